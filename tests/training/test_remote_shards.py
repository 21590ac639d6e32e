"""Both towers trained from S3: batches are those of local shards, ranks share the cache, a bad shard may be allowed."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from efficientclip.config import load_config
from efficientclip.files.places import URL
from tests import tiny
from tests.data.servers import S3, put, s3
from tests.training.launch import metrics, run
from tests.training.test_both_towers import config, shard


@pytest.fixture(scope="module")
def store() -> Iterator[S3]:
    with s3() as server:
        yield server


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, store: S3) -> Path:
    path = tmp_path_factory.mktemp("remote")
    tiny.tokenizer(path)
    (path / "train").mkdir()
    for number in range(3):
        file = shard(path / "train" / f"{number}.tar", 40, number)
        put(f"{S3.bucket}/train/{file.name}", file.read_bytes())
    put(f"{S3.bucket}/held.tar", shard(path / "held.tar", 24, 9).read_bytes())
    return path


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in metrics(folder) if "loss" in line]


def test_ranks_train_on_s3_as_on_local_shards(folder: Path, store: S3) -> None:
    run(2, str(config(folder, "local", training__log_every=1)))
    remote: dict[str, Any] = {
        "data__sources": {"train": f"{S3.bucket}/train/{{0..2}}.tar"},
        "data__validation": {"held": f"{S3.bucket}/held.tar"},
        "data__cache": str(folder / "cache"),
    }
    file = config(folder, "remote", training__log_every=1, **copy.deepcopy(remote))
    assert load_config(file).data.sources["train"].path == URL(f"{S3.bucket}/train/{{0..2}}.tar")
    store.asked.clear()
    store.faults += [("GET", "drop"), ("GET", "503")]
    run(2, str(file))
    assert losses(folder / "remote") == losses(folder / "local")
    # Each shard is fetched once for both ranks and all epochs, but for what failed.
    assert len([path for method, path in store.asked if method == "GET" and path.endswith(".tar")]) == 4 + 2
    assert len([*(folder / "cache").glob("*.shard")]) == 4


def test_a_shard_that_cannot_be_had_ends_a_run_or_is_left_out(folder: Path, store: S3) -> None:
    shards = {"data__sources": {"train": f"{S3.bucket}/train/{{0..3}}.tar"}}
    told = run(1, str(config(folder, "ended", **shards)), code=2)
    assert f"error: shard {S3.bucket}/train/3.tar: not there (404)" in told
    file = str(config(folder, "left", data__max_bad_shards=1, **shards))
    told = run(1, file, "training.pair_visits=160")
    assert f"shard {S3.bucket}/train/3.tar: not there (404)" in told and "left out of this epoch" in told
    # What changes no figure may change where a run goes on.
    run(
        1,
        file,
        "training.pair_visits=160",
        "data.max_bad_shards=2",
        f"data.cache={folder / 'other'}",
        "data.cache_gib=1",
    )
