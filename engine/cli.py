"""The command line: `efficientclip COMMAND …`. A user's mistake ends in one message and exit code 2."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from . import __version__
from .errors import UserError, reported


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    parser = _parser()
    given, rest = parser.parse_known_args(argv)
    if rest and ("overrides" not in given or any(item.startswith("-") for item in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        # argparse stops filling a `*` positional at the first option.
        given.overrides += rest
    command: Callable[[argparse.Namespace], None] = given.command
    return reported(lambda: command(given))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="efficientclip",
        description="Trains a Chinese CLIP text tower against frozen image features.",
        epilog="On several devices: deepspeed --module efficientclip.train CONFIG [key=value …]",
    )
    parser.add_argument("--version", action="version", version=f"efficientclip {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(run: Callable[[argparse.Namespace], None], name: str, help: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=help, description=f"{help[0].upper()}{help[1:]}.")
        added.set_defaults(command=run)
        return added

    demo_data = command(_demo_data, "demo-data", "download and build the demo's pictures, captions and texts")
    demo_data.add_argument("directory", type=Path, metavar="DIR")
    demo_data.add_argument("--config", type=Path, required=True, help="its demo_data section says how")

    prepare = command(_prepare, "prepare", "make a store of pictures (.tar), parallel text (.tsv) or plain text (.txt)")
    prepare.add_argument("source", type=Path, metavar="SOURCE", help="a file, or a folder of .tar files")
    prepare.add_argument("store", type=Path, metavar="STORE", help="folder to write")
    prepare.add_argument("--config", type=Path, required=True, help="names the frozen tower and the tokenizer")
    prepare.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the config")

    train = command(_train, "train", "train a run on one device, or go on from its newest checkpoint")
    train.add_argument("config", type=Path, metavar="CONFIG")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the config")

    evaluate = command(_evaluate, "evaluate", "measure recall and mean rank of a run on labelled pairs")
    _add_run(evaluate)
    evaluate.add_argument("data", type=Path, metavar="DATA", help="a store, a .tar, or a folder of .tar files")
    evaluate.add_argument("--json", type=Path, metavar="FILE", help="write the result there, too")

    search = command(_search, "search", "find pictures for a text and write them as one picture")
    _add_run(search)
    search.add_argument("query", metavar="QUERY", help="for instance 一只戴帽子的猫")
    search.add_argument("--data", type=Path, help="store or .tar to search (default: what the run trained on)")
    search.add_argument("--top", type=int, default=10, help="number of pictures (default: 10)")
    search.add_argument("--output", type=Path, metavar="FILE.png", help="picture to write (default: RUN/search.png)")

    report = command(_report, "report", "write the run's report: one page that opens from disk")
    _add_run(report)
    report.add_argument(
        "--data",
        nargs="+",
        action="extend",
        metavar="NAME=PATH",
        help="stores or .tar files; the gallery shows the first (default: data.validation of the run)",
    )
    return parser


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a trained run")


def _demo_data(given: argparse.Namespace) -> None:
    from .config import load_config
    from .demo import build_demo_data

    recipe = load_config(given.config).demo_data
    build_demo_data(
        given.directory,
        noise_share=recipe.noise_share,
        noise_seed=recipe.noise_seed,
        image_size=recipe.image_size,
    )


def _prepare(given: argparse.Namespace) -> None:
    from .config import load_config

    config = load_config(given.config, given.overrides)
    _silence_model_files()
    from .prepare import prepare

    manifest = prepare(given.source, given.store, config)
    kinds = [kind for kind in ("pairs", "images", "captions", "texts") if kind in manifest]
    bad = [f"{count:,} × {cause}" for cause, count in manifest.get("bad_counts", {}).items()]
    print(
        f"{given.store}: {', '.join(f'{manifest[kind]:,} {kind}' for kind in kinds)}"
        + (f"; left out: {', '.join(bad)}" if bad else "")
    )


def _train(given: argparse.Namespace) -> None:
    from .config import load_config

    # A mistake in the config is told before torch is loaded.
    load_config(given.config, given.overrides)
    from .train import main

    main([str(given.config), *given.overrides])


def _evaluate(given: argparse.Namespace) -> None:
    _silence_model_files()
    from rich.console import Console

    from .evaluation.evaluate import evaluate, recall_table, write_json

    if given.json is not None and not given.json.parent.is_dir():
        raise UserError(f"--json {given.json}: the folder {given.json.parent} does not exist")
    report = evaluate(given.run, given.data)
    Console().print(recall_table(report, f"{given.run} on {given.data}"))
    if given.json is not None:
        write_json(report, given.json)


def _search(given: argparse.Namespace) -> None:
    if given.top < 1:
        raise UserError(f"--top {given.top}: at least one picture must be asked for")
    _silence_model_files()
    from rich.console import Console

    from .evaluation.search import draw_matches, match_table, search

    file = given.output or given.run / "search.png"
    matches = search(given.run, given.query, given.data, given.top)
    Console().print(match_table(matches, given.query))
    draw_matches(matches, given.query, file)
    print(file)


def _report(given: argparse.Namespace) -> None:
    from .config import load_config

    tables = {}
    for item in given.data or ():
        name, _, path = item.partition("=")
        if not name or not path:
            raise UserError(f"--data {item!r}: write it as NAME=PATH, for instance seen=stores/demo-val_seen")
        tables[name] = Path(path)
    _silence_model_files()
    from .evaluation.report import write_report

    if not tables and (given.run / "config.yaml").is_file():
        tables = load_config(given.run / "config.yaml").data.validation
    print(write_report(given.run, tables))


def _silence_model_files() -> None:
    """Bars over the loading and writing of small weight files say nothing."""
    from transformers.utils import logging

    logging.disable_progress_bar()
