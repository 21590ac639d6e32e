"""A tenth of the resources? What CLIP's recipe, WenLan's and EfficientCLIP's pay until text finds pictures as well as
by the model that CLIP's ends with: seconds, operations, pair visits and peak memory.

    python -m benchmarks.resources [--count given|all] [--clip-visits 250000] [--most-visits 1000000] [--budgets 1,2,4]

On the demo's data, one process on one thread at a time. There are two ways to count:

- given: as the paper counts. All image towers are EfficientNet-Lite0s. efficientclip's is frozen, and its training on
  ImageNet and the teacher's own training are given; the teacher's embeddings, the distillation, fitting the head and
  the features, made once, count.
- all: the image tower, a small ResNet in all recipes, learns from the teacher first, which counts. The teacher's own
  training does not.

The recipes:

- clip: both towers from scratch. It runs for twice as long until text-to-image R@10 on the validation pictures gains
  less than 0.5 in the last fifth; only the longest run counts, what was tried before does not.
- wenlan: momentum copies and two queues, for as many visits. It begins from towers that can tell pictures apart, as
  WenLan does; here a short run of CLIP's recipe makes them, which counts.
- efficientclip: complete pipelines of several budgets. Where the image tower learns here, there is no distillation: at
  budgets as small as these its visits are worth more in the joint training.

A recipe has reached CLIP's recall when its own R@10 is at least what clip ends with, on the validation pictures, and in
rows of their own on the test pictures, of a style that no training saw. The baselines are taken at the first validation
that is, efficientclip at the end of a pipeline. Seconds are those of CPU time, imports and validations included, but
for those on the test pictures; operations are counted by the cost model of `efficientclip plan`, without the teacher's.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import reduce
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.ticker import NullFormatter
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from benchmarks.ecl import FIXED, SCHEDULE
from benchmarks.measuring import RESULTS, Row, hardware, kept, once, record
from efficientclip.config import Config, load_config
from efficientclip.data.store import Store
from efficientclip.data.tokenizer import load_tokenizer
from efficientclip.evaluation.evaluate import evaluate
from efficientclip.evaluation.run import read_metrics
from efficientclip.planning.settings import DEVICES, GIB, Machine, Settings, stored
from efficientclip.planning.work import measure_work, operations, picture_training_work

DATA = Path("data/demo")
HELD_OUT, TEST = "val_seen", "test_vendor"
# Of the towers from scratch where ImageNet's is given. They have the pictures' own 64 pixels, ImageNet's tower has 128;
# bf16 would be half as fast, by the gradients of depthwise filters on CPUs.
SAME = {"model.image_tower.architecture": {"model_type": "efficientnet_lite"}, "training.precision": "fp32"}
# Pictures that the head is fitted on; it takes more than its 512 dimensions.
FITTED = 1024
# Visits, batch size, learning rate of efficientclip's trainings at budget 1: short runs need steps, not large batches.
STARTS = {
    "demo-distill": (16_000, 128, 2e-3), "demo": (4_000, 128, 2e-3),
    "demo-image": (24_000, 128, 2.8e-3), "demo-own": (40_000, 256, 2e-3),
}  # fmt: skip
# Of CLIP's recipe, before WenLan's; with EfficientNet-Lite0 129,024 visits hardly leave chance.
WENLAN_START = {"given": 240_000, "all": 48_000}
# What the recipe's R@10 may still gain in the last fifth of its run.
SETTLED = 0.5
RARELY = "training.validate_every=1000000"
KEY = ("hardware", "torch", "count", "until", "recipe", "budget")
COLUMNS = (
    *KEY, "pair_visits", "cpu_seconds", "operations", "peak_gib", "val_R@10", "test_R@10", "last_fifth", "reached",
    "cpu_over_clip", "operations_over_clip", "cpu_over_wenlan", "operations_over_wenlan", "date", "command",
)  # fmt: skip

Recalls = Mapping[str, float]
"""Text-to-image R@10 by set of pictures."""


@dataclass(frozen=True)
class Spent:
    """Resources; `cpu_seconds` of all threads, user and system."""

    cpu_seconds: float = 0
    operations: float = 0
    visits: int = 0
    peak_bytes: float = 0

    def __add__(self, other: Spent) -> Spent:
        return Spent(
            self.cpu_seconds + other.cpu_seconds,
            self.operations + other.operations,
            self.visits + other.visits,
            max(self.peak_bytes, other.peak_bytes),
        )

    def part(self, share: float) -> Spent:
        """What was spent when `share` of the visits were."""
        return Spent(share * self.cpu_seconds, share * self.operations, round(share * self.visits), self.peak_bytes)


@dataclass(frozen=True)
class Recipe:
    """What a recipe spent until each of some points, with the recalls there."""

    name: str
    budget: str
    points: Sequence[tuple[Spent, Recalls]]

    def until(self, measured: str, goal: float) -> Spent | None:
        """What it spent until its recall on this set was `goal` first; None: it never was."""
        return next((spent for spent, recalls in self.points if recalls[measured] >= goal), None)


def stage(target: Path, *arguments: str, counted: Callable[[], tuple[float, int]] = lambda: (0, 0)) -> Spent:
    """Run the command that makes `target`, unless it is made; `counted`: operations and visits of it."""
    cpu_seconds, peak_bytes = once(target, *arguments)
    made, visits = counted()
    return Spent(cpu_seconds, made, visits, peak_bytes)


def training(config: Path, run: Path, *overrides: str) -> Spent:
    """A run of `config` in one process on one thread."""
    arguments = [f"run={run}", *FIXED, *overrides]
    return stage(run, "train", str(config), *arguments, counted=lambda: counted(load_config(config, arguments)))


def counted(config: Config) -> tuple[float, int]:
    """Operations and visits of a run that has ended."""
    last = read_metrics(config.run / "metrics.jsonl")[0][-1]
    visits, tokens = last["visits"], last["visits"] * last["tokens_per_s"] / last["pairs_per_s"]
    if config.training.tower == "image":
        return sum(operations(config, picture_training_work(config), given(0, 0), visits, 0, 0, 0).values()), visits
    texts = 0.0
    if config.mlm.texts_per_batch and config.mlm.texts is not None:
        texts = visits / config.training.batch_size * config.mlm.texts_per_batch * stored(config)["text_tokens"]
    work = measure_work(config, (tokens - texts) / visits)
    rows = len(Store(config.data.store).features) if config.data.store else 0
    settings = given(rows, (tokens - texts) / visits)
    made = operations(config, work, settings, visits, tokens - texts, texts, texts * config.mlm.mask_share)
    return sum(made.values()), visits


def given(images: int, caption_tokens: float) -> Settings:
    """Settings for the cost model; its machine does not matter to a count of operations."""
    return Settings(images, images, caption_tokens, 0, Machine(DEVICES["h100"], 1))


def curve(run: Path) -> list[tuple[int, Recalls]]:
    """Visits and recalls of each validation of a run."""
    _, validations = read_metrics(run / "metrics.jsonl")
    return [
        (line["visits"], {name: report["t2i"]["R@10"] for name, report in line["validation"].items()})
        for line in validations
    ]


def tested(run: Path, data: Path) -> dict[str, float]:
    """Recall on the test pictures and the CPU seconds it took to measure, no part of what the recipe pays; kept."""

    def measure() -> dict[str, float]:
        before = time.process_time()
        found: float = evaluate(run, data)["t2i"]["R@10"]
        return {"R@10": found, "cpu_seconds": time.process_time() - before}

    return kept(run / "test.json", measure)


def gained(points: Sequence[tuple[int, float]]) -> float:
    """What a run gained in its last fifth, by visits: the mean of its last two validations beside that of the two
    before its last fifth, since one alone turns on a query or two; infinite where there are too few."""
    before = [recall for visits, recall in points if visits <= 0.8 * points[-1][0]][-2:]
    after = [recall for _, recall in points][-2:]
    return float(np.mean(after)) - float(np.mean(before)) if len(before) == 2 else np.inf


def recipe_of(name: str, count: str, folder: Path) -> Path:
    """`configs/demo-NAME.yaml`, with SAME in it where ImageNet's tower is given."""
    shipped = Path(f"configs/demo-{name}.yaml")
    if count != "given":
        return shipped
    config = OmegaConf.load(shipped)
    for key, value in SAME.items():
        OmegaConf.update(config, key, value, merge=False)
    file, text = folder / shipped.name, OmegaConf.to_yaml(config)
    # Its age tells whether a run of it is made already.
    if not file.is_file() or file.read_text() != text:
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return file


