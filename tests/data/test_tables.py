"""Tables as people have them: what separates cells, what ends a row, which columns count, and pictures inside."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from efficientclip.data import sources
from efficientclip.data.shards import read_picture
from efficientclip.data.sources import open_labelled, open_source
from efficientclip.data.tables import Columns, read_table
from efficientclip.errors import UserError
from tests.data.reading import opened, read
from tests.formats import files, picture

PICTURES = {f"{number}.png": picture(number) for number in range(4)}
ROWS = [("0.png", "一只猫"), ("1.png", "狗"), ("2.png", "鸟")]


def write(folder: Path, name: str, content: str) -> Path:
    """A table beside four pictures."""
    files(folder, PICTURES)
    (folder / name).write_bytes(content.encode())
    return folder / name


def write_parquet(folder: Path, **columns: Any) -> Path:
    files(folder, PICTURES)
    pq.write_table(pa.table(columns), folder / "t.parquet", row_group_size=2)
    return folder / "t.parquet"


def found(table: Path, columns: Columns | None = None) -> tuple[list[tuple[str, list[str]]], list[tuple[str, str]]]:
    """(key, captions) of the samples, and (key, cause) of the bad ones."""
    good, bad = read(open_source(table, columns=columns or Columns()))
    return [(sample.key, sample.captions) for sample in good], [(sample.key, sample.cause) for sample in bad]


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
@pytest.mark.parametrize("separator", [",", "\t", ";", "|"])
def test_the_header_tells_the_separator(tmp_path: Path, suffix: str, separator: str) -> None:
    lines = [("filepath", "n", "title"), *((name, "1", text) for name, text in ROWS)]
    table = write(tmp_path, f"t{suffix}", "".join(separator.join(line) + "\r\n" for line in lines))
    assert found(table) == ([(name, [text]) for name, text in ROWS], [])
    assert not sources.is_parallel(table)


@pytest.mark.parametrize("name", ["t.tsv", "t.csv"])
@pytest.mark.parametrize(
    ("cell", "caption"),
    [
        ('"今天', '"今天'),
        ('今天"', '今天"'),
        ('"今"天', '"今"天'),
        ('今"天', '今"天'),
        ('"今天"', "今天"),
        ('"他说""好"""', '他说"好"'),
        ('"今\t天"', "今\t天"),
    ],
)
def test_quotes_in_a_line_with_tabs_join_no_lines(tmp_path: Path, name: str, cell: str, caption: str) -> None:
    table = write(tmp_path, name, f'image\tcaption\n0.png\t{cell}\n1.png\t天气\n2.png\t好"\n')
    assert found(table) == ([("0.png", [caption]), ("1.png", ["天气"]), ("2.png", ['好"'])], [])


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_quoted_cell_has_lines_as_long_as_it_swallows_no_row(tmp_path: Path, end: str) -> None:
    rows = [
        "image\tcaption\tn",
        '0.png\t"今天',
        '天气"',
        '1.png\t"一',
        "二",
        '三"\t7',
        '2.png\t"鸟\t8',
        '3.png\t鱼"\t9',
    ]
    assert found(write(tmp_path, "t.tsv", end.join(rows) + end)) == (
        [("1.png", ["一\n二\n三"]), ("2.png", ['"鸟']), ("3.png", ['鱼"'])],
        [(f"line {line}", "more or fewer cells than the header has") for line in (2, 3)],
    )
    rows = ["image\tcaption", '0.png\t"今天', '天气"', '1.png\t狗"', '2.png\t"', "3.png\t鱼"]
    captions = [("0.png", ["今天\n天气"]), ("1.png", ['狗"']), ("2.png", ['"']), ("3.png", ["鱼"])]
    assert found(write(tmp_path, "t.tsv", end.join(rows))) == (captions, [])


