"""Each format gives the same record; what cannot be read is named with its file and line or field."""

from __future__ import annotations

import base64
import io
import json
import struct
import tarfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from efficientclip.data import sources
from efficientclip.data.images import ImageBatch
from efficientclip.data.pictures import decode_square
from efficientclip.data.shards import BadSample
from efficientclip.data.sources import open_labelled, open_source
from efficientclip.errors import UserError
from tests.data import reading
from tests.data.reading import Sample, opened
from tests.formats import chinese_clip, files, picture

PICTURES = {number: picture(number) for number in range(3)}
CAT, DOG, BOTH = "一只“猫”, 在睡", "狗", "两只\t动物"


def read(source: sources.Source | Path) -> list[Sample]:
    """Samples, each found at the place it says."""
    samples, wrong = reading.read(source)
    for sample in samples:
        stored = sample.shard.read_bytes()[sample.offset : sample.offset + sample.length]
        plain = stored.translate(bytes.maketrans(b"-_", b"+/"))
        assert sample.image == (base64.b64decode(plain) if sample.shard.suffix == ".tsv" else stored)
    assert wrong == []
    return samples


def bad(source: sources.Source | Path) -> list[BadSample]:
    return reading.read(source)[1]


def captions(samples: list[Sample]) -> dict[str, list[str]]:
    return {sample.key: sample.captions for sample in samples}


def texts() -> list[dict[str, Any]]:
    return [
        {"text_id": 7, "text": CAT, "image_ids": [0]},
        {"text_id": 8, "text": BOTH, "image_ids": [1, 0]},
        {"text_id": 9, "text": CAT, "image_ids": [0]},
    ]


@pytest.mark.parametrize("named", ["imgs", "texts", "folder"])
def test_chinese_clip_has_texts_of_several_images_and_images_without_text(tmp_path: Path, named: str) -> None:
    images = chinese_clip(tmp_path, "valid", PICTURES, texts())
    path = {"imgs": images, "texts": tmp_path / "valid_texts.jsonl", "folder": tmp_path}[named]
    source = open_source(path)
    samples = read(source)
    assert source.pictures == 3 and [sample.image for sample in samples] == list(PICTURES.values())
    assert captions(samples) == {"0": [CAT, BOTH, CAT], "1": [BOTH], "2": []}
    assert [sample.text_ids for sample in samples] == [["7", "8", "9"], ["8"], []]


def test_base64_may_be_of_the_url_alphabet_and_lines_may_end_in_crlf(tmp_path: Path) -> None:
    images = chinese_clip(tmp_path, "t", PICTURES, texts())
    plain = images.read_bytes()
    assert b"+" in plain and b"/" in plain
    images.write_bytes(plain.translate(bytes.maketrans(b"+/", b"-_")).replace(b"\n", b"\r\n"))
    assert [sample.image for sample in read(images)] == [*PICTURES.values()]


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet"])
def test_tables_gather_the_captions_of_a_picture(tmp_path: Path, suffix: str) -> None:
    files(tmp_path, {"a/0.png": PICTURES[0], "a/1.png": PICTURES[1]})
    rows = [("a/0.png", CAT), ("a/1.png", BOTH), ("a/0.png", DOG)]
    table = tmp_path / f"table{suffix}"
    if suffix == ".parquet":
        columns = {"n": [1, 2, 3], "filepath": [name for name, _ in rows], "title": [text for _, text in rows]}
        pq.write_table(pa.table(columns), table)
    else:
        separator = "," if suffix == ".csv" else "\t"
        quoted = [[str(n), name, '"' + text.replace('"', '""') + '"'] for n, (name, text) in enumerate(rows)]
        lines = [["n", "FilePath", "title"], *quoted]
        table.write_text("\ufeff" + "".join(separator.join(line) + "\n" for line in lines), encoding="utf-8")
    samples = read(open_source(table))
    assert captions(samples) == {"a/0.png": [CAT, DOG], "a/1.png": [BOTH]}
    assert not any(sample.text_ids for sample in samples)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "a").rename(tmp_path / "elsewhere" / "a")
    assert captions(read(open_source(table, tmp_path / "elsewhere"))) == captions(samples)