def baseline(
    name: str, config: Path, visits: int, most: int, folder: Path, before: Spent | None = None, *overrides: str
) -> Recipe:
    """`config` at `visits`, or at twice as many until it has settled, `most` at last.

    `before`: what was spent on the towers that it begins from.
    """
    validated = [f"data.validation.{TEST}={DATA / TEST}.tar", "training.validate_every=2"]
    while True:
        run = folder / f"{name}-{visits}"
        spent = training(config, run, f"training.pair_visits={visits}", *validated, *overrides)
        points = curve(run)
        gain = gained([(seen, recalls[HELD_OUT]) for seen, recalls in points])
        if gain < SETTLED or 2 * visits > most:
            if gain >= SETTLED:
                print(f"{name}: still gains {gain:.1f} after {visits} visits; it would pay more for what it ends with")
            tests = len(points) * tested(run, DATA / f"{TEST}.tar")["cpu_seconds"]
            own, end = replace(spent, cpu_seconds=spent.cpu_seconds - tests), points[-1][0]
            start = before or Spent()
            return Recipe(name, "", [(start + own.part(seen / end), recalls) for seen, recalls in points])
        visits *= 2


def baselines(count: str, first: int, most: int, wenlan: int | None, folder: Path) -> list[Recipe]:
    """clip from `first` visits to `most`; then wenlan, behind WENLAN_START of clip's recipe, for as many, or for
    `wenlan` (0: left out)."""
    recipe = recipe_of("clip", count, folder)
    clip = baseline("clip", recipe, first, most, folder)
    visits = clip.points[-1][0].visits if wenlan is None else wenlan
    if not visits:
        return [clip]
    start = folder / "wenlan-start"
    before = training(recipe, start, f"training.pair_visits={WENLAN_START[count]}", RARELY)
    begun = f"model.start_from={start}"
    return [clip, baseline("wenlan", recipe_of("wenlan", count, folder), visits, visits, folder, before, begun)]


