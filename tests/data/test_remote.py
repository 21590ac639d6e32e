"""Remote data: what braces and globs stand for, whole objects or an error that names them, and the cache."""

from __future__ import annotations

import contextlib
import errno
import io
import multiprocessing
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from efficientclip.data import attempts, remote
from efficientclip.data.cache import Cache, fetch
from efficientclip.data.shards import read_members, read_picture
from efficientclip.data.sources import Source, open_source
from efficientclip.errors import ShardError, UserError
from efficientclip.files.places import URL, braced, location
from tests.data.reading import read
from tests.data.servers import FAULTS, S3, Faulty, http, put, s3
from tests.data.tars import SEED, write_tar
from tests.formats import chinese_clip, files, picture

HASTY = attempts.Patience(connect=0.2, read=0.2, command=1, wait=0.01, longest=0.05, tries=4, slowest=1 << 20)
# With the end that tars have.
BODY = np.random.default_rng(SEED).bytes(200_000) + bytes(1024)
TURNED = BODY[:-1024][::-1] + BODY[-1024:]


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempts, "patience", HASTY)


@pytest.fixture(scope="module")
def web() -> Iterator[Faulty]:
    with http() as server:
        yield server


@pytest.fixture(scope="module")
def store() -> Iterator[S3]:
    with s3() as server:
        yield server


@pytest.fixture
def served(web: Faulty) -> Faulty:
    """With BODY as /a.tar."""
    web.files, web.always = {"/a.tar": BODY}, {}
    web.faults.clear()
    web.asked.clear()
    web.sized = web.ranged = web.tagged = True
    web.retry_after = "0.05"
    return web


def tar(server: Faulty) -> URL:
    return URL(f"{server.url}/a.tar")


def content_of(url: URL, cache: Cache | None = None) -> bytes:
    with fetch(url, cache) as file:
        return file.read()


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("a.tar", ["a.tar"]),
        ("{0..2}.tar", ["0.tar", "1.tar", "2.tar"]),
        ("{0009..0011}", ["0009", "0010", "0011"]),
        ("{2..0}", ["2", "1", "0"]),
        ("s3://b/{cc3m,cc12m}-{00..01}.tar", [f"s3://b/{a}-{n}.tar" for a in ("cc3m", "cc12m") for n in ("00", "01")]),
        ("{a,b{1..2}}x", ["ax", "b1x", "b2x"]),
        ("pipe:awk '{print $1}' {a,b}", ["pipe:awk '{print $1}' a", "pipe:awk '{print $1}' b"]),
        ("{a", ["{a"]),
    ],
)
def test_braces_stand_for_what_they_do_in_webdataset(text: str, meant: list[str]) -> None:
    assert braced(text) == meant


def test_globs_and_braces_are_expanded_in_order(tmp_path: Path, served: Faulty, store: S3) -> None:
    names = ["b/2.tar", "b/10.tar", "b/1.tar", "b/t.json", "c/0.tar"]
    files(tmp_path, dict.fromkeys(names, b"x"))
    for name in names:
        put(f"{S3.bucket}/globs/{name}", b"x")
        served.files[f"/{name}"] = b"x"
    for root in (str(tmp_path), f"{S3.bucket}/globs", served.url):
        found = [[str(file) for file in open_source(f"{root}/{at}").files] for at in ("b/*.tar", "b/{2,1}.tar", "b")]
        assert found == [
            [f"{root}/b/{name}.tar" for name in order] for order in (("1", "10", "2"), "21", ("1", "10", "2"))
        ]
        with pytest.raises(UserError, match=r"d\*\.tar: nothing has a name like that"):
            open_source(f"{root}/d*.tar")
        with pytest.raises(UserError, match="stands for 2 files; let all be"):
            open_source(f"{root}/b/{{1.tar,t.json}}")
    for root in (str(tmp_path), f"{S3.bucket}/globs"):
        assert [str(file) for file in open_source(f"{root}/*/0.tar").files] == [f"{root}/c/0.tar"]
        found = {str(file).removeprefix(root) for file in open_source(f"{root}/**/*.tar").files}
        assert found == {f"/{name}" for name in names if name.endswith(".tar")}
    assert isinstance(location("s3://b/a"), URL) and location("data/{0..3}.tar") == Path("data/{0..3}.tar")


