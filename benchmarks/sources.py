"""Images per second from each form of source, from the page cache and where each read waits; a restore far inside.

    python -m benchmarks.sources [--rounds 5] [--wait-ms 1]

The same photographs lie in a tar, as files that a CSV names, as Chinese-CLIP's base64 and in a Parquet. Each has a
process of its own, and these work in turns. Where reads wait, a library that is loaded before the system's adds time
to every `open` and `pread` of the reader. Needs gcc, scikit-image and scikit-learn.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from datetime import date
from io import BytesIO
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from benchmarks.images import BATCH, MEAN, PER_SHARD, STD, encoded_pictures, make_shards
from benchmarks.measuring import RESULTS, Neighbours, Row, hardware, require_green, show_and_record
from efficientclip import ImageLoader

ROOT = Path(__file__).parents[1]
TURN, AHEAD = 1.5, 4
FORMS = ("tar", "CSV of files", "base64", "Parquet")
COLUMNS = (
    "date", "hardware", "torch", "source", "wait_ms", "images_per_s", "of_tar", "of_page_cache", "seconds", "rounds",
    "note",
)  # fmt: skip
KEY = ("date", "hardware", "torch", "source", "wait_ms")
FAR, PER_TAR = 1_000_000, 10_000
WAITING = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdlib.h>
#include <sys/types.h>
#include <unistd.h>
static void wait_for_it(void) { usleep(atoi(getenv("READ_WAIT_US"))); }
ssize_t pread(int file, void *to, size_t size, off_t at) {
    static ssize_t (*next)(int, void *, size_t, off_t);
    if (!next) next = dlsym(RTLD_NEXT, "pread");
    wait_for_it();
    return next(file, to, size, at);
}
int open(const char *path, int flags, ...) {
    static int (*next)(const char *, int, ...);
    va_list rest;
    va_start(rest, flags);
    const int mode = flags & O_CREAT ? va_arg(rest, int) : 0;
    va_end(rest);
    if (!next) next = dlsym(RTLD_NEXT, "open");
    /* The reader's own. */
    if (flags & O_NONBLOCK) wait_for_it();
    return next(path, flags, mode);
}
"""


