"""Where data lies: a path, or a place that is none, and the lists of them that braces write."""

from __future__ import annotations

import os
import re
from itertools import chain
from pathlib import Path

REMOTE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://|pipe:")
RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)")
GLOB = re.compile(r"[*?[]")


class URL(str):
    """s3://, gs://, hf://, https:// and the like, or pipe:COMMAND: kept as written, where a Path would lose a slash."""

    __slots__ = ()

    @property
    def piped(self) -> bool:
        return self.startswith("pipe:")

    @property
    def protocol(self) -> str:
        return self.partition(":")[0].lower()

    @property
    def name(self) -> str:
        """The last part, without what signs it; of a command all."""
        return str(self) if self.piped else self._bare.rstrip("/").rpartition("/")[2]

    @property
    def suffix(self) -> str:
        return ".tar" if self.piped else Path(self.name).suffix

    @property
    def stem(self) -> str:
        return "piped" if self.piped else Path(self.name).stem

    @property
    def parent(self) -> URL:
        return URL(self._bare.rstrip("/").rpartition("/")[0])

    def with_name(self, name: str) -> URL:
        return self.parent / name

    def __truediv__(self, name: str | Path) -> URL:
        """As of paths; a `name` that is a place of its own stays."""
        return URL(name) if REMOTE.match(str(name)) else URL(f"{self.rstrip('/')}/{name}")

    @property
    def _bare(self) -> str:
        """Without a query, as signed links have one."""
        return re.split("[?#]", self, maxsplit=1)[0] if self.protocol in ("http", "https") else str(self)


Location = Path | URL


def location(text: str | Path) -> Location:
    return URL(text) if isinstance(text, str) and REMOTE.match(text) else Path(text)


def is_pattern(place: Location) -> bool:
    """Whether braces or a glob make it stand for several."""
    if isinstance(place, URL):
        return len(braced(place)) > 1 or is_glob(place)
    names = str(written(place)[1])
    return not place.exists() and (len(braced(names)) > 1 or is_glob(names))


def is_glob(names: str) -> bool:
    if not isinstance(names, URL):
        return GLOB.search(names) is not None
    # In a URL, a question mark begins a query or a version.
    return not names.piped and re.search(r"[*[]", names) is not None


def written(place: Path) -> tuple[Path, Path]:
    """The folders that are there as they are written, and what follows them."""
    folder = next((parent for parent in place.parents if os.path.isdir(parent)), Path(place.anchor))
    return folder, place.relative_to(folder)


def braced(text: str) -> list[str]:
    """What braces stand for, in order: {00000..00099} with its zeros, {a,b}; braces around anything else stay."""
    start = text.find("{")
    if start < 0:
        return [text]
    depth, commas, end = 0, [start], -1
    for at in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        if depth == 0:
            end = at
            break
        if depth == 1 and text[at] == ",":
            commas.append(at)
    if end < 0:
        return [text]
    inside = [text[first + 1 : last] for first, last in zip(commas, [*commas[1:], end], strict=True)]
    counted = RANGE.fullmatch(text[start + 1 : end])
    if counted:
        options = _counted(*counted.groups())
    elif len(inside) > 1:
        options = list(chain.from_iterable(map(braced, inside)))
    else:
        options = [f"{{{one}}}" for one in braced(inside[0])]
    behind = braced(text[end + 1 :])
    return [text[:start] + option + rest for option in options for rest in behind]


def _counted(first: str, last: str) -> list[str]:
    zeros = any(re.match(r"-?0\d", end) for end in (first, last))
    width = max(len(first), len(last)) if zeros else 0
    step = 1 if int(first) <= int(last) else -1
    return [f"{number:0{width}d}" for number in range(int(first), int(last) + step, step)]


def resolved(place: Location | str) -> str:
    """Of a path, absolute and with its links followed."""
    found = location(place)
    return str(found) if isinstance(found, URL) else os.path.realpath(found)
