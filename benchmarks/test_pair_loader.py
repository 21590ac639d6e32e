"""The pair loader beside a torch DataLoader and vectorised numpy, in one run; see docs/performance.md.

    pytest benchmarks/test_pair_loader.py --benchmark-only

All make the same batches of 4,096 pairs from the same memory-mapped store, which lies in the page cache: packed tokens,
positions, boundaries and frozen features. They take turns; figures are medians. While the loader's tests are red, or
other processes take the cores, nothing is recorded.
"""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Iterator
from datetime import date
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, Dataset

from benchmarks.measuring import Neighbours, hardware, record, wait_until_idle
from efficientclip.data.pairs import PairLoader
from efficientclip.data.store import PAIR_FILES, Store, staging
from efficientclip.prepare.writer import finish, write_ids

PAIRS, BATCH, WIDTH, MEAN_TOKENS, ROUNDS = 1_000_000, 4_096, 512, 20, 9
# Workers of the DataLoader, and the most batches that it or PairLoader makes ahead by default.
WORKERS, AHEAD = 2, 4
# A round goes so often around: what other machines do to this one's memory then falls on all alike.
TURNS = 8
TESTS = ("tests/data/test_pairs.py", "tests/csrc/test_loader.py", "-k", "not sanitizers")
KEY = ("pairs", "batch", "width", "mean_tokens", "hardware", "torch", "implementation")
COLUMNS = (*KEY, "pairs_per_s", "ms_per_batch", "ratio_of_ours", "rounds", "date")

Packed = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """A million pairs of as many captions and images."""
    random = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("pair-loader") / "store"
    folder = staging(path)
    folder.mkdir()
    with (folder / "features.bin").open("wb") as file:
        for _ in range(0, PAIRS, 10_000):
            # Random bits of finite halves.
            file.write((random.integers(0, 1 << 16, (10_000, WIDTH), np.uint16) & 0xBBFF).tobytes())
    lengths = np.clip(random.poisson(MEAN_TOKENS, PAIRS), 3, 77)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    offsets.astype(np.int64).tofile(folder / "offsets.bin")
    random.integers(5, 21_128, offsets[-1], np.uint16).tofile(folder / "tokens.bin")
    image_ids, caption_ids = random.permutation(PAIRS), np.arange(PAIRS)
    write_ids(folder, image_ids, caption_ids, PAIRS)
    pq.write_table(pa.table({"image_id": image_ids, "caption_id": caption_ids}), folder / "pairs.parquet")
    manifest = {"kind": "pairs", "width": WIDTH, "pairs": PAIRS, "token_dtype": "uint16", "vocabulary": 21_128}
    finish(folder, path, manifest, PAIR_FILES)
    yield Store(path)
    shutil.rmtree(path)


