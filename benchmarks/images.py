"""What `test_images.py` measures: image loaders side by side, from tars of JPEGs to batches of 224 x 224 floats.

Photographs are those that scikit-image and scikit-learn carry, cut at random, so that no two files are equal.
"""

from __future__ import annotations

import io
import itertools
import statistics
import tarfile
import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.measuring import MIB, Memory, Neighbours, Row, hardware, wait_until_idle
from efficientclip import ImageLoader

SHARDS, PER_SHARD, QUALITY, BATCH = 2, 1500, 86, 128
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
# Seconds and batches a round takes at least, after the batches that a pipeline had ready were taken away.
ROUND, BATCHES, PREFETCHED = 1.5, 8, 4
KEY = ("height", "width", "batch", "hardware", "torch", "implementation", "threads")
COLUMNS = (
    *KEY, "images_per_s", "over_open_clip", "over_spdl", "over_decoding", "mean_error", "max_error",
    "extra_mib", "mean_bytes", "rounds", "note", "date",
)  # fmt: skip


def photographs() -> list[Image.Image]:
    from skimage import data
    from sklearn.datasets import load_sample_images

    carried = [data.astronaut(), data.coffee(), data.chelsea(), data.rocket(), *load_sample_images().images]
    return [Image.fromarray(picture) for picture in carried]