def test_a_folder_is_meant_as_it_is_written(tmp_path: Path) -> None:
    folder = tmp_path / "x{a,b}[1]"
    files(folder, dict.fromkeys(["0.tar", "1.tar"], b"x"))
    for names in ("*.tar", "{0,1}.tar", "[01].tar"):
        assert open_source(folder / names).files == [folder / "0.tar", folder / "1.tar"]
    for missing in ("2.tar", "d*.tar"):
        with pytest.raises(UserError, match=r"no such file|nothing has a name like that"):
            open_source(folder / missing)


def test_a_folder_that_cannot_be_listed_is_told(served: Faulty) -> None:
    for name in ("data/", "data/*.tar"):
        with pytest.raises(ShardError, match=r"http://127\.0\.0\.1:9/data/: 4 attempts failed, .*Connect call failed"):
            open_source(f"http://127.0.0.1:9/{name}")
    served.files |= {"/b/": b"", "/b/0.tar": b"x", "/c/": b"", "/c/0.tar": b"x"}
    found = [f"{served.url}/{name}/0.tar" for name in "bc"]
    served.faults.append(("GET", "503"))
    assert open_source(f"{served.url}/*/0.tar").files == found and not served.faults
    # What one folder holds is not left out.
    served.always["/c/"] = "503"
    with pytest.raises(ShardError, match="/c/: 4 attempts failed, the last one: the server answers 503"):
        open_source(f"{served.url}/*/0.tar")


def test_any_faults_end_with_the_right_bytes_or_an_error_that_names_the_url(served: Faulty) -> None:
    print(f"seed {SEED}")
    good = 0
    for number in range(30):
        chance = random.Random(SEED + number)
        served.files["/a.tar"] = BODY
        served.faults.clear()
        served.faults.extend(
            (chance.choice(["GET", "GET", "GET", "HEAD"]), chance.choice(FAULTS)) for _ in range(chance.randint(1, 5))
        )
        served.sized, served.ranged, served.tagged = (chance.random() < 0.8 for _ in range(3))
        told, started = list(served.faults), time.monotonic()
        try:
            assert content_of(tar(served)) in (BODY, TURNED), told
            good += 1
        except ShardError as error:
            assert str(tar(served)) in str(error) and ";" in str(error), told
        assert time.monotonic() - started < 5, told
    assert good > 5


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("403", r"a\.tar: access denied \(403\); check the credentials"),
        ("404", r"a\.tar: not there \(404\); check its name"),
        ("400", r"a\.tar: the server answers 400; check the URL"),
        ("500", r"a\.tar: 4 attempts failed, the last one: the server answers 500; .*run the same command again"),
        ("429", r"a\.tar: 4 attempts failed, the last one: the server answers 429"),
        ("stall", r"a\.tar: 4 attempts failed, the last one: timed out"),
        ("drop", r"a\.tar: 4 attempts failed, the last one: Not enough data"),
        ("half", r"a\.tar: 4 attempts failed, the last one: .* of 201,024 bytes came"),
        ("trickle", r"a\.tar: 4 attempts failed, the last one: timed out \(the server stalls\)"),
    ],
)
def test_a_server_that_never_gives_it_is_told_with_the_remedy(
    served: Faulty, monkeypatch: pytest.MonkeyPatch, fault: str, message: str
) -> None:
    served.ranged = False
    served.always["/a.tar"] = fault
    with pytest.raises(ShardError, match=message):
        content_of(tar(served))


def test_nobody_listens(served: Faulty) -> None:
    with pytest.raises(ShardError, match=r"http://127\.0\.0\.1:9/x\.tar: 4 attempts failed, .*Connect call failed"):
        content_of(URL("http://127.0.0.1:9/x.tar"))
    with pytest.raises(ShardError, match=r"shard https:///x\.tar: .*; check the URL$"):
        content_of(URL("https:///x.tar"))


def test_what_came_is_not_asked_for_again(served: Faulty) -> None:
    served.faults += [("GET", "drop"), ("GET", "stall")]
    assert content_of(tar(served)) == BODY
    first, second = len(BODY) // 2, len(BODY) // 2 + len(BODY) // 4
    ranges = [asked for method, _, asked in served.asked if method == "GET"]
    assert ranges == [None, f"bytes={first}-", f"bytes={second}-"]


def test_a_server_may_say_when_to_come_back(served: Faulty, monkeypatch: pytest.MonkeyPatch) -> None:
    served.faults.append(("GET", "429"))
    served.retry_after = "0.4"
    started = time.monotonic()
    assert content_of(tar(served)) == BODY
    assert time.monotonic() - started > 0.4
    served.faults.append(("GET", "429"))
    served.retry_after = "4000"
    with pytest.raises(ShardError, match="asks to wait 4000 s"):
        content_of(tar(served))


