"""What a source holds, told before any work: pairs, repeated titles, languages, lengths, missing pictures, columns."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.table import Table

from ..data.listing import Listing
from ..data.sources import Source, is_table, open_source
from ..data.tables import CAPTION_COLUMNS, KEY_COLUMNS, PICTURE_COLUMNS, Columns, header, named
from ..errors import UserError
from ..files.places import Location, location

LOOKED_AT, LEAST_PAIRS = 50_000, 8
SCRIPTS = {
    "Chinese": r"[\u3400-\u9fff\uf900-\ufaff]",
    "Japanese": r"[\u3040-\u30ff]",
    "Korean": r"[\uac00-\ud7af]",
    "Latin": r"[A-Za-z\u00c0-\u024f]",
    "Cyrillic": r"[\u0400-\u04ff]",
    "Arabic": r"[\u0600-\u06ff]",
}
PATTERNS = {name: re.compile(pattern) for name, pattern in SCRIPTS.items()}


@dataclass(frozen=True)
class Found:
    """Of a source: `pictures` and `pairs` are None where only reading tells, as in tars; `notes` by subject."""

    pictures: int | None
    pairs: int | None
    notes: dict[str, str]

    def table(self, title: str) -> Table:
        shown = Table(show_header=False, title=title, title_justify="left", box=None)
        for subject, note in self.notes.items():
            shown.add_row(subject, note)
        return shown


def look(path: Location, images: Location | None, columns: Columns) -> Found:
    """UserError where the source cannot be read, or none of its pictures is there."""
    source = open_source(path, images, columns)
    notes = _columns_of(path, columns)
    parts = source.tables or [source]
    if source.of_tars:
        sizes = [file.stat().st_size for file in source.files if isinstance(file, Path)]
        told = f"{len(source.files):,} tar files" + (f", {sum(sizes) / 1e9:.1f} GB" if sizes else "")
        return Found(None, None, notes | {"pairs": f"{told}; how many, reading tells"})
    listings = [part.listing for part in parts if part.listing is not None]
    pictures = sum(map(len, listings))
    captions = [text for listing in listings for text in _captions(listing)]
    notes |= {"pairs": f"{len(captions):,} on {pictures:,} pictures"}
    if not captions:
        raise UserError(f"source {path}: no row has a caption that can be used ({_bad_notes(parts)})")
    if len(captions) < LEAST_PAIRS:
        raise UserError(f"source {path}: {len(captions)} pairs; nothing is learned from fewer than {LEAST_PAIRS}")
    times = Counter(captions)
    often = {text: count for text, count in times.items() if count > 1}
    if often:
        most = max(often, key=lambda text: often[text])
        notes["repeated"] = f"{len(often):,} captions are of several pictures, the most of {often[most]:,}: {most[:40]}"
    random = np.random.default_rng(0)
    chosen = [captions[at] for at in random.permutation(len(captions))[:LOOKED_AT]]
    notes["languages"] = _scripts(chosen)
    lengths = np.quantile([len(text) for text in chosen], [0.5, 0.95, 1]).astype(int)
    notes["lengths"] = f"{lengths[0]} characters (median), {lengths[1]} (95 %), {lengths[2]} (longest)"
    if missing := _missing(listings, random):
        if missing[0] == missing[1]:
            raise UserError(
                f"source {path}: none of the pictures looked for is there, the first: {missing[2]}; give --images, the"
                " folder where the paths start"
            )
        notes["missing"] = f"{missing[0]:,} of {missing[1]:,} picture files looked for, the first: {missing[2]}"
    if bad := _bad_notes(parts):
        notes["left out"] = bad
    return Found(pictures, len(captions), notes)


def _columns_of(path: Location, columns: Columns) -> dict[str, str]:
    """What of a table is taken for what."""
    if not is_table(path):
        return {"source": str(path)}
    wanted = {
        "picture": named(columns.image, PICTURE_COLUMNS),
        "caption": named(columns.caption, CAPTION_COLUMNS),
        "key": named(columns.key, KEY_COLUMNS),
    }
    names = header(path, wanted["picture"], wanted["caption"])
    taken = {name: role for name in names for role, kind in wanted.items() if name.strip().lower() in kind}
    others = [name for name in names if name not in taken]
    told = ", ".join(f"{name} is the {role}" for name, role in taken.items())
    return {"source": str(path), "columns": told + (f"; {', '.join(others)} not used" if others else "")}


def _captions(listing: Listing) -> Iterator[str]:
    held = listing.captions
    for at in range(len(held.ends) - 1):
        yield held[at].decode("utf-8", "replace")


def _scripts(captions: list[str]) -> str:
    """Shares of captions by the script that most of their letters are of."""
    counts = Counter[str]()
    for text in captions:
        letters = {name: len(pattern.findall(text)) for name, pattern in PATTERNS.items()}
        # Kana tell Japanese from Chinese, however many characters they share.
        most = "Japanese" if letters["Japanese"] else max(letters, key=lambda name: letters[name])
        counts["none" if not any(letters.values()) else most] += 1
    return ", ".join(f"{count / len(captions):.0%} {name}" for name, count in counts.most_common(4))


def _missing(listings: list[Listing], random: np.random.Generator) -> tuple[int, int, str] | None:
    """Picture files that are not there, of how many looked for, and the first; None: all are there."""
    files = [
        os.fsdecode(listing.files[at])
        for listing in listings
        if listing.memory is None and not listing.base64
        for at in random.permutation(len(listing.files.ends) - 1)[:LOOKED_AT]
    ]
    gone = sorted(file for file in files if isinstance(location(file), Path) and not os.path.exists(file))
    return (len(gone), len(files), gone[0]) if gone else None


def _bad_notes(parts: Sequence[Source]) -> str:
    causes = Counter(bad.cause for part in parts for bad in part.bad)
    return ", ".join(f"{count:,} × {cause}" for cause, count in causes.most_common(3))
