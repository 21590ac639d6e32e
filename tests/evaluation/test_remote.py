"""Remote shards through the commands: `prepare`, `evaluate`, `search` and `audit --export`, and shards that are bad."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from efficientclip.cli import main
from efficientclip.config import Config, load_config
from efficientclip.data import attempts
from efficientclip.data.images import ImageLoader
from efficientclip.data.store import Store
from efficientclip.errors import UserError
from efficientclip.evaluation.audit import Audit
from efficientclip.evaluation.evaluate import evaluate
from efficientclip.evaluation.search import search
from efficientclip.evaluation.subset import export_kept
from efficientclip.evaluation.suspects import Evidence
from efficientclip.evaluation.verdicts import Verdicts
from efficientclip.files.places import URL, location
from efficientclip.prepare.build import prepare
from efficientclip.verify import broken, verify
from tests.data.servers import S3, Faulty, http, put, s3
from tests.evaluation.conftest import World
from tests.prepare.tars import good, write_shards, write_tar


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        attempts, "patience", attempts.Patience(connect=0.5, read=0.5, wait=0.01, longest=0.05, tries=3)
    )


@pytest.fixture(scope="module")
def store() -> Iterator[S3]:
    with s3() as server:
        yield server


@pytest.fixture(scope="module")
def web() -> Iterator[Faulty]:
    with http() as server:
        yield server


@pytest.fixture
def shards(tmp_path: Path, store: S3) -> Path:
    """Three tars of two samples each, on the disk and in the folder of the bucket that is called like its parent."""
    folder = write_shards(tmp_path / "shards")
    for tar in folder.iterdir():
        put(f"{S3.bucket}/{tmp_path.name}/{tar.name}", tar.read_bytes())
    return folder


def settings(world: World, **data: Any) -> Config:
    config = load_config(world.run / "config.yaml")
    return config.model_copy(update={"data": config.data.model_copy(update=data)})


def rows(store: Path) -> list[dict[str, Any]]:
    return pq.read_table(store / "pairs.parquet").to_pylist()


@pytest.mark.parametrize("cached", [False, True])
def test_a_store_of_remote_shards_is_that_of_local_ones(
    world: World, shards: Path, tmp_path: Path, web: Faulty, cached: bool
) -> None:
    web.files = {f"/{tar.name}": tar.read_bytes() for tar in shards.iterdir()}
    prepare(shards, tmp_path / "local", settings(world))
    config = settings(world, cache=tmp_path / "cache" if cached else None)
    places = (f"{S3.bucket}/{tmp_path.name}", f"{web.url}/{{0..2}}.tar", f"pipe:cat {shards}/{{0,1,2}}.tar")
    for number, source in enumerate(places):
        made = tmp_path / f"remote-{number}"
        manifest = prepare(URL(source), made, config)
        assert manifest["bad_shards"] == [] and manifest["source"] == source
        for name in ("features.bin", "tokens.bin", "image_ids.bin"):
            assert (made / name).read_bytes() == (tmp_path / "local" / name).read_bytes()
        expected = [{**row, "shard": ""} for row in rows(tmp_path / "local")]
        assert [{**row, "shard": ""} for row in rows(made)] == expected
        assert all(isinstance(location(row["shard"]), URL) for row in rows(made))
        again = prepare(URL(source), made, config)
        assert {**again, **manifest} == again
    assert not cached or len([*(tmp_path / "cache").glob("*.shard")]) == 6


def test_bad_shards_are_left_out_under_a_limit_and_tried_again(
    world: World, shards: Path, tmp_path: Path, store: S3, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = f"{S3.bucket}/{tmp_path.name}"
    put(f"{folder}/1.tar", (shards / "1.tar").read_bytes()[:700])
    names = f"{folder}/{{0..3}}.tar"
    arguments = ["prepare", names, str(tmp_path / "made"), "--config", str(world.run / "config.yaml")]
    assert main([*arguments, "data.max_bad_shards=1"]) == 2
    assert f"shard {folder}/3.tar: not there (404)" in capsys.readouterr().err
    assert main([*arguments, "data.max_bad_shards=2"]) == 0
    told = capsys.readouterr().out
    assert f"left out: 2 of its shards, the first: shard {folder}/1.tar: not a whole tar file" in told
    assert "the same command tries again" in told
    made = Store(tmp_path / "made")
    assert [entry["shard"] for entry in made.manifest["bad_shards"]] == [f"{folder}/1.tar", f"{folder}/3.tar"]
    assert {row["shard"] for row in rows(made.path)} == {f"{folder}/0.tar", f"{folder}/2.tar"}
    assert broken(verify(made.path)) is None
    put(f"{folder}/1.tar", (shards / "1.tar").read_bytes())
    put(f"{folder}/3.tar", write_tar(tmp_path / "3.tar", good(8) | good(9)).read_bytes())
    store.asked.clear()
    assert main(arguments) == 0
    assert {row["shard"] for row in rows(made.path)} == {f"{folder}/{number}.tar" for number in range(4)}
    # The shards that were good are not read again.
    assert {path.rpartition("/")[2] for method, path in store.asked if method == "GET"} == {"1.tar", "3.tar"}
    assert not [*made.path.glob("part-*")]
    store.asked.clear()
    assert main(arguments) == 0
    assert "GET" not in {method for method, _ in store.asked}


def test_local_shards_are_left_out_as_remote_ones_are(world: World, shards: Path, tmp_path: Path) -> None:
    (shards / "1.tar").unlink()
    with pytest.raises(UserError, match=r"shard .*1\.tar: No such file"):
        prepare(shards / "{0..2}.tar", tmp_path / "made", settings(world))
    made = prepare(shards / "{0..2}.tar", tmp_path / "made", settings(world, max_bad_shards=1))
    assert [Path(entry["shard"]).name for entry in made["bad_shards"]] == ["1.tar"] and made["images"] == 4


def test_evaluate_and_search_read_remote_data(
    world: World, tmp_path: Path, store: S3, web: Faulty, capsys: pytest.CaptureFixture[str]
) -> None:
    content = world.tar.read_bytes()
    put(f"{S3.bucket}/pictures.tar", content)
    web.files = {"/pictures.tar": content, "/cut.tar": content[:-12000]}
    expected = evaluate(world.run, world.tar)
    for place in (f"{S3.bucket}/pictures.tar", f"{web.url}/pictures.tar"):
        web.faults += [("GET", "drop")]
        assert evaluate(world.run, URL(place)) == expected
        found = search(world.run, "猫", URL(place), 3)
        assert [match.key for match in found] == [match.key for match in search(world.run, "猫", world.tar, 3)]
    assert main(["evaluate", str(world.run), f"{web.url}/cut.tar"]) == 2
    assert f"shard {web.url}/cut.tar: not a whole tar file" in capsys.readouterr().err


def test_kept_pairs_of_remote_shards_are_exported(world: World, shards: Path, tmp_path: Path, store: S3) -> None:
    prepare(URL(f"{S3.bucket}/{tmp_path.name}"), tmp_path / "store", settings(world))
    held = Store(tmp_path / "store")
    kept = np.ones(len(held), bool)
    kept[1] = False
    zero = np.zeros(len(held))
    audit = Audit(world.run, settings(world), held, Verdicts(zero, kept, None), [], zero, Evidence(zero))
    store.faults += [("GET", "drop"), ("GET", "500")]
    assert export_kept(audit, tmp_path / "kept", samples=2, size=1 << 20) == (3, 5)
    with ImageLoader(tmp_path / "kept", batch_size=8, size=16, train=False) as loader:
        assert [key for batch in loader for key in batch.keys] == ["000", "002", "003", "004", "005"]


def test_a_read_that_stalls_ends_a_pass(shards: Path, web: Faulty) -> None:
    web.files = {f"/{tar.name}": tar.read_bytes() for tar in shards.iterdir()}
    web.always = {"/1.tar": "stall"}
    web.ranged = False
    try:
        with (
            ImageLoader(f"{web.url}/{{0..2}}.tar", batch_size=8, size=16, train=False) as loader,
            pytest.raises(UserError, match=r"1\.tar: 3 attempts failed, the last one: timed out"),
        ):
            list(loader)
        with ImageLoader(f"{web.url}/{{0..2}}.tar", batch_size=8, size=16, train=False, max_bad_shards=1) as loader:
            assert [key for batch in loader for key in batch.keys] == ["000", "001", "004", "005"]
            assert [bad.shard for bad in loader.bad_shards] == ["1.tar"]
    finally:
        web.always, web.ranged = {}, True
