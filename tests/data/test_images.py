"""The image loader against Pillow, against the shards' own reader, and against everything that may interrupt it."""

from __future__ import annotations

import gc
import io
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import tarfile
import time
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from efficientclip import ImageLoader
from efficientclip.data.images import CLIP_MEAN, CLIP_STD, ImageBatch
from efficientclip.data.pictures import MAX_PIXELS, decode_square
from efficientclip.data.shards import BadSample, Sample, read_shard
from efficientclip.errors import UserError
from tests.forks import exit_code_of_fork

SEED = int(np.random.default_rng().integers(2**31))
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
Files = Iterable[tuple[str, bytes]]


@pytest.fixture(autouse=True)
def seed() -> None:
    print(f"seed {SEED}")


def encode(picture: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


def photograph(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth colours, edges and some noise."""
    rng = np.random.default_rng([SEED, seed])
    y, x = np.mgrid[:height, :width] / 100
    phases = rng.uniform(0, 6, (3, 2))
    waves = np.stack([np.sin(x * 3 * (c + 1) + phases[c, 0]) * np.cos(y * 4 + phases[c, 1]) for c in range(3)], -1)
    pixels = 128 + 90 * waves + 40 * (np.sin(x * 7 + y * 9) > 0.3)[..., None] + rng.normal(0, 6, waves.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def write_tar(path: Path, files: Files) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def jpegs(count: int, *, first: int = 0, size: int = 40) -> list[tuple[str, bytes]]:
    """Samples of captions "caption <number>", each of its own picture."""
    rng = np.random.default_rng([SEED, first, count])
    files = []
    for number in range(first, first + count):
        width, height = (int(side) for side in rng.integers(size // 2, size, 2))
        files.append((f"{number:06d}.jpg", encode(photograph(width, height, number), "JPEG")))
        files.append((f"{number:06d}.txt", f"caption {number}".encode()))
    return files


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five shards of 150 samples in all."""
    folder = tmp_path_factory.mktemp("shards")
    for shard, (first, end) in enumerate([(0, 20), (20, 60), (60, 65), (65, 125), (125, 150)]):
        write_tar(folder / f"{shard}.tar", jpegs(end - first, first=first))
    return folder


def loader(source: Any, **options: Any) -> ImageLoader:
    given: dict[str, Any] = {"batch_size": 16, "size": 32, "threads": 2, "seed": SEED, "shuffle_buffer": 30}
    return ImageLoader(source, **(given | options))


def numbers(batches: Iterable[ImageBatch]) -> list[int]:
    return [int(key) for batch in batches for key in batch.keys]


def kept(batches: Iterable[ImageBatch]) -> list[tuple[list[str], torch.Tensor]]:
    return [(batch.keys, batch.images.clone()) for batch in batches]


def assert_same(one: list[tuple[list[str], torch.Tensor]], other: list[tuple[list[str], torch.Tensor]]) -> None:
    for (keys, images), (other_keys, other_images) in zip(one, other, strict=True):
        assert keys == other_keys
        assert torch.equal(images, other_images)


def tasks() -> int:
    return len(os.listdir("/proc/self/task"))


# Values

ARITHMETIC = """
ffd8ffe000104a46494600010100000100010000ffdb00430006040506050406060506070706080a100a0a09090a140e0f0c
1017141818171416161a1d251f1a1b231c1616202c20232627292a29191f2d302d283025282928ffc9000b08001000100101
1100ffcc000600101005ffda0008010100003f00ff00cb3b33eab4864793e4cf0a3735e2ab286c439ea8ffd9
"""


def rgb(encoded: bytes) -> Image.Image:
    picture = ImageOps.exif_transpose(Image.open(io.BytesIO(encoded)))
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def pillow_square(encoded: bytes, size: int) -> np.ndarray:
    """torchvision's Resize (bicubic, antialiased) and CenterCrop, as they work on Pillow images."""
    picture = rgb(encoded)
    short = min(picture.size)
    picture = picture.resize(tuple(int(size * side / short) for side in picture.size), Image.Resampling.BICUBIC)
    left, top = (round((side - size) / 2) for side in picture.size)
    return np.asarray(picture.crop((left, top, left + size, top + size)))


def two_passes(picture: Image.Image, size: int) -> list[np.ndarray]:
    """Resize and crop of the middle in double precision, whole bytes after each pass: rows first, and columns first."""
    short, weights = min(picture.size), []
    for side in picture.size:
        scaled = int(size * side / short)
        scale = side / scaled
        centres = (round((scaled - size) / 2) + np.arange(size) + 0.5) * scale
        x = np.abs((np.arange(side) + 0.5 - centres[:, None]) / max(scale, 1))
        near, far = (1.5 * x - 2.5) * x * x + 1, ((2.5 - 0.5 * x) * x - 4) * x + 2
        filtered = np.where(x < 1, near, np.where(x < 2, far, 0))
        weights.append(filtered / filtered.sum(1, keepdims=True))
    across, down = weights
    passes = ("xk,jkc->jxc", across), ("yj,jxc->yxc", down)

    def done(order: Iterable[tuple[str, np.ndarray]]) -> np.ndarray:
        pixels = np.asarray(picture, np.float64)
        for subscripts, by in order:
            pixels = np.clip(np.floor(np.einsum(subscripts, by, pixels) + 0.5), 0, 255)
        return pixels

    return [done(passes), done(passes[::-1])]


def check_square(found: np.ndarray, encoded: bytes, size: int, name: str, turned: bool = False) -> None:
    """The loader's square is that of two passes, rows of the stored picture first, and Pillow's are those of either
    order, by cost: rounding and clipping between the passes let the order tell."""
    orders = two_passes(rgb(encoded), size)
    # `decode_square` feeds the same towers, from sources that are no tars.
    either = pillow_square(encoded, size), decode_square(encoded, size)
    for made, of in ((found, orders[turned : turned + 1]), *((made, orders) for made in either)):
        error = min((np.abs(made - order) for order in of), key=np.max)
        assert error.mean() < 0.4 and error.max() <= 2, name


def squares(folder: Path, files: dict[str, bytes], **options: Any) -> dict[str, np.ndarray]:
    """Each file by its name, through the loader, as uint8 [size, size, 3]."""
    write_tar(folder / "squares.tar", files.items())
    found = {}
    with loader(
        folder / "squares.tar", **({"train": False, "captions": False, "dtype": torch.uint8} | options)
    ) as batches:
        for batch in batches:
            found |= {key: image.permute(1, 2, 0).numpy() for key, image in zip(batch.keys, batch.images, strict=True)}
        assert batches.bad_samples == []
    return {name: found[name.split(".")[0]] for name in files}


def interlaced(pixels: np.ndarray) -> bytes:
    """An Adam7 PNG of uint8 [height, width, 3], which Pillow reads but does not write."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = zlib.crc32(kind + content)
        return len(content).to_bytes(4, "big") + kind + content + checksum.to_bytes(4, "big")

    height, width, _ = pixels.shape
    passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    rows = b"".join(b"\0" + row.tobytes() for y, x, down, right in passes for row in pixels[y::down, x::right])
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 1])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def every_kind() -> dict[str, bytes]:
    rng = np.random.default_rng([SEED, 9])
    picture = photograph(150, 101)
    grey = picture.convert("L")
    transparent, grey_transparent = picture.copy(), grey.copy()
    for mode in (transparent, grey_transparent):
        mode.putalpha(Image.fromarray(rng.integers(0, 256, (101, 150)).astype(np.uint8)))
    files = {
        "cmyk.jpg": encode(picture.convert("CMYK"), "JPEG"),
        "grey.jpg": encode(grey, "JPEG"),
        "misnamed.jpg": encode(picture, "PNG"),
        "rgb.png": encode(picture, "PNG"),
        "grey.png": encode(grey, "PNG"),
        "rgba.png": encode(transparent, "PNG"),
        "grey-alpha.png": encode(grey_transparent, "PNG"),
        "bits.png": encode(picture.convert("1"), "PNG"),
        "palette.png": encode(picture.quantize(50), "PNG"),
        "palette-one-transparent.png": encode(picture.quantize(50), "PNG", transparency=3),
        "palette-transparent.png": encode(picture.quantize(50), "PNG", transparency=bytes(range(0, 250, 5))),
        "rgb-one-transparent.png": encode(picture, "PNG", transparency=picture.getpixel((5, 5))),
        "lossy.webp": encode(picture, "WEBP"),
        "lossless.webp": encode(picture, "WEBP", lossless=True),
        "lossy-alpha.webp": encode(transparent, "WEBP"),
        "moving.webp": encode(picture, "WEBP", save_all=True, append_images=[picture.rotate(180)]),
        "interlaced.png": interlaced(np.asarray(picture)),
        "pixel.png": encode(photograph(1, 1), "PNG"),
        "line.jpg": encode(photograph(1, 300), "JPEG"),
        "wide.jpg": encode(photograph(900, 20), "JPEG"),
    }
    for quality, subsampling, progressive in [(30, 0, True), (95, 1, False), (75, 2, True), (60, 2, False)]:
        width, height = (int(side) for side in rng.integers(33, 400, 2))
        files[f"{width}x{height}-{subsampling}{progressive}.jpg"] = encode(
            photograph(width, height), "JPEG", quality=quality, subsampling=subsampling, progressive=progressive
        )
    return {f"{number}-{name}": content for number, (name, content) in enumerate(files.items())}


@pytest.mark.parametrize("size", [24, 75, 224])
def test_pictures_of_every_kind_equal_pillows(tmp_path: Path, size: int) -> None:
    files = every_kind()
    for name, found in squares(tmp_path, files, size=size).items():
        check_square(found, files[name], size, name)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation_is_applied(tmp_path: Path, kind: str) -> None:
    picture, files = photograph(90, 61), {}
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x112] = orientation
        files[f"{orientation}.{kind.lower()}"] = encode(picture, kind, exif=exif)
    for name, found in squares(tmp_path, files).items():
        # From the fifth on, rows are columns.
        check_square(found, files[name], 32, name, turned=int(name.split(".")[0]) >= 5)


def test_sixteen_bits_keep_their_upper_eight(tmp_path: Path) -> None:
    grey = np.add.outer(np.arange(32) * 900, np.arange(32) * 1000).astype(np.uint16)
    found = squares(tmp_path, {"a.png": encode(Image.fromarray(grey), "PNG")})["a.png"]
    # Pillow would make white of everything above 255.
    np.testing.assert_array_equal(found, np.repeat((grey >> 8)[..., None], 3, -1))


def test_arithmetic_coding(tmp_path: Path) -> None:
    # What libjpeg-turbo's `cjpeg -arithmetic` makes of a grey picture, of 16 x 16 pixels of 8 x + 4 y.
    encoded = bytes.fromhex(ARITHMETIC)
    found = squares(tmp_path, {"a.jpg": encoded}, size=16)["a.jpg"]
    expected = np.add.outer(np.arange(16) * 4, np.arange(16) * 8)
    assert np.abs(found[..., 0] - expected).max() <= 3


def test_scaled_decoding_stays_near(tmp_path: Path) -> None:
    files = {f"{n}.jpg": encode(photograph(640, 480, n), "JPEG", quality=90) for n in range(3)}
    near = squares(tmp_path, files, size=100, scaled_decoding=True)
    for name, exact in squares(tmp_path, files, size=100).items():
        error = np.abs(near[name].astype(int) - exact)
        assert 0 < error.mean() < 3, name


def test_values_are_normalised_and_laid_out_as_asked(shards: Path) -> None:
    with loader(shards, dtype=torch.uint8) as batches:
        bytes_ = next(batches).images
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    expected = (bytes_.float() / 255 - mean) / std
    for dtype, tolerance in [(torch.float32, 2e-6), (torch.bfloat16, 2**-7)]:
        for channels_last in (False, True):
            with loader(shards, dtype=dtype, channels_last=channels_last) as batches:
                images = next(batches).images
            assert images.dtype == dtype and images.shape == (16, 3, 32, 32)
            assert images.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
            torch.testing.assert_close(images.float(), expected, atol=tolerance, rtol=tolerance)


def test_random_crops_are_those_that_are_asked_for(tmp_path: Path) -> None:
    # Red tells the column and green the row: the corners of a crop can be read off its values.
    y, x = np.mgrid[:200, :240]
    picture = encode(Image.fromarray(np.stack([x, y, x * 0], -1).astype(np.uint8)), "PNG")
    write_tar(tmp_path / "a.tar", [(f"{n:03d}.png", picture) for n in range(400)])
    options = {"captions": False, "dtype": torch.uint8, "scale": (0.3, 0.6), "ratio": (0.5, 2.0), "flip": True}
    with loader(tmp_path, **options) as batches:
        crops = torch.cat([batch.images.clone() for batch in batches]).double()
        again = torch.cat([batch.images.clone() for batch in batches]).double()
    right, left = crops[:, 0].amax(dim=(1, 2)), crops[:, 0].amin(dim=(1, 2))
    bottom, top = crops[:, 1].amax(dim=(1, 2)), crops[:, 1].amin(dim=(1, 2))
    # The outermost pixels are half of what an output pixel covers inside the edge.
    width, height = (right - left) * 32 / 31, (bottom - top) * 32 / 31
    share, ratio = width * height / (200 * 240), width / height
    assert share.min() > 0.25 and share.max() < 0.65 and share.std() > 0.05
    assert ratio.min() > 0.45 and ratio.max() < 2.2 and ratio.std() > 0.2
    assert left.min() < 15 and right.max() > 225 and top.min() < 15 and bottom.max() > 185
    flipped = (crops[:, 0, 0, 0] > crops[:, 0, 0, -1]).double().mean()
    assert 0.4 < flipped < 0.6
    assert not torch.equal(crops, again)


# Samples


def test_batches_carry_what_the_shard_says(tmp_path: Path) -> None:
    encoded = encode(photograph(30, 20), "JPEG")
    record = {"captions": [" one ", {"text": "two", "noise": True}], "url": "x"}
    write_tar(
        tmp_path / "a.tar",
        [
            ("d/first.jpg", encoded),
            ("d/first.txt", "  标题\n".encode()),
            ("d/second.x.jpg", encoded),
            ("third.png", encode(photograph(9, 9), "PNG")),
            ("third.json", json.dumps(record).encode()),
        ],
    )
    with loader(tmp_path, train=False, keep_encoded=True) as batches:
        (batch,) = batches
        assert batches.bad_samples == [BadSample("a.tar", "d/second", "caption without image")]
        assert batches.bad_counts == {"caption without image": 1}
    assert batch.keys == ["d/first", "third"] and batch.shards == ["a.tar"] * 2
    assert batch.captions == [["标题"], ["one", "two"]]
    assert batch.json[0] is None and json.loads(batch.json[1] or "") == record
    raw = (tmp_path / "a.tar").read_bytes()
    for image, offset, length in zip(batch.encoded, batch.offsets, batch.lengths, strict=True):
        assert image == raw[offset : offset + length]
    assert batch.encoded[0] == encoded


JSONS = [
    '{"caption": "a"}', '{"caption": " \\u3000\\n"}', '{"caption": null}', '{"captions": []}', '{"captions": "x"}',
    '{"captions": ["a", " "]}', '{"captions": [{"text": "x", "noise": true}, {"text": ""}]}', '{"caption": "\t"}',
    '{"captions": [null, 1, [], {}]}', '{"captions": [{"text": {}}]}', '{"caption": {"text": ""}}', " {} ", "{} x",
    '{"caption": "a", "caption": null}', '{"\\u0063aption": "a"}', '{"x": [1, -0.5e+3, NaN, -Infinity, true]}',
    '{"caption": "\\ud83d\\ude00 \\ud800"}', "[]", '"x"', "{", '{"a": 01}', '{"a": 1,}', '{"a"', "",
    '\ufeff{"caption": "bom"}',
]  # fmt: skip


def test_samples_are_those_of_the_shards_own_reader(tmp_path: Path) -> None:
    rng = random.Random(SEED)
    picture = encode(photograph(8, 8), "PNG")
    texts = ["a", " ", "", "\u3000x", "\x1c\x85\xa0"]
    files = []
    for number in range(1500):
        if rng.random() < 0.95:
            files.append((f"{number:05d}.{rng.choice(['png', 'PNG', 'seg.png', 'jpeg'])}", picture))
        if rng.random() < 0.4:
            text = rng.choice(texts).encode()
            files.append((f"{number:05d}.txt", text + (b"\xff" if rng.random() < 0.1 else b"")))
        if rng.random() < 0.8:
            record = bytearray(rng.choice(JSONS).encode())
            for _ in range(rng.choice([0, 0, 1, 2])):
                at = rng.randrange(len(record) + 1)
                record[at : at + rng.choice([0, 1])] = rng.choice(
                    [b'"', b"{", b"]", b",", b"\\", b"1", b"\xe3", b" ", b"e"]
                )
            files.append((f"{number:05d}.json", bytes(record)))
    shard = write_tar(tmp_path / "a.tar", files)
    expected = list(read_shard(shard))
    with loader(tmp_path, train=False) as batches:
        found = [
            (key, captions, offset, length)
            for batch in batches
            for key, captions, offset, length in zip(
                batch.keys, batch.captions, batch.offsets, batch.lengths, strict=True
            )
        ]
        bad = batches.bad_samples
    assert found == [(s.key, s.captions, s.offset, s.length) for s in expected if isinstance(s, Sample)]
    assert bad == [sample for sample in expected if isinstance(sample, BadSample)]
    assert len(found) > 100 and len(bad) > 100


def test_bad_pictures_are_skipped_by_cause(tmp_path: Path) -> None:
    good = encode(photograph(60, 60), "JPEG")
    bomb = bytearray(encode(photograph(8, 8), "JPEG"))
    frame = bomb.index(b"\xff\xc0")
    bomb[frame + 5 : frame + 9] = (65000).to_bytes(2, "big") * 2
    pictures = {
        "a": (good, None),
        "b": (good[: len(good) // 2], "truncated image"),
        "c": (good[:-2], "truncated image"),
        "d": (b"GIF89a", "undecodable image"),
        "e": (b"", "undecodable image"),
        "f": (bytes(bomb), "image too large"),
        "g": (encode(photograph(60, 60), "PNG")[:-200], "truncated image"),
        "h": (encode(photograph(60, 60), "WEBP")[:-20], "truncated image"),
        "i": (good, None),
    }
    write_tar(tmp_path / "a.tar", [(f"{key}.jpg", picture) for key, (picture, _) in pictures.items()])
    with loader(tmp_path, train=False, captions=False) as batches:
        (batch,) = batches
        assert batch.keys == ["a", "i"]
        assert batches.bad_samples == [
            BadSample("a.tar", key, cause) for key, (_, cause) in pictures.items() if cause is not None
        ]
    # Pillow, which reads the demo's pictures, refuses them too; a JPEG without its end marker it reads now and then.
    for key, (picture, cause) in pictures.items():
        if cause is not None and key != "c":
            with pytest.raises((OSError, Image.DecompressionBombError)):
                pillow_square(picture, 8)


def test_the_limits_of_both_decoders_agree() -> None:
    source = (Path(__file__).parents[2] / "csrc/picture.hpp").read_text()
    assert f"kMaxPixels = {MAX_PIXELS:_};".replace("_", "'") in source


# Order


def test_batches_are_the_same_for_any_number_of_threads(shards: Path) -> None:
    whole = kept(loader(shards, threads=1))
    assert sorted(numbers(loader(shards))) == list(range(150))
    for threads in (2, 4):
        assert_same(kept(loader(shards, threads=threads, prefetch=1 + threads)), whole)


def test_each_epoch_has_an_order_of_its_own(shards: Path) -> None:
    with loader(shards) as batches:
        first, second = numbers(batches), numbers(batches)
        assert batches.epoch == 2
        batches.epoch = 0
        assert numbers(batches) == first
    assert sorted(first) == sorted(second) == list(range(150)) and first != second
    assert numbers(loader(shards, epoch=1)) == second
    assert numbers(loader(shards, seed=SEED + 1)) != first
    # Neighbours in a shard are apart: 29 of 30 would be by chance.
    assert np.mean(np.abs(np.diff(first)) == 1) < 0.15
    assert numbers(loader(shards, train=False)) == list(range(150))


@pytest.mark.parametrize("world_size", [2, 3, 5, 8])
@pytest.mark.parametrize("train", [True, False])
def test_ranks_share_all_samples_out(shards: Path, world_size: int, train: bool) -> None:
    ranks = [numbers(loader(shards, rank=rank, world_size=world_size, train=train)) for rank in range(world_size)]
    assert all(ranks)
    assert sorted(number for rank in ranks for number in rank) == list(range(150))


def test_loaders_share_an_order_in_runs(shards: Path) -> None:
    whole = dict(zip(numbers(loader(shards)), torch.cat([images for _, images in kept(loader(shards))]), strict=True))
    order = list(whole)

    def dealt(left: list[int], skip: int, block: int, number: int, of: int) -> list[int]:
        return [sample for place, sample in enumerate(left[skip:]) if place // block % of == number]

    for number in range(3):
        first, second = (16, 4, number, 3), (8, 2, 1, 2)
        once, twice = dealt(order, *first), dealt(dealt(order, *first), *second)
        assert numbers(loader(shards, shares=[first])) == once
        with loader(shards, shares=[first, second], batch_size=4) as batches:
            found = [next(batches), next(batches)]
            state = batches.state()
        with loader(shards, shares=[first, second], batch_size=4) as batches:
            batches.restore(state)
            found += list(batches)
        assert numbers(found) == twice
        for batch in found:
            assert all(torch.equal(image, whole[int(key)]) for key, image in zip(batch.keys, batch.images, strict=True))
    with pytest.raises(UserError, match="loader state: shards"):
        loader(shards).restore(state)


def test_a_picture_is_cut_the_same_way_on_every_rank(shards: Path) -> None:
    def images(**options: Any) -> dict[str, torch.Tensor]:
        return {key: image for keys, images in kept(loader(shards, **options)) for key, image in zip(keys, images)}  # noqa: B905

    whole = images()
    for rank in range(3):
        for key, image in images(rank=rank, world_size=3).items():
            assert torch.equal(image, whole[key])


def test_the_last_batch_may_be_left_out(shards: Path) -> None:
    assert [len(batch) for batch in loader(shards)] == [16] * 9 + [6]
    assert [len(batch) for batch in loader(shards, drop_last=True)] == [16] * 9


# Going on


def test_state_is_the_last_batch_that_was_consumed(shards: Path, tmp_path: Path) -> None:
    damaged = write_tar(tmp_path / "9.tar", [("a.jpg", b"x"), ("a.txt", b"x")])
    sources = [shards, damaged]
    with loader(sources) as batches:
        whole = kept(batches) + kept(batches)
        counts = batches.bad_counts
    assert counts == {"undecodable image": 1}
    for taken in sorted(random.Random(SEED).sample(range(len(whole)), 4)):
        with loader(sources) as batches:
            parts: list[ImageBatch] = []
            while len(parts) < taken:
                parts += (batch for _, batch in zip(range(taken - len(parts)), batches, strict=False))
            time.sleep(0.05)  # what is made ahead must not count
            state = pickle.loads(pickle.dumps(batches.state()))
        with loader(sources, threads=1) as batches:
            batches.restore(state)
            rest = kept(batches)
            if batches.epoch < 2:
                rest += kept(batches)
            assert batches.bad_counts == counts
        assert_same([(batch.keys, batch.images) for batch in parts] + rest, whole)


def test_a_broken_loop_goes_on_where_it_stopped(shards: Path) -> None:
    whole = numbers(loader(shards))
    with loader(shards) as batches:
        found = []
        for batch in batches:
            found += numbers([batch])
            if len(found) > 50:
                break
        found += numbers(batches)
    assert found == whole
    assert batches.waited_seconds > 0 and batches.images_per_second > 0


CONSUMER = """
import json, os, sys
from pathlib import Path
from efficientclip import ImageLoader
folder, state, log = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
with ImageLoader(folder, batch_size=4, size=32, threads=2, seed=int(sys.argv[4]), shuffle_buffer=30) as batches:
    if state.exists():
        batches.restore(json.loads(state.read_text()))
    with log.open("a") as lines:
        for batch in batches:
            # The keys and the state reach the disk together: a line is whole or is not there.
            lines.write(json.dumps([batch.keys, batches.state()]) + "\\n")
            lines.flush()
            print(flush=True)
"""


def test_killed_and_restored_no_sample_is_seen_twice_or_lost(shards: Path, tmp_path: Path) -> None:
    rng, log, state = random.Random(SEED), tmp_path / "log", tmp_path / "state"
    command = [sys.executable, "-c", CONSUMER, str(shards), str(state), str(log), str(SEED)]
    for _ in range(2):
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=ENVIRONMENT) as process:
            assert process.stdout is not None
            for _ in range(rng.randint(1, 12)):
                process.stdout.readline()
            process.send_signal(signal.SIGKILL)
        whole = [line for line in log.read_text().splitlines(keepends=True) if line.endswith("\n")]
        log.write_text("".join(whole))
        state.write_text(json.dumps(json.loads(whole[-1])[1]))
    subprocess.run(command, check=True, capture_output=True, env=ENVIRONMENT)
    seen = [int(key) for line in log.read_text().splitlines() for key in json.loads(line)[0]]
    assert seen == numbers(loader(shards))


@pytest.mark.parametrize(
    ("changed", "named"),
    [({"seed": SEED + 1}, "seed"), ({"rank": 1, "world_size": 2}, "rank"), ({"shuffle_buffer": 9}, "shards")],
)
def test_a_state_of_other_settings_is_refused(shards: Path, changed: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=f"loader state: {named}"):
        loader(shards, **changed).restore(loader(shards).state())


# Life


def test_batches_stay_as_they_are_while_they_are_held(shards: Path) -> None:
    with loader(shards, batch_size=8, prefetch=1) as batches:
        held = list(batches)
        copies = kept(held)
        rows = [batch.images[3:5].view(-1) for batch in held]
        del held
        numbers(batches)
    for row, (_, images) in zip(rows, copies, strict=True):
        assert torch.equal(row, images[3:5].view(-1))


def test_memory_returns_to_the_loader(shards: Path) -> None:
    with loader(shards, batch_size=8, prefetch=1) as batches:
        places = {batch.images.data_ptr() for batch in batches}
    assert len(places) <= 4


def test_no_thread_is_left_behind(shards: Path) -> None:
    before = tasks()
    batches = loader(shards, threads=4)
    assert tasks() == before, "threads start with the first batch"
    next(batches)
    assert tasks() > before
    batches.close()
    assert tasks() == before
    with pytest.raises(RuntimeError, match="closed"):
        next(batches)
    with pytest.raises(ZeroDivisionError), loader(shards) as batches:
        for _ in batches:
            raise ZeroDivisionError
    assert tasks() == before
    for taken in range(6):
        batches = loader(shards)
        for _ in range(taken):
            next(batches)
    cycle: list[Any] = [batches]
    cycle.append(cycle)
    del batches, cycle
    gc.collect()
    assert tasks() == before


def test_a_forked_child_gets_an_error_and_ends(shards: Path) -> None:
    batches: Any = loader(shards)
    next(batches)

    def child() -> int:
        nonlocal batches
        refused = False
        try:
            next(batches)
        except RuntimeError as error:
            refused = "after the fork" in str(error)
        # Its threads are the parent's: to end it must not wait for them.
        batches = None
        gc.collect()
        return 0 if refused else 2

    assert exit_code_of_fork(child) == 0
    next(batches)


WAITER = """
import os, signal, sys, threading
from efficientclip import ImageLoader
tasks = lambda: len(os.listdir("/proc/self/task"))
before = tasks()
# Whoever starts the tests in a shell's background has the signal ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
timer = threading.Timer(0.4, os.kill, (os.getpid(), signal.SIGINT))
timer.start()
try:
    with ImageLoader(sys.argv[1], batch_size=100_000, size=32, threads=2, captions=False) as batches:
        next(batches)
except KeyboardInterrupt:
    timer.join()
    print("interrupted", tasks() - before)
"""


def test_ctrl_c_ends_the_waiting(tmp_path: Path) -> None:
    # A shard that takes long, all of it one batch.
    picture = encode(photograph(900, 900), "JPEG")
    write_tar(tmp_path / "0.tar", [(f"{number}.jpg", picture) for number in range(300)])
    for shard in range(1, 30):
        (tmp_path / f"{shard}.tar").symlink_to(tmp_path / "0.tar")
    command = [sys.executable, "-c", WAITER, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=ENVIRONMENT)
    assert done.stdout.split() == ["interrupted", "0"], done.stderr


MEMORY = """
import sys
from efficientclip import ImageLoader
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
import torch
torch.zeros(1).numpy()
before = resident()
with ImageLoader(sys.argv[1], batch_size=8, size=224, threads=4, captions=False, shuffle_buffer=50) as batches:
    most = 0
    for epoch in range(2):
        for batch in batches:
            most = max(most, resident())
print(most - before)
"""


def test_memory_stays_in_bounds(tmp_path: Path) -> None:
    # 36 MB each when decoded as a whole.
    picture = encode(Image.effect_noise((4000, 3000), 20).convert("RGB"), "JPEG", quality=50)
    write_tar(tmp_path / "0.tar", [(f"{number}.jpg", picture) for number in range(12)])
    command = [sys.executable, "-c", MEMORY, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True, env=ENVIRONMENT)
    ring = 4 * 8 * 3 * 224 * 224 * 4
    buffer = 12 * len(picture)
    assert int(done.stdout) - ring - buffer < 100e6


def test_a_shard_that_is_cut_is_named_after_its_whole_samples(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", jpegs(20))
    whole = write_tar(tmp_path / "1.tar", jpegs(20, first=20)).read_bytes()
    (tmp_path / "1.tar").write_bytes(whole[: len(whole) // 2])
    found = []
    with loader(tmp_path, train=False) as batches:
        with pytest.raises(UserError, match=r"1\.tar: not a whole tar file .* download it again"):
            for batch in batches:
                found += numbers([batch])
        assert found == list(range(len(found))) and 20 < len(found) < 40
        # Put right, the rest follows.
        (tmp_path / "1.tar").write_bytes(whole)
        assert found + numbers(batches) == list(range(40))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"size": 0}, "size"),
        ({"threads": 0}, "threads"),
        ({"rank": 2, "world_size": 2}, "rank"),
        ({"shares": [(0, 4, 2, 2)]}, "shares"),
        ({"dtype": torch.float16}, "dtype"),
        ({"std": (0, 1, 1)}, "std"),
        ({"scale": (0.9, 0.1)}, "scale"),
        ({"ratio": (0, 1)}, "ratio"),
        ({"seed": -1}, "seed"),
        ({"epoch": -1}, "epoch"),
        ({"prefetch": 0}, "prefetch"),
        ({"shuffle_buffer": 0}, "shuffle_buffer"),
    ],
)
def test_mistakes_are_named(shards: Path, options: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        loader(shards, **options)


def test_absent_shards_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        loader(tmp_path / "absent.tar")
    with pytest.raises(UserError, match=r"no \.tar file"):
        loader(tmp_path)
