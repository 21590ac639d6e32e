"""`efficientclip audit RUN --export DIR`: the pairs that ECL kept, as webdataset shards that `prepare` reads again.

DIR/00000.tar, 00001.tar, …    samples as they lay in the original shards, without the captions that were dropped
DIR/export.json                what the export is of, its finished shards, and how many shares of the pairs are in them

The kept pairs are dealt into shares, which end with a shard of the store, and which a process for each core makes tars
of. A tar appears whole or not at all, in the order of the store; an interrupted export goes on after its last share.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from ..data.store import Store
from ..errors import UserError, reading, writing
from ..files import digests
from ..files.atomic import sync, write_atomically
from ..files.lock import held
from ..files.ownership import claim, mark
from ..files.places import location
from ..hardware import cores_of_rank
from ..stopping import end_with_parent
from .audit import Audit
from .kept import Export, Share, aside, write_share


def export_kept(audit: Audit, folder: Path, *, samples: int, size: int) -> tuple[int, int]:
    """Write the kept pairs to shards of at most `samples` samples and `size` bytes; returns how many shards and pairs.

    A picture keeps the captions that were kept, and goes with the last of them. Keys stay; one that a shard holds
    already begins the next. UserError when pictures are gone or changed, or `folder` holds anything else.
    """
    folder = claim_export(folder, audit.folder, audit.store.path)
    store, kept = audit.store, audit.verdicts.kept
    _check_shards(store)
    identity = {
        "pairs": store.manifest["files"]["pairs.parquet"]["xxh3"],
        "kept": hashlib.sha256(np.packbits(kept).tobytes()).hexdigest(),
        "samples": samples,
        "bytes": size,
    }
    mark(folder, "kept pairs")
    with held(folder, "exporting"):
        shards = _export(Export(store.path, folder, samples, size), kept, identity)
    return len(shards), sum(shard["pairs"] for shard in shards)


def claim_export(folder: Path, run: Path, store: Path | None) -> Path:
    """The folder that `folder` names; UserError when shards of kept pairs may not be written there."""
    return claim(folder, "kept pairs", sources=[run, *([] if store is None else [store])])


def _export(export: Export, kept: npt.NDArray[np.bool_], identity: dict[str, Any]) -> list[dict[str, Any]]:
    """Write what the folder lacks of the export; returns what export.json tells of its shards."""
    folder = export.folder
    record = _open(folder, identity)
    shards: list[dict[str, Any]] = record["shards"]
    if record["finished"]:
        return shards
    done, total = sum(shard["pairs"] for shard in shards), int(kept.sum())
    shares = list(islice(_shares(export, kept), record["shares"], None))
    try:
        with (
            tqdm(total=total, initial=done, desc=f"kept pairs to {folder}", unit="pair", unit_scale=True) as bar,
            _processes(min(cores_of_rank(), len(shares))) as spread,
        ):
            for made in spread(partial(write_share, export), shares):
                with writing(folder):
                    for tar in made:
                        tar["name"] = f"{len(shards):05d}.tar"
                        os.replace(folder / tar.pop("aside"), folder / tar["name"])
                        shards.append(tar)
                    sync(folder)
                record["shares"] += 1
                write_atomically(folder / "export.json", json.dumps(record, indent=1).encode())
                bar.update(sum(tar["pairs"] for tar in made))
    finally:
        # Of shares that were made ahead of one that was not.
        for left in folder.glob(aside(0, 0).replace("0", "[0-9]")):
            left.unlink()
    record["finished"] = True
    write_atomically(folder / "export.json", json.dumps(record, indent=1).encode())
    return shards


@contextmanager
def _processes(count: int) -> Iterator[Any]:
    """A `map` over `count` processes, in order; over this one where that is one."""
    if count <= 1:
        yield map
        return
    # Forked ones would inherit the threads' locks.
    pool = ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), initializer=end_with_parent)
    try:
        yield pool.map
    finally:
        pool.shutdown(cancel_futures=True)


def _shares(export: Export, kept: npt.NDArray[np.bool_]) -> Iterator[Share]:
    """All rows, cut where a shard ends, or a picture in no tar, once what is kept of a share would fill a shard."""
    last: tuple[str, int] | None = None
    # Of shares so far: their number, and where the next one begins in rows, kept pictures and bytes of these.
    number, begun = 0, np.zeros(3, np.int64)
    # Of rows so far.
    first, pictures, size = 0, 0, 0
    for table in Store(export.store).pair_tables(["shard", "offset", "length"]):
        here = np.flatnonzero(kept[first : first + len(table)])
        if len(here):
            shard = table["shard"].combine_chunks().dictionary_encode()
            names, codes = shard.dictionary.to_pylist(), shard.indices.to_numpy()[here]
            offsets, lengths = (table[name].to_numpy()[here] for name in ("offset", "length"))
            in_tar = np.array([location(name).suffix == ".tar" for name in names])[codes]
            other_shard = np.append(last is None or names[codes[0]] != last[0], codes[1:] != codes[:-1])
            moved = np.append(last is None or offsets[0] != last[1], offsets[1:] != offsets[:-1])
            new = other_shard | moved
            last = names[codes[-1]], int(offsets[-1])
            # Before each row.
            counted = pictures + np.cumsum(new) - new
            filled = size + np.cumsum(lengths * new) - lengths * new
            pictures, size = int(counted[-1] + new[-1]), int(filled[-1] + lengths[-1] * new[-1])
            places = np.stack([first + here, counted, filled])[:, other_shard | (new & ~in_tar)]
            while True:
                cut = min(
                    np.searchsorted(places[1], begun[1] + export.samples),
                    np.searchsorted(places[2], begun[2] + export.size),
                )
                if cut == places.shape[1]:
                    break
                yield Share(number, int(begun[0]), kept[begun[0] : places[0, cut]])
                number, begun = number + 1, places[:, cut]
        first += len(table)
    yield Share(number, int(begun[0]), kept[begun[0] :])


def _check_shards(store: Store) -> None:
    named = store.picture_files()
    if not named:
        raise UserError(f"store {store.path}: holds only text, so there is no picture to export")
    local = [place for place in map(location, named) if isinstance(place, Path)]
    missing = sorted(str(place) for place in local if not place.is_file())
    if missing:
        raise UserError(
            f"shard {missing[0]}: no such file ({len(missing)} of the {len(named)} shards of {store.path} are gone);"
            f" put them back, or tell where they are by `efficientclip moved {store.path} OLD NEW`"
        )


def _open(folder: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """export.json of an export that is to go on, or a new one."""
    file = folder / "export.json"
    if not file.is_file():
        record = {"identity": identity, "shards": [], "shares": 0, "finished": False}
        write_atomically(file, json.dumps(record, indent=1).encode())
        return record
    remedy = f"remove {folder} and export anew"
    with reading("export", file, remedy):
        record = json.loads(file.read_text(encoding="utf-8"))
        differing = ", ".join(name for name, value in identity.items() if record["identity"][name] != value)
        written = {shard["name"]: {"bytes": shard["bytes"], "xxh3": shard["xxh3"]} for shard in record["shards"]}
        if not record["finished"] and "shares" not in record:
            raise ValueError("an earlier version began it")
    if differing:
        raise UserError(f"--export {folder}: holds another export ({differing} differ); choose another folder")
    digests.check(folder, written, remedy)
    return record
