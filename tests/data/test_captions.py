"""One rule says what a caption is, and what ends a line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from efficientclip.data.captions import captions_of, is_utf8, read_lines, stripped
from efficientclip.errors import UserError

FLAG = "\U0001f3f4\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f"
FAMILY = "\U0001f468\u200d\U0001f469"


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("\ufeff猫 ", "猫"),
        ("\u200b猫\u2060", "猫"),
        ("\u3000 一只\u3000猫\x85", "一只\u3000猫"),
        ("一只\u200b猫", "一只\u200b猫"),
        (FAMILY, FAMILY),
        (FLAG, FLAG),
        ("❤\ufe0f", "❤\ufe0f"),
        ("\u200b", ""),
        ("\ufeff", ""),
        ("\u00ad\u200e \u2069", ""),
        ("\x00\x07", ""),
        ("\u3164\u2800", ""),
        ("", ""),
    ],
)
def test_what_cannot_be_seen_is_no_text(text: str, kept: str) -> None:
    assert stripped(text) == kept


@pytest.mark.parametrize(
    ("value", "captions"),
    [(" 猫", ["猫"]), (["一只猫", "猫在睡\ufeff"], ["一只猫", "猫在睡"]), ("nan", ["nan"]), ({"text": "猫"}, ["猫"])],
)
def test_a_list_is_several_captions(value: Any, captions: list[str]) -> None:
    assert captions_of(value) == captions


@pytest.mark.parametrize(
    ("value", "cause"),
    [
        (None, "image without caption"),
        ("\u200b", "empty caption"),
        ([], "image without caption"),
        ([None, "a"], "caption is no text"),
        (["a", " "], "empty caption"),
        (float("nan"), "caption is no text"),
        (7, "caption is no text"),
        ({"raw": b"a"}, "caption is no text"),
        ([["a"]], "caption is no text"),
        ("\ud83d", "caption is not UTF-8"),
        (["a", "猫\udc00"], "caption is not UTF-8"),
    ],
)
def test_what_is_no_caption_says_why(value: Any, cause: str) -> None:
    with pytest.raises(ValueError, match=f"^{cause}$"):
        captions_of(value)


def test_whole_emoji_can_be_written() -> None:
    assert is_utf8("\U0001f600") and not is_utf8("\ud83d")


@pytest.mark.parametrize(
    "line", ["猫\u2028狗\tcat", "猫\u0085狗\tcat", "猫\x0b狗\tcat", "猫\x0c狗\tcat", "猫\r狗\tcat"]
)
def test_only_line_ends_end_a_line(tmp_path: Path, line: str) -> None:
    (tmp_path / "t.tsv").write_bytes(f"\ufeff{line}\r\n鸟\tbird\n\n鱼\tfish".encode())
    assert read_lines(tmp_path / "t.tsv") == [line, "鸟\tbird", "", "鱼\tfish"]


def test_a_file_that_is_no_utf8_is_named_by_line(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_bytes("猫\n狗\n".encode() + "鸟".encode("gbk"))
    with pytest.raises(UserError, match=r"t\.txt, line 3: not UTF-8; .*iconv"):
        read_lines(tmp_path / "t.txt")
    with pytest.raises(UserError, match=r"none\.txt: No such file"):
        read_lines(tmp_path / "none.txt")