@pytest.mark.parametrize("folder", ["caption_images", ".", "../val2014"])
def test_ai_challenger_and_coco_find_their_pictures(tmp_path: Path, folder: str) -> None:
    (tmp_path / "annotations").mkdir()
    files(tmp_path / "annotations" / folder, {"0.png": PICTURES[0], "1.png": PICTURES[1]})
    challenger = [
        {"url": "x", "image_id": "0.png", "caption": [CAT, CAT]},
        {"url": "x", "image_id": "1.png", "caption": [DOG]},
    ]
    coco = {
        "images": [{"id": 5, "file_name": "0.png"}, {"id": 6, "file_name": "1.png"}],
        "annotations": [
            {"id": 1, "image_id": 6, "caption": DOG},
            {"id": 2, "image_id": 5, "caption": CAT},
            {"id": 3, "image_id": 5, "caption": CAT},
        ],
    }
    for tree, keys in ((challenger, ["0.png", "1.png"]), (coco, ["5", "6"])):
        file = tmp_path / "annotations" / "captions.json"
        file.write_text(json.dumps(tree))
        samples = read(open_source(file))
        assert captions(samples) == dict(zip(keys, ([CAT, CAT], [DOG]), strict=True))
        ids = [name for sample in samples for name in sample.text_ids]
        assert len(set(ids)) == 3


def test_tars_are_read_as_ever(tmp_path: Path) -> None:
    for number in range(2):
        with tarfile.open(tmp_path / f"{number}.tar", "w") as tar:
            for name, content in (("0.png", PICTURES[number]), ("0.txt", DOG.encode())):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    source = open_source(tmp_path)
    assert [(sample.image, sample.captions) for sample in read(source)] == [(PICTURES[n], [DOG]) for n in range(2)]
    assert len(source.parts) == len(source.files) == 2 and source.pictures is None


def test_parts_make_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "PART", 2)
    source = open_source(chinese_clip(tmp_path, "t", PICTURES, texts()))
    assert [[sample.key for sample in read(part)] for part in source.parts] == [["0", "1"], ["2"]]
    assert [sample.key for sample in read(source)] == ["0", "1", "2"] == [sample.key for sample in read(source)]


def test_pictures_that_cannot_be_read_are_bad_samples(tmp_path: Path) -> None:
    images = chinese_clip(tmp_path, "t", PICTURES, texts())
    lines = images.read_bytes().split(b"\n")
    images.write_bytes(b"\n".join([lines[0], b"1\t!?", lines[2]]))
    assert bad(images)[0] == BadSample("t_imgs.tsv", "1", "picture is not base64")
    files(tmp_path, {"0.png": PICTURES[0]})
    table = tmp_path / "t.csv"
    table.write_text(f"image,caption\n0.png,{DOG}\nnone.png,{DOG}\n")
    assert bad(table)[0] == BadSample("t.csv", "none.png", "picture file: No such file or directory")


def in_tars(folder: Path, pictures: dict[int, bytes], per_shard: int) -> Path:
    """Tars of the pictures with two captions each; every fifth has none."""
    folder.mkdir()
    for first in range(0, len(pictures), per_shard):
        with tarfile.open(folder / f"{first:03d}.tar", "w") as tar:
            for number in list(pictures)[first : first + per_shard]:
                record = {"captions": [] if number % 5 == 4 else [f"图{number}", f"画{number}"]}
                for name, content in (
                    (f"{number}.png", pictures[number]),
                    (f"{number}.json", json.dumps(record).encode()),
                ):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return folder


