"""Options that say where the pictures of a table lie, and what its columns are called."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from .files.places import Location, location

if TYPE_CHECKING:
    from .data.tables import Columns


def add_columns(parser: argparse.ArgumentParser, source: str) -> None:
    parser.add_argument("--images", type=location, metavar="DIR", help=f"where the picture paths in {source} start")
    for name, held in (
        ("image", "picture paths, or pictures"),
        ("caption", "captions, or labels"),
        ("key", "what each row is called, for instance a product's number"),
    ):
        parser.add_argument(f"--{name}-column", metavar="NAME", help=f"of {source}, if it is a table: {held}")


def columns_of(given: argparse.Namespace) -> Columns:
    from .data.tables import Columns

    return Columns(given.image_column, given.caption_column, given.key_column)


def as_words(images: Location | None, columns: Columns) -> list[str]:
    """The same options for another command."""
    options = [] if images is None else ["--images", str(images)]
    return options + [word for option in columns.given for word in option.split(" ", 1)]