def trained(budget: float, config: Path, run: Path, *overrides: str) -> Spent:
    """A training of efficientclip's at `budget` times its visits in STARTS."""
    visits, batch_size, rate = STARTS[config.stem]
    chosen = [f"training.pair_visits={round(budget * visits)}", f"training.batch_size={batch_size}"]
    return training(config, run, *chosen, f"optimizer.lr={rate}", RARELY, *overrides)


def joint(
    budget: float, config: Path, tower: Path, before: Spent, features: Path, run: Path, start: str = "null"
) -> Recipe:
    """Stores of texts and of the frozen tower's features, and a joint training that begins from the text tower `start`.

    `before`: what was spent on the towers.
    """
    frozen = f"model.image_tower.pretrained={tower}"

    def prepare(source: str, store: str, *overrides: str) -> list[str]:
        return ["prepare", str(DATA / source), str(features / store), "--config", str(config), *overrides]

    def pictures(source: str, store: str) -> Spent:
        def encoded() -> tuple[float, int]:
            return len(Store(features / store).features) * picture_work(config, tower), 0

        return stage(features / store, *prepare(source, store, frozen), counted=encoded)

    together = [
        f"data.store={features / 'store'}", f"data.validation.{HELD_OUT}={features / HELD_OUT}", frozen,
        f"mlm.texts={features / 'texts'}", f"model.start_from={start}", "mlm.texts_per_batch=8", *SCHEDULE,
    ]  # fmt: skip
    stages = [
        before,
        stage(features / "texts", *prepare("texts.txt", "texts")),
        pictures("train", "store"),
        pictures(f"{HELD_OUT}.tar", HELD_OUT),
        trained(budget, config, run, *together),
    ]
    pictures(f"{TEST}.tar", TEST)
    recalls = {**curve(run)[-1][1], TEST: tested(run, features / TEST)["R@10"]}
    return Recipe("efficientclip", f"{budget:g}", [(reduce(Spent.__add__, stages), recalls)])


