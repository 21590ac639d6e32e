"""The stages of a fit, in their order, and what is decided between them: towers, budget, parts."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.table import Table
from yaml import safe_dump

from ..columns import as_words
from ..config import Config, ImageTower, load_config
from ..data.store import Store, TextStore, read_manifest
from ..data.tables import SUFFIXES, Columns
from ..errors import UserError
from ..files.atomic import write_atomically
from ..files.digests import digest_of
from ..files.lock import held
from ..files.ownership import claim, mark
from ..files.places import Location, resolved
from ..model.frozen import image_tower_name, tower_difference
from ..noise.cross_fit import read_near, read_rates
from .budget import PAGES, held_out, sized, told, visits_of, visits_within
from .cleaned import write_cleaned
from .demo import tower_stages
from .head import Head
from .look import Found, look
from .split import TRAIN, split
from .stages import Stage, Stages, devices, on_cpu, span
from .towers import HEAD, Towers, Tree, choose, of_config
from .trial import Rates, measure

MEMORY = "fit.json"
VALIDATION, TEST = "validation", "test"
REPORT, AUDIT = ("report.html", "results.json"), ("audit.html", "audit.parquet", "suspects.csv")
# The paper's unpaired texts to a pair.
TEXTS = 40 / 256


@dataclass(frozen=True)
class Wish:
    """What the command line asks for; None: the usual."""

    source: Location
    out: Path
    images: Location | None
    columns: Columns
    image_tower: str | None
    text_tower: str | None
    texts: Path | None
    config: Path | None
    epochs: float | None
    seconds: float | None
    verdicts: Path | None
    held_out: float | None
    ranks: int | None
    overrides: Sequence[str]


def fit(wish: Wish) -> None:
    """Make of `wish.source` what `efficientclip.fit` lists, or go on with it. UserError with the stage that failed."""
    console = Console(stderr=True)
    out = claim(wish.out, "fit", sources=[one for one in (wish.source, wish.images) if isinstance(one, Path)])
    found = look(wish.source, wish.images, wish.columns)
    console.print(found.table(f"{wish.out}: what {wish.source} holds"), highlight=False)
    with held(out, "fitting"):
        mark(out, "fit")
        _fit(wish, out, found, console)


def _fit(wish: Wish, out: Path, found: Found, console: Console) -> None:
    towers = _towers(wish, console)
    tree, ranks, started = towers.tree, wish.ranks or devices(), time.monotonic()
    tree["run"] = str(out / "work" / "run")
    if wish.verdicts is not None:
        tree["data"]["verdicts"] = str(wish.verdicts)
    everywhere = Stages(out / "stages.json", out / "logs", console)
    if towers.start is not None:
        beside = Stages(towers.start / "stages.json", towers.start / "logs", console)
        beside.run(tower_stages(towers.start, ranks, HEAD))
    if wish.texts is not None:
        tree["mlm"] = {"texts": str(out / "texts"), "texts_per_batch": round(TEXTS * tree["training"]["batch_size"])}
    draft = _written(out / "draft.yaml", tree, wish.overrides)
    config = load_config(draft)
    tower, head = config.model.image_tower, None
    if towers.headless and tower is not None:
        overridden = any(word.startswith("model.width=") for word in wish.overrides)
        asked = towers.asked or config.model.start_from is not None or overridden
        head = Head.of(out / "head", config, tower, asked=asked)
        tower = head.on_tower
    _require_same(out / "store", wish, tower)
    by = ["--config", str(draft)]
    if wish.texts is not None:
        everywhere.run_anyway(Stage("texts", ["prepare", str(wish.texts), str(out / "texts"), "--replace", *by]))
    rates = _rates(wish, out, draft, found, ranks)
    seconds: dict[str, float] = {}
    if found.pairs is not None and found.pictures is not None:
        seconds = _told_before(wish, towers, rates, found.pairs, found.pictures, ranks, console)
    options = as_words(wish.images, wish.columns)
    if head is not None:
        width = head.stands or head.width(found.pictures)
        if head.stands is None:
            made_by = _written(out / "head.yaml", head.tree(wish.source, width), ())
            everywhere.run_anyway(Stage("head", ["fit-head", str(made_by), *options], seconds.get("head")))
        elif (wider := head.width(found.pictures)) > width:
            console.print(
                f"head: of {width} dimensions, made of the pictures that there were first, where there are enough for"
                f" {wider} now; it stays, since another one changes all features: another --out makes it of all",
                highlight=False,
            )
        tree["model"]["width"] = width
        tree["model"]["image_tower"]["pretrained"] = str(head.folder)
        _written(draft, tree, wish.overrides)
    words = ["prepare", str(wish.source), str(out / "store"), "--replace", *options, *by]
    everywhere.run_anyway(Stage("prepare", words, seconds.get("prepare"), 0 if on_cpu() else ranks))
    store = Store(out / "store")
    if not seconds:
        _told_before(wish, towers, rates, len(store), store.manifest["images"], ranks, console)
    made = tree if _as_given(wish) else sized(tree, len(store), _visits(wish, out, towers, store, rates, ranks))
    work = out / "work" / _digest(store, made, wish)
    parts = _parts(store, work, wish, made, console)
    run = work / "run" / out.name
    made |= {"run": str(run)}
    made["data"] = {**made["data"], "store": str(parts[TRAIN])}
    watched = next((name for name in (VALIDATION, TEST) if name in parts), None)
    made["data"]["validation"] = {} if watched is None else {"held out": str(parts[watched])}
    if made["confidence"].get("selection") == "calibrated":
        made["confidence"]["cross_fit"] = str(work / "cross-fit")
    config = load_config(_written(out / "config.yaml", made, wish.overrides))
    here = Stages(work / "stages.json", out / "logs", console)
    trained, shown = _stages(out, config, parts, store, rates, ranks)
    here.run(trained, of=len(trained) + len(shown))
    if (out / "run").resolve() != run:
        # What stands there is of other settings.
        here.forget(shown)
        _link(out / "run", run)
    here.run(shown, after=len(trained), of=len(trained) + len(shown))
    cleaned = _cleaned(wish, out, parts, here)
    told_seconds = everywhere.told + here.told
    if told_seconds:
        took = span(everywhere.took + here.took)
        console.print(f"the stages took {took}, told were {span(told_seconds)}", highlight=False)
    _tell_after(wish, out, config, cleaned, time.monotonic() - started, console)


def _link(link: Path, run: Path) -> None:
    """`link` names the run of these settings, as long as nothing else stands there."""
    if link.is_symlink() or not link.exists():
        aside = link.with_name(f".{link.name}.partial")
        aside.unlink(missing_ok=True)
        aside.symlink_to(os.path.relpath(run, link.parent))
        os.replace(aside, link)


def _as_given(wish: Wish) -> bool:
    """Whether a config of the user's says how long to train, too."""
    return wish.config is not None and wish.epochs is None and wish.seconds is None


