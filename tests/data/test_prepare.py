"""Sources become stores whole or not at all; bad samples are counted, listed and left out."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import ResNetConfig

from efficientclip import prepare as stage
from efficientclip.config import Config, load_config
from efficientclip.data.shards import read_picture
from efficientclip.data.store import Store, TextStore, staging
from efficientclip.errors import UserError
from efficientclip.model.efficientclip import EfficientCLIP, EfficientCLIPConfig
from efficientclip.prepare import prepare
from tests import tiny


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 24, 3), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def good(number: int, caption: str = "猫") -> dict[str, bytes]:
    return {f"{number:03d}.png": png(number), f"{number:03d}.txt": caption.encode()}


@pytest.fixture
def config(tmp_path: Path) -> Config:
    tiny.tokenizer(tmp_path)
    resnet = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    model = EfficientCLIP(EfficientCLIPConfig(image={**resnet.to_dict(), "image_size": 16}, width=tiny.WIDTH))
    model.save_pretrained(tmp_path / "image-run" / "model")
    return load_config(
        tiny.config(
            tmp_path,
            data__tokenizer=str(tmp_path / "vocab.txt"),
            data__max_text_tokens=8,
            data__max_bad_share=0.9,
            model__image_tower={"pretrained": str(tmp_path / "image-run"), "size": 16},
        )
    )


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
        ("folder", "holds no .tar file"),
        ("empty.tar", "empty, no sample found"),
        ("cut.tar", "not a whole tar file"),
        ("empty.txt", "empty, no text found"),
        ("latin.txt", "byte 0 is not UTF-8"),
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
    real, read = stage.ImageLoader, []

    def failing(shard: Path, **settings: Any) -> Any:
        read.append(shard.name)
        if len(read) == 2:
            raise KeyboardInterrupt
        return real(shard, **settings)

    monkeypatch.setattr(stage, "ImageLoader", failing)
    with pytest.raises(KeyboardInterrupt):
        prepare(shards, tmp_path / "made", config)
    with pytest.raises(UserError, match="was interrupted"):
        Store(tmp_path / "made")
    prepare(shards, tmp_path / "made", config)
    assert read == ["0.tar", "1.tar", "1.tar", "2.tar"]
    assert Store(tmp_path / "made").manifest["images"] == 6
    prepare(shards, tmp_path / "made", config)
    assert len(read) == 4


def test_long_texts_are_cut_into_pieces_without_loss(tmp_path: Path, config: Config) -> None:
    (tmp_path / "t.txt").write_text("猫狗鸟鱼红蓝黄绿大小\n\n上\n", encoding="utf-8")
    prepare(tmp_path / "t.txt", tmp_path / "made", config)
    texts = TextStore(tmp_path / "made")
    lengths = np.diff(texts.offsets).tolist()
    assert lengths == [8, 6, 3]
    special = texts.manifest["special_tokens"]
    assert (~np.isin(texts.tokens, special)).sum() == 11


def test_a_damaged_store_is_refused(tmp_path: Path, config: Config) -> None:
    prepare(write_tar(tmp_path / "a.tar", good(0)), tmp_path / "made", config)
    with (tmp_path / "made" / "features.bin").open("ab") as file:
        file.write(b"x")
    with pytest.raises(UserError, match=r"features\.bin has 33 bytes, the manifest says 32"):
        Store(tmp_path / "made")