def picture_work(config: Path, tower: Path) -> float:
    """Operations of a picture through the frozen tower."""
    return measure_work(load_config(config, [f"model.image_tower.pretrained={tower}"]), 8).picture


def with_given_tower(budget: float, folder: Path) -> Recipe:
    """ImageNet's tower gets a head; the stores are the same at every budget, the text tower's start is not."""
    config, teaching, head = Path("configs/demo.yaml"), Path("configs/demo-distill.yaml"), folder / "head"
    parallel, start = folder / "parallel", folder / f"distill-{budget:g}"
    arguments = [f"run={head}", f"training.pair_visits={FITTED}", "training.threads=1"]

    def fitted() -> tuple[float, int]:
        return FITTED * picture_work(config, head), 0

    before = [
        stage(head, "fit-head", "configs/demo-head.yaml", *arguments, counted=fitted),
        stage(parallel, "prepare", str(DATA / "parallel.tsv"), str(parallel), "--config", str(teaching)),
        trained(budget, teaching, start, f"data.store={parallel}"),
    ]
    run = folder / f"efficientclip-{budget:g}"
    return joint(budget, config, head, reduce(Spent.__add__, before), folder, run, str(start))


def with_own_tower(budget: float, folder: Path) -> Recipe:
    """The image tower is trained, too, at `budget` times its visits."""
    here = folder / f"efficientclip-{budget:g}"
    here.mkdir(parents=True, exist_ok=True)
    image = trained(budget, Path("configs/demo-image.yaml"), here / "image")
    return joint(budget, Path("configs/demo-own.yaml"), here / "image", image, here, here / "run")


def rows_of(recipes: Sequence[Recipe], count: str, until: str) -> list[Row]:
    """A row a recipe: what it spent until it reached the recall on the set `until` that clip ends with, or in all.

    Shares are of what clip's and wenlan's spent until then, or in all.
    """
    goal = recipes[0].points[-1][1][until]
    paid = {recipe.name: recipe.until(until, goal) or recipe.points[-1][0] for recipe in recipes if not recipe.budget}
    rows = []
    for recipe in recipes:
        reached, (whole, recalls) = recipe.until(until, goal), recipe.points[-1]
        spent = reached or whole
        gain = gained([(at.visits, found[until]) for at, found in recipe.points])
        row = {
            "hardware": hardware("cpu"), "torch": torch.__version__, "count": count, "until": until,
            "recipe": recipe.name, "budget": recipe.budget,
            "pair_visits": spent.visits, "cpu_seconds": f"{spent.cpu_seconds:.0f}",
            "operations": f"{spent.operations:.3g}", "peak_gib": f"{spent.peak_bytes / GIB:.2f}",
            "val_R@10": recalls[HELD_OUT], "test_R@10": recalls[TEST],
            "last_fifth": f"{gain:+.1f}" if np.isfinite(gain) else "", "reached": "yes" if reached else "no",
            "date": date.today(), "command": "python -m benchmarks.resources " + " ".join(sys.argv[1:]),
        }  # fmt: skip
        for name, other in paid.items():
            row[f"cpu_over_{name}"] = f"{spent.cpu_seconds / other.cpu_seconds:.3f}"
            row[f"operations_over_{name}"] = f"{spent.operations / other.operations:.3f}"
        rows.append(row)
    return rows


