"""Time and memory of the judge of cross-fit on stores that are made up, beside what its products alone would take.

    python -m benchmarks.judge [--pairs 200k,1M,5M] [--folder DIR]

A made-up store: images and captions lie around concepts, captions recur, a fifth of the captions is that of another
pair; pairs are of four sources. Two towers know 70 % of the concepts. 5M pairs take 9 GB of disk. Each size is judged
by a process of its own, from the page cache.

The floor: a pair is compared with NULL_CAPTIONS captions twice, 4 NULL_CAPTIONS D operations, 8.4 million at D = 512.
All else is small beside it: of a caption, by two towers, and of an image the DIRECTIONS of its cell are computed (.13
and .07 million), and what these are learned from is bounded (.2 Tera). `floor_s` is the time that the comparison takes
at the rate of torch.mm on 4,096 rows, in the same process, before. Memory is the process's own (RssAnon): mapped
features are the page cache's.
"""

from __future__ import annotations

import argparse
import multiprocessing
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from benchmarks.measuring import RESULTS, Neighbours, Row, hardware, own_seconds, require_green, show_and_record
from efficientclip.data.store import PAIR_FILES, Store, staging
from efficientclip.evaluation.verdicts import separation
from efficientclip.noise.answers import NULL_CAPTIONS
from efficientclip.noise.docket import Docket
from efficientclip.noise.neighbourhoods import folds, near, pair_groups
from efficientclip.planning.settings import parse_count
from efficientclip.prepare.writer import finish, write_ids

ROOT = Path(__file__).parents[1]
WIDTH, NOISE, KNOWN, SOURCES = 512, 0.2, 0.7, (0.5, 0.3, 0.15, 0.05)
TESTS = ("tests/noise/test_rate.py", "tests/noise/test_neighbourhoods.py")
KEY = ("hardware", "cores", "torch", "pairs", "width")
COLUMNS = (
    *KEY, "captions", "images", "groups_s", "answers_s", "verdicts_s", "judge_s", "cpu_s", "floor_s", "of_floor",
    "peak_mib", "true", "estimated", "auc", "note", "date", "command",
)  # fmt: skip


