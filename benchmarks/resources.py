"""What each recipe pays to reach the recall that CLIP's ends with: seconds, operations, pair visits and peak memory.

    python -m benchmarks.resources [--clip-visits 250000] [--most-visits 1000000] [--budgets 1,2,4]

On the demo's data, one process a stage, one core each, two recipes at a time.

- clip: both towers from scratch. It runs for twice as long until text-to-image R@10 on the validation pictures gains
  less than 0.5 in the last fifth; only the longest run counts, what was tried before does not.
- wenlan: momentum copies and two queues, for as many visits. It begins from towers that can tell pictures apart, as
  WenLan does; here a short run of CLIP's recipe makes them, which counts.
- efficientclip: complete pipelines of several budgets. Everything counts: the teacher's embeddings, the image start,
  the stores, the joint training. The teacher's own training does not: it is the given that the method rests on. There
  is no distillation: at budgets as small as these its visits are worth more in the joint training.

A recipe has reached the recall when its validation R@10 is at least what clip ends with; the baselines are taken at the
first validation that is, efficientclip at the end of a pipeline. The test pictures, of a style that no training saw,
stand beside. Seconds are those of CPU time, imports and validations included; operations are counted by the cost model
of `efficientclip plan`, without the teacher's.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date
from functools import reduce
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.ticker import NullFormatter
from rich.console import Console
from rich.table import Table

from benchmarks.ecl import FIXED, SCHEDULE
from benchmarks.measuring import RESULTS, Row, hardware, kept, once, record
from efficientclip.config import Config, load_config
from efficientclip.data.store import Store, TextStore
from efficientclip.evaluation.evaluate import evaluate
from efficientclip.evaluation.run import read_metrics
from efficientclip.planning.settings import DEVICES, GIB, Machine, Settings
from efficientclip.planning.work import measure_work, operations, picture_training_work

DATA = Path("data/demo")
TEST = DATA / "test_vendor.tar"
HELD_OUT = "val_seen"
# Visits, batch size, learning rate of efficientclip's trainings at budget 1: short runs need steps, not large batches.
STARTS = {"demo-image": (24_000, 128, 2.8e-3), "demo-own": (40_000, 256, 2e-3)}
# Of CLIP's recipe, before WenLan's.
WENLAN_START = 48_000
# What the recipe's R@10 may still gain in the last fifth of its run.
SETTLED = 0.5
KEY = ("hardware", "torch", "recipe", "budget")
COLUMNS = (
    *KEY, "pair_visits", "cpu_seconds", "operations", "peak_gib", "val_R@10", "test_R@1", "test_R@10", "reached",
    "cpu_over_clip", "operations_over_clip", "date", "command",
)  # fmt: skip


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
    """What a recipe spent until each of some points, with the validation R@10 there, and its recall on the test."""

    name: str
    budget: str
    points: Sequence[tuple[Spent, float]]
    test: dict[str, float]


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
        mean = np.minimum(np.diff(TextStore(config.mlm.texts).offsets), config.data.max_text_tokens).mean()
        texts = visits / config.training.batch_size * config.mlm.texts_per_batch * float(mean)
    work = measure_work(config, (tokens - texts) / visits)
    rows = len(Store(config.data.store).features) if config.data.store else 0
    settings = given(rows, (tokens - texts) / visits)
    made = operations(config, work, settings, visits, tokens - texts, texts, texts * config.mlm.mask_share)
    return sum(made.values()), visits


def given(images: int, caption_tokens: float) -> Settings:
    """Settings for the cost model; its machine does not matter to a count of operations."""
    return Settings(images, images, caption_tokens, 0, Machine(DEVICES["h100"], 1))


def curve(run: Path) -> list[tuple[int, float]]:
    """Visits and text-to-image R@10 of each validation of a run."""
    _, validations = read_metrics(run / "metrics.jsonl")
    return [(line["visits"], line["validation"][HELD_OUT]["t2i"]["R@10"]) for line in validations]


def tested(run: Path) -> dict[str, float]:
    """Text-to-image recall on the test pictures, which is not part of what the recipe pays; kept in the run."""
    return kept(run / "test.json", lambda: evaluate(run, TEST)["t2i"])


def settled(points: Sequence[tuple[int, float]]) -> bool:
    """Whether the last fifth of a run, by visits, gained less than SETTLED: the mean of its last two validations beside
    that of the two before its last fifth, since one alone turns on a query or two."""
    before = [recall for visits, recall in points if visits <= 0.8 * points[-1][0]][-2:]
    after = [recall for _, recall in points][-2:]
    return len(before) == 2 and float(np.mean(after)) - float(np.mean(before)) < SETTLED


def baseline(name: str, visits: int, most: int, folder: Path, start: Path | None = None) -> Recipe:
    """`configs/demo-NAME.yaml` at `visits`, or at twice as many until it has settled, `most` at last.

    `start`: where a run of CLIP's recipe goes from whose towers this one begins.
    """
    before, overrides = Spent(), []
    if start is not None:
        before = training(Path("configs/demo-clip.yaml"), start, f"training.pair_visits={WENLAN_START}")
        overrides = [f"model.start_from={start}"]
    while True:
        run = folder / f"{name}-{visits}"
        spent = training(Path(f"configs/demo-{name}.yaml"), run, f"training.pair_visits={visits}", *overrides)
        points = curve(run)
        done = settled(points)
        if done or 2 * visits > most:
            if not done:
                print(f"{name}: still gaining after {visits} visits; its figures are a lower bound of what it pays")
            end = points[-1][0]
            return Recipe(name, "", [(before + spent.part(seen / end), recall) for seen, recall in points], tested(run))
        visits *= 2


def pipeline(budget: float, folder: Path) -> Recipe:
    """All of efficientclip's stages, each with `budget` times the visits in STARTS."""
    here = folder / f"efficientclip-{budget:g}"
    here.mkdir(parents=True, exist_ok=True)
    image, joint = (Path(f"configs/{name}.yaml") for name in STARTS)

    def train(config: Path, run: str, *overrides: str) -> Spent:
        visits, batch_size, rate = STARTS[config.stem]
        chosen = [f"training.pair_visits={round(budget * visits)}", f"training.batch_size={batch_size}"]
        return training(config, here / run, *chosen, f"optimizer.lr={rate}", *overrides)

    def prepare(source: str, store: str, *overrides: str) -> list[str]:
        return ["prepare", str(DATA / source), str(here / store), "--config", str(joint), *overrides]

    frozen = f"model.image_tower.pretrained={here / 'image'}"

    def pictures(source: str, store: str) -> Spent:
        def encoded() -> tuple[float, int]:
            return len(Store(here / store).features) * measure_work(load_config(joint, [frozen]), 8).picture, 0

        return stage(here / store, *prepare(source, store, frozen), counted=encoded)

    rarely = "training.validate_every=1000000"
    together = [
        f"data.store={here / 'store'}", f"data.validation.{HELD_OUT}={here / HELD_OUT}", f"mlm.texts={here / 'texts'}",
        frozen, rarely, "model.start_from=null", "mlm.texts_per_batch=8", *SCHEDULE,
    ]  # fmt: skip
    stages = [
        train(image, "image", rarely),
        stage(here / "texts", *prepare("texts.txt", "texts")),
        pictures("train", "store"),
        pictures(f"{HELD_OUT}.tar", HELD_OUT),
        train(joint, "run", *together),
    ]
    spent = reduce(Spent.__add__, stages)
    return Recipe("efficientclip", f"{budget:g}", [(spent, curve(here / "run")[-1][1])], tested(here / "run"))


