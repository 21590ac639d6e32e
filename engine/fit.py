"""`efficientclip fit SOURCE --out DIR`: from pairs to a model, its report and what it found wrong, by one command.

In DIR:

head             of an image tower that has no space: one of these pictures
store            what the frozen tower makes of the source
work/OF          of this source and these settings: the parts that train and measure, cross-fit, run
run              the run of these settings
config.yaml      what was trained: `efficientclip train DIR/config.yaml` goes on from it
fit.json         what was found for what was asked: rates, a budget
logs             what each stage said
model            the Hugging Face folder
report.html, audit.html, audit.parquet, suspects.csv, cleaned.csv
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import UserError
from .files.places import location

if TYPE_CHECKING:
    from .data.tables import Columns


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=location, metavar="SOURCE", help="pairs, in any form that `prepare` reads")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the config")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the model and all else")
    parser.add_argument("--image-tower", metavar="ID", help="hub id or folder (default: CLIP's ViT-B/32, if in reach)")
    parser.add_argument("--text-tower", metavar="ID", help="hub id or folder (default: a Chinese RoBERTa, if in reach)")
    parser.add_argument("--texts", type=Path, metavar="FILE.txt", help="unpaired texts, a line each")
    parser.add_argument(
        "--verdicts", type=Path, metavar="FILE.csv", help="what audit.html handed out: which pairs are right, or wrong"
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="a YAML that says all but where the data lies")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=float, metavar="N", help="passes over the pairs (default: 10)")
    length.add_argument("--budget", metavar="TIME", help="15m, 2h: as many passes as end within it")
    parser.add_argument("--ranks", type=int, metavar="N", help="of training (default: one a device, two on CPUs)")
    parser.add_argument(
        "--held-out", type=float, metavar="SHARE", help="pairs kept from training, to choose and to measure by"
    )


def run(given: argparse.Namespace, columns: Columns) -> None:
    """What the command line asks for."""
    import torch

    if not torch.cuda.is_available():
        # Left to find that out, DeepSpeed warns.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from .fitting.budget import parse_time
    from .fitting.fit import Wish, fit

    if given.ranks is not None and given.ranks < 1:
        raise UserError(f"--ranks {given.ranks}: give 1 or more")
    for option in ("epochs", "held_out"):
        value = getattr(given, option)
        if value is not None and not (value > 0 if option == "epochs" else 0 <= value <= 0.5):
            least = "more than 0" if option == "epochs" else "0 to 0.5"
            raise UserError(f"--{option.replace('_', '-')} {value:g}: give {least}")
    for option in ("texts", "verdicts"):
        file = getattr(given, option)
        if file is not None and not file.is_file():
            raise UserError(f"--{option} {file}: no such file")
    seconds = None if given.budget is None else parse_time(given.budget)
    fit(
        Wish(
            given.source, given.out, given.images, columns, given.image_tower, given.text_tower, given.texts,
            given.config, given.epochs, seconds, given.verdicts, given.held_out, given.ranks,
            given.overrides,
        )
    )  # fmt: skip
