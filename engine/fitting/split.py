"""A store in parts that share no picture, near-duplicate of one, or title: what trains, and what it is measured on."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from ..data.store import PAIR_FILES, PAIR_SCHEMA, Store, ranges, read_manifest, staging
from ..errors import UserError
from ..noise.neighbourhoods import SAMPLE, best_device, cells, rows_of
from ..prepare.writer import TokenFile, finish, token_dtype, write_ids

Bools = npt.NDArray[np.bool_]
Ids = npt.NDArray[np.int64]

# Of a picture saved anew, cut a little or made smaller; different pictures of one thing are less alike.
NEAR_DUPLICATE = 0.95
# A title on more pictures than this names a kind of thing, not a thing.
TITLE_PICTURES = 8
LARGEST_SHARE = 0.02
AT_ONCE = 1 << 14
TRAIN = "train"


def split(store: Store, folder: Path, wanted: Mapping[str, int], seed: int) -> dict[str, Path]:
    """Stores in `folder`: "train", and by name as many pairs as are `wanted` of each of the others, about.

    Groups of pictures that near-duplicates join, or titles on at most TITLE_PICTURES pictures, stay together; titles on
    more are on both sides, and fewer titles join where a group would be more than LARGEST_SHARE of the pairs. Stores
    that stand there already are not made again.
    """
    groups, joined_below = groups_of(store, seed)
    rows = _drawn(groups[store.image_ids], wanted, seed)
    made = {}
    for name, chosen in rows.items():
        made[name] = folder / name
        of = {"part": name, "of": store.identity, "seed": seed, "wanted": dict(wanted), "titles_join": joined_below}
        if (made[name] / "manifest.json").is_file() and read_manifest(made[name]).get("split") == of:
            continue
        write_part(store, made[name], chosen, {"split": of})
    return made


def groups_of(store: Store, seed: int) -> tuple[Ids, int]:
    """Group of each picture, int64 [images], and up to how many pictures a title joined."""
    duplicates = np.concatenate([np.empty((2, 0), np.int64), *_near_duplicates(store, seed)], 1)
    offsets, linked = store.caption_edges
    counts = np.diff(offsets)
    most = TITLE_PICTURES
    while True:
        joining = np.flatnonzero((counts > 1) & (counts <= most))
        first = np.repeat(linked[offsets[joining]], counts[joining])
        others = linked[ranges(offsets[joining], counts[joining])]
        one, other = np.concatenate([duplicates, np.stack([first, others])], 1)
        graph = coo_array((np.ones(len(one), np.int8), (one, other)), shape=(len(store.features),) * 2)
        groups: Ids = connected_components(graph, directed=False)[1].astype(np.int64)
        largest = np.bincount(groups[store.image_ids]).max()
        if most == 1 or largest <= max(LARGEST_SHARE * len(store), 2 * TITLE_PICTURES):
            return groups, most
        most //= 2


def _near_duplicates(store: Store, seed: int) -> Iterator[npt.NDArray[np.int64]]:
    """Pairs of pictures [2, n] of one cell whose cosine is NEAR_DUPLICATE or more, less what all have in common."""
    device = best_device()
    sample = np.sort(np.random.default_rng([seed, 13]).permutation(len(store.features))[:SAMPLE])
    mean_D = rows_of(store.features, sample, device).mean(0)
    cell = cells([store.features], seed)
    order = np.argsort(cell, kind="stable")
    bounds = np.searchsorted(cell[order], np.arange(cell.max() + 2))
    for begin, end in pairwise(bounds):
        # A cell of thousands holds what repeats: against its first ones, joining is all the same.
        rows = order[begin:end]
        features_CD = torch.nn.functional.normalize(rows_of(store.features, rows, device) - mean_D, dim=1)
        for at in range(0, len(rows), AT_ONCE):
            alike = features_CD[at : at + AT_ONCE] @ features_CD[:AT_ONCE].T >= NEAR_DUPLICATE
            one, other = alike.nonzero(as_tuple=True)
            yield np.stack([rows[one.cpu().numpy() + at], rows[other.cpu().numpy()]])


def _drawn(group: Ids, wanted: Mapping[str, int], seed: int) -> dict[str, Bools]:
    """Which pairs each part has; `group` int64 [pairs]."""
    sizes = np.bincount(group)
    order = np.random.default_rng([seed, 11]).permutation(np.flatnonzero(sizes))
    part_of = np.full(len(sizes), -1)
    for number, count in enumerate(wanted.values()):
        left = order[part_of[order] < 0]
        left = left[sizes[left] <= count]
        part_of[left[: np.searchsorted(np.cumsum(sizes[left]), count, side="right")]] = number
    rows = {name: part_of[group] == number for number, name in enumerate(wanted)}
    if empty := [name for name, chosen in rows.items() if not chosen.any() and wanted[name]]:
        raise UserError(
            f"fit: no group of pictures is small enough to hold {empty[0]} apart; give --held-out 0, or another source"
        )
    return {TRAIN: part_of[group] < 0} | rows


@torch.no_grad()
def write_part(store: Store, path: Path, chosen: Bools, told: dict[str, Any]) -> None:
    """A store at `path` of the `chosen` pairs, bool [pairs], with their pictures and captions alone."""
    images, image_ids = np.unique(store.image_ids[chosen], return_inverse=True)
    captions, caption_ids = np.unique(store.caption_ids[chosen], return_inverse=True)
    folder = staging(path)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with (folder / "features.bin").open("wb") as file:
        for start in range(0, len(images), AT_ONCE):
            file.write(np.ascontiguousarray(store.features[images[start : start + AT_ONCE]]).data)
    dtype = token_dtype(store.manifest["vocabulary"])
    with TokenFile(folder, dtype) as tokens:
        for start in range(0, len(captions), AT_ONCE):
            here = captions[start : start + AT_ONCE]
            lengths = store.offsets[here + 1] - store.offsets[here]
            tokens.write(store.tokens[ranges(store.offsets[here], lengths)], lengths)
    names, row, at = [name for name in PAIR_SCHEMA.names if not name.endswith("_id")], 0, 0
    with pq.ParquetWriter(folder / "pairs.parquet", PAIR_SCHEMA) as writer:
        for table in store.pair_tables(names):
            kept = np.flatnonzero(chosen[row : row + len(table)])
            own = slice(at, at := at + len(kept))
            row += len(table)
            ids = {"image_id": pa.array(image_ids[own]), "caption_id": pa.array(caption_ids[own])}
            columns = {name: table[name].take(pa.array(kept)) for name in names} | ids
            writer.write_table(pa.table({name: columns[name] for name in PAIR_SCHEMA.names}).cast(PAIR_SCHEMA))
    write_ids(folder, image_ids, caption_ids, len(captions))
    shutil.copytree(store.path / "tokenizer", folder / "tokenizer")
    counts = {"pairs": int(chosen.sum()), "images": len(images), "captions": len(captions)}
    manifest = {key: value for key, value in store.manifest.items() if key not in ("files", "format", "sha256")}
    finish(folder, path, manifest | counts | told, PAIR_FILES)