def draw(recipes: Sequence[Recipe], file: Path) -> None:
    """Recall against CPU-seconds and operations, a row of panels a set; efficientclip's points are a pipeline each."""
    units: tuple[tuple[str, Callable[[Spent], float]], ...] = (
        ("CPU seconds", lambda spent: spent.cpu_seconds),
        ("operations", lambda spent: spent.operations),
    )
    figure, panels = plt.subplots(2, 2, figsize=(10, 7), sharex="col", sharey="row", layout="constrained")
    for row, (measured, shown) in zip(panels, ((HELD_OUT, "validation"), (TEST, "held-out style")), strict=True):
        for panel, (unit, value) in zip(row, units, strict=True):
            for name in dict.fromkeys(recipe.name for recipe in recipes):
                points = [point for recipe in recipes if recipe.name == name for point in recipe.points]
                points.sort(key=lambda point: value(point[0]))
                style = "o-" if name == "efficientclip" else "-"
                at, recall = [value(spent) for spent, _ in points], [recalls[measured] for _, recalls in points]
                panel.plot(at, recall, style, label=name)
            panel.set(xscale="log", xlabel=f"{unit}, all that counts")
            panel.xaxis.set_minor_formatter(NullFormatter())
            panel.grid(alpha=0.3)
        row[0].set_ylabel(f"{shown}, text to image R@10")
    panels[0, 0].legend()
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)


def sizes(count: str, folder: Path) -> str:
    """Parameters of the towers, which all recipes share."""
    clip = recipe_of("clip", count, folder)
    words = len(load_tokenizer(load_config(clip).data.tokenizer))
    both, text = (
        measure_work(
            load_config(clip, [f"training.tower={tower}", f"model.text_tower.architecture.vocab_size={words}"]), 8
        ).parameters
        for tower in ("both", "text")
    )
    return f"towers of every recipe: text {text / 1e6:.1f}M parameters, image {(both - text) / 1e6:.1f}M"


PIPELINES = {"given": with_given_tower, "all": with_own_tower}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", choices=PIPELINES, default="given", help="what counts (default: given)")
    parser.add_argument("--clip-visits", type=int, default=250_000, help="of the first run (default: 250000)")
    parser.add_argument("--most-visits", type=int, default=1_000_000, help="of the last (default: 1000000)")
    parser.add_argument("--wenlan-visits", type=int, help="0: left out (default: as many as clip's)")
    parser.add_argument("--budgets", default="1,2,4", help="of efficientclip's pipelines, times STARTS")
    parser.add_argument("--folder", type=Path, default=Path("runs/resources"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if not DATA.is_dir():
        parser.error(f"{DATA} is missing: make it with `make demo`")
    count, folder = arguments.count, arguments.folder / arguments.count
    # As the runs have it, whose validations on the test pictures are timed here.
    torch.set_num_threads(1)
    recipes = [
        *baselines(count, arguments.clip_visits, arguments.most_visits, arguments.wenlan_visits, folder),
        *(PIPELINES[count](float(budget), folder) for budget in arguments.budgets.split(",")),
    ]
    shown = [name for name in COLUMNS if name not in ("hardware", "torch", "count", "until", "command", "date")]
    for until in (HELD_OUT, TEST):
        rows = rows_of(recipes, count, until)
        goal = recipes[0].points[-1][1][until]
        table = Table(*shown, title=f"counted: {count}; until R@10 on {until} is {goal}, which clip ends with")
        for row in rows:
            table.add_row(*(str(row.get(name, "")) for name in shown))
        Console(width=200).print(table)
        record(rows, arguments.results / "resources.csv", KEY, COLUMNS)
    print(sizes(count, folder))
    draw(recipes, arguments.results / f"resources-{count}.svg")


if __name__ == "__main__":
    main()
