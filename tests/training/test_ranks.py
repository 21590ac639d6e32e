"""Ranks agree before they start, and one rank's error, or a signal to it, ends all of them with one message."""

from __future__ import annotations

import os
import re
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from tests.training.launch import ended, start, start_ranks
from tests.training.test_resume import kill_at

WITHIN_SECONDS = 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ranks")
    tiny.pair_store(path / "store")
    tiny.pair_store(path / "other", seed=5)
    tiny.text_store(path / "texts")
    return path


def config(folder: Path, name: str, **changes: Any) -> str:
    endless = {"training__pair_visits": 1_000_000, "training__checkpoint_every": 1000}
    file = tiny.config(folder, run=str(folder / name), **(endless | changes))
    return str(file.rename(folder / f"{name}.yaml"))


@pytest.mark.parametrize(
    ("rank_1", "message"),
    [
        (["seed=5"], "config: rank 1 on .* has another than rank 0"),
        (["data.store={folder}/other"], "store: rank 1 on .* has another than rank 0"),
        (["run={folder}/elsewhere"], "rank 1 on .* does not see the folder that rank 0 writes"),
        (["data.store={folder}/nowhere"], "nowhere: no manifest.json"),
        (["training.batch_size=x"], "training.batch_size: Input should be a valid integer"),
    ],
    ids=["config", "store", "run", "error", "mistake"],
)
def test_ranks_that_do_not_agree_end_with_one_message(folder: Path, rank_1: list[str], message: str) -> None:
    file = config(folder, "agree")
    ranks = start_ranks(folder, (file,), (file, *(override.format(folder=folder) for override in rank_1)))
    codes, output = ended(folder, ranks, 60)
    assert codes == [2, 2]
    assert output.count("error: ") == 1 and re.search(message, output) and "Traceback" not in output
    assert not list((folder / "agree").glob("checkpoints/step-*"))


@pytest.mark.parametrize(("signum", "rank"), [(signal.SIGTERM, 1), (signal.SIGHUP, 0)])
def test_a_signal_to_one_rank_saves_and_ends_all(folder: Path, signum: int, rank: int) -> None:
    file = config(folder, f"signal-{rank}")
    ranks = start_ranks(folder, (file,), (file,))
    kill_at(ranks[rank], folder / f"signal-{rank}", 5, signum)
    codes, output = ended(folder, ranks, 20)
    assert codes == [128 + signum] * 2 and "Traceback" not in output
    assert output.count(f"stopped by {signal.Signals(signum).name}; checkpoint of step") == 1
    assert list((folder / f"signal-{rank}" / "checkpoints").glob("step-*/digests.json"))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_killed_ends_the_other(folder: Path, rank: int) -> None:
    file = config(folder, f"killed-{rank}")
    ranks = start_ranks(folder, (file,), (file,))
    kill_at(ranks[rank], folder / f"killed-{rank}", 5)
    codes, output = ended(folder, ranks, WITHIN_SECONDS)
    assert codes[rank] == -signal.SIGKILL and codes[1 - rank] == 2
    assert re.search("is gone.*; the same command goes on", output) and "Traceback" not in output


def test_a_second_run_in_the_folder_is_refused_and_a_dead_ones_lock_taken_over(folder: Path) -> None:
    file = config(folder, "locked")
    first = start(folder / "log-0", file)
    wait_for(folder / "locked" / "metrics.jsonl")
    second = start(folder / "log-1", file)
    second.join(30)
    output = (folder / "log-1").read_text()
    assert second.exitcode == 2 and "Traceback" not in output
    assert f"process {first.pid} on {socket.gethostname()} (training) is at it" in output
    kill_at(first, folder / "locked", 1)
    third = start(folder / "log-1", file)
    while third.is_alive() and f'"pid": {third.pid}' not in (folder / "locked" / ".lock").read_text():
        time.sleep(0.01)
    assert third.pid is not None
    os.kill(third.pid, signal.SIGINT)
    third.join(20)
    assert third.exitcode == 130 and "stopped by SIGINT" in (folder / "log-1").read_text()


def test_a_second_ctrl_c_leaves_at_once(folder: Path) -> None:
    """A step of this run never ends: it holds no signal back."""
    script = folder / "hangs.py"
    script.write_text(
        "import time\nfrom pathlib import Path\nfrom efficientclip import stopping\nstopping.watch()\n"
        f"with stopping.finishing(60):\n    Path({str(folder / 'hangs')!r}).touch()\n    time.sleep(60)\n"
    )
    process = start(folder / "log-0", script=script)
    wait_for(folder / "hangs")
    for _ in range(2):
        assert process.pid is not None and process.is_alive()
        os.kill(process.pid, signal.SIGINT)
        process.join(1)
    assert process.exitcode == 130


def wait_for(file: Path) -> None:
    deadline = time.monotonic() + 60
    while not file.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert file.exists()
