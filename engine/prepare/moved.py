"""`efficientclip moved STORE OLD NEW`: the pictures that a store was made of lie elsewhere now."""

from __future__ import annotations

import json
from pathlib import Path

from ..data.store import Store, manifest_digest, place_now
from ..errors import UserError, writing
from ..files import lock
from ..files.atomic import write_atomically
from ..files.places import Location, location, resolved


def note_move(path: Path, old: Location, new: Location) -> tuple[int, int]:
    """Note in the manifest of the store at `path` that what lay at `old` lies at `new`, a folder or a file.

    Searches, pages and exports read pictures there from now on; to runs the store is the same. Returns how many files
    of pictures have moved, and how many there are. UserError where none lay there, or one is not where it should be.
    """
    store = Store(path)
    move = _spelled(old), _spelled(new)
    places = store.picture_files()
    moved = {place: place_now(place, [move]) for place in sorted(places)}
    moved = {place: now for place, now in moved.items() if now != place}
    if not moved:
        some = f"its pictures lie at {min(places)}" if places else "it holds only text"
        raise UserError(f"store {path}: nothing of it lies at {move[0]}; {some}{' and the like' * (len(places) > 1)}")
    gone = [now for now in map(location, moved.values()) if isinstance(now, Path) and not now.is_file()]
    if gone:
        raise UserError(f"{gone[0]}: no such file ({len(gone)} of {len(moved)} are not there); name where they lie now")
    with lock.held(path, "noting where its pictures are"), writing(path):
        manifest = store.manifest | {"moved": [*store.moved, move]}
        manifest["sha256"] = manifest_digest(manifest)
        write_atomically(path / "manifest.json", json.dumps(manifest, ensure_ascii=False, indent=1).encode())
    return len(moved), len(places)


def _spelled(place: Location) -> str:
    return resolved(place).rstrip("/")