def test_a_fetch_can_be_stopped(served: Faulty, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempts, "patience", attempts.Patience())
    served.always["/a.tar"] = "stall"
    stop, told = threading.Event(), []

    def run(read: Callable[[], Any]) -> None:
        try:
            read()
        except ShardError as error:
            told.append(str(error))

    urls = (tar(served), URL("pipe:sleep 60"))
    reads = [*(partial(fetch, url, None, stop) for url in urls), lambda: [*remote.each([tar(served)] * 100, stop)]]
    threads = [threading.Thread(target=run, args=(read,)) for read in reads]
    for thread in threads:
        thread.start()
    time.sleep(0.3)
    stop.set()
    for thread in threads:
        thread.join(2)
        assert not thread.is_alive()
    assert len(told) == 3 and all("stopped" in one for one in told)


def _begins(url: URL) -> None:
    attempts.patience = attempts.Patience()
    threading.Thread(target=lambda: [*remote.each([url] * 100, threading.Event())], daemon=True).start()
    time.sleep(0.5)


def test_a_process_ends_beside_pictures_that_stall(served: Faulty) -> None:
    served.always["/a.tar"] = "silence"
    process = multiprocessing.get_context("fork").Process(target=_begins, args=(tar(served),))
    process.start()
    process.join(10)
    ended = process.exitcode
    process.kill()
    assert ended == 0 and served.asked


@pytest.mark.parametrize("fault", ["drop", "stall", "500", "503"])
def test_s3_is_asked_again(store: S3, fault: str) -> None:
    put(f"{S3.bucket}/again.tar", BODY)
    store.faults += [("GET", fault)] * 2
    assert content_of(URL(f"{S3.bucket}/again.tar")) == BODY
    assert not store.faults


def test_s3_refuses_and_fails(store: S3) -> None:
    put(f"{S3.bucket}/refused.tar", BODY)
    url = URL(f"{S3.bucket}/refused.tar")
    store.faults += [("HEAD", "403")]
    with pytest.raises(ShardError, match=r"s3://shards/refused\.tar: access denied \(403\)"):
        content_of(url)
    store.faults += [("GET", "500")] * 4
    with pytest.raises(ShardError, match=r"s3://shards/refused\.tar: 4 attempts failed, .*500"):
        content_of(url)
    for missing in ("s3://shards/none.tar", "s3://nobucket/none.tar"):
        with pytest.raises(ShardError, match=rf"{missing}: not there"):
            content_of(URL(missing))


def test_an_object_larger_than_a_block_comes_whole(store: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "BLOCK", 50_000)
    put(f"{S3.bucket}/blocks.tar", BODY)
    assert content_of(URL(f"{S3.bucket}/blocks.tar")) == BODY


def test_a_command_writes_a_shard() -> None:
    assert content_of(URL("pipe:printf %s {a,b}c | tr a d")) == b"dcbc"
    with pytest.raises(
        ShardError, match=r"pipe:echo no such shard >&2; exit 3: the command ended with 3 \(no such shard\)"
    ):
        content_of(URL("pipe:echo no such shard >&2; exit 3"))
    # Half of it came, and the first command failed.
    with pytest.raises(ShardError, match="ended with 7"):
        content_of(URL("pipe:(echo half; exit 7) | cat"))
    with pytest.raises(UserError, match="source pipe: : names no command; give pipe:COMMAND"):
        open_source("pipe: ")


def test_a_silent_command_is_killed_with_its_children() -> None:
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    with pytest.raises(ShardError, match="the command wrote nothing for 1 s"):
        content_of(URL("pipe:echo begun; sleep 61 & sleep 62"))
    left = [child for child in psutil.Process().children(recursive=True) if child.pid not in before]
    assert not [child for child in left if "sleep" in " ".join(child.cmdline())]


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    remote._made.cache_clear()

    def missing(protocol: str) -> Any:
        raise ImportError("Please install it")

    monkeypatch.setattr(fsspec, "get_filesystem_class", missing)
    for protocol, package in (("gs", "gcsfs"), ("s3", "s3fs"), ("https", "aiohttp"), ("hf", "huggingface_hub")):
        with pytest.raises(UserError, match=rf"{protocol}://: needs the package {package} .*; pip install {package}"):
            content_of(URL(f"{protocol}://b/a.tar"))
    monkeypatch.undo()
    remote._made.cache_clear()
    with pytest.raises(UserError, match=r"nothing://: .*give s3://"):
        content_of(URL("nothing://b/a.tar"))


