"""Tables through `prepare`: what is counted, which columns count, pictures inside a Parquet."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from efficientclip.cli import main
from efficientclip.config import Config
from efficientclip.data.shards import read_picture
from efficientclip.data.store import Store
from efficientclip.data.tables import Columns
from efficientclip.errors import UserError
from efficientclip.prepare import parallel
from efficientclip.prepare.build import prepare
from tests import tiny
from tests.formats import files
from tests.model import hub
from tests.prepare.tars import CAPTIONS, as_table, good, png, write_tar


def test_bad_rows_are_counted_listed_and_left_out(
    tmp_path: Path, config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    files(tmp_path, {f"{number}.png": png(number) for number in range(3)})
    table = tmp_path / "t.csv"
    rows = [
        "0.png,猫",
        "1.png,",
        "2.png,\u200b",
        "http://x.org/a,狗",
        "0.png,猫",
        f"0.png,{'狗' * 90}",
        "2.png,龘龘",
        ",鸟",
    ]
    table.write_text("\ufeffimage,caption\n" + "\n".join(rows) + "\n", encoding="utf-8")
    assert main(["prepare", str(table), str(tmp_path / "made"), "--config", str(tmp_path / "config.yaml")]) == 0
    told = capsys.readouterr().out
    manifest = Store(tmp_path / "made").manifest
    assert manifest["bad_counts"] == {"empty caption": 2, "picture is a URL, not a file": 1, "no picture named": 1}
    assert [entry["key"] for entry in manifest["bad_samples"]] == ["line 3", "line 4", "line 5", "line 9"]
    counts = ("pairs", "images", "captions", "repeated_pairs", "long_captions", "unknown_captions")
    assert [manifest[name] for name in counts] == [3, 2, 3, 1, 1, 1]
    for part in (
        "3 pairs, 2 images, 3 captions",
        "1 × repeated pair",
        "1 × caption of more than 64 tokens",
        "1 × caption of unknown words alone",
        "left out: 2 × empty caption, 1 × picture is a URL",
    ):
        assert part in told
    strict = config.model_copy(update={"data": config.data.model_copy(update={"max_bad_share": 0.5})})
    with pytest.raises(UserError, match=r"66\.7% of 6 samples are bad .*first: line 3 in t\.csv"):
        prepare(table, tmp_path / "strict", strict)


def test_keys_and_sources_reach_the_store(tmp_path: Path, config: Config) -> None:
    files(tmp_path, {f"{number}.png": png(number) for number in range(2)})
    (tmp_path / "t.tsv").write_text(
        "图片\t标题\tsource\tSKU\n0.png\t猫\tshop\tA1\n1.png\t狗\tweb\tA2\n", encoding="utf-8"
    )
    told = Columns(image="图片", caption="标题", key="SKU")
    prepare(tmp_path / "t.tsv", tmp_path / "made", config, columns=told)
    pairs = Store(tmp_path / "made").pairs().select(["key", "caption", "source"]).to_pylist()
    assert [tuple(pair.values()) for pair in pairs] == [("A1", "猫", "shop"), ("A2", "狗", "web")]
    with pytest.raises(UserError, match=r"made of something else \(columns is .*SKU.* there and .*标题'\] now"):
        prepare(tmp_path / "t.tsv", tmp_path / "made", config, columns=Columns(image="图片", caption="标题"))
    with pytest.raises(UserError, match=r"--key-column SKU: .* is no table"):
        prepare(write_tar(tmp_path / "a.tar", good(0)), tmp_path / "other", config, columns=Columns(key="SKU"))


def test_a_parquet_of_pictures_gives_the_store_of_the_same_tar(tmp_path: Path, config: Config) -> None:
    members: dict[str, bytes] = {}
    for number, captions in CAPTIONS.items():
        members |= {f"{number}.png": png(number), f"{number}.json": json.dumps({"captions": captions}).encode()}
    prepare(write_tar(tmp_path / "a.tar", members), tmp_path / "expected", config)
    table = {
        "image": [{"bytes": png(number), "path": f"{number}.png"} for number in CAPTIONS],
        "caption": list(CAPTIONS.values()),
    }
    pq.write_table(pa.table(table), tmp_path / "t.parquet", row_group_size=2)
    prepare(tmp_path / "t.parquet", tmp_path / "made", config)
    expected, made = Store(tmp_path / "expected"), Store(tmp_path / "made")
    np.testing.assert_allclose(made.features.astype(np.float32), expected.features.astype(np.float32), atol=2e-3)
    columns = ["caption", "image_id", "caption_id"]
    assert made.pairs().select(columns).to_pylist() == expected.pairs().select(columns).to_pylist()
    for row in made.pairs().to_pylist():
        assert read_picture(Path(row["shard"]), row["offset"], row["length"]) == png(row["image_id"])


@pytest.mark.parametrize("lacks", ["[CLS] and no [SEP]", "[MASK]"])
def test_a_tokenizer_that_cannot_make_a_text_store_is_refused(tmp_path: Path, config: Config, lacks: str) -> None:
    if lacks == "[MASK]":
        bert = tiny.tokenizer(tmp_path)
        bert.mask_token = None  # type: ignore[assignment]
        bert.save_pretrained(tmp_path / "tokenizer")
    else:
        hub.clip_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "t.txt").write_text("a cat\n")
    data = config.data.model_copy(update={"tokenizer": str(tmp_path / "tokenizer")})
    with pytest.raises(UserError, match=rf"data\.tokenizer: has no {lacks}".replace("[", r"\[").replace("]", r"\]")):
        prepare(tmp_path / "t.txt", tmp_path / "made", config.model_copy(update={"data": data}))


def test_invisible_lines_are_no_texts(tmp_path: Path, config: Config) -> None:
    (tmp_path / "t.txt").write_bytes("\ufeff猫\n\u200b\n\ufeff\n狗\u2028鸟\n".encode())
    assert prepare(tmp_path / "t.txt", tmp_path / "made", config)["texts"] == 2


def test_a_table_that_changes_is_prepared_anew(tmp_path: Path, config: Config) -> None:
    table = as_table(tmp_path, {number: png(number) for number in CAPTIONS})
    rows = table.read_text(encoding="utf-8")
    table.write_text(rows + "images/0.png,\n", encoding="utf-8")
    assert prepare(table, tmp_path / "made", config)["bad_counts"] == {"empty caption": 1}
    table.write_text(rows + "images/0.png,狗\n", encoding="utf-8")
    made = prepare(table, tmp_path / "made", config, replace=True)
    assert (made["bad_counts"], made["pairs"]) == ({}, 5)


def test_parallel_text_is_two_texts_around_a_tab(
    tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    def encode(texts: list[str], progress: str) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
        return np.eye(tiny.WIDTH, dtype=np.float32)[: len(texts)]

    monkeypatch.setattr(parallel, "Teacher", lambda _: SimpleNamespace(encode=encode))
    lines = ["\ufeff猫\tcat", "7\t狗\tdog", "鸟\t", "\u200b\tfish", "鱼\u2028水\tfish\t", "红\x85蓝\tred", "雨"]
    (tmp_path / "t.tsv").write_bytes("\n".join(lines).encode())
    made = prepare(tmp_path / "t.tsv", tmp_path / "made", config)
    assert made["bad_counts"] == {"not two texts around a tab": 4}
    captions = Store(tmp_path / "made").pairs()["caption"].to_pylist()
    assert captions == ["猫", "鱼\u2028水", "红\x85蓝"]
