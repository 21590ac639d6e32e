"""`efficientclip demo`: real data of registries, all trainings, the report; the first half makes towers for `fit`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from ..recipes import shipped
from .stages import Stage, Stages, devices

REPORTED = {
    "held-out style, seen concepts": "stores/demo-test_vendor",
    "held-out concepts, google style": "data/demo/test_concept_google.tar",
    "held-out concepts, held-out style": "data/demo/test_both.tar",
    "validation": "stores/demo-val_seen",
    "photographs": "data/demo/photographs.tar",
}
SHOWN = ("held-out style, seen concepts", "photographs")


def demo(folder: Path, ranks: int | None) -> Path:
    """Make the demo in `folder`, or what it lacks of it; returns the report."""
    ranks = ranks or devices()
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    stages = Stages(folder / "runs" / "demo-stages.json", folder / "runs" / "demo-logs", Console(stderr=True))
    stages.run_anyway(*tower_stages(folder, ranks), *_trained(folder, ranks))
    return folder / "runs" / "demo" / "report.html"


def tower_stages(folder: Path, ranks: int, head: Sequence[str] = ()) -> list[Stage]:
    """An ImageNet tower with a head, and a text tower that a dictionary taught the space of that; `head` overrides the
    recipe of the former."""
    files = shipped()
    distill = str(files["demo-distill"])
    prepared = ["--replace", "--config"]
    return [
        Stage("packages", ["demo-data", "data/demo", "--config", str(files["demo"])], folder=folder,
              made=[folder / "data/demo/manifest.json"]),
        Stage("prose", ["prepare", "data/demo/texts.txt", "stores/texts", *prepared, str(files["demo"])],
              folder=folder, made=[folder / "stores/texts"], waits=["packages"]),
        Stage("dictionary", ["prepare", "data/demo/parallel.tsv", "stores/parallel", *prepared, distill],
              folder=folder, made=[folder / "stores/parallel"], waits=["packages"]),
        Stage("head", ["fit-head", str(files["demo-head"]), *head], folder=folder,
              made=[folder / "runs/demo-head/model"], waits=["packages"]),
        Stage("distillation", ["train", distill], ranks=ranks, folder=folder,
              made=[folder / "runs/demo-distill/model"], waits=["dictionary"]),
    ]  # fmt: skip


def _trained(folder: Path, ranks: int) -> list[Stage]:
    config = str(shipped()["demo"])
    stores = {"demo": "train", "demo-val_seen": "val_seen.tar", "demo-test_vendor": "test_vendor.tar"}
    sets = [f"{name}={place}" for name, place in REPORTED.items()]
    return [
        *(
            Stage(name, ["prepare", f"data/demo/{part}", f"stores/{name}", "--replace", "--config", config],
                  folder=folder, waits=["head"])
            for name, part in stores.items()
        ),
        Stage("cross-fit", ["cross-fit", config], ranks=ranks, folder=folder),
        Stage("train", ["train", config], ranks=ranks, folder=folder),
        Stage("report", ["report", "runs/demo", "--replace", "--data", *sets, "--gallery", *SHOWN], folder=folder),
    ]  # fmt: skip