def test_a_row_of_another_length_is_a_bad_sample(tmp_path: Path) -> None:
    for name, between in (("t.csv", ","), ("t.tsv", "\t")):
        rows = [["image", "caption"], ["0.png", "猫"], ["1.png", "一只狗", "在睡"], ["2.png"], [], ["3.png", "鱼"]]
        table = write(tmp_path, name, "\n".join(between.join(row) for row in rows))
        cause = "more or fewer cells than the header has"
        assert found(table) == ([("0.png", ["猫"]), ("3.png", ["鱼"])], [("line 3", cause), ("line 4", cause)])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("image,caption\r0.png,猫\r", "line 1: new-line character seen in unquoted field; mend the line"),
        (f'image,caption\n0.png,"{"猫" * 140_000}\n', r"line 2: field larger than field limit \(131072\); mend"),
    ],
)
def test_what_is_no_table_is_one_message(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(UserError, match=rf"t\.csv, {message}"):
        open_source(write(tmp_path, "t.csv", content))


def test_a_row_swallowed_by_an_open_quote_is_refused(tmp_path: Path) -> None:
    table = write(tmp_path, "t.csv", 'image,caption\n0.png,"今天\n1.png,天气\n2.png,好"\n')
    with pytest.raises(UserError, match=r"t\.csv, line 4: a quote opens a caption .*'1\.png,天气' is a row of its own"):
        open_source(table)
    table = write(tmp_path, "t.csv", 'image,caption\n0.png,"今天,\n天气, 好"\n1.png,狗\n')
    assert found(table) == ([("0.png", ["今天,\n天气, 好"]), ("1.png", ["狗"])], [])


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"])
@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_other_separators_are_part_of_a_cell(tmp_path: Path, suffix: str, separator: str) -> None:
    between, text = "," if suffix == ".csv" else "\t", f"猫{separator}狗"
    table = write(tmp_path, f"t{suffix}", f"image{between}caption\n0.png{between}{text}\n1.png{between}鸟\n")
    assert found(table) == ([("0.png", [text]), ("1.png", ["鸟"])], [])


@pytest.mark.parametrize(
    ("cell", "cause"),
    [
        ("", "empty caption"),
        (" \u3000", "empty caption"),
        ("\u200b", "empty caption"),
        ("\ufeff", "empty caption"),
    ],
)
@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet"])
def test_an_empty_cell_is_a_bad_sample(tmp_path: Path, suffix: str, cell: str, cause: str) -> None:
    rows = [ROWS[0], ("1.png", cell), ROWS[2], ("", "鱼")]
    place = "row" if suffix == ".parquet" else "line"
    first = 1 if suffix == ".parquet" else 2
    if suffix == ".parquet":
        table = write_parquet(tmp_path, image=[name for name, _ in rows], caption=[text or None for _, text in rows])
    else:
        between = "," if suffix == ".csv" else "\t"
        table = write(
            tmp_path, f"t{suffix}", f"image{between}caption\n" + "".join(f"{a}{between}{b}\n" for a, b in rows)
        )
    bad = [(f"{place} {first + 1}", cause), (f"{place} {first + 3}", "no picture named")]
    assert found(table) == ([("0.png", ["一只猫"]), ("2.png", ["鸟"])], bad)
    assert open_source(table).pictures == 4


def test_captions_of_a_parquet_may_be_lists_and_null(tmp_path: Path) -> None:
    lists = pa.array([["一只猫", "猫在睡"], [None, "a"], None, []], pa.list_(pa.string()))
    table = write_parquet(tmp_path, image=list(PICTURES), caption=lists)
    bad = [("row 2", "empty caption"), ("row 3", "empty caption"), ("row 4", "image without caption")]
    assert found(table) == ([("0.png", ["一只猫", "猫在睡"])], bad)
    objects = pa.array([{"raw": "猫"}] * 4)
    assert found(write_parquet(tmp_path, image=list(PICTURES), caption=objects))[1][0] == (
        "row 1",
        "caption is no text",
    )
    numbers = pa.array([float("nan"), 3.0, None, 7.5])
    good, bad = found(write_parquet(tmp_path, image=list(PICTURES), caption=numbers))
    assert good == [("1.png", ["3.0"]), ("3.png", ["7.5"])] and [key for key, _ in bad] == ["row 1", "row 3"]
    encoded = pa.array(["猫".encode(), "鸟狗".encode("gbk"), b"cat", None])
    good, bad = found(write_parquet(tmp_path, image=list(PICTURES), caption=encoded))
    assert good == [("0.png", ["猫"]), ("2.png", ["cat"])] and bad[0] == ("row 2", "caption is not UTF-8")


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        ("https://x.org/a.jpg", "picture is a URL, not a file"),
        ("http://x.org/a", "picture is a URL, not a file"),
        ("/9j/" * 60, "picture is base64, not a file"),
        ("a\0.png", "no file can have this name"),
    ],
)
def test_a_name_that_is_no_files_is_a_bad_sample(tmp_path: Path, name: str, cause: str) -> None:
    table = write(tmp_path, "t.csv", f"image,caption\n{name},猫\n1.png,狗\n")
    assert found(table) == ([("1.png", ["狗"])], [("line 2", cause)])


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_columns_may_be_told(tmp_path: Path, suffix: str) -> None:
    columns = {"图片": ["0.png", "1.png"], "标题": ["猫", "狗"], "title": ["cat", "dog"], "caption": ["a", "b"]}
    columns |= {"image": ["none", "none"], "SKU": ["A1", "A2"], "source": ["shop", ""]}
    if suffix == ".csv":
        lines = [columns, *zip(*columns.values(), strict=True)]
        table = write(tmp_path, "t.csv", "".join(",".join(line) + "\n" for line in lines))
    else:
        table = write_parquet(tmp_path, **columns)
    with pytest.raises(
        UserError, match=r"exactly one must be named image or .*, not 图片 and image, or be told by --image-column NAME"
    ):
        open_source(table)
    told = Columns(image="图片", caption="标题", key="sku")
    samples, _ = read(open_source(table, columns=told))
    assert [(sample.key, sample.captions, sample.source) for sample in samples] == [
        ("A1", ["猫"], "shop"),
        ("A2", ["狗"], ""),
    ]
    assert [sample.image for sample in samples] == [PICTURES["0.png"], PICTURES["1.png"]]
    with pytest.raises(UserError, match=r"exactly one must be named 价格"):
        open_source(table, columns=Columns(image="图片", caption="价格"))
    labels = open_labelled(table, columns=Columns(image="图片", caption="标题"))
    assert [sample.captions for sample in read(labels)[0]] == [["猫"], ["狗"]]


