"""Captions, and the lines of text they stand in: one rule for every source that is text.

A line ends at a line feed, or at one behind a carriage return; Unicode's other separators are part of a text.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from .. import _loader
from ..errors import UserError, reading
from ..files.places import Location
from .remote import opened

RECODE = "convert the file with iconv -f GB18030 -t UTF-8, or -f UTF-16 where a spreadsheet wrote it"
# Without white space and marks at its ends; empty where nothing in it can be seen.
stripped = _loader.stripped


def captions_of(value: Any) -> list[str]:
    """Those that a cell or a value of JSON means, stripped: as a tar's .txt or the "captions" of its .json do.

    ValueError, which tells why, where it means none.
    """
    if isinstance(value, str):
        return _loader.read_captions(value.encode("utf-8", "surrogatepass"), None)[0]
    return _loader.read_captions(None, json.dumps({"captions": value}, default=str).encode())[0]


def is_utf8(text: str) -> bool:
    """Whether `text` can be written: JSON's escapes can make half a character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def escaped(name: str) -> str:
    """A name in which what cannot be written is told by its number."""
    return name.encode("utf-8", "backslashreplace").decode()


def numbered_lines(file: Location) -> Iterator[tuple[int, str]]:
    """Each line of a UTF-8 file with its end, and its number from 1; a byte order mark is left out."""
    with reading("source", file, "copy it again"), opened(file) as stream:
        for number, line in enumerate(stream, 1):
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise UserError(f"source {file}, line {number}: not UTF-8; {RECODE}") from error


def read_lines(file: Location) -> list[str]:
    """Lines as editors and `wc` count them, without their ends."""
    return [line.removesuffix("\n").removesuffix("\r") for _, line in numbered_lines(file)]