def make_shards(folder: Path, height: int, width: int, seed: int = 0) -> list[Path]:
    """Tars of JPEGs `height` x `width` with captions, made once; a cut keeps at least 4/5 of a photograph's side."""
    files = [folder / f"{height}x{width}-{number}.tar" for number in range(SHARDS)]
    if all(file.is_file() for file in files):
        return files
    folder.mkdir(parents=True, exist_ok=True)
    random, pictures = np.random.default_rng(seed), photographs()
    for file in files:
        with tarfile.open(file.with_suffix(".partial"), "w") as tar:
            for number in range(PER_SHARD):
                picture = pictures[random.integers(len(pictures))]
                side = min(picture.width / width, picture.height / height) * random.uniform(0.8, 1)
                left, top = (
                    random.uniform(0, whole - side * part)
                    for whole, part in ((picture.width, width), (picture.height, height))
                )
                box = (left, top, left + side * width, top + side * height)
                cut = picture.resize((width, height), Image.Resampling.BICUBIC, box)
                encoded = io.BytesIO()
                cut.save(encoded, "JPEG", quality=QUALITY)
                for suffix, content in (("jpg", encoded.getvalue()), ("txt", f"{file.stem} {number}".encode())):
                    member = tarfile.TarInfo(f"{file.stem}-{number:05}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        file.with_suffix(".partial").rename(file)
    return files


def encoded_pictures(shards: list[Path]) -> list[bytes]:
    found = []
    for shard in shards:
        with tarfile.open(shard) as tar:
            found += [tar.extractfile(member).read() for member in tar if member.name.endswith(".jpg")]  # type: ignore[union-attr]
    return found


# Implementations: each yields the number of pictures in its next batch, endlessly.

Batches = Generator[int, None, None]


def ours(shards: list[Path], threads: int, scaled: bool) -> Batches:
    with ImageLoader(shards, batch_size=BATCH, threads=threads, mean=MEAN, std=STD, scaled_decoding=scaled) as loader:
        while True:
            for batch in loader:
                yield len(batch.images)


def open_clip(shards: list[Path], threads: int) -> Batches:
    """Its own training pipeline, with a tokenizer that does nothing."""
    from open_clip.transform import image_transform
    from open_clip_train.data import get_wds_dataset

    given = SimpleNamespace(
        train_data="::".join(map(str, shards)), train_num_samples=SHARDS * PER_SHARD,
        train_data_upsampling_factors=None, dataset_resampled=True, seed=0, batch_size=BATCH, workers=threads,
        world_size=1,
    )  # fmt: skip
    nothing = torch.zeros(1, 1)
    data = get_wds_dataset(given, image_transform(224, is_train=True), True, tokenizer=lambda text: nothing)
    for epoch in itertools.count():
        data.set_epoch(epoch)
        for images, _ in data.dataloader:
            yield len(images)


def dali(shards: list[Path], threads: int) -> Batches:
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(batch_size=BATCH, num_threads=threads, device_id=None)
    def training() -> Any:
        encoded, _ = fn.readers.webdataset(
            paths=[str(shard) for shard in shards], ext=["jpg", "txt"], random_shuffle=True, initial_fill=1000
        )
        cut = fn.decoders.image_random_crop(encoded, random_area=[0.9, 1.0], random_aspect_ratio=[3 / 4, 4 / 3])
        small = fn.resize(cut, size=[224, 224], interp_type=types.INTERP_CUBIC, antialias=True)
        return fn.crop_mirror_normalize(
            small, dtype=types.FLOAT, output_layout="CHW",
            mean=[255 * m for m in MEAN], std=[255 * s for s in STD],
        )  # fmt: skip

    running = training()
    running.build()
    while True:
        (out,) = running.run()
        yield len(out)


def spdl(shards: list[Path], threads: int) -> Batches:
    """A pipeline of threads as its manual builds them: JPEGs decoded at a fraction of their size, cut, resized."""
    import cv2
    from simplejpeg import decode_jpeg
    from spdl.pipeline import PipelineBuilder

    cv2.setNumThreads(1)
    random = np.random.default_rng(0)
    mean, std = (255 * np.array(values, np.float32) for values in (MEAN, STD))

    def samples() -> Generator[bytes, None, None]:
        for shard in itertools.cycle(shards):
            with tarfile.open(shard) as tar:
                for member in tar:
                    if member.name.endswith(".jpg"):
                        yield tar.extractfile(member).read()  # type: ignore[union-attr]

    def made(encoded: bytes) -> np.ndarray[Any, Any]:
        picture = decode_jpeg(encoded, min_height=224, min_width=224)
        height, width = (int(side * random.uniform(0.95, 1)) for side in picture.shape[:2])
        top, left = (
            int(random.integers(whole - part + 1))
            for whole, part in zip(picture.shape[:2], (height, width), strict=True)
        )
        small = cv2.resize(picture[top : top + height, left : left + width], (224, 224), interpolation=cv2.INTER_AREA)
        return np.ascontiguousarray(((small - mean) / std).transpose(2, 0, 1))

    pipeline = (
        PipelineBuilder()
        .add_source(samples())
        .pipe(made, concurrency=threads)
        .aggregate(BATCH)
        .pipe(lambda rows: torch.from_numpy(np.stack(rows)))
        .add_sink(PREFETCHED)
        .build(num_threads=threads)
    )
    with pipeline.auto_stop():
        for images in pipeline.get_iterator():
            yield len(images)


def decoding(shards: list[Path], threads: int) -> Batches:
    """libjpeg-turbo alone: whole pictures from memory to RGB, no crop, no resize, no batch."""
    from simplejpeg import decode_jpeg

    pictures = encoded_pictures(shards)
    with ThreadPoolExecutor(threads) as pool:
        for start in itertools.cycle(range(0, len(pictures) - BATCH, BATCH)):
            yield sum(1 for _ in pool.map(decode_jpeg, pictures[start : start + BATCH]))


@dataclass(frozen=True)
class Implementation:
    name: str
    threads: int
    batches: Callable[[list[Path]], Batches]
    module: str = "efficientclip"
    package: str = ""


OPEN_CLIP, SPDL, DECODING = "open_clip", "SPDL, scaled decoding", "libjpeg-turbo alone"
IMPLEMENTATIONS = (
    Implementation("ours", 2, lambda shards: ours(shards, 2, False)),
    Implementation("ours", 1, lambda shards: ours(shards, 1, False)),
    Implementation("ours, scaled decoding", 2, lambda shards: ours(shards, 2, True)),
    Implementation(OPEN_CLIP, 2, lambda shards: open_clip(shards, 2), "open_clip_train", "'open_clip_torch[training]'"),
    Implementation(SPDL, 2, lambda shards: spdl(shards, 2), "spdl.pipeline", "spdl simplejpeg opencv-python-headless"),
    Implementation("DALI", 2, lambda shards: dali(shards, 2), "nvidia.dali", "nvidia-dali-cuda130"),
    Implementation(DECODING, 2, lambda shards: decoding(shards, 2), "simplejpeg", "simplejpeg"),
    Implementation(DECODING, 1, lambda shards: decoding(shards, 1), "simplejpeg", "simplejpeg"),
)


def missing(module: str) -> bool:
    try:
        return find_spec(module) is None
    except ModuleNotFoundError:
        return True


# Measuring


def errors(shards: list[Path], scaled: bool, pictures: int = 256) -> tuple[float, float]:
    """Mean and greatest error of the evaluation transform against torchvision's, of a scale 0 to 1."""
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize, ToTensor

    transform = Compose([Resize(224, InterpolationMode.BICUBIC), CenterCrop(224), ToTensor()])
    opened = (Image.open(io.BytesIO(encoded)) for encoded in encoded_pictures(shards)[:pictures])
    truth = torch.stack([transform(picture.convert("RGB")) for picture in opened])
    with ImageLoader(
        shards, batch_size=pictures, train=False, mean=(0, 0, 0), std=(1, 1, 1), scaled_decoding=scaled
    ) as loader:
        off = (next(iter(loader)).images - truth).abs()
    return float(off.mean()), float(off.max())


def extra_memory(shards: list[Path]) -> float:
    """MiB beyond the batches in memory and the shuffle buffer while all pictures go by on 2 threads."""
    batch, prefetch, buffered = 32, 2, 500
    pictures = encoded_pictures(shards)
    held = (prefetch + 2) * batch * 3 * 224 * 224 * 4 + buffered * sum(map(len, pictures)) / len(pictures)
    del pictures
    memory = Memory("cpu")
    memory.start()
    with ImageLoader(
        shards, batch_size=batch, threads=2, mean=MEAN, std=STD, prefetch=prefetch, shuffle_buffer=buffered
    ) as loader:
        for _ in loader:
            pass
        return (memory.peak() - held) / MIB


Turn = Callable[[], None]


def measure(shards: list[Path], repeat: Callable[[Turn, Turn], None]) -> tuple[list[Row], str | None]:
    """A row for each implementation, and what makes them worthless if the machine was busy.

    `repeat(ours, others)` runs both in turn, any number of times.
    """
    running = {one: one.batches(shards) for one in IMPLEMENTATIONS if not missing(one.module)}
    for batches in running.values():
        next(batches)
    neighbours = Neighbours()
    seconds: dict[Implementation, list[float]] = {one: [] for one in running}

    def run(one: Implementation) -> None:
        wait_until_idle()
        for _ in range(PREFETCHED):
            next(running[one])
        pictures, start = 0, time.perf_counter()
        # Workers that hand over whole batches in turn come in bursts: many batches, for a rate.
        while (taken := time.perf_counter() - start) < ROUND or pictures < BATCHES * BATCH:
            pictures += next(running[one])
        seconds[one].append(taken / pictures)

    def run_others() -> None:
        for one in running:
            if one is not IMPLEMENTATIONS[0]:
                run(one)

    repeat(lambda: run(IMPLEMENTATIONS[0]), run_others)
    busy = neighbours.busy(2, {f"{one.name} on {one.threads}": taken for one, taken in seconds.items()})
    for batches in running.values():
        batches.close()
    rates = {(one.name, one.threads): 1 / statistics.median(taken) for one, taken in seconds.items()}
    return _rows(shards, rates, len(seconds[IMPLEMENTATIONS[0]])), busy


def _rows(shards: list[Path], rates: dict[tuple[str, int], float], rounds: int) -> list[Row]:
    pictures = encoded_pictures(shards)
    width, height = Image.open(io.BytesIO(pictures[0])).size
    rows = []
    for one in IMPLEMENTATIONS:
        row: Row = {
            "height": height, "width": width, "batch": BATCH, "hardware": hardware("cpu"), "torch": torch.__version__,
            "implementation": one.name, "threads": one.threads, "date": date.today(),
            "mean_bytes": sum(map(len, pictures)) // len(pictures),
        }  # fmt: skip
        rate = rates.get((one.name, one.threads))
        if rate is None:
            row["note"] = f"not installed: pip install {one.package}"
        else:
            row |= {"images_per_s": f"{rate:.0f}", "rounds": rounds}
            for column, name in (
                ("over_open_clip", OPEN_CLIP),
                ("over_spdl", SPDL),
                ("over_decoding", DECODING),
            ):
                if (base := rates.get((name, one.threads))) is not None:
                    row[column] = f"{rate / base:.2f}"
        rows.append(row)
    return rows
