"""`prepare` on several ranks: one store whatever their number, after whatever end of one of them."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from efficientclip.config import Config
from efficientclip.data.store import read_manifest, staging
from efficientclip.files.places import URL, Location
from efficientclip.prepare import merge
from efficientclip.prepare.build import prepare
from efficientclip.prepare.deal import dealt
from tests.data.servers import put, s3
from tests.prepare.tars import good, write_shards, write_tar
from tests.training import launch

SLOW, KILLED = (Path(__file__).with_name(f"{name}_prepare.py") for name in ("slow", "killed"))


def started(
    folder: Path, shards: Location, store: Path, *more: str, ranks: int = 2, script: Path = SLOW
) -> list[BaseProcess]:
    arguments = (*(["prepare", str(shards), str(store)]), "--config", str(folder / "config.yaml"), *more)
    return launch.start_ranks(folder, *[arguments] * ranks, script=script)


def ended(folder: Path, processes: list[BaseProcess], seconds: float = 120) -> list[str]:
    """What each rank printed; all must end by themselves."""
    deadline = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    told = [(folder / f"log-{rank}").read_text() for rank in range(len(processes))]
    assert not any(process.is_alive() for process in processes), told
    return told


def wait_for(folder: Path, processes: list[BaseProcess], rank: int, parts: int) -> None:
    """Until that rank encodes its part of that number."""
    log, deadline = folder / f"log-{rank}", time.monotonic() + 120
    while not log.exists() or log.read_text().count("encoding") < parts:
        assert processes[rank].is_alive() and time.monotonic() < deadline
        time.sleep(0.01)


def test_the_largest_parts_are_dealt_first() -> None:
    sizes = [1, 9, 4, 4, 0, 2]
    assert dealt(range(6), sizes, 2) == [[0, 1, 4], [2, 3, 5]]
    assert dealt([0, 3], sizes, 3) == [[3], [0], []]
    assert sorted(part for share in dealt(range(20), [7] * 20, 3) for part in share) == [*range(20)]


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_make_the_store_of_one(tmp_path: Path, config: Config, ranks: int) -> None:
    shards = write_shards(tmp_path / "shards", 7)
    # The same picture and caption in the hands of two ranks.
    write_tar(shards / "7.tar", good(0) | good(40, "狗"))
    processes = started(tmp_path, shards, tmp_path / "made", ranks=ranks)
    told = ended(tmp_path, processes)
    assert [process.exitcode for process in processes] == [0] * ranks, told
    assert all("encoding" in rank for rank in told) and sum(rank.count("encoding") for rank in told) == 8
    assert ["15 pairs, 15 images" in rank for rank in told] == [True, *[False] * (ranks - 1)]
    prepare(shards, tmp_path / "expected", config)
    assert read_manifest(tmp_path / "made") == read_manifest(tmp_path / "expected")
    # Nothing is to be made: all end.
    processes = started(tmp_path, shards, tmp_path / "made", ranks=ranks)
    told = ended(tmp_path, processes)
    assert [process.exitcode for process in processes] == [0] * ranks and "encoding" not in "".join(told)


def test_deepspeed_starts_its_ranks(tmp_path: Path, config: Config) -> None:
    shards, store = write_shards(tmp_path / "shards", 3), tmp_path / "made"
    given = [str(shards), str(store), "--config", str(tmp_path / "config.yaml")]
    launch.run(2, *given, module="efficientclip.prepare", by_deepspeed=True, OMP_NUM_THREADS="1")
    prepare(shards, tmp_path / "expected", config)
    assert read_manifest(store) == read_manifest(tmp_path / "expected")


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_costs_a_part_a_rank(tmp_path: Path, config: Config, victim: int) -> None:
    shards, path = write_shards(tmp_path / "shards", 12), tmp_path / "made"
    seed = int(np.random.default_rng().integers(2**31))
    print(f"seed {seed}")
    random = np.random.default_rng(seed)
    processes = started(tmp_path, shards, path)
    wait_for(tmp_path, processes, victim, int(random.integers(1, 5)))
    time.sleep(random.uniform(0, 0.1))
    for process in (processes[victim], *processes):
        # A launcher ends the others.
        if process.is_alive() and process.pid is not None:
            os.kill(process.pid, signal.SIGKILL if process is processes[victim] else signal.SIGTERM)
    told = ended(tmp_path, processes)
    assert not path.exists() and "Traceback" not in "".join(told)
    encoded = sum(rank.count("encoding") for rank in told)
    left = len(list(staging(path).glob("part-*.parquet")))
    assert encoded - 2 <= left <= encoded
    processes = started(tmp_path, shards, path)
    told = ended(tmp_path, processes)
    assert [process.exitcode for process in processes] == [0, 0], told
    assert sum(rank.count("encoding") for rank in told) == 12 - left
    prepare(shards, tmp_path / "expected", config)
    assert read_manifest(path) == read_manifest(tmp_path / "expected")


@pytest.mark.parametrize("damaged", [None, "features.bin"])
def test_what_stands_of_a_store_when_rank_0_is_killed_is_not_made_again(
    tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch, damaged: str | None
) -> None:
    shards, path = write_shards(tmp_path / "shards", 3), tmp_path / "made"
    processes = started(tmp_path, shards, path, script=KILLED)
    ended(tmp_path, processes)
    assert processes[0].exitcode == -signal.SIGKILL and not path.exists()
    if damaged:
        (file,) = staging(path).glob(f"merging-*/*/{damaged}")
        file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:])
    made: list[str] = []

    def noted(name: str, work: Callable[..., Any], *given: Any) -> Any:
        made.append(name)
        return work(*given)

    for name in ("features", "tokens", "pairs", "ids_and_edges", "origins"):
        monkeypatch.setattr(merge, f"_{name}", partial(noted, name, getattr(merge, f"_{name}")))
    prepare(shards, path, config)
    assert sorted(made) == (["features", "pairs"] if damaged else ["pairs"])
    prepare(shards, tmp_path / "expected", config)
    assert read_manifest(path) == read_manifest(tmp_path / "expected")
    assert {*os.listdir(path)} == {*os.listdir(tmp_path / "expected")}


def test_what_an_interrupted_store_of_other_parts_left_is_not_used(tmp_path: Path, config: Config) -> None:
    shards, path = write_shards(tmp_path / "shards", 3), tmp_path / "made"
    ended(tmp_path, started(tmp_path, shards, path, ranks=1, script=KILLED))
    write_tar(shards / "1.tar", good(40, "狗"))
    prepare(shards, path, config)
    prepare(shards, tmp_path / "expected", config)
    assert read_manifest(path) == read_manifest(tmp_path / "expected")
    assert {*os.listdir(path)} == {*os.listdir(tmp_path / "expected")}


@pytest.mark.parametrize("allowed", [1, 2])
def test_bad_shards_are_counted_over_all_ranks(tmp_path: Path, config: Config, allowed: int) -> None:
    shards = write_shards(tmp_path / "shards", 6)
    for name in ("2.tar", "3.tar"):
        (shards / name).write_bytes((shards / name).read_bytes()[:700])
    processes = started(tmp_path, shards, tmp_path / "made", f"data.max_bad_shards={allowed}")
    told = ended(tmp_path, processes)
    if allowed == 1:
        codes = [process.exitcode for process in processes]
        # A rank that is through with its share before the other finds one too many has ended well.
        assert codes[0] == 2 and (codes[1] == 2 or told[1].count("encoding") == 2), told
        assert "".join(told).count("error:") == 1 and "Traceback" not in "".join(told)
        assert not (tmp_path / "made").exists()
        return
    assert [process.exitcode for process in processes] == [0, 0], told
    limited = config.model_copy(update={"data": config.data.model_copy(update={"max_bad_shards": 2})})
    expected = prepare(shards, tmp_path / "expected", limited)
    assert read_manifest(tmp_path / "made") == read_manifest(tmp_path / "expected")
    assert [Path(entry["shard"]).name for entry in expected["bad_shards"]] == ["2.tar", "3.tar"]


def test_an_error_of_one_rank_ends_all_with_one_message(tmp_path: Path, config: Config) -> None:
    shards = write_shards(tmp_path / "shards", 40)
    processes = started(tmp_path, shards, tmp_path / "made")
    wait_for(tmp_path, processes, 1, 2)
    # Rank 1 has the odd ones: its last one goes.
    (shards / "9.tar").write_bytes(b"")
    began = time.monotonic()
    told = ended(tmp_path, processes)
    assert [process.exitcode for process in processes] == [2, 2], told
    assert "".join(told).count("error:") == 1 and "9.tar" in "".join(told) and "Traceback" not in "".join(told)
    assert time.monotonic() - began < 20


def test_ranks_on_s3_that_were_killed_make_the_store_of_one_on_a_disk(tmp_path: Path, config: Config) -> None:
    shards = write_shards(tmp_path / "shards", 8)
    with s3() as server:
        for shard in shards.glob("*.tar"):
            put(f"{server.bucket}/many/{shard.name}", shard.read_bytes())
        source = URL(f"{server.bucket}/many/{{0..7}}.tar")
        processes = started(tmp_path, source, tmp_path / "made")
        wait_for(tmp_path, processes, 1, 2)
        for process in processes:
            if process.is_alive() and process.pid is not None:
                os.kill(process.pid, signal.SIGKILL)
        ended(tmp_path, processes)
        assert not (tmp_path / "made").exists()
        left = len(list(staging(tmp_path / "made").glob("part-*.parquet")))
        server.faults += [("GET", "drop")]
        processes = started(tmp_path, source, tmp_path / "made")
        told = ended(tmp_path, processes)
    assert [process.exitcode for process in processes] == [0, 0], told
    assert sum(rank.count("encoding") for rank in told) == 8 - left
    prepare(shards, tmp_path / "expected", config)
    made, expected = (read_manifest(tmp_path / name)["files"] for name in ("made", "expected"))
    # The pair table alone tells where pictures lie.
    made.pop("pairs.parquet"), expected.pop("pairs.parquet")
    assert made == expected
