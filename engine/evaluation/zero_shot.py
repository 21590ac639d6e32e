"""`efficientclip evaluate RUN DATA --classes FILE`: pictures are named by the nearest class name, without training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.table import Table
from rich.text import Text

from ..data.captions import read_lines, stripped
from ..data.sources import open_labelled
from ..data.tables import USUAL, Columns
from ..errors import UserError
from ..files.places import Location
from ..objectives.retrieval import best_ranks
from .run import Run, left_out, open_run

TEMPLATES = (
    "{}",
    "{}的照片",
    "一张{}的照片",
    "一张{}的图片",
    "一张{}的特写",
    "一张清晰的{}照片",
    "一张模糊的{}照片",
    "一幅{}的画",
    "照片里有{}",
    "这是{}",
)
LISTED_CLASSES = 30


def classify(
    run: Path,
    data: Location,
    classes: Path,
    images: Location | None = None,
    store: Path | None = None,
    columns: Columns = USUAL,
) -> dict[str, Any]:
    """Zero-shot accuracy over the labelled pictures of `data`, in per cent.

    {"top1", "top5", "mean_per_class", "images", "left_out": {cause: bad samples}, "classes": {name: {"top1",
    "images"}}, "templates"}. A class is the
    normalised mean of the features of its name in all templates; `mean_per_class` weighs all classes that have pictures
    alike. A class that equals the right one counts as half a rank before it, so that equal classes are no hits.

    `data` is read by `open_labelled`. `classes` has a line a class: its name, where labels are these names or count
    the lines from 0, or else label<TAB>name.
    """
    named = read_classes(classes)
    opened = open_run(run, store)
    labels, features, bad = [], [], Counter[str]()
    for batch, features_MD in opened.encode_source(open_labelled(data, images, columns), bad):
        for key, captions in zip(batch.keys, batch.captions, strict=True):
            if len(set(captions)) != 1:
                raise UserError(f"source {data}, {key}: has the labels {', '.join(captions)}; leave it one")
            labels.append(captions[0])
        features.append(features_MD)
    number = class_numbers(labels, named, classes)
    right_N = np.array([number[label] for label in labels], np.int32)
    names = [name for _, name in named]
    image_ND = np.concatenate(features)
    ranks_N = best_ranks(image_ND, _class_features(opened, names), (np.arange(len(labels) + 1), right_N))
    top1 = {names[k]: ranks_N[right_N == k] <= 1 for k in np.unique(right_N).tolist()}
    return {
        "top1": _percent(ranks_N <= 1),
        "top5": _percent(ranks_N <= 5),
        "mean_per_class": round(float(np.mean([hits.mean() for hits in top1.values()])) * 100, 2),
        "images": len(labels),
        "left_out": dict(bad),
        "classes": {name: {"top1": _percent(hits), "images": len(hits)} for name, hits in top1.items()},
        "templates": list(TEMPLATES),
    }


def read_classes(file: Path) -> list[tuple[str | None, str]]:
    """(label, or None where the file gives none; name) of each class."""
    lines = [line for line in read_lines(file) if stripped(line)]
    classes: list[tuple[str | None, str]] = []
    for line in lines:
        label, tab, name = line.partition("\t")
        classes.append((stripped(label), stripped(name)) if tab else (None, stripped(label)))
    labels, names = ([entry[side] for entry in classes] for side in (0, 1))
    if len(classes) < 2 or "" in names or len(set(names)) < len(names):
        raise UserError(f"--classes {file}: needs two classes or more, each with a name of its own")
    if any(labels) and len(set(labels) - {None, ""}) < len(labels):
        raise UserError(f"--classes {file}: some lines have no label before a tab, or one that stands there twice")
    return classes


def class_numbers(labels: Iterable[str], classes: list[tuple[str | None, str]], file: Path) -> dict[str, int]:
    """Which class each label of the data means: the label of the file, or else the name, or else the line from 0."""
    wanted = set(labels)
    by_label = {label: number for number, (label, _) in enumerate(classes) if label is not None}
    by_name = {name: number for number, (_, name) in enumerate(classes)}
    known = by_label or by_name
    if not by_label and not wanted & by_name.keys() and all(label.isdecimal() for label in wanted):
        known = {label: int(label) for label in wanted if int(label) < len(classes)}
    if unknown := sorted(wanted - known.keys()):
        raise UserError(
            f"--classes {file}: none of its {len(classes)} lines is for the label {unknown[0]!r}; write label<TAB>name"
        )
    return known


def class_table(report: Mapping[str, Any], title: str) -> Table:
    """The result of `classify` for the terminal, the worst classes where there are many."""
    classes = sorted(report["classes"].items(), key=lambda entry: entry[1]["top1"])
    table = Table(title=Text(title), show_footer=True)
    many = len(classes) > LISTED_CLASSES
    table.add_column(f"the worst of {len(classes)} classes" if many else "class", f"top-5 {report['top5']:.1f} %")
    table.add_column("top-1 %", f"{report['top1']:.1f}", justify="right")
    table.add_column("images", f"{report['images']:,}", justify="right")
    for name, result in classes[:LISTED_CLASSES]:
        table.add_row(Text(name), f"{result['top1']:.1f}", f"{result['images']:,}")
    table.caption = f"mean of the classes' top-1: {report['mean_per_class']:.1f} %{left_out(report)}"
    return table


def _class_features(run: Run, names: list[str]) -> npt.NDArray[np.float32]:
    texts = [template.format(name) for name in names for template in TEMPLATES]
    mean_KD = run.encode_texts(texts, progress=True).reshape(len(names), len(TEMPLATES), -1).mean(1)
    normalised_KD: npt.NDArray[np.float32] = mean_KD / np.linalg.norm(mean_KD, axis=1, keepdims=True)
    return normalised_KD


def _percent(hits: npt.NDArray[np.bool_]) -> float:
    return round(float(hits.mean()) * 100, 2)