def test_rows_of_one_picture_keep_their_own_keys_and_sources(tmp_path: Path) -> None:
    rows = "image,caption,key,source\n0.png,猫,a,shop\n0.png,狗,b,shop\n0.png,鸟,a,shop\n0.png,鱼,a,web\n"
    samples, _ = read(open_source(write(tmp_path, "t.csv", rows)))
    assert [(sample.key, sample.source, sample.captions) for sample in samples] == [
        ("a", "shop", ["猫", "鸟"]),
        ("b", "shop", ["狗"]),
        ("a", "web", ["鱼"]),
    ]


@pytest.mark.parametrize("held", ["struct", "binary"])
@pytest.mark.parametrize("part", [1, 3, 4096])
def test_pictures_inside_a_parquet_are_found_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: str, part: int
) -> None:
    monkeypatch.setattr(sources, "PART", part)
    contents = [*PICTURES.values(), None, PICTURES["0.png"]]
    image: Any = contents if held == "binary" else [{"bytes": content, "path": "x.jpg"} for content in contents[:4]]
    # As `datasets` leaves it where a picture was not embedded: a path alone.
    image = image if held == "binary" else [*image, {"bytes": None, "path": None}, {"bytes": None, "path": "3.png"}]
    captions = pa.array([["猫", "狗"], ["鸟"], [], ["鱼"], ["水"], ["火"]])
    table = write_parquet(tmp_path, n=range(6), image=pa.array(image), caption=captions, key=list("abcdef"))
    source = open_source(table)
    good, bad = read(source)
    assert source.pictures == len(good) + len(bad) == 6
    last = PICTURES["0.png" if held == "binary" else "3.png"]
    expected = [PICTURES["0.png"], PICTURES["1.png"], PICTURES["3.png"], last]
    assert [sample.image for sample in good] == expected
    assert [read_picture(sample.shard, sample.offset, sample.length) for sample in good] == expected
    assert [(sample.key, sample.captions) for sample in good] == [
        *(("a", ["猫", "狗"]), ("b", ["鸟"])),
        *(("d", ["鱼"]), ("f", ["火"])),
    ]
    assert {one.key: one.cause for one in bad} == {"e": "caption without image", "row 3": "image without caption"}