def _towers(wish: Wish, console: Console) -> Towers:
    if wish.config is not None:
        return of_config(wish.config, wish.overrides)
    towers = choose(wish.image_tower, wish.text_tower)
    console.print(f"towers: {towers.image} for pictures, frozen; {towers.text} for texts", highlight=False)
    if towers.start is not None:
        told = "no hub is in reach: these towers are small; name others by --image-tower and --text-tower"
        console.print(told, style="bold", highlight=False)
    return towers


def _written(file: Path, tree: Tree, overrides: Sequence[str]) -> Path:
    """The config that `tree` and `overrides` describe, as YAML."""
    try:
        merged = OmegaConf.merge(OmegaConf.create(tree), OmegaConf.from_dotlist(list(overrides)))
    except OmegaConfBaseException as error:
        raise UserError(f"override {overrides}: {error}") from error
    text = safe_dump(OmegaConf.to_container(merged, resolve=True), sort_keys=False, allow_unicode=True)
    write_atomically(file, text.encode())
    return file


def _visits(wish: Wish, out: Path, towers: Towers, store: Store, rates: Rates, ranks: int) -> int:
    """The budget; that of an earlier call which asked for the same stays, however fast the machine is today."""
    if wish.seconds is None:
        return visits_of(len(store), wish.epochs)
    asked = [wish.seconds, len(store)]
    kept = _remembered(out, "budget", asked)
    if kept is None:
        images = store.manifest["images"]
        kept = visits_within(wish.seconds, towers.tree, rates, len(store), images, ranks, head=towers.headless)
        _remember(out, "budget", asked, kept)
    return int(kept)