def rows_of(recipes: Sequence[Recipe]) -> list[Row]:
    """A row a recipe: what it spent until it reached the recall that clip ends with, or in all."""
    clip = next(recipe for recipe in recipes if recipe.name == "clip")
    goal = clip.points[-1][1]
    paid = next(spent for spent, recall in clip.points if recall >= goal)
    rows = []
    for recipe in recipes:
        reached = next((spent for spent, recall in recipe.points if recall >= goal), None)
        spent = reached or recipe.points[-1][0]
        rows.append(
            {
                "hardware": hardware("cpu"), "torch": torch.__version__, "recipe": recipe.name, "budget": recipe.budget,
                "pair_visits": spent.visits, "cpu_seconds": f"{spent.cpu_seconds:.0f}",
                "operations": f"{spent.operations:.3g}", "peak_gib": f"{spent.peak_bytes / GIB:.2f}",
                "val_R@10": recipe.points[-1][1], "test_R@1": recipe.test["R@1"], "test_R@10": recipe.test["R@10"],
                "reached": "yes" if reached else "no",
                "cpu_over_clip": f"{spent.cpu_seconds / paid.cpu_seconds:.3f}",
                "operations_over_clip": f"{spent.operations / paid.operations:.3f}",
                "date": date.today(), "command": "python -m benchmarks.resources " + " ".join(sys.argv[1:]),
            }
        )  # fmt: skip
    return rows