class PairDataset(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """One pair an item, as data sets for torch are written."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        store, caption = self.store, self.store.caption_ids[row]
        tokens = store.tokens[store.offsets[caption] : store.offsets[caption + 1]]
        feature = np.array(store.features[store.image_ids[row]])
        return torch.from_numpy(tokens.astype(np.int64)), torch.from_numpy(feature)


def collate(items: list[tuple[torch.Tensor, torch.Tensor]]) -> Packed:
    items = sorted(items, key=lambda item: len(item[0]))
    lengths = torch.tensor([0, *(len(tokens) for tokens, _ in items)])
    return (
        torch.cat([tokens for tokens, _ in items]),
        torch.cat([torch.arange(len(tokens)) for tokens, _ in items]),
        lengths.cumsum(0).int(),
        torch.stack([feature for _, feature in items]),
    )


def by_item(store: Store) -> Iterator[Packed]:
    generator = torch.Generator().manual_seed(0)
    while True:
        yield from DataLoader(
            PairDataset(store),
            BATCH,
            shuffle=True,
            generator=generator,
            num_workers=WORKERS,
            collate_fn=collate,
            drop_last=True,
        )


def by_numpy(store: Store) -> Iterator[Packed]:
    random = np.random.default_rng(0)
    while True:
        order = random.permutation(len(store))
        for start in range(0, len(order) - BATCH + 1, BATCH):
            yield taken(store, order[start : start + BATCH])


def taken(store: Store, rows: np.ndarray[Any, Any]) -> Packed:
    """The batch of `rows` in vectorised numpy, shortest caption first."""
    captions = store.caption_ids[rows]
    begin = store.offsets[captions]
    lengths = store.offsets[captions + 1] - begin
    by_length = np.argsort(lengths, kind="stable")
    lengths = lengths[by_length]
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    positions = np.arange(bounds[-1]) - np.repeat(bounds[:-1], lengths)
    tokens = store.tokens.take(np.repeat(begin[by_length], lengths) + positions)
    return (
        torch.from_numpy(tokens.astype(np.int64)),
        torch.from_numpy(positions),
        torch.from_numpy(bounds.astype(np.int32)),
        torch.from_numpy(store.features.take(store.image_ids[rows], axis=0)),
    )


def ours(store: Store, threads: int) -> Iterator[Any]:
    with PairLoader(store, batch_size=BATCH, threads=threads) as loader:
        while True:
            yield from loader


def check_same_work(store: Store) -> None:
    """A speed-up of something else is no speed-up."""
    with PairLoader(store, batch_size=BATCH) as loader:
        batch = next(loader)
    (found,) = batch.inputs
    tokens, positions, bounds, features = taken(store, batch.rows_N)
    assert torch.equal(found["input_ids"], tokens) and torch.equal(found["position_ids"], positions)
    assert torch.equal(found["segments"].cu_seqlens, bounds)
    assert np.array_equal(batch.frozen_MD.numpy().view(np.uint16), features.numpy().view(np.uint16))
    lengths = collate([PairDataset(store)[int(row)] for row in batch.rows_N])[2]
    assert torch.equal(lengths, bounds)


@pytest.mark.usefixtures("green")
def test_pair_loader(benchmark: Any, capsys: pytest.CaptureFixture[str], store: Store, request: Any) -> None:
    torch.set_num_threads(1)
    check_same_work(store)
    # Batches a turn.
    plan: dict[str, tuple[Iterator[Any], int]] = {
        "PairLoader, 1 thread": (ours(store, 1), 50),
        "PairLoader, 2 threads": (ours(store, 2), 50),
        "numpy, 1 thread": (by_numpy(store), 25),
        f"torch DataLoader, {WORKERS} workers": (by_item(store), 2),
    }
    seconds: dict[str, list[float]] = {name: [] for name in plan}
    first = next(iter(plan))

    def turn(name: str) -> float:
        batches, count = plan[name]
        if name == first:
            # The DataLoader's workers, whose turn it was, go on making batches ahead.
            wait_until_idle()
        # What was made ahead, in the others' time.
        for _ in range(AHEAD):
            next(batches)
        started = time.perf_counter()
        for _ in range(count):
            next(batches)
        return (time.perf_counter() - started) / count / TURNS

    def round_() -> None:
        taken = dict.fromkeys(plan, 0.0)
        for _ in range(TURNS):
            for name in plan:
                taken[name] += turn(name)
        for name, mean in taken.items():
            seconds[name].append(mean)

    neighbours = Neighbours()
    benchmark.pedantic(round_, rounds=ROUNDS + 1)
    busy = neighbours.busy(2, {name: taken[1:] for name, taken in seconds.items()})
    for batches, _ in plan.values():
        batches.close()  # type: ignore[attr-defined]
    if benchmark.disabled:
        return
    # The first round warms up.
    medians = {name: statistics.median(taken[1:]) for name, taken in seconds.items()}
    ratios = {name: np.median(np.divide(taken[1:], seconds[first][1:])) for name, taken in seconds.items()}
    rows = [
        {
            "pairs": PAIRS, "batch": BATCH, "width": WIDTH, "mean_tokens": MEAN_TOKENS, "hardware": hardware("cpu"),
            "torch": torch.__version__, "implementation": name, "pairs_per_s": f"{BATCH / median:.4g}",
            "ms_per_batch": f"{1000 * median:.4g}", "ratio_of_ours": f"{ratios[name]:.3g}",
            "rounds": ROUNDS, "date": date.today(),
        }
        for name, median in medians.items()
    ]  # fmt: skip
    table = Table("implementation", "pairs_per_s", "ms_per_batch", "ratio_of_ours", title="pair loader")
    for row in rows:
        table.add_row(*(str(row[column.header]) for column in table.columns))
    with capsys.disabled():
        Console(width=100).print("", table)
    if busy:
        pytest.skip(f"{busy}; nothing recorded")
    folder = request.config.getoption("--results")
    folder.mkdir(parents=True, exist_ok=True)
    record(rows, folder / "pair_loader.csv", KEY, COLUMNS)


def test_opening_a_store(benchmark: Any, store: Store) -> None:
    benchmark(Store, store.path)