def _rates(wish: Wish, out: Path, draft: Path, found: Found, ranks: int) -> Rates:
    """Measured once for each config and source; a repeated call does not wait for it."""
    # Other rates would be of another version.
    names = [field.name for field in fields(Rates)]
    asked = [draft.read_text(encoding="utf-8"), str(wish.source), str(wish.images), ranks, names]
    kept = _remembered(out, "rates", asked)
    if kept is None:
        kept = asdict(measure(draft, wish.source, wish.images, wish.columns, found.pairs, found.pictures, ranks))
        _remember(out, "rates", asked, kept)
    return Rates(**kept)


def _remembered(out: Path, what: str, asked: list[Any]) -> Any:
    """What an earlier call found when the same was asked; None: nothing."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        kept = json.loads((out / MEMORY).read_text(encoding="utf-8"))[what]
        return kept["found"] if kept["asked"] == asked else None
    return None


def _remember(out: Path, what: str, asked: list[Any], found: Any) -> None:
    kept: dict[str, Any] = {}
    with suppress(OSError, ValueError):
        kept = json.loads((out / MEMORY).read_text(encoding="utf-8"))
    kept[what] = {"asked": asked, "found": found}
    write_atomically(out / MEMORY, json.dumps(kept, indent=1, ensure_ascii=False).encode())


def _digest(store: Store, tree: Tree, wish: Wish) -> str:
    """Of what is trained on, and how: another source or setting has another folder."""
    texts = tree["mlm"].get("texts")
    told = {key: value for key, value in tree.items() if key != "run"}
    told["mlm"] = tree["mlm"] | ({"texts": TextStore(Path(texts)).identity} if texts else {})
    judged = None if wish.verdicts is None else digest_of(wish.verdicts)
    whole = json.dumps([store.identity, told, wish.held_out, list(wish.overrides), judged], sort_keys=True, default=str)
    return hashlib.sha256(whole.encode()).hexdigest()[:12]


def _parts(store: Store, work: Path, wish: Wish, tree: Tree, console: Console) -> dict[str, Path]:
    # Weights that are chosen by one part are measured by another.
    names = [TEST, VALIDATION] if tree["training"].get("final", "best") == "best" else [TEST]
    count = held_out(len(store), wish.held_out, len(names))
    if count == 0:
        console.print("all pairs are trained on: nothing is held out to measure the model by", highlight=False)
        return {TRAIN: store.path}
    parts = split(store, work, dict.fromkeys(names, count), tree.get("seed", 0))
    does = {TRAIN: "train", VALIDATION: "choose the weights", TEST: "measure them"}
    told = ", ".join(f"{len(Store(parts[name])):,} {does[name]}" for name in (TRAIN, *reversed(names)))
    console.print(f"of the pairs {told}", highlight=False)
    return parts


def _stages(
    out: Path, config: Config, parts: dict[str, Path], store: Store, rates: Rates, ranks: int
) -> tuple[list[Stage], list[Stage]]:
    """What trains, once the store stands, and what is shown of that in `out`."""
    of = str(out / "config.yaml")
    seconds = told(config.model_dump(), rates, len(store), store.manifest["images"], ranks)
    run, measured = str(config.run), parts.get(TEST, parts[TRAIN])
    name = "held out" if TEST in parts else "trained on"
    trained = [Stage("train", ["train", of], seconds["train"], ranks, [config.run / "model"])]
    if config.confidence.selection == "calibrated" and config.confidence.cross_fit is not None:
        verdicts = config.confidence.cross_fit / "cross_fit.parquet"
        trained.insert(0, Stage("cross-fit", ["cross-fit", of], seconds["cross-fit"], ranks, [verdicts]))
    pages = {
        "report": (["report", run, "--data", f"{name}={measured}", "--output", str(out / "report.html")], REPORT),
        "audit": (["audit", run, str(out)], AUDIT),
        "export": (["export", run, str(out / "model"), "--replace"], ["model"]),
    }
    shown = [
        Stage(stage, words, seconds[PAGES], made=[out / made for made in left], waits=["train"])
        for stage, (words, left) in pages.items()
    ]
    return trained, shown


def _cleaned(wish: Wish, out: Path, parts: dict[str, Path], here: Stages) -> Path:
    """The user's rows with verdicts, written when the audit was."""
    made = [out / f"cleaned{suffix}" for suffix in SUFFIXES if (out / f"cleaned{suffix}").is_file()]
    if "cleaned" not in here.done or not made:
        held = [path for name, path in parts.items() if name != TRAIN]
        made = [write_cleaned(wish.source, wish.columns, out / "audit.parquet", held, out)]
        here.note("cleaned", 0.0)
    return made[0]