def as_coco(folder: Path, pictures: dict[int, bytes]) -> Path:
    """The same in JSON as COCO writes it, over files."""
    files(folder, {f"{number}.png": content for number, content in pictures.items()})
    notes = [{"image_id": n, "caption": f"{prefix}{n}"} for n in pictures if n % 5 != 4 for prefix in "图画"]
    images = [{"id": n, "file_name": f"{n}.png"} for n in pictures]
    (folder / "coco.json").write_text(json.dumps({"images": images, "annotations": notes}))
    return folder / "coco.json"


def as_base64(folder: Path, pictures: dict[int, bytes]) -> Path:
    of = [n for n in pictures if n % 5 != 4]
    lines = [{"text_id": f"{prefix}{n}", "text": f"{prefix}{n}", "image_ids": [n]} for n in of for prefix in "图画"]
    return chinese_clip(folder, "t", pictures, lines)


def passed(source: Any, **options: Any) -> list[tuple[list[str], list[list[str]], torch.Tensor]]:
    with opened(source, captions=True, dtype=torch.uint8, **({"seed": 3} | options)) as loader:
        return [(batch.keys, batch.captions, batch.images.clone()) for batch in loader]


@pytest.mark.parametrize("written", [as_coco, as_base64])
def test_every_source_gives_the_batches_of_the_same_tars(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: Any
) -> None:
    monkeypatch.setattr(sources, "PART", 7)
    pictures = {number: picture(number) for number in range(30)} | {12: b"no picture"}
    tars, source = in_tars(tmp_path / "tars", pictures, 7), open_source(written(tmp_path, pictures))
    for options in (
        {},
        {"train": True, "shuffle_buffer": 5},
        {"train": True, "shuffle_buffer": 5, "rank": 1, "world_size": 2, "epoch": 3},
        {"train": True, "shuffle_buffer": 5, "shares": [(4, 3, 1, 2)]},
    ):
        expected, found = passed(tars, **options), passed(source, **options)
        for (keys, texts, images), (other_keys, other_texts, other_images) in zip(expected, found, strict=True):
            assert keys == other_keys and texts == other_texts
            assert torch.equal(images, other_images)
    both = passed([tars, source, tars])
    assert [key for keys, _, _ in both for key in keys] == [key for keys, _, _ in passed(tars) for key in keys] * 3


def chunk(kind: bytes, content: bytes) -> bytes:
    return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")


def sixteen_bits(pixels: np.ndarray, transparent: tuple[int, ...] | None = None) -> bytes:
    """A PNG of uint16 [height, width] or [height, width, 3]; pixels of one value are transparent."""
    height, width = pixels.shape[:2]
    colour = 0 if pixels.ndim == 2 else 2
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([16, colour, 0, 0, 0])
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    one = b"" if transparent is None else chunk(b"tRNS", b"".join(value.to_bytes(2, "big") for value in transparent))
    parts = chunk(b"IHDR", header) + one + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def odd_exif() -> bytes:
    """A JPEG whose EXIF turns it, and holds a rational number that lies nowhere."""
    encoded = io.BytesIO()
    Image.open(io.BytesIO(picture(3, 24))).save(encoded, "JPEG")
    entries = struct.pack("<HHIHH", 0x112, 3, 1, 6, 0) + struct.pack("<HHII", 0x11A, 5, 1, 0xFFFF)
    exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 2) + entries + bytes(4)
    segment = b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif
    return encoded.getvalue()[:2] + segment + encoded.getvalue()[2:]


