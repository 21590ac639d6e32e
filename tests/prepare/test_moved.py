"""A store whose pictures were moved, or are elsewhere on another machine, finds them again."""

from __future__ import annotations

from pathlib import Path

import pytest

from efficientclip import cli
from efficientclip.config import Config
from efficientclip.data.shards import read_picture
from efficientclip.data.store import Store, place_now
from efficientclip.errors import UserError
from efficientclip.files.places import location
from efficientclip.prepare.build import prepare
from efficientclip.prepare.moved import note_move
from efficientclip.verify import broken, verify
from tests.prepare.tars import write_shards


def pictures(store: Store) -> list[bytes]:
    return [read_picture(location(pair["shard"]), pair["offset"], pair["length"]) for pair in store.pairs().to_pylist()]


def test_pictures_are_found_where_they_were_moved_to(
    tmp_path: Path, config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    shards, made = write_shards(tmp_path / "shards", 3), tmp_path / "made"
    prepare(shards, made, config)
    before, identity = pictures(Store(made)), Store(made).identity
    shards.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"efficientclip moved STORE OLD NEW"):
        pictures(Store(made))
    assert cli.main(["moved", str(made), str(shards), str(tmp_path / "elsewhere")]) == 0
    assert "3 of the 3 files" in capsys.readouterr().out
    assert pictures(Store(made)) == before and Store(made).identity == identity
    assert broken(verify(made)) is None and not (made / ".lock").exists()
    # A single shard, once more.
    (tmp_path / "elsewhere" / "1.tar").rename(tmp_path / "one.tar")
    assert note_move(made, tmp_path / "elsewhere" / "1.tar", tmp_path / "one.tar") == (1, 3)
    store = Store(made)
    assert pictures(store) == before
    tables = [table["shard"].to_pylist() for table in store.pair_tables(["shard"])]
    assert [*map(str, store.pairs(columns=["shard"])["shard"])] == [name for table in tables for name in table]
    assert {Path(name).name for name in tables[0]} == {"0.tar", "one.tar", "2.tar"}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("other", "shards", r"nothing of it lies at .*other; its pictures lie at .*0\.tar and the like"),
        ("shard", "shards", r"nothing of it lies at .*shard;"),
        ("shards", "nowhere", r"nowhere/0\.tar: no such file \(3 of 3 are not there\)"),
    ],
)
def test_a_move_that_cannot_be_is_refused(tmp_path: Path, config: Config, old: str, new: str, message: str) -> None:
    prepare(write_shards(tmp_path / "shards", 3), tmp_path / "made", config)
    before = (tmp_path / "made" / "manifest.json").read_bytes()
    with pytest.raises(UserError, match=message):
        note_move(tmp_path / "made", tmp_path / old, tmp_path / new)
    assert (tmp_path / "made" / "manifest.json").read_bytes() == before


def test_moves_follow_each_other() -> None:
    moved = [("/a", "s3://b/a"), ("s3://b/a/1.tar", "/one.tar"), ("/ab", "/no")]
    assert [place_now(place, moved) for place in ("/a/0.tar", "/a/1.tar", "/abc/0.tar")] == [
        *("s3://b/a/0.tar", "/one.tar", "/abc/0.tar")
    ]