def make_forms(folder: Path) -> dict[str, Path]:
    shard = make_shards(folder / "photographs", 480, 640)[0]
    pictures = encoded_pictures([shard])
    captions = [f"caption {number}" for number in range(len(pictures))]
    (folder / "files").mkdir(exist_ok=True)
    names = [f"files/{number:05}.jpg" for number in range(len(pictures))]
    for name, picture in zip(names, pictures, strict=True):
        (folder / name).write_bytes(picture)
    rows = zip(names, captions, strict=True)
    (folder / "t.csv").write_text("image,caption\n" + "".join(f"{name},{text}\n" for name, text in rows))
    lines = (f"{number}\t{base64.b64encode(picture).decode()}\n" for number, picture in enumerate(pictures))
    (folder / "t_imgs.tsv").write_text("".join(lines))
    texts = ({"text_id": number, "text": text, "image_ids": [number]} for number, text in enumerate(captions))
    (folder / "t_texts.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    held = [{"bytes": picture, "path": None} for picture in pictures]
    pq.write_table(pa.table({"image": held, "caption": captions}), folder / "t.parquet")
    return dict(zip(FORMS, (shard, folder / "t.csv", folder / "t_imgs.tsv", folder / "t.parquet"), strict=True))


def batches(source: Path) -> Iterator[int]:
    with ImageLoader(source, batch_size=BATCH, threads=2, mean=MEAN, std=STD) as loader:
        while True:
            for batch in loader:
                yield len(batch)


def serve(source: Path) -> None:
    """A turn for each line on standard input; its images per second go to standard output."""
    running = batches(source)
    # The whole source once: from then on it lies in the page cache.
    for _ in range(PER_SHARD // BATCH + 1):
        next(running)
    print("ready", flush=True)
    for _ in sys.stdin:
        for _ in range(AHEAD):
            next(running)
        images, start = 0, time.perf_counter()
        while (taken := time.perf_counter() - start) < TURN:
            images += next(running)
        print(images / taken, flush=True)


def rates(sources: dict[str, Path], library: Path, wait_ms: float, rounds: int) -> dict[tuple[str, float], list[float]]:
    preload = {"LD_PRELOAD": str(library), "READ_WAIT_US": str(int(1000 * wait_ms))}
    running: dict[tuple[str, float], subprocess.Popen[str]] = {}
    for form, source in sources.items():
        for wait in (0.0, wait_ms):
            command = [sys.executable, "-m", "benchmarks.sources", "--serve", str(source)]
            running[form, wait] = subprocess.Popen(
                command, cwd=ROOT, env=os.environ | (preload if wait else {}), text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            )  # fmt: skip
            assert running[form, wait].stdout.readline() == "ready\n"
    found: dict[tuple[str, float], list[float]] = {one: [] for one in running}
    for _ in range(rounds):
        for one, process in running.items():
            # What its threads made ahead is taken away within the turn.
            print(file=process.stdin, flush=True)
            found[one].append(float(process.stdout.readline()))
    for process in running.values():
        process.stdin.close()
        process.wait()
    return found


def restores(folder: Path) -> tuple[float, float]:
    """Seconds from `restore()` at sample FAR to the next batch, without and with indexes."""
    picture = BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "JPEG")
    files = [folder / f"{number:03}.tar" for number in range(FAR // PER_TAR + 1)]
    with tarfile.open(files[0], "w") as tar:
        for number in range(PER_TAR):
            for suffix, content in (("jpg", picture.getvalue()), ("txt", b"caption")):
                member = tarfile.TarInfo(f"{number:05}.{suffix}")
                member.size = len(content)
                tar.addfile(member, BytesIO(content))
    for file in files[1:]:
        shutil.copyfile(files[0], file)
    taken = []
    for _ in range(2):
        with ImageLoader(files, batch_size=8, size=8, threads=2, indexes=folder / "index") as loader:
            state = {**loader.state(), "consumed": FAR}
            start = time.perf_counter()
            loader.restore(state)
            next(loader)
            taken.append(time.perf_counter() - start)
    return taken[0], taken[1]


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--rounds", type=int, default=5)
    asked.add_argument("--wait-ms", type=float, default=1.0, help="of each open and read, where reads wait")
    asked.add_argument("--results", type=Path, default=RESULTS)
    asked.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    given = asked.parse_args()
    if given.serve:
        serve(given.serve)
        return
    require_green(ROOT, "tests/data/test_images.py", "tests/data/test_ahead.py")
    same = {"date": date.today(), "hardware": hardware("cpu"), "torch": torch.__version__, "rounds": given.rounds}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        library = folder / "waiting.so"
        subprocess.run(
            ["gcc", "-shared", "-fPIC", "-O1", "-x", "c", "-", "-o", library, "-ldl"],
            input=WAITING,
            text=True,
            check=True,
        )
        neighbours = Neighbours()
        found = rates(make_forms(folder), library, given.wait_ms, given.rounds)
        seconds = {f"{form}, {wait} ms": [1 / rate for rate in taken] for (form, wait), taken in found.items()}
        busy = neighbours.busy(2, seconds)
        walked, jumped = restores(folder)

    def share(of: list[float], whole: list[float]) -> str:
        return f"{statistics.median(one / other for one, other in zip(of, whole, strict=True)):.2f}"

    rows: list[Row] = [
        same | {
            "source": form, "wait_ms": wait, "images_per_s": f"{statistics.median(taken):.0f}",
            "of_tar": share(taken, found["tar", wait]), "of_page_cache": share(taken, found[form, 0.0]),
        }
        for (form, wait), taken in found.items()
    ]  # fmt: skip
    for source, taken in (("headers", walked), ("an index", jumped)):
        rows.append(same | {"source": f"restore at {FAR:,} by {source}", "wait_ms": 0.0, "seconds": f"{taken:.2f}"})
    shown = ("source", "wait_ms", "images_per_s", "of_tar", "of_page_cache", "seconds")
    show_and_record(rows, shown, "Sources", busy, given.results / "sources.csv", KEY, COLUMNS)


if __name__ == "__main__":
    main()