@pytest.mark.parametrize("written", [in_tars, as_coco, as_base64])
def test_pictures_that_decoders_disagreed_on_are_the_same_in_every_source(tmp_path: Path, written: Any) -> None:
    grey = np.add.outer(np.arange(16) * 900, np.arange(16) * 1000).astype(np.uint16)
    colour = np.stack([grey, grey.T, 65535 - grey], -1)
    gif = io.BytesIO()
    Image.open(io.BytesIO(picture(1))).save(gif, "GIF")
    pictures = {
        0: sixteen_bits(grey),
        1: sixteen_bits(grey, (int(grey[3, 5]),)),
        2: sixteen_bits(colour, tuple(colour[7, 2].tolist())),
        3: odd_exif(),
        5: gif.getvalue(),
    }
    expected = {name: decode_square(content, 16) for name, content in pictures.items()}
    upper, clear = (grey >> 8).astype(np.uint8), grey == grey[3, 5]
    np.testing.assert_array_equal(expected[0], np.repeat(upper[..., None], 3, -1))
    np.testing.assert_array_equal(expected[1], np.repeat(np.where(clear, 255, upper)[..., None], 3, -1))
    clear = (colour == colour[7, 2]).all(-1, keepdims=True)
    np.testing.assert_array_equal(expected[2], np.where(clear, 255, colour >> 8))
    assert clear.sum() == 1
    arguments = (tmp_path / "tars", pictures, 9) if written is in_tars else (tmp_path, pictures)
    ((keys, _, images),) = passed(written(*arguments), size=16, batch_size=9)
    for key, image in zip(keys, images, strict=True):
        np.testing.assert_array_equal(image.permute(1, 2, 0), expected[int(key)])
    assert len(keys) == 5


def test_a_source_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "PART", 7)
    source = open_source(as_base64(tmp_path, {number: picture(number) for number in range(30)}))
    options: dict[str, Any] = {"train": True, "shuffle_buffer": 5, "captions": True}

    def keys(batches: Iterable[ImageBatch]) -> list[str]:
        return [key for batch in batches for key in batch.keys]

    with opened(source, **options) as loader:
        whole = keys(loader)
    with opened(source, **options) as loader:
        found = keys(batch for _, batch in zip(range(5), loader, strict=False))
        state = loader.state()
    with opened(source, **options) as loader:
        loader.restore(state)
        found += keys(loader)
        assert loader.bad_counts == {"image without caption": 6}
    assert found == whole
    monkeypatch.setattr(sources, "PART", 8)
    with opened(source, **options) as loader, pytest.raises(UserError, match="loader state: shards"):
        loader.restore(state)


