"""Sources become stores whole or not at all; bad samples are counted, listed and left out."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from efficientclip.cli import main
from efficientclip.config import Config
from efficientclip.data import sources
from efficientclip.data.shards import BadSample, read_picture
from efficientclip.data.store import PAIR_FILES, Store, TextStore, staging
from efficientclip.errors import UserError
from efficientclip.model import frozen
from efficientclip.prepare import merge, pictures
from efficientclip.prepare.build import prepare
from tests.formats import chinese_clip, files
from tests.prepare.tars import CAPTIONS, as_table, good, png, write_tar


def test_store_holds_every_image_and_caption_once(tmp_path: Path, config: Config) -> None:
    members = good(0, "猫") | good(1, "狗")
    members |= {"002.png": png(0), "002.json": json.dumps({"captions": ["猫", "红鸟"]}).encode()}
    tar = write_tar(tmp_path / "a.tar", members)
    manifest = prepare(tar, tmp_path / "made", config)
    store = Store(tmp_path / "made")
    assert (manifest["pairs"], manifest["images"], manifest["captions"]) == (3, 2, 3)
    np.testing.assert_allclose(np.linalg.norm(store.features.astype(np.float32), axis=1), 1, atol=2e-3)
    row = store.pairs().to_pylist()[2]
    assert row["caption"] == "红鸟" and row["image_id"] == store.image_ids[0]
    assert read_picture(Path(row["shard"]), row["offset"], row["length"]) == png(0)
    assert not staging(tmp_path / "made").exists()


def test_bad_samples_are_counted_listed_and_left_out(tmp_path: Path, config: Config) -> None:
    members = good(0)
    members |= {"001.txt": "猫".encode()}
    members |= {"002.png": png(2)}
    members |= {"003.png": b"no picture", "003.txt": "猫".encode()}
    members |= {"004.png": png(4), "004.txt": b"\xff\xfe\xff"}
    members |= {"005.png": png(5), "005.txt": b"  "}
    members |= {"006.png": png(6)[:200], "006.txt": "狗".encode()}
    members |= {"007.png": png(7), "007.json": b"{"}
    manifest = prepare(write_tar(tmp_path / "a.tar", members), tmp_path / "made", config)
    assert manifest["pairs"] == 1
    assert manifest["bad_counts"] == {
        "caption without image": 1,
        "image without caption": 1,
        "undecodable image": 1,
        "truncated image": 1,
        "caption is not UTF-8": 1,
        "empty caption": 1,
        "json is malformed": 1,
    }
    assert {entry["key"] for entry in manifest["bad_samples"]} == {f"{n:03d}" for n in range(1, 8)}


def test_too_many_bad_samples_stop(tmp_path: Path, config: Config) -> None:
    strict = config.model_copy(update={"data": config.data.model_copy(update={"max_bad_share": 0.1})})
    tar = write_tar(tmp_path / "a.tar", good(0) | {"001.txt": "猫".encode()})
    with pytest.raises(UserError, match=r"50\.0% of 2 samples are bad .*001.*max_bad_share"):
        prepare(tar, tmp_path / "made", strict)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("missing.tar", "missing.tar: no such file"),
        ("folder", r"holds no \.tar, no \.parquet and no \*_imgs\.tsv"),
        ("empty.tar", "empty, no sample found"),
        ("cut.tar", "not a whole tar file"),
        ("empty.txt", "empty, no text found"),
        ("latin.txt", "line 1: not UTF-8"),
    ],
)
def test_broken_sources_end_in_one_message(tmp_path: Path, config: Config, source: str, message: str) -> None:
    (tmp_path / "folder").mkdir()
    write_tar(tmp_path / "empty.tar", {})
    whole = write_tar(tmp_path / "whole.tar", good(0) | good(1)).read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[:700])
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "latin.txt").write_bytes(b"\xe9t\xe9")
    with pytest.raises(UserError, match=message):
        prepare(tmp_path / source, tmp_path / "made", config)
    assert not (tmp_path / "made").exists()


def test_interrupted_call_keeps_its_finished_parts(
    tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    for number in range(3):
        write_tar(shards / f"{number}.tar", good(2 * number) | good(2 * number + 1))
    real, read = frozen.ImageLoader, []

    def failing(part: sources.Source, **settings: Any) -> Any:
        read.append(part.path.name)
        # The reader of the part after next is made once the first one stands.
        if len(read) == 3:
            raise KeyboardInterrupt
        return real(part, **settings)

    monkeypatch.setattr(frozen, "ImageLoader", failing)
    with pytest.raises(KeyboardInterrupt):
        prepare(shards, tmp_path / "made", config)
    with pytest.raises(UserError, match="was interrupted"):
        Store(tmp_path / "made")
    prepare(shards, tmp_path / "made", config)
    assert read == ["0.tar", "1.tar", "2.tar", "1.tar", "2.tar"]
    assert Store(tmp_path / "made").manifest["images"] == 6
    prepare(shards, tmp_path / "made", config)
    assert len(read) == 5


def test_long_texts_are_cut_into_pieces_without_loss(tmp_path: Path, config: Config) -> None:
    (tmp_path / "t.txt").write_text("猫狗鸟鱼红蓝黄绿大小\n\n上\n", encoding="utf-8")
    prepare(tmp_path / "t.txt", tmp_path / "made", config)
    texts = TextStore(tmp_path / "made")
    lengths = np.diff(texts.offsets).tolist()
    assert lengths == [8, 6, 3]
    special = texts.manifest["special_tokens"]
    assert (~np.isin(texts.tokens, special)).sum() == 11


def test_a_store_of_several_sources_tells_their_names(
    tmp_path: Path, config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    told = {**good(0), "000.json": '{"caption": "猫", "source": "finer"}'.encode()}
    one = write_tar(tmp_path / "one.tar", told | good(1, "狗"))
    # Its first pair stands in the other source, too.
    two = write_tar(tmp_path / "two.tar", good(1, "狗") | good(2, "鸟"))
    named = {"wukong": one, "coco": two}
    assert prepare(named, tmp_path / "store", config)["sources"] == {"wukong": str(one), "coco": str(two)}
    pairs = Store(tmp_path / "store").pairs()
    assert pairs["source"].to_pylist() == ["wukong", "wukong", "coco"]
    assert pairs["key"].to_pylist() == ["000", "001", "002"]
    found = Store(tmp_path / "store").sources()
    assert found.names == ("wukong", "coco") and found.of.tolist() == [0, 0, 1]
    prepare(one, tmp_path / "alone", config)
    assert Store(tmp_path / "alone").pairs()["source"].to_pylist() == ["finer", ""]
    # The same by the command, overrides before and behind its other arguments.
    sources, file = f"data.sources={{wukong: {one}, coco: {{path: {two}, weight: 3}}}}", str(tmp_path / "config.yaml")
    for number, rest in enumerate([[sources, "--config", file], ["--config", file, sources, "seed=1"]]):
        place = str(tmp_path / f"by-command-{number}")
        assert main(["prepare", place, *rest]) == 0
        assert Store(Path(place)).pairs()["source"].to_pylist() == ["wukong", "wukong", "coco"]
    assert prepare(named, tmp_path / "store", config)["pairs"] == 3
    for other in ({"renamed": one, "coco": two}, one):
        with pytest.raises(UserError, match="made of something else"):
            prepare(other, tmp_path / "store", config)
    assert main(["prepare", str(tmp_path / "none"), "--config", file]) == 2
    assert "give SOURCE and STORE, or STORE alone and data.sources" in capsys.readouterr().err
    with pytest.raises(UserError, match="--images: tells of one SOURCE"):
        prepare(named, tmp_path / "other", config, images=tmp_path)
    parallel = tmp_path / "parallel.tsv"
    parallel.write_text("猫\tcat\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"data\.sources: some are parallel text, some pictures"):
        prepare({"a": one, "b": parallel}, tmp_path / "other", config)
    with pytest.raises(UserError, match="no such file or folder"):
        prepare({"a": one, "b": tmp_path / "absent"}, tmp_path / "other", config)


def test_a_damaged_store_is_refused(tmp_path: Path, config: Config) -> None:
    prepare(write_tar(tmp_path / "a.tar", good(0)), tmp_path / "made", config)
    with (tmp_path / "made" / "features.bin").open("ab") as file:
        file.write(b"x")
    with pytest.raises(UserError, match=r"features\.bin: has 33 bytes, not the 32"):
        Store(tmp_path / "made")


def as_chinese_clip(folder: Path, pictures: Mapping[int, bytes]) -> Path:
    texts = {
        caption: [n for n in CAPTIONS if caption in CAPTIONS[n]]
        for captions in CAPTIONS.values()
        for caption in captions
    }
    lines = [{"text_id": n, "text": text, "image_ids": ids} for n, (text, ids) in enumerate(texts.items())]
    return chinese_clip(folder, "train", pictures, lines)


def as_challenger(folder: Path, pictures: Mapping[int, bytes]) -> Path:
    files(folder / "images", {f"{n}.png": content for n, content in pictures.items()})
    entries = [{"image_id": f"{n}.png", "caption": captions * 2} for n, captions in CAPTIONS.items()]
    (folder / "challenger.json").write_text(json.dumps(entries))
    return folder / "challenger.json"


def as_coco(folder: Path, pictures: Mapping[int, bytes]) -> Path:
    files(folder / "images", {f"{n}.png": content for n, content in pictures.items()})
    images = [{"id": n, "file_name": f"{n}.png"} for n in pictures]
    notes = [{"image_id": n, "caption": caption} for n, captions in CAPTIONS.items() for caption in captions]
    (folder / "coco.json").write_text(json.dumps({"images": images, "annotations": notes}))
    return folder / "coco.json"


def gif(seed: int) -> bytes:
    buffer = io.BytesIO()
    with Image.open(io.BytesIO(png(seed))) as picture:
        picture.save(buffer, "GIF")
    return buffer.getvalue()


def interrupted_at(call: int, real: Any, encoded: list[int] | None = None) -> Any:
    """`encode_pixels` that is interrupted in that call; `encoded` tells the sizes of all."""
    sizes = [] if encoded is None else encoded

    def failing(self: Any, pixels: Any) -> Any:
        sizes.append(len(pixels))
        if len(sizes) == call:
            raise KeyboardInterrupt
        return real(self, pixels)

    return failing


def as_tsv(folder: Path, pictures: Mapping[int, bytes]) -> Path:
    return as_table(folder, pictures, ".tsv")


def as_parquet(folder: Path, pictures: Mapping[int, bytes]) -> Path:
    return as_table(folder, pictures, ".parquet")


@pytest.mark.parametrize("written", [as_chinese_clip, as_challenger, as_coco, as_table, as_tsv, as_parquet])
def test_every_format_gives_the_store_of_the_same_tar(tmp_path: Path, config: Config, written: Any) -> None:
    pictures = {number: png(number) for number in CAPTIONS}
    tar: dict[str, bytes] = {}
    for number, captions in CAPTIONS.items():
        tar |= {f"{number}.png": pictures[number], f"{number}.json": json.dumps({"captions": captions}).encode()}
    prepare(write_tar(tmp_path / "a.tar", tar), tmp_path / "expected", config)
    made = prepare(written(tmp_path, pictures), tmp_path / "made", config)
    expected, found = Store(tmp_path / "expected"), Store(tmp_path / "made")
    assert {name: made[name] for name in ("pairs", "images", "captions")} == {"pairs": 4, "images": 3, "captions": 3}
    for name in set(PAIR_FILES) - {"pairs.parquet"}:
        assert (found.path / name).read_bytes() == (expected.path / name).read_bytes(), name
    columns = ["caption", "source", "image_id", "caption_id", "noise"]
    assert found.pairs().select(columns).to_pylist() == expected.pairs().select(columns).to_pylist()
    for row in found.pairs().to_pylist():
        assert read_picture(Path(row["shard"]), row["offset"], row["length"]) == pictures[row["image_id"]]


def test_pictures_may_lie_elsewhere(tmp_path: Path, config: Config) -> None:
    table = as_table(tmp_path, {number: png(number) for number in CAPTIONS})
    (tmp_path / "images").rename(tmp_path / "moved")
    (tmp_path / "other").mkdir()
    (tmp_path / "moved").rename(tmp_path / "other" / "images")
    with pytest.raises(UserError, match=r"100\.0% of 3 samples are bad .*picture file: No such file"):
        prepare(table, tmp_path / "made", config)
    manifest = prepare(table, tmp_path / "made", config, tmp_path / "other")
    assert (manifest["images"], manifest["bad_samples"]) == (3, [])


def test_bad_samples_of_other_sources_are_counted_listed_and_left_out(tmp_path: Path, config: Config) -> None:
    images = as_chinese_clip(tmp_path, {number: png(number) for number in CAPTIONS})
    extra = {3: png(3), 4: b"no picture", 5: png(5)[:200]}
    with images.open("a") as stream:
        for number, content in extra.items():
            stream.write(f"{number}\t{base64.b64encode(content).decode()}\n")
        stream.write("6\t!?\n")
    with (tmp_path / "train_texts.jsonl").open("a") as stream:
        stream.write(json.dumps({"text_id": 90, "text": "鱼", "image_ids": [4, 5, 6]}) + "\n")
    manifest = prepare(images, tmp_path / "made", config)
    causes = ("image without caption", "undecodable image", "truncated image", "picture is not base64")
    listed = [vars(BadSample(images.name, str(number), cause)) for number, cause in enumerate(causes, 3)]
    assert (manifest["pairs"], manifest["bad_samples"]) == (4, listed)
    assert manifest["bad_counts"] == dict.fromkeys(causes, 1)
    strict = config.model_copy(update={"data": config.data.model_copy(update={"max_bad_share": 0.5})})
    with pytest.raises(UserError, match=r"57\.1% of 7 samples are bad .*first: 3 in train_imgs\.tsv.*max_bad_share"):
        prepare(images, tmp_path / "strict", strict)


def test_pictures_of_the_slow_path_are_counted(
    tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sources, "PART", 2)
    contents = {number: gif(number) if number else png(number) for number in CAPTIONS}
    table = as_table(tmp_path, contents)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(pictures.FrozenImages, "encode_pixels", interrupted_at(2, pictures.FrozenImages.encode_pixels))
        prepare(table, tmp_path / "made", config)
    # One of a part that is kept, one of a part made now.
    assert main(["prepare", str(table), str(tmp_path / "made"), "--config", str(tmp_path / "config.yaml")]) == 0
    assert "2 × picture by Pillow, the slow path" in capsys.readouterr().out
    assert Store(tmp_path / "made").manifest["slow_pictures"] == 2
    members = {f"{n}.gif": gif(n) for n in CAPTIONS} | {f"{n}.txt": CAPTIONS[n][0].encode() for n in CAPTIONS}
    tar = write_tar(tmp_path / "a.tar", dict(sorted(members.items())))
    assert prepare(tar, tmp_path / "tar", config)["slow_pictures"] == 3


def test_interrupted_call_over_another_source_goes_on(
    tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "PART", 1)
    images = as_chinese_clip(tmp_path, {number: png(number) for number in CAPTIONS})
    encoded: list[int] = []
    failing = interrupted_at(2, pictures.FrozenImages.encode_pixels, encoded)
    monkeypatch.setattr(pictures.FrozenImages, "encode_pixels", failing)
    with pytest.raises(KeyboardInterrupt):
        prepare(images, tmp_path / "made", config)
    assert not (tmp_path / "made").exists()
    assert prepare(images, tmp_path / "made", config)["images"] == 3
    assert prepare(images, tmp_path / "made", config)["pairs"] == 4
    assert encoded == [1, 1, 1, 1]
    with images.open("a") as stream:
        stream.write(f"3\t{base64.b64encode(png(3)).decode()}\n")
    made = prepare(images, tmp_path / "made", config, replace=True)
    assert made["bad_counts"] == {"image without caption": 1}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.tsv", "a/0.png\t猫\n", r"t\.tsv, line 1: names a picture file, but line 1 .* header with one of image,"),
        ("t.tsv", "文件\t标题\na/0.JPG\t猫\n", r"t\.tsv, line 2: names a picture file"),
        ("t.tsv", f"1\t{'/9j+' * 60}\n", r"t\.tsv, line 1: holds base64.* name it \*_imgs\.tsv"),
        ("t.tsv", "image\tlabel\na.png\t猫\n", r"columns image, label; exactly one must be named caption"),
        ("t.tsv", "猫\tcat\n", r"model\.teacher: not set; .*t\.tsv is taken as parallel text, .*a table"),
        ("t.tsv", "图像\timage\n", r"taken as parallel text"),
        ("x_imgs.tsv", "1\tAAAA\n", r"x_texts\.jsonl: no such file; \*_imgs\.tsv and \*_texts\.jsonl belong together"),
        ("t.zip", "", r"t\.zip: unknown format"),
    ],
)
def test_what_a_file_is_taken_for_is_told(
    tmp_path: Path, config: Config, name: str, content: str, message: str
) -> None:
    without = config.model_copy(update={"model": config.model.model_copy(update={"teacher": None})})
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match="(?i)" + message):
        prepare(tmp_path / name, tmp_path / "made", without)


def test_a_changed_picture_file_is_told_when_it_is_shown(tmp_path: Path) -> None:
    (tmp_path / "x_imgs.tsv").write_text("1\t!!!!\n")
    with pytest.raises(UserError, match=r"x_imgs\.tsv: no picture at byte 2 .* prepare the store anew"):
        read_picture(tmp_path / "x_imgs.tsv", 2, 4)


@pytest.mark.parametrize("at_once", [1 << 20, 7])
def test_ids_count_in_the_order_of_first_occurrence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr(merge, "SORTED_AT_ONCE", at_once)
    monkeypatch.setattr(merge, "SCANNED_AT_ONCE", 2 * at_once)
    random = np.random.default_rng(0)
    # Halves of the digests are equal where the whole is not.
    digests_N2 = random.choice(random.integers(0, 1 << 64, 3, np.uint64, endpoint=False), (200, 2))
    known: dict[bytes, int] = {}
    expected = [known.setdefault(digest.tobytes(), len(known)) for digest in digests_N2]
    ids, new, count = merge._ids(tmp_path, digests_N2)
    assert ids.tolist() == expected and count == len(known) == 9
    assert np.flatnonzero(new).tolist() == [expected.index(number) for number in range(9)]
    assert not [*tmp_path.iterdir()]
