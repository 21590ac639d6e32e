"""Shards that are fetched, broken or absent, and the indexes of tars."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from threading import Event, Lock
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from efficientclip.data.ahead import AHEAD
from efficientclip.data.images import ImageLoader
from efficientclip.data.sources import Source
from efficientclip.errors import ShardError, UserError
from tests.data.tars import jpegs, loader, numbers, write_tar
from tests.data.test_images import ENVIRONMENT, assert_same, kept


@pytest.fixture
def tars(tmp_path: Path) -> list[Path]:
    """Samples 0 to 69, ten a tar."""
    return [write_tar(tmp_path / f"{first:02}.tar", jpegs(10, first=first)) for first in range(0, 70, 10)]


class Store:
    """Gives the tars after `delay`; those in `absent` not at all, those in `stalled` until it is stopped."""

    def __init__(self, tars: list[Path], delay: float = 0.0) -> None:
        self.sources = [Source(tar, [tar], fetch=self._fetch(tar)) for tar in tars]
        self.delay, self.absent, self.stalled = delay, set[str](), set[str]()
        self.begun: list[str] = []
        self.open: list[IO[bytes]] = []
        self._lock = Lock()

    def _fetch(self, tar: Path) -> Callable[[Event], IO[bytes]]:
        def fetch(stopped: Event) -> IO[bytes]:
            with self._lock:
                self.begun.append(tar.name)
            stopped.wait(60 if tar.name in self.stalled else self.delay)
            if tar.name in self.absent | self.stalled:
                raise ShardError(f"shard {tar}: not there; put it back")
            copy = tempfile.TemporaryFile()  # noqa: SIM115
            copy.write(tar.read_bytes())
            copy.flush()
            with self._lock:
                self.open.append(copy)
            return copy

        return fetch


# Indexes


@pytest.mark.parametrize("options", [{"train": False}, {}, {"rank": 1, "world_size": 3}, {"shares": [(5, 4, 1, 3)]}])
def test_batches_are_the_same_by_an_index(tars: list[Path], tmp_path: Path, options: dict[str, Any]) -> None:
    index = tmp_path / "index"
    whole = kept(loader(tars, **options))
    assert_same(kept(loader(tars, indexes=index, **options)), whole)
    assert 0 < len(list(index.glob("*.index"))) <= len(tars) == 7
    assert_same(kept(loader(tars, indexes=index, **options)), whole)


def test_restored_by_an_index_nothing_before_is_read(tars: list[Path], tmp_path: Path) -> None:
    options = {"train": False, "indexes": tmp_path / "index", "batch_size": 8}
    expected = numbers(loader(tars, **options))
    with loader(tars, **options) as batches:
        seen = [number for batch in itertools.islice(batches, 5) for number in numbers([batch])]
        state = batches.state()
    for tar in tars[:4]:
        # The same file as far as an index can tell, but nothing in it can be read.
        found = tar.stat()
        tar.write_bytes(bytes(found.st_size))
        os.utime(tar, ns=(found.st_atime_ns, found.st_mtime_ns))
    with loader(tars, **options) as batches:
        batches.restore(state)
        assert seen + numbers(batches) == expected


def test_an_index_of_another_tar_or_a_damaged_one_is_not_used(tars: list[Path], tmp_path: Path) -> None:
    index = tmp_path / "index"
    list(loader(tars, indexes=index))
    write_tar(tars[0], jpegs(3, first=900))
    files = sorted(index.iterdir())
    for file in files[:3]:
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    assert sorted(numbers(loader(tars, indexes=index))) == [*range(10, 70), 900, 901, 902]
    assert len(list(index.iterdir())) == len(files) + 1


def test_a_tar_that_changes_while_it_is_read_gets_no_index(tars: list[Path], tmp_path: Path) -> None:
    options = {"indexes": tmp_path / "index", "train": False, "batch_size": 4}
    with loader(tars[:1], **options, prefetch=1) as batches:
        next(batches)
        write_tar(tmp_path / "new.tar", jpegs(100, first=500, size=60)).rename(tars[0])
        list(batches)
    assert numbers(loader(tars[:1], **options)) == list(range(500, 600))
    assert numbers(loader(tars[:1], **options)) == list(range(500, 600))


def test_where_no_index_can_be_written_there_is_none(tars: list[Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert len(numbers(loader(tars, indexes=tmp_path / "file" / "index"))) == 70


# Fetches


@pytest.mark.parametrize("train", [False, True])
def test_fetched_shards_give_the_same_batches(tars: list[Path], train: bool) -> None:
    store = Store(tars, delay=0.05)
    with loader(store.sources, train=train) as batches:
        found = kept(batches)
        again = kept(batches)
    assert_same(found, kept(loader(tars, train=train)))
    assert sorted(store.begun) == sorted(tar.name for tar in [*tars, *tars])
    assert_same(again, kept(loader(tars, train=train, epoch=1)))
    assert all(copy.closed for copy in store.open) or len(store.open) == 14


def test_few_are_fetched_ahead_and_none_is_kept(tmp_path: Path) -> None:
    tars = [write_tar(tmp_path / f"{first:03}.tar", jpegs(50, first=first)) for first in range(0, 600, 50)]
    store = Store(tars)
    with loader(store.sources, train=False, batch_size=10, prefetch=1, threads=1) as batches:
        next(batches)
        time.sleep(0.5)
        # Those that are ahead, and the one or two that samples on their way lie in.
        assert store.begun[0] == "000.tar" and len(store.begun) <= AHEAD + 2
        list(batches)
    before = open_files()
    del batches
    assert len(store.begun) == len(tars) and before <= open_files() + len(store.open)
    store.open.clear()
    assert open_files() <= before - len(tars)


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_a_stopped_loader_waits_for_no_fetch(tars: list[Path]) -> None:
    store = Store(tars)
    store.stalled = {"20.tar"}
    with loader(store.sources, train=False, batch_size=5) as batches:
        for _ in range(2):
            next(batches)
        started = time.monotonic()
    assert time.monotonic() - started < 5


EXIT = """
import contextlib, threading, time
from pathlib import Path
from efficientclip import ImageLoader
from efficientclip.data.sources import Source
def fetch(stopped):
    print("asked", flush=True)
    threading.Event().wait(600)
