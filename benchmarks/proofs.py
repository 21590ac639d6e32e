"""What it costs that nothing is lost: checkpoints, their digests, and the comparison of stores at a start.

    python -m benchmarks.proofs                    # BERT-base's size, a store of 5 GB; needs 15 GB of disk
    python -m benchmarks.proofs --layers 2 --store-gb 0.1 --pairs 10000

Checkpoints with digests and without are waited for in turns, each fsynced; medians. `share` is the time beyond those
without, with the bounds of its 90 % bootstrap interval: a disk's own changes are larger than what is measured. Beside
training, what counts is how long the trainer's thread stands still: `share` is that of a hundred seconds, a thousand
steps of a tenth; the device that makes the steps is simulated by sleep. The store's start is `proven` on one rank,
with an empty cache and again.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import date
from pathlib import Path
from unittest.mock import patch

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.measuring import RESULTS, Row, hardware, record
from efficientclip.config import load_config
from efficientclip.data.store import PAIR_FILES, Store, staging
from efficientclip.files import digests
from efficientclip.files.atomic import sync
from efficientclip.noise.confidence import ConfidenceTable
from efficientclip.prepare.writer import finish, write_ids
from efficientclip.training import checkpoint as checkpoints
from efficientclip.training.distributed import end_process, process_group
from efficientclip.training.run_folder import owned, proven
from efficientclip.training.runs import new_trainer, text_run
from efficientclip.training.trainer import Trainer
from tests import tiny

WIDTH = 512
STEPS, STEP_SECONDS = 1000, 0.1
# Later than all steps before.
FIRST = 10**6
COLUMNS = ("hardware", "what", "gigabytes", "seconds", "cpu_seconds", "share", "from", "to", "date", "command")


def only_synced(folder: Path, files: Iterable[str]) -> digests.Described:
    """What stood in the place of digests: every file fsynced."""
    names = sorted(files)
    for name in names:
        sync(folder / name)
    return {name: {"bytes": (folder / name).stat().st_size, "xxh3": ""} for name in names}


def large_store(folder: Path, gigabytes: float) -> Path:
    """A pair store of random finite features, a caption and an image a pair."""
    small, path = Store(tiny.pair_store(folder / "small")), folder / "large"
    rows = round(gigabytes * 1e9 / (2 * WIDTH))
    made = staging(path)
    made.mkdir()
    generator = np.random.default_rng(0)
    with (made / "features.bin").open("wb") as stream:
        for start in range(0, rows, 1 << 16):
            part = generator.standard_normal((min(1 << 16, rows - start), WIDTH), dtype=np.float32)
            stream.write((part / np.linalg.norm(part, axis=1, keepdims=True)).astype(np.float16).tobytes())
    captions = np.arange(rows, dtype=np.int32) % (len(small.offsets) - 1)
    for name in ("tokens.bin", "offsets.bin", "pairs.parquet"):
        (made / name).write_bytes((small.path / name).read_bytes())
    write_ids(made, np.arange(rows, dtype=np.int32), captions, len(small.offsets) - 1)
    os.rename(small.path / "tokenizer", made / "tokenizer")
    kept = {key: value for key, value in small.manifest.items() if key not in ("format", "files", "sha256")}
    finish(made, path, kept | {"width": WIDTH, "images": rows, "pairs": rows}, PAIR_FILES)
    return path


@contextmanager
def timed(seconds: list[tuple[float, float]]) -> Iterator[None]:
    """Seconds on the clock and of CPUs."""
    started = time.perf_counter(), time.process_time()
    yield
    seconds.append((time.perf_counter() - started[0], time.process_time() - started[1]))


def starts(store: Path) -> tuple[tuple[float, float], tuple[float, float]]:
    """Seconds, as `timed` tells them, of the first and of the second look at the store."""
    seconds: list[tuple[float, float]] = []
    for _ in range(2):
        with timed(seconds):
            proven({"store": Store(store)})
    return seconds[0], seconds[1]


def saves(trainer: Trainer, rounds: int) -> list[list[tuple[float, float]]]:
    """Seconds of checkpoints with digests and without, in turns."""
    seconds: list[list[tuple[float, float]]] = [[], []]
    for step in range(2 * rounds):
        # Another one begins each round: what precedes a write changes its time.
        way = (step + step // 2) % 2
        unproven = patch.object(checkpoints.digests, "described", only_synced) if way else nullcontext()
        with unproven, timed(seconds[way]):
            trainer.checkpoints.save(trainer.engine, step + 1, trainer._state(), None)
            trainer.checkpoints.finish()
    return seconds


def besides(trainer: Trainer, pairs: int, rounds: int) -> list[list[tuple[float, float]]]:
    """Seconds that training stands still for a checkpoint with ECL's table of `pairs`, and those until it is there."""
    trainer.confidence = ConfidenceTable(pairs, trainer.config.confidence)
    seconds: list[list[tuple[float, float]]] = [[], []]
    for number in range(rounds):
        with timed(seconds[1]):
            with timed(still := []):
                trainer.checkpoints.save(trainer.engine, FIRST + number, trainer._state(), None)
            while not trainer.checkpoints.written:
                time.sleep(STEP_SECONDS)
            with timed(still):
                trainer.checkpoints.finish()
        seconds[0].append((sum(span[0] for span in still), sum(span[1] for span in still)))
    return seconds


