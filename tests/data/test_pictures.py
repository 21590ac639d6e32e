"""Pictures as the image loader makes them, against Pillow."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from efficientclip.data.images import CLIP_MEAN, CLIP_STD
from efficientclip.data.pictures import decode_square
from efficientclip.data.shards import BadSample
from tests.data.tars import SEED, check_square, encode, loader, photograph, pillow_square, squares, write_tar

ARITHMETIC = """
ffd8ffe000104a46494600010100000100010000ffdb00430006040506050406060506070706080a100a0a09090a140e0f0c
1017141818171416161a1d251f1a1b231c1616202c20232627292a29191f2d302d283025282928ffc9000b08001000100101
1100ffcc000600101005ffda0008010100003f00ff00cb3b33eab4864793e4cf0a3735e2ab286c439ea8ffd9
"""


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
        check_square(found, files[name], 32, name)


def orientation_in_xmp(orientation: int, *, element: bool) -> bytes:
    said = f"><tiff:Orientation>{orientation}</tiff:Orientation>" if element else f' tiff:Orientation="{orientation}">'
    return f"<x:xmpmeta>tiff:Orientation <rdf:Description{said}</rdf:Description></x:xmpmeta>".encode()


@pytest.mark.parametrize("element", [False, True])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_orientation_in_xmp_is_applied_where_exif_has_none(tmp_path: Path, kind: str, element: bool) -> None:
    picture, files = photograph(90, 61), {}
    plain, upright = Image.Exif(), Image.Exif()
    plain[0x10F] = "maker"
    upright[0x112] = 1
    for orientation in range(10):
        xmp = orientation_in_xmp(orientation, element=element)
        for name, exif in (("none", {}), ("plain", {"exif": plain}), ("upright", {"exif": upright})):
            if kind == "PNG":
                info = PngInfo()
                info.add_itxt("XML:com.adobe.xmp", xmp.decode())
                options: dict[str, Any] = {"pnginfo": info}
            else:
                options = {"xmp": xmp}
            files[f"{orientation}-{name}.{kind.lower()}"] = encode(picture, kind, **exif, **options)
    for name, found in squares(tmp_path, files).items():
        check_square(found, files[name], 32, name)


def test_orientation_in_a_text_of_a_png_is_applied(tmp_path: Path) -> None:
    picture, files = photograph(90, 61), {}
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x112] = orientation
        digits = (b"Exif\0\0" + exif.tobytes().removeprefix(b"Exif\0\0")).hex()
        lines = [digits[start : start + 72] for start in range(0, len(digits), 72)]
        for compressed in (False, True):
            info = PngInfo()
            info.add_text(
                "Raw profile type exif", f"\nexif\n{len(digits) // 2:8}\n" + "\n".join(lines) + "\n", zip=compressed
            )
            files[f"{orientation}-{compressed}.png"] = encode(picture, "PNG", pnginfo=info)
    seen = set()
    for name, found in squares(tmp_path, files).items():
        check_square(found, files[name], 32, name)
        seen.add(found.tobytes())
    assert len(seen) == 8


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


def test_a_progressive_picture_of_too_many_scans_is_refused_before_it_is_decoded() -> None:
    plain = encode(Image.new("RGB", (4000, 4000)), "JPEG", progressive=True)
    last = plain.rindex(b"\xff\xda")
    many = plain[:last] + plain[last:-2] * 300 + plain[-2:]
    assert decode_square(plain, 32).shape == (32, 32, 3)
    with pytest.raises(ValueError, match="progressive image of too many scans"):
        decode_square(many, 32)