def test_the_cache_keeps_what_is_whole(tmp_path: Path, served: Faulty) -> None:
    cache = Cache(tmp_path / "cache", 1 << 20)
    served.faults.append(("GET", "drop"))
    assert content_of(tar(served), cache) == BODY
    gets = len([method for method, *_ in served.asked if method == "GET"])
    assert content_of(tar(served), cache) == BODY
    assert len([method for method, *_ in served.asked if method == "GET"]) == gets == 2
    (kept,) = cache.folder.iterdir()
    # A disk that changed it, and a process that died over it.
    kept.write_bytes(BODY[:-1] + b"x")
    assert content_of(tar(served), cache) == BODY
    (kept,) = cache.folder.iterdir()
    kept.rename(kept.with_name(f".{kept.name.partition('-')[0]}.partial"))
    assert content_of(tar(served), cache) == BODY
    assert [file.name.endswith(".shard") for file in cache.folder.iterdir()] == [True]
    served.files["/a.tar"] = TURNED
    assert content_of(tar(served), cache) == TURNED


def test_the_cache_may_hold_another_users_files(
    tmp_path: Path, served: Faulty, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    cache = Cache(tmp_path / "cache", 1 << 20)
    assert content_of(tar(served), cache) == BODY
    monkeypatch.setattr(os, "utime", refuse)
    gets = len([method for method, *_ in served.asked if method == "GET"])
    assert content_of(tar(served), cache) == BODY
    assert len([method for method, *_ in served.asked if method == "GET"]) == gets
    monkeypatch.setattr("efficientclip.data.cache._is_sound", refuse)
    with pytest.raises(UserError, match="Operation not permitted"):
        content_of(tar(served), cache)
    assert not [file for file in psutil.Process().open_files() if file.path.endswith(".shard")]


def test_the_cache_has_a_size_and_those_used_least_recently_go(tmp_path: Path, served: Faulty) -> None:
    cache = Cache(tmp_path / "cache", 3 * len(BODY))
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "other.txt").write_bytes(b"not ours")
    urls = [URL(f"{served.url}/{number}.tar") for number in range(5)]
    served.files = {f"/{number}.tar": bytes([number]) + BODY[1:] for number in range(5)}
    for used in (0, 1, 2, 0, 3, 4):
        assert content_of(urls[used], cache)[0] == used
    held = {file.read_bytes()[0] for file in cache.folder.glob("*.shard")}
    assert held == {0, 3, 4}
    assert (tmp_path / "cache" / "other.txt").is_file()
    served.files["/0.tar"] = BODY * 4
    assert content_of(urls[0], cache) == BODY * 4
    assert len([*cache.folder.glob("*.shard")]) == 3


def _fetches(url: URL, cache: Cache, results: Any) -> None:
    attempts.patience = HASTY
    results.put(content_of(url, cache) == BODY)


def test_processes_share_the_cache(tmp_path: Path, served: Faulty) -> None:
    served.faults.append(("GET", "stall"))
    cache, context = Cache(tmp_path / "cache", 1 << 20), multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=_fetches, args=(tar(served), cache, results)) for _ in range(4)]
    for process in processes:
        process.start()
    assert [results.get(timeout=20) for _ in processes] == [True] * 4
    for process in processes:
        process.join(5)
    assert len([method for method, *_ in served.asked if method == "GET"]) == 2
    assert len([*cache.folder.iterdir()]) == 1


PICTURES = {number: picture(number) for number in range(5)}
TEXTS = [{"text_id": number, "text": f"caption {number}", "image_ids": [number]} for number in PICTURES]


def in_cells(folder: Path, name: str, numbers: list[int]) -> None:
    rows = {
        "image": [{"bytes": PICTURES[n], "path": None} for n in numbers],
        "caption": [f"caption {n}" for n in numbers],
    }
    pq.write_table(pa.table(rows), folder / name, row_group_size=2)


def as_rows(folder: Path) -> None:
    files(folder / "images", {f"{number}.png": content for number, content in PICTURES.items()})
    lines = ["image,caption", *(f"images/{number}.png,caption {number}" for number in PICTURES)]
    (folder / "t.csv").write_text("\n".join(lines) + "\n")
    pq.write_table(pa.table({"path": [f"images/{n}.png" for n in PICTURES], "text": ["x"] * 5}), folder / "t.parquet")
    rows = [{"image_id": f"images/{number}.png", "caption": [f"caption {number}"]} for number in PICTURES]
    (folder / "t.json").write_text(str(rows).replace("'", '"'))