def draw(recipes: Sequence[Recipe], file: Path) -> None:
    """Validation recall against CPU-seconds and operations; efficientclip's points are a pipeline each."""
    units: tuple[tuple[str, Callable[[Spent], float]], ...] = (
        ("CPU seconds", lambda spent: spent.cpu_seconds),
        ("operations", lambda spent: spent.operations),
    )
    figure, panels = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for panel, (unit, value) in zip(panels, units, strict=True):
        for name in dict.fromkeys(recipe.name for recipe in recipes):
            points = [point for recipe in recipes if recipe.name == name for point in recipe.points]
            points.sort(key=lambda point: value(point[0]))
            style = "o-" if name == "efficientclip" else "-"
            panel.plot([value(spent) for spent, _ in points], [recall for _, recall in points], style, label=name)
        panel.set(xscale="log", xlabel=f"{unit}, all starts included")
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("validation, text to image R@10")
    panels[0].legend()
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)


def sizes() -> str:
    """Parameters of the towers, which all recipes share."""
    clip = Path("configs/demo-clip.yaml")
    both, alone = (measure_work(load_config(clip, [f"training.tower={tower}"]), 8) for tower in ("both", "text"))
    text = measure_work(load_config(Path("configs/demo-own.yaml")), 8).parameters
    image = both.parameters - alone.parameters
    return f"towers of every recipe: text {text / 1e6:.1f}M parameters, image {image / 1e6:.1f}M"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clip-visits", type=int, default=250_000, help="of the first run (default: 250000)")
    parser.add_argument("--most-visits", type=int, default=1_000_000, help="of the last (default: 1000000)")
    parser.add_argument("--wenlan-visits", type=int, help="0: left out (default: as many as clip's)")
    parser.add_argument("--budgets", default="1,2,4", help="of efficientclip's pipelines, times STARTS")
    parser.add_argument("--folder", type=Path, default=Path("runs/resources"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if not DATA.is_dir():
        parser.error(f"{DATA} is missing: make it with `make demo`")
    budgets = [float(budget) for budget in arguments.budgets.split(",")]
    folder, first, most = arguments.folder, arguments.clip_visits, arguments.most_visits

    def baselines() -> list[Recipe]:
        clip = baseline("clip", first, most, folder)
        visits = clip.points[-1][0].visits if arguments.wenlan_visits is None else arguments.wenlan_visits
        return [clip, *([baseline("wenlan", visits, visits, folder, folder / "wenlan-start")] if visits else [])]

    with ThreadPoolExecutor(2) as pool:
        slow = pool.submit(baselines)
        fast = pool.submit(lambda: [pipeline(budget, folder) for budget in budgets])
        recipes = [*slow.result(), *fast.result()]
    rows = rows_of(recipes)
    shown = [name for name in COLUMNS if name not in ("hardware", "torch", "command", "date")]
    table = Table(*shown, title=f"until validation R@10 is {recipes[0].points[-1][1]}, which clip ends with")
    for row in rows:
        table.add_row(*(str(row[name]) for name in shown))
    Console(width=160).print(table, sizes(), "the teacher's own training is not counted")
    record(rows, arguments.results / "resources.csv", KEY, COLUMNS)
    draw(recipes, arguments.results / "resources.svg")


if __name__ == "__main__":
    main()
