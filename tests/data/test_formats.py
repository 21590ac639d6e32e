"""Pictures that Pillow decodes for the image loader, from its threads: values, counts, and what may interrupt it."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from efficientclip.data import pictures
from efficientclip.data.shards import BadSample
from tests.data.tars import check_square, encode, loader, photograph, squares, write_tar
from tests.forks import exit_code_of_fork

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x112] = orientation
    return exif


def other_formats() -> dict[str, bytes]:
    picture = photograph(90, 61)
    transparent = picture.copy()
    transparent.putalpha(picture.convert("L"))
    return {
        "a.gif": encode(picture, "GIF"),
        "b.gif": encode(picture.quantize(16), "GIF", transparency=3),
        "c.gif": encode(picture, "GIF", save_all=True, append_images=[picture.rotate(180)]),
        "d.bmp": encode(picture, "BMP"),
        "e.tif": encode(picture, "TIFF"),
        "f.tiff": encode(picture.convert("CMYK"), "TIFF", compression="tiff_lzw"),
        "g.tif": encode(transparent, "TIFF"),
        "h.tif": encode(picture, "TIFF", exif=turned(6)),
        "i.avif": encode(picture, "AVIF"),
        "j.avif": encode(transparent, "AVIF"),
        "k.jpg": encode(picture, "GIF"),
    }


def test_other_formats_equal_pillows(tmp_path: Path) -> None:
    files = other_formats()
    for size in (24, 75):
        for name, found in squares(tmp_path, files, size=size).items():
            check_square(found, files[name], size, name)


def test_they_are_counted_apart_and_beside_the_others(tmp_path: Path) -> None:
    picture = photograph(30, 20)
    kinds = ["GIF", "JPEG", "BMP", "PNG", "TIFF"]
    files = [(f"{n:02d}.{kinds[n % 5].lower()}", encode(picture, kinds[n % 5])) for n in range(40)]
    write_tar(tmp_path / "a.tar", [*files, ("x.gif", b"GIF89a")])
    with loader(tmp_path, captions=False, threads=3, batch_size=8) as batches:
        expected = [batch.keys for batch in batches]
        assert batches.slow_pictures == 24
        assert batches.bad_samples == [BadSample("a.tar", "x", "undecodable image")]
        batches.epoch = 0
        assert [batch.keys for batch in batches] == expected and batches.slow_pictures == 24


def test_sixteen_bits_of_a_tiff_keep_their_upper_eight(tmp_path: Path) -> None:
    grey = np.add.outer(np.arange(32) * 900, np.arange(32) * 1000).astype(np.uint16)
    found = squares(tmp_path, {"a.tif": encode(Image.fromarray(grey), "TIFF")})["a.tif"]
    np.testing.assert_array_equal(found, np.repeat((grey >> 8)[..., None], 3, -1))


def test_bad_ones_are_named_by_cause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = encode(photograph(60, 40), "GIF")
    heic = b"\0\0\0\x18ftypheic" + bytes(40)
    bad = {
        "a": (good[: len(good) // 2], "truncated image"),
        "b": (good[:6] + b"\xff\xff\xff\xff" + good[10:], "image too large"),
        "c": (encode(photograph(60, 40), "BMP")[:-900], "truncated image"),
        "d": (b"<svg/>", "undecodable image"),
        "e": (heic, "HEIC image, which needs pillow-heif"),
    }
    write_tar(tmp_path / "a.tar", [(f"{key}.gif", content) for key, (content, _) in bad.items()])
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    pictures._add_heic.cache_clear()
    with loader(tmp_path, train=False, captions=False) as batches:
        assert list(batches) == []
        assert batches.bad_samples == [BadSample("a.tar", key, cause) for key, (_, cause) in bad.items()]
        assert batches.slow_pictures == 0


def test_heic_is_read_where_its_decoder_is(tmp_path: Path) -> None:
    heif = pytest.importorskip("pillow_heif")
    heif.register_heif_opener()
    pictures._add_heic.cache_clear()
    content = encode(photograph(90, 61), "HEIF", quality=90)
    check_square(squares(tmp_path, {"a.heic": content})["a.heic"], content, 32, "a.heic")


@pytest.fixture
def slowly(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Pillow takes its time."""
    real = pictures.by_pillow

    def slow(encoded: bytes) -> tuple[int, int, bytes] | str:
        time.sleep(0.02)
        return real(encoded)

    monkeypatch.setattr("efficientclip.data.images.by_pillow", slow)
    yield


def gifs(path: Path, count: int = 60) -> Path:
    picture = encode(photograph(30, 20), "GIF")
    return write_tar(path / "a.tar", [(f"{number:03d}.gif", picture) for number in range(count)])


def tasks() -> int:
    return len(os.listdir("/proc/self/task"))


@pytest.mark.usefixtures("slowly")
def test_a_loader_is_closed_while_pillow_is_at_it(tmp_path: Path) -> None:
    before = tasks()
    for taken in range(4):
        batches = loader(gifs(tmp_path), captions=False, threads=3, batch_size=2)
        for _ in range(taken):
            next(batches)
        time.sleep(0.01)
        if taken % 2:
            batches.close()
        else:
            del batches
            gc.collect()
        assert tasks() == before


@pytest.mark.usefixtures("slowly")
def test_a_child_forked_while_pillow_is_at_it_ends(tmp_path: Path) -> None:
    batches = loader(gifs(tmp_path), captions=False, threads=3, batch_size=2)
    next(batches)

    def child() -> int:
        with loader(tmp_path, captions=False, threads=2) as own:
            return sum(len(batch) for batch in own) - 60

    for _ in range(5):
        assert exit_code_of_fork(child) == 0
    assert sum(len(batch) for batch in batches) == 58


ENDING = """
import os, signal, sys, threading
from efficientclip import ImageLoader
how, batches = sys.argv[2], ImageLoader(sys.argv[1], batch_size=2, size=32, threads=3, captions=False)
next(batches)
signal.signal(signal.SIGINT, signal.default_int_handler)
if how == "interrupted":
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    with ImageLoader(sys.argv[1], batch_size=10**6, size=32, threads=3, captions=False) as large:
        next(large)
if how == "forked" and os.fork() == 0:
    sys.exit(0)
print("done")
if how == "raised":
    raise ZeroDivisionError
"""


@pytest.mark.parametrize(("how", "code"), [("left", 0), ("forked", 0), ("raised", 1), ("interrupted", -signal.SIGINT)])
def test_the_interpreter_ends_while_pillow_is_at_it(tmp_path: Path, how: str, code: int) -> None:
    gifs(tmp_path, 3000)
    command = [sys.executable, "-c", ENDING, str(tmp_path), how]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=ENVIRONMENT)
    assert done.returncode == code, done.stderr
    assert done.stdout == ("" if how == "interrupted" else "done\n")
    assert done.stderr == "" or how in ("raised", "interrupted"), done.stderr


@pytest.mark.parametrize(
    ("form", "suffix"), [("JPEG", "jpeg"), ("MPO", "jpg"), ("PNG", "png"), ("WEBP", "webp"), ("TIFF", "tiff")]
)
def test_a_picture_is_named_by_its_content(form: str, suffix: str) -> None:
    picture = photograph(90, 61)
    several = {"save_all": True, "append_images": [picture]} if form == "MPO" else {}
    assert pictures.suffix_of(encode(picture, form, **several)) == suffix
    with pytest.raises(ValueError, match="cannot identify"):
        pictures.suffix_of(b"no picture")