def test_pictures_inside_a_parquet_are_read_in_any_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "PART", 2)
    contents = [*PICTURES.values(), *PICTURES.values()]
    keys = [f"{number}" for number in range(8)]
    table = write_parquet(tmp_path, image=contents, caption=["猫"] * 8, key=keys, source=["a", "b"] * 4)
    with opened(table, train=True, shuffle_buffer=3) as loader:
        for _ in range(2):
            batches = list(loader)
            seen = {
                key: (image, source)
                for batch in batches
                for key, image, source in zip(batch.keys, batch.encoded, batch.sources, strict=True)
            }
            assert seen == dict(zip(keys, zip(contents, ["a", "b"] * 4, strict=True), strict=True))


def test_a_bad_row_is_told_once_an_epoch_by_one_loader(tmp_path: Path) -> None:
    table = write(tmp_path, "t.csv", "image,caption\n0.png,猫\n1.png,\n2.png,狗\nnone.png,鸟\n3.png,鱼\n")
    causes = {"empty caption": 1, "picture file: No such file or directory": 1}
    with opened(table, batch_size=1) as loader:
        for _ in range(2):
            assert len(list(loader)) == 3 and loader.bad_counts == causes
        next(loader)
        state = loader.state()
    with opened(table, batch_size=1) as loader:
        loader.restore(state)
        assert len(list(loader)) == 2 and loader.bad_counts == causes
    for shared in (
        [{"rank": rank, "world_size": 2} for rank in range(2)],
        [{"shares": [(0, 1, number, 2)]} for number in range(2)],
    ):
        found = Counter[str]()
        for options in shared:
            with opened(table, **options) as loader:
                list(loader)
                found.update(loader.bad_counts)
        assert found == causes


def test_a_folder_of_parquets_is_one_split(tmp_path: Path) -> None:
    for number in range(2):
        table = write_parquet(tmp_path / "made", image=[PICTURES[f"{number}.png"]], caption=[f"猫{number}"])
        (tmp_path / "data").mkdir(exist_ok=True)
        table.rename(tmp_path / "data" / f"train-0000{number}-of-00002-0a1b2c.parquet")
    source = open_source(tmp_path / "data")
    assert [sample.captions for sample in read(source)[0]] == [["猫0"], ["猫1"]]
    assert (source.pictures, len(source.files), len(source.parts)) == (2, 2, 2)
    (tmp_path / "data" / "train-00001-of-00002-0a1b2c.parquet").rename(
        tmp_path / "data" / "test-00000-of-00001.parquet"
    )
    with pytest.raises(UserError, match=r"data: holds several splits, test, train; give each a folder of its own"):
        open_source(tmp_path / "data")


def test_a_changed_parquet_is_told_when_it_is_shown(tmp_path: Path) -> None:
    table = write_parquet(tmp_path, image=["0.png"], caption=["猫"])
    with pytest.raises(UserError, match=r"t\.parquet: no picture at byte 1 .*no picture in row 1"):
        read_picture(table, 1, 10)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("一只猫\thttps://x.org/a/123\n", r"line 1: holds a URL, so it is no parallel text; download"),
        ("caption\turl\n一只猫\thttp://x.org/a.jpg\n", r"line 2: holds a URL"),
        ("商品图\t名称\n0.png\t猫\n", r"line 2: names a picture file.*--image-column"),
    ],
)
def test_a_list_of_pictures_is_no_parallel_text(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        sources.is_parallel(write(tmp_path, "t.tsv", content))


@pytest.mark.parametrize(
    "content", ["猫\tcat\n", "图像\timage\n", "图, 字\timage, text of it\n", "网址\tsee https://x.org/\n"]
)
def test_parallel_text_is_known(tmp_path: Path, content: str) -> None:
    assert sources.is_parallel(write(tmp_path, "t.tsv", content))


def test_columns_are_of_tables_alone(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text("[]")
    with pytest.raises(UserError, match=r"--caption-column title: .*t\.json is no table; leave it out"):
        open_source(tmp_path / "t.json", columns=Columns(caption="title"))


def test_cells_of_several_lines_keep_the_count_of_lines(tmp_path: Path) -> None:
    table = write(tmp_path, "t.csv", 'text,label\n"a\nb",1\n\nc,2\n')
    assert list(read_table(table, ("text",), ("label",))) == [("line 3", ["a\nb", "1"]), ("line 5", ["c", "2"])]