def _require_same(store: Path, wish: Wish, tower: ImageTower | None) -> None:
    """UserError where the store that stands, hours of work perhaps, is of another source or tower."""
    if not (store / "manifest.json").is_file() or tower is None:
        return
    manifest, another = read_manifest(store), "name another --out, or remove that folder"
    if manifest.get("source") != resolved(wish.source):
        raise UserError(f"--out {wish.out}: holds what was made of {manifest.get('source')}; {another}")
    if (difference := tower_difference(manifest["tower"], image_tower_name(tower))) is not None:
        raise UserError(f"--out {wish.out}: its pictures went through {manifest['tower']}, now {difference}; {another}")


def _told_before(
    wish: Wish, towers: Towers, rates: Rates, pairs: int, pictures: int, ranks: int, console: Console
) -> dict[str, float]:
    """Seconds of each stage, told."""
    tree, head = towers.tree, towers.headless
    if _as_given(wish):
        made = tree
    elif wish.seconds is not None:
        made = sized(tree, pairs, visits_within(wish.seconds, tree, rates, pairs, pictures, ranks, head=head))
    else:
        made = sized(tree, pairs, visits_of(pairs, wish.epochs))
    seconds = told(made, rates, pairs, pictures, ranks, head=head)
    table = Table("stage", "about")
    for name, length in seconds.items():
        table.add_row(name, span(length))
    table.add_row("in all", span(sum(seconds.values())), style="bold")
    console.print(f"what it will take here, on {ranks} rank(s):", table, highlight=False)
    return seconds


def _tell_after(wish: Wish, out: Path, config: Config, cleaned: Path, spent: float, console: Console) -> None:
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    table = Table(show_header=False, title=f"{wish.out}: {span(spent)}", title_justify="left", box=None)
    for name, report in results.items():
        if isinstance(report, dict) and "t2i" in report:
            of = report["t2i"]
            table.add_row(f"text finds picture, {name}", f"R@1 {of['R@1']:.1f}, R@10 {of['R@10']:.1f}")
    if config.confidence.cross_fit is not None:
        for rate in read_rates(config.confidence.cross_fit):
            shown = f"{rate.rate:.1%} of {rate.pairs:,} ({rate.low:.1%} to {rate.high:.1%})"
            table.add_row(f"wrong pairs, {rate.name}", shown if rate.droppable else f"{shown}: nothing was dropped")
        if near := read_near(config.confidence.cross_fit):
            table.add_row("beside them", near)
    for what, name in (
        ("model", "model"), ("report", "report.html"), ("pairs to look at", "audit.html"), ("the same, as a list",
        "suspects.csv"), ("your rows, judged", cleaned.name), ("what was trained", "config.yaml"),
    ):  # fmt: skip
        table.add_row(what, str(wish.out / name))
    console.print(table, highlight=False)
    console.print(f'efficientclip search {wish.out}/run "…" finds pictures for a text', highlight=False)
