"""What a source is told to hold before any work."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import efficientclip.fitting.look
from efficientclip.data.tables import USUAL, Columns
from efficientclip.errors import UserError
from efficientclip.fitting.look import look
from tests.prepare.tars import png, write_shards


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(efficientclip.fitting.look, "LEAST_PAIRS", 1)


def shop(folder: Path, rows: str, suffix: str = ".csv") -> Path:
    for number in range(3):
        (folder / f"{number}.png").write_bytes(png(number))
    table = folder / f"products{suffix}"
    table.write_text(rows, encoding="utf-8")
    return table


def test_a_table_is_told_by_what_it_holds(tmp_path: Path) -> None:
    rows = (
        "图片,标题,sku,价格\n0.png,一只猫,A1,3\n1.png,一只猫,A2,4\n2.png,red cup,A3,5\n3.png,ねこ,A4,5\n2.png,,A5,5\n"
    )
    found = look(shop(tmp_path, rows), None, USUAL)
    assert (found.pictures, found.pairs) == (4, 4)
    assert found.notes["columns"] == "图片 is the picture, 标题 is the caption, sku is the key; 价格 not used"
    assert found.notes["repeated"] == "1 captions are of several pictures, the most of 2: 一只猫"
    assert found.notes["languages"] == "50% Chinese, 25% Latin, 25% Japanese"
    assert found.notes["lengths"] == "3 characters (median), 6 (95 %), 7 (longest)"
    assert found.notes["missing"].startswith("1 of 4 picture files looked for, the first: ")
    assert found.notes["left out"].startswith("1 × ")


def test_pictures_that_are_all_elsewhere_end_it_with_the_remedy(tmp_path: Path) -> None:
    table = shop(tmp_path, "image,caption\na/0.png,猫\na/1.png,狗\n")
    with pytest.raises(UserError, match=r"none of the pictures .* is there, the first: .*a/0\.png; give --images"):
        look(table, None, USUAL)


def test_two_columns_that_may_both_be_it_end_it_with_the_remedy(tmp_path: Path) -> None:
    table = shop(tmp_path, "image,标题,描述\n0.png,猫,黑色的猫\n")
    with pytest.raises(UserError, match=r"not 标题 and 描述, or be told by --caption-column NAME"):
        look(table, None, USUAL)
    assert look(table, None, Columns(caption="描述")).notes["columns"] == (
        "image is the picture, 描述 is the caption; 标题 not used"
    )


def test_a_table_without_a_caption_that_can_be_used_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no row has a caption that can be used \(2 × "):
        look(shop(tmp_path, "image,caption\n0.png,\n1.png, \n"), None, USUAL)


def test_a_handful_of_pairs_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(efficientclip.fitting.look, "LEAST_PAIRS", 8)
    with pytest.raises(UserError, match="2 pairs; nothing is learned from fewer than 8"):
        look(shop(tmp_path, "image,caption\n0.png,猫\n1.png,狗\n"), None, USUAL)


def test_of_tars_only_reading_tells(tmp_path: Path) -> None:
    found = look(write_shards(tmp_path / "tars"), None, USUAL)
    assert found.pairs is None and found.notes["pairs"].startswith("3 tar files, ")


def test_pictures_inside_a_parquet_are_counted(tmp_path: Path) -> None:
    file = tmp_path / "train.parquet"
    pq.write_table(pa.table({"image": [{"bytes": png(0), "path": "x"}], "caption": ["猫"]}), file)
    found = look(file, None, USUAL)
    assert (found.pictures, found.pairs) == (1, 1) and "missing" not in found.notes