@pytest.fixture(scope="module")
def everywhere(tmp_path_factory: pytest.TempPathFactory, web: Faulty, store: S3) -> Path:
    """The same pictures in every format, on the disk, and under data/ of both servers."""
    folder = tmp_path_factory.mktemp("data")
    chinese_clip(folder, "t", PICTURES, TEXTS)
    as_rows(folder)
    in_cells(folder, "cells.parquet", [0, 1, 2, 3, 4])
    (folder / "split").mkdir()
    in_cells(folder / "split", "train-00000-of-00002.parquet", [0, 1, 2])
    in_cells(folder / "split", "train-00001-of-00002.parquet", [3, 4])
    samples = [(f"{n:03}.{kind}", said) for n in PICTURES for kind, said in (("png", PICTURES[n]), ("txt", b"caption"))]
    write_tar(folder / "0.tar", samples[:6])
    write_tar(folder / "1.tar", samples[6:])
    for name, content in under_data(folder).items():
        put(f"{S3.bucket}{name}", content)
    return folder


def under_data(folder: Path) -> dict[str, bytes]:
    """All files of `folder`, by the path where a server has them."""
    found = (file for file in folder.rglob("*.*") if file.is_file())
    return {f"/data/{file.relative_to(folder)}": file.read_bytes() for file in found}


NAMES = (
    *("t_imgs.tsv", "t_texts.jsonl", "t.csv", "t.parquet", "t.json", "cells.parquet", "split", "0.tar", "{0,1}.tar"),
    "split/*-{00000..00001}-*",
)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("ranged", [True, False])
def test_every_format_is_the_same_anywhere(everywhere: Path, served: Faulty, name: str, ranged: bool) -> None:
    served.ranged = ranged
    served.files |= under_data(everywhere)
    expected, none = read(open_source(everywhere / name))
    assert len(expected) == (3 if name == "0.tar" else 5) and not none
    for root in (f"{served.url}/data", *([f"{S3.bucket}/data"] if ranged else [])):
        found, bad = read(open_source(f"{root}/{name}"))
        assert not bad and [replace(one, shard="") for one in found] == [replace(one, shard="") for one in expected]
        for one in found[:1] + found[-1:]:
            assert str(one.shard).startswith(root)
            assert read_picture(one.shard, one.offset, one.length) == one.image


def test_members_of_a_remote_tar(everywhere: Path, served: Faulty) -> None:
    served.files |= under_data(everywhere)
    expected = dict(read_members(everywhere / "0.tar"))
    assert len(expected) == 3
    for place in (f"{served.url}/data/0.tar", f"{S3.bucket}/data/0.tar", f"pipe:cat {everywhere}/0.tar"):
        assert dict(read_members(URL(place))) == expected
        content, at = expected["001"]["png"]
        assert read_picture(URL(place), at, len(content)) == content


def test_a_picture_that_is_not_there_is_a_bad_sample(everywhere: Path, served: Faulty) -> None:
    served.files |= {f"/{name.name}": name.read_bytes() for name in [everywhere / "t.csv"]}
    served.files |= {f"/images/{n}.png": content for n, content in PICTURES.items() if n != 2}
    good, bad = read(open_source(f"{served.url}/t.csv"))
    assert [sample.key for sample in good] == [f"images/{n}.png" for n in (0, 1, 3, 4)]
    assert [(sample.key, sample.cause) for sample in bad] == [
        ("images/2.png", "picture file: No such file or directory")
    ]
    served.always = {f"/images/{n}.png": "503" for n in PICTURES}
    with pytest.raises(ShardError, match=r"images/\d\.png: 4 attempts failed, the last one: the server answers 503"):
        read(open_source(f"{served.url}/t.csv"))


def test_a_table_that_changes_while_it_is_read_is_told(everywhere: Path, served: Faulty) -> None:
    served.files["/cells.parquet"] = (everywhere / "cells.parquet").read_bytes()
    with contextlib.ExitStack() as stack:
        held = stack.enter_context(remote.ranges(URL(f"{served.url}/cells.parquet")))
        assert pq.read_schema(held).names == ["image", "caption"]
        served.files["/cells.parquet"] += b"x"
        with pytest.raises(ShardError, match="it changed while it was read"):
            stack.close()


def test_a_tar_says_how_it_is_fetched(served: Faulty) -> None:
    local, away = Source(Path("x.tar"), [Path("x.tar")]), open_source(str(tar(served)))
    assert [part.fetch for part in local.parts] == [None]
    (part,) = away.parts
    assert part.fetch is not None
    with part.fetch(threading.Event()) as file:
        assert isinstance(file, io.IOBase) and os.pread(file.fileno(), len(BODY) + 1, 0) == BODY