loader = ImageLoader(Source(Path("a.tar"), [Path("a.tar")], fetch=fetch), batch_size=1)
def consume():
    with contextlib.suppress(Exception):
        next(loader)
threading.Thread(target=consume, daemon=True).start()
time.sleep(1)
print("ends", flush=True)
"""


def test_a_process_ends_beside_a_fetch_that_does_not() -> None:
    done = subprocess.run([sys.executable, "-c", EXIT], capture_output=True, text=True, timeout=60, env=ENVIRONMENT)
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, ["asked", "ends"], "")


def test_pictures_of_a_parquet_are_unpacked_part_by_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("efficientclip.data.sources.PART", 10)
    files = jpegs(45)
    pictures = [content for name, content in files if name.endswith(".jpg")]
    captions = [content.decode() for name, content in files if name.endswith(".txt")]
    table = pa.table({"image": [{"bytes": picture, "path": None} for picture in pictures], "caption": captions})
    pq.write_table(table, tmp_path / "t.parquet")
    for train in (False, True):
        with ImageLoader(tmp_path / "t.parquet", batch_size=4, train=train, keep_encoded=True) as batches:
            found = {int(batch.captions[at][0].split()[1]): (batch.encoded[at], batch.offsets[at]) for batch in batches
                     for at in range(len(batch))}  # fmt: skip
            # Cells are counted along the rows, of which each has two.
            assert found == {number: (picture, 2 * number) for number, picture in enumerate(pictures)}


def test_a_temporary_file_is_not_taken_for_one_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("efficientclip.data.sources.PART", 1)
    pictures = []
    # Of one length: each file's bytes would do for any other's.
    for number in range(300):
        Image.fromarray(np.full((8, 8, 3), number % 256, np.uint8)).save(file := BytesIO(), "png", compress_level=0)
        pictures.append(file.getvalue())
    assert len({len(picture) for picture in pictures}) == 1
    captions = [f"picture {number}" for number in range(300)]
    table = pa.table({"image": [{"bytes": picture, "path": None} for picture in pictures], "caption": captions})
    pq.write_table(table, tmp_path / "t.parquet")
    with ImageLoader(tmp_path / "t.parquet", batch_size=4, size=8, train=False, keep_encoded=True) as batches:
        found = [
            (texts[0], picture)
            for batch in batches
            for texts, picture in zip(batch.captions, batch.encoded, strict=True)
        ]
    assert found == list(zip(captions, pictures, strict=True))


# Bad shards


@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("train", [False, True])
def test_bad_shards_are_named_and_left_out(tars: list[Path], tmp_path: Path, train: bool, indexed: bool) -> None:
    store = Store(tars)
    options = {"train": train, "indexes": tmp_path / "index" if indexed else None, "batch_size": 8}
    list(loader(store.sources, **options))
    store.absent = {"10.tar", "40.tar"}
    rest = [*range(10), *range(20, 40), *range(50, 70)]
    with loader(store.sources, max_bad_shards=2, **options) as batches:
        assert sorted(numbers(batches)) == rest
        assert sorted(bad.shard for bad in batches.bad_shards) == ["10.tar", "40.tar"]
        assert all("not there; put it back" in bad.cause for bad in batches.bad_shards)
        # Named again in each epoch, and read again where they are back.
        store.absent = {"40.tar"}
        assert sorted(numbers(batches)) == sorted([*rest, *range(10, 20)])
        assert [bad.shard for bad in batches.bad_shards] == ["40.tar"]
    store.absent.add("10.tar")
    with (
        loader(store.sources, max_bad_shards=1, **options) as batches,
        pytest.raises(UserError, match=r"[14]0\.tar: not there; put it back"),
    ):
        list(batches)


@pytest.mark.parametrize("train", [False, True])
def test_a_bad_shard_stays_out_until_the_epoch_ends(tars: list[Path], train: bool) -> None:
    store = Store(tars)
    store.absent = {"10.tar"}
    options = {"train": train, "max_bad_shards": 1, "batch_size": 8, "shuffle_buffer": 5}
    expected = numbers(loader(store.sources, **options))
    for most in range(1, 7):
        with loader(store.sources, **options) as batches:
            seen = [number for batch in itertools.islice(batches, most) for number in numbers([batch])]
            state, known = batches.state(), batches.bad_shards
        with loader(tars, **options) as batches:
            batches.restore(state)
            assert batches.bad_shards == known
            if known:
                assert seen + numbers(batches) == expected


def test_a_bad_shard_stays_out_of_a_share_that_is_not_begun(tars: list[Path]) -> None:
    store = Store(tars)
    store.absent = {"00.tar"}
    options = {"train": False, "max_bad_shards": 1, "batch_size": 4}
    with loader(store.sources, **options) as batches:
        seen = numbers([next(batches)])
        state = batches.state()
    store.absent.clear()
    for number in range(2):
        with loader(store.sources, shares=[(4, 2, number, 2)], **options) as share:
            share.restore({**share.state(), "bad_shards": state["bad_shards"]})
            assert share.state()["bad_shards"] == state["bad_shards"]
            seen += numbers(share)
    assert sorted(seen) == list(range(10, 70))


def test_what_is_no_fault_of_a_shard_ends_the_pass(tars: list[Path]) -> None:
    def fetch(stopped: Event) -> IO[bytes]:
        raise UserError("folder: no space left; free some")

    sources = [Source(tar, [tar], fetch=fetch) for tar in tars]
    with loader(sources, max_bad_shards=100) as batches, pytest.raises(UserError, match="no space left; free some"):
        next(batches)


def test_a_cut_tar_gives_its_whole_samples_and_is_left(tars: list[Path], tmp_path: Path) -> None:
    whole = tars[2].read_bytes()
    tars[2].write_bytes(whole[: len(whole) // 2])
    tars[4].unlink()
    with loader([Source(tar, [tar]) for tar in tars], train=False, max_bad_shards=2) as batches:
        found = numbers(batches)
        assert [bad.shard for bad in batches.bad_shards] == ["20.tar", "40.tar"]
    gone = sorted(set(range(70)) - set(found))
    assert gone[-10:] == list(range(40, 50)) and gone[0] > 20 and gone[-11] == 29