def made_up_store(folder: Path, pairs: int, random: np.random.Generator) -> Store:
    """About `pairs` pairs, and in text-0.bin and text-1.bin two towers' features of the captions, fp16."""
    concepts, images, captions = max(64, pairs // 200), int(0.8 * pairs), int(0.5 * pairs)
    concept_of_image, concept_of_caption = random.integers(0, concepts, images), random.integers(0, concepts, captions)
    by_concept = np.argsort(concept_of_caption, kind="stable")
    held = np.bincount(concept_of_caption, minlength=concepts)
    image_ids = np.concatenate([np.arange(images), random.integers(0, images, pairs - images)])
    own = concept_of_image[image_ids]
    # Some captions of a concept are common, most are rare.
    place = (np.cumsum(held) - held)[own] + (held[own] * random.random(pairs) ** 3).astype(np.int64)
    caption_ids = by_concept[np.minimum(place, captions - 1)]
    wrong = np.flatnonzero(random.random(pairs) < NOISE)
    caption_ids[wrong] = caption_ids[random.permutation(wrong)]
    _, first = np.unique(image_ids * captions + caption_ids, return_index=True)
    image_ids, caption_ids = image_ids[first], caption_ids[first]
    noise = concept_of_caption[caption_ids] != concept_of_image[image_ids]
    kept, caption_ids = np.unique(caption_ids, return_inverse=True)
    made = staging(folder / "store")
    made.mkdir(parents=True)
    # Concepts lie in few directions, what is no concept in all.
    centres = unit(random.standard_normal((concepts, 64), np.float32) @ random.standard_normal((64, WIDTH), np.float32))
    write_around(made / "features.bin", centres, concept_of_image, random)
    for tower in range(2):
        learned = centres.copy()
        unknown = random.random(concepts) > KNOWN
        learned[unknown] = learned[random.permutation(concepts)[: unknown.sum()]]
        write_around(folder / f"text-{tower}.bin", learned, concept_of_caption[kept], random)
    np.zeros(len(kept), np.uint16).tofile(made / "tokens.bin")
    np.arange(len(kept) + 1).tofile(made / "offsets.bin")
    write_ids(made, image_ids, caption_ids, len(kept))
    source = random.choice(len(SOURCES), images, p=SOURCES)[image_ids]
    table = {"source": pa.array(source).cast(pa.string()), "noise": noise}
    pq.write_table(pa.table(table), made / "pairs.parquet")
    manifest = {"kind": "pairs", "tower": "made up", "tokenizer": "none", "width": WIDTH, "pairs": len(image_ids)}
    counts = {"images": images, "captions": len(kept), "token_dtype": "uint16", "vocabulary": 1}
    finish(made, folder / "store", manifest | counts, PAIR_FILES)
    return Store(folder / "store")


def unit(rows: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def write_around(
    file: Path, centres: npt.NDArray[np.float32], concept: npt.NDArray[np.int64], random: np.random.Generator
) -> None:
    """A feature fp16 a row of `concept`, as far from its centre as that from the origin."""
    with file.open("wb") as stream:
        for start in range(0, len(concept), 1 << 16):
            some = centres[concept[start : start + (1 << 16)]]
            apart = random.standard_normal(some.shape, np.float32) / WIDTH**0.5
            unit(some + apart).astype(np.float16).tofile(stream)


@contextmanager
def watched_memory() -> Iterator[list[int]]:
    """The peak of this process's own memory, in bytes, once the block has ended."""
    peak, ended = [0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.02):
            lines = Path("/proc/self/status").read_text().splitlines()
            peak[0] = max(peak[0], next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon")))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    yield peak
    ended.set()
    thread.join()


def product_rate() -> float:
    """Operations a second of torch.mm."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    one = torch.randn(4096, WIDTH, device=device)
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        (one @ one.T)[0, 0].item()
        seconds.append(time.perf_counter() - began)
    return 2 * 4096**2 * WIDTH / sorted(seconds)[2]


def judged(folder: Path) -> Row:
    """The figures of one store, in this process."""
    store, rate = Store(folder / "store"), product_rate()
    captions = len(store.offsets) - 1
    text_2KD = [np.memmap(folder / f"text-{tower}.bin", np.float16, "r").reshape(-1, WIDTH) for tower in range(2)]
    neighbours, spent, began = Neighbours(), own_seconds(), time.perf_counter()
    with watched_memory() as peak:
        groups = pair_groups(store, near(store.features, 0))
        docket = Docket(store, folds(groups, 0), text_2KD, 0)
        grouped = time.perf_counter()
        answers = np.concatenate([docket.answers(part) for part in range(len(docket.parts))])
        answered = time.perf_counter()
        found = docket.verdicts(answers, groups, 0)
        ended = time.perf_counter()
    noise = pq.read_table(store.path / "pairs.parquet")["noise"].to_numpy()
    floor = 4 * len(store) * NULL_CAPTIONS * WIDTH / rate
    return {
        "pairs": len(store), "captions": captions, "images": len(store.features), "groups_s": round(grouped - began, 1),
        "answers_s": round(answered - grouped, 1), "verdicts_s": round(ended - answered, 1),
        "judge_s": round(ended - began, 1), "cpu_s": round(own_seconds() - spent, 1), "floor_s": round(floor, 1),
        "of_floor": round((ended - began) / floor, 2), "peak_mib": round(peak[0] / 2**20),
        "true": round(float(noise.mean()), 3), "estimated": round(found.rate, 3),
        "auc": round(separation(found.clean_log_odds[~noise], found.clean_log_odds[noise]), 4),
        "note": neighbours.busy(torch.get_num_threads(), {"judge": [1.0]}) or "",
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", default="200k,1M,5M")
    parser.add_argument("--folder", type=Path, help="where stores are made and removed again; the system's by default")
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args()
    require_green(ROOT, *TESTS)
    common = {
        "hardware": hardware("cuda" if torch.cuda.is_available() else "cpu"), "cores": torch.get_num_threads(),
        "torch": torch.__version__, "width": WIDTH, "date": date.today(),
        "command": "python -m benchmarks.judge " + " ".join(sys.argv[1:]),
    }  # fmt: skip
    shown = [name for name in COLUMNS if name not in ("hardware", "torch", "command", "date")]
    for pairs in map(parse_count, given.pairs.split(",")):
        folder = Path(tempfile.mkdtemp(dir=given.folder))
        try:
            made_up_store(folder, pairs, np.random.default_rng(0))
            with multiprocessing.get_context("spawn").Pool(1) as process:
                row = process.apply(judged, (folder,))
        finally:
            shutil.rmtree(folder)
        # The largest takes long: what is measured before stands.
        show_and_record(
            [common | row], shown, "judging a made-up store", None, given.results / "judge.csv", KEY, COLUMNS
        )


if __name__ == "__main__":
    main()