def test_labels_come_from_folders_or_a_column(tmp_path: Path) -> None:
    files(tmp_path / "set", {"狗/b.png": PICTURES[1], "狗/x/c.JPG": PICTURES[2], "猫/a.png": PICTURES[0]})
    files(tmp_path / "set", {"狗/notes.md": b"", "猫/._a.png": b"", "list.csv": "image,label\n猫/a.png,3\n".encode()})
    assert captions(read(open_labelled(tmp_path / "set"))) == {
        "狗/b.png": ["狗"],
        "狗/x/c.JPG": ["狗"],
        "猫/a.png": ["猫"],
    }
    assert captions(read(open_labelled(tmp_path / "set" / "list.csv"))) == {"猫/a.png": ["3"]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_ids": []}, r"t_texts.jsonl, line 2: image_ids is empty, as in test splits .*another split"),
        ({"image_ids": [0, 99]}, r"t_texts.jsonl, line 2: image_ids names 99, which .*t_imgs.tsv lacks"),
        ({"image_ids": 3}, r"line 2: field image_ids is missing, empty or of the wrong type"),
        ({"text_id": 7}, r"line 2: text_id 7 stands on line 1, too"),
        ({"text_id": None}, r"line 2: field text_id is missing"),
    ],
)
def test_faulty_texts_are_named_by_line_and_field(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    lines = texts()
    lines[1] |= change
    with pytest.raises(UserError, match=message):
        open_source(chinese_clip(tmp_path, "t", PICTURES, lines))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.csv", None, "none.csv: no such file"),
        ("a.zip", b"", "a.zip: unknown format; give .tar,"),
        ("x_imgs.tsv", b"1\tAAAA\n", "x_texts.jsonl: no such file; .* belong together"),
        ("t_imgs.tsv", b"0\tAAAA\n0\tAAAA\n", "t_imgs.tsv, line 2: image id 0 stands there twice"),
        ("t_imgs.tsv", b"0 AAAA\n", "t_imgs.tsv, line 1: not id<TAB>base64"),
        ("t_texts.jsonl", b"{}\n{", "t_texts.jsonl, line 1: field text_id is missing"),
        ("t_texts.jsonl", b"{", "t_texts.jsonl, line 1: malformed JSON"),
        ("t_texts.jsonl", b"[1]", "t_texts.jsonl, line 1: expected an object with text_id"),
        ("t_texts.jsonl", b"\xff\xfe", "t_texts.jsonl, line 1: not UTF-8"),
        ("a.json", b"{", "a.json: malformed JSON"),
        ("a.json", b"\xff", "a.json: byte 0 is not UTF-8"),
        ("a.json", b"[]", "a.json: no picture"),
        ("a.json", b'[{"image_id": "0.png"}]', r"a.json, entry 0: field caption is missing"),
        ("a.json", b'[{"image_id": "no.png", "caption": ["x"]}]', "no.png, lies in no folder near it; give --images"),
        ("a.json", b'{"images": []}', "a.json: field annotations is missing"),
        ("a.json", b'{"images": [{"id": 1}], "annotations": []}', r"images\[0\]: field file_name is missing"),
        (
            "a.json",
            b'{"images": [], "annotations": [{"image_id": 1, "caption": "x"}]}',
            r"annotations\[0\]: image_id 1 is not among images",
        ),
        ("a.json", b"[" * 100_000, "a.json: malformed JSON, maximum recursion"),
        ("a.csv", b"", "a.csv: columns ; exactly one must be named image or"),
        (
            "a.csv",
            b"image,text,caption\n",
            "columns image, text, caption; exactly one must be named caption or captions or text",
        ),
        (
            "a.csv",
            b'image,text\n0.png,"x\n',
            "a.csv, line 2: unexpected end of data; mend the line, or the quotes before it",
        ),
        ("a.csv", b"image,text\n0.png,\xc3\xa8\n1.png,\xb0\xa1\n", "a.csv, line 3: not UTF-8"),
        ("a.csv", b"image,text\n", "a.csv: no picture"),
        ("a.parquet", b"PAR", "a.parquet: broken .*it is not whole, or no Parquet"),
    ],
)
def test_faulty_files_end_in_one_message(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    chinese_clip(tmp_path, "t", PICTURES, texts())
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        open_source(tmp_path / name)


def test_a_broken_page_of_a_table_is_one_message(tmp_path: Path) -> None:
    file, rows = tmp_path / "a.parquet", 2000
    table = pa.table({"image": [f"{number}.png" for number in range(rows)], "text": ["猫"] * rows})
    pq.write_table(table, file, compression="zstd", use_dictionary=False)
    whole = bytearray(file.read_bytes())
    whole[100:400] = bytes(300)
    file.write_bytes(whole)
    assert pq.read_schema(file).names == ["image", "text"]
    with pytest.raises(UserError, match=r"a\.parquet: broken .*write it anew, or copy it again"):
        open_source(file)


def test_a_folder_of_several_splits_or_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no \.tar, no \.parquet and no \*_imgs\.tsv"):
        open_source(tmp_path)
    for split in ("test", "valid"):
        chinese_clip(tmp_path, split, PICTURES, texts())
    with pytest.raises(UserError, match=r"several splits, name one: .*test_imgs\.tsv, .*valid_imgs\.tsv"):
        open_source(tmp_path)
    with pytest.raises(UserError, match="no picture"):
        open_labelled(tmp_path)


def causes(source: sources.Source) -> dict[str, str]:
    return {found.key: found.cause for found in bad(source)}


NONE = [
    ("null", "image without caption"),
    ('""', "empty caption"),
    ('"\\u200b"', "empty caption"),
    ("NaN", "caption is no text"),
]
NONE += [('"\\ud83d"', "caption is not UTF-8"), ('["猫", null]', "caption is no text"), ("[]", "image without caption")]


@pytest.mark.parametrize(("caption", "cause"), NONE)
def test_a_caption_that_is_none_is_a_bad_sample_of_every_format(tmp_path: Path, caption: str, cause: str) -> None:
    files(tmp_path, {"0.png": PICTURES[0], "1.png": PICTURES[1]})
    challenger = tmp_path / "challenger.json"
    challenger.write_text(
        f'[{{"image_id": "0.png", "caption": {caption}}}, {{"image_id": "1.png", "caption": "狗"}}]', encoding="utf-8"
    )
    assert causes(open_source(challenger)) == {"entry 0": cause}
    coco = tmp_path / "coco.json"
    coco.write_text(
        '{"images": [{"id": 5, "file_name": "0.png"}, {"id": 6, "file_name": "1.png"}], "annotations":'
        f' [{{"image_id": 6, "caption": "狗"}}, {{"image_id": 5, "caption": {caption}}}]}}',
        encoding="utf-8",
    )
    assert causes(open_source(coco)) == {"annotations[1]": cause}
    images = chinese_clip(tmp_path, "t", PICTURES, [])
    (tmp_path / "t_texts.jsonl").write_text(
        f'{{"text_id": 1, "text": {caption}, "image_ids": [0]}}\n{{"text_id": 2, "text": "狗", "image_ids": [1]}}\n',
        encoding="utf-8",
    )
    assert causes(open_source(images)) == {"line 1": cause}
    for source in (challenger, coco, images):
        assert ["狗"] in [sample.captions for sample in reading.read(source)[0]]


def test_a_list_of_captions_is_several_in_every_format(tmp_path: Path) -> None:
    images = chinese_clip(tmp_path, "t", PICTURES, [{"text_id": 1, "text": [CAT, DOG], "image_ids": [0]}])
    first = next(iter(read(open_source(images))))
    assert (first.captions, first.text_ids) == ([CAT, DOG], ["1#0", "1#1"])
    files(tmp_path, {"0.png": PICTURES[0]})
    (tmp_path / "c.json").write_text(
        json.dumps(
            {"images": [{"id": 1, "file_name": "0.png"}], "annotations": [{"image_id": 1, "caption": [CAT, DOG]}]}
        )
    )
    assert captions(read(open_source(tmp_path / "c.json"))) == {"1": [CAT, DOG]}


def test_names_that_no_file_can_have_are_bad_samples(tmp_path: Path) -> None:
    files(tmp_path, {"0.png": PICTURES[0]})
    (tmp_path / "a.json").write_text(
        '[{"image_id": "\\ud83d.png", "caption": "x"}, {"image_id": "a\\u0000.png", "caption": "x"},'
        ' {"image_id": "0.png", "caption": "x"}]'
    )
    cause = "no file can have this name"
    assert causes(open_source(tmp_path / "a.json")) == {"entry 0": cause, "entry 1": cause}
    (tmp_path / "c.json").write_text(
        '{"images": [{"id": 1, "file_name": "\\ud83d.png"}, {"id": 2, "file_name": "0.png"}],'
        ' "annotations": [{"image_id": 1, "caption": "x"}, {"image_id": 2, "caption": "x"}]}'
    )
    assert causes(open_source(tmp_path / "c.json")) == {"images[0]": cause}


@pytest.mark.parametrize("separator", ["\u2028", "\x85", "\x0b"])
def test_other_separators_end_no_line_of_texts(tmp_path: Path, separator: str) -> None:
    line = {"text_id": 1, "text": f"猫{separator}狗", "image_ids": [0]}
    images = chinese_clip(tmp_path, "t", PICTURES, [])
    (tmp_path / "t_texts.jsonl").write_text(json.dumps(line, ensure_ascii=False) + "\n", encoding="utf-8")
    if separator == "\x0b":
        # JSON escapes control characters.
        assert "\\u000b" in (tmp_path / "t_texts.jsonl").read_text()
    assert captions(read(open_source(images)))["0"] == [f"猫{separator}狗"]