def median(seconds: list[tuple[float, float]]) -> tuple[float, float]:
    clock, cpus = zip(*seconds, strict=True)
    return statistics.median(clock), statistics.median(cpus)


def bytes_of(trainer: Trainer) -> float:
    """Of a checkpoint, on the average of those that are there."""
    there = list(trainer.checkpoints.folder.glob("step-*"))
    return sum(path.stat().st_size for step in there for path in step.rglob("*") if path.is_file()) / len(there)


def beyond(some: list[tuple[float, float]], others: list[tuple[float, float]]) -> tuple[float, float, float]:
    """How much longer the median of `some` takes than that of `others`, and the 5 and 95 % of 2,000 resamplings."""
    seconds = np.array([[pair[0][0], pair[1][0]] for pair in zip(some, others, strict=True)])
    picked = seconds[np.random.default_rng(0).integers(len(seconds), size=(2000, len(seconds)))]
    drawn = np.median(picked, axis=1)
    low, high = np.quantile(drawn[:, 0] / drawn[:, 1] - 1, (0.05, 0.95))
    whole = np.median(seconds, axis=0)
    return float(whole[0] / whole[1] - 1), float(low), float(high)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16, help="of width 768; 16 are 113M parameters")
    parser.add_argument("--pairs", type=int, default=10_000_000, help="of ECL's table beside training")
    parser.add_argument("--store-gb", type=float, default=5.0)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="proofs-", dir=".") as name:
        folder = Path(name).resolve()
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        rows = measured(folder, given.layers, given.store_gb, given.pairs, given.rounds)
    record(rows, RESULTS / "proofs.csv", ("hardware", "what"), COLUMNS)
    table = Table(*COLUMNS[1:8])
    for row in rows:
        table.add_row(*(str(row.get(column, "")) for column in COLUMNS[1:8]))
    Console().print(table)
    return 0


def measured(folder: Path, layers: int, gigabytes: float, pairs: int, rounds: int) -> list[Row]:
    tiny.pair_store(folder / "store")
    tower = {
        "model_type": "bert", "hidden_size": 768, "num_hidden_layers": layers, "num_attention_heads": 12,
        "intermediate_size": 3072, "max_position_embeddings": 128,
    }  # fmt: skip
    changes = {"model__text_tower": {"architecture": tower}, "mlm__texts_per_batch": 0, "data__validation": {}}
    file = tiny.config(folder, run=str(folder / "run"), training__threads=0, **changes)
    config = load_config(file)
    large = large_store(folder, gigabytes)
    with process_group(config), owned(config.run, "run", "benchmark"):
        first, second = starts(large)
        trainer = new_trainer(config, Trainer, text_run(config))
        # The optimiser's state is there from the first step on.
        batch = next(trainer.loader)
        trainer.bank.add_to(batch, trainer.source.edges)
        trainer.train_step(batch)
        digested, bare = saves(trainer, rounds)
        size = bytes_of(trainer)
        still, until = besides(trainer, pairs, rounds)
        large_size = bytes_of(trainer)
    held = sum(entry["bytes"] for entry in Store(large).manifest["files"].values())
    waited = median(still)
    share = waited[0] / (STEPS * STEP_SECONDS)
    figures = [
        ("checkpoint, with digests", size, median(digested), beyond(digested, bare)),
        ("checkpoint, without", size, median(bare), None),
        (f"checkpoint beside training, {pairs} pairs: training waits", large_size, waited, (share,)),
        (f"checkpoint beside training, {pairs} pairs: until it is there", large_size, median(until), None),
        ("store at a start, first", held, first, None),
        ("store at a start, again", held, second, None),
    ]
    return [
        {
            "hardware": hardware("cpu"),
            "what": what,
            "gigabytes": f"{held / 1e9:.2f}",
            "seconds": f"{seconds[0]:.3f}",
            "cpu_seconds": f"{seconds[1]:.3f}",
            **({} if share is None else {k: f"{v:.3f}" for k, v in zip(("share", "from", "to"), share, strict=False)}),
            "date": date.today().isoformat(),
            "command": " ".join(["python -m benchmarks.proofs", *sys.argv[1:]]),
        }
        for what, held, seconds, share in figures
    ]


if __name__ == "__main__":
    end_process(main())
