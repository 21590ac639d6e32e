"""Ranks as srun, mpirun and torchrun start them train one run; a port that is taken ends in a message."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from efficientclip.launchers import free_port
from tests import tiny
from tests.training import launch
from tests.training.launch import ended, environment, metrics, run, start, start_ranks
from tests.training.test_ranks import wait_for

# A rank 0 that cannot be reached is waited for a minute otherwise, and who waits for a launcher's end 3 seconds.
OTHER_TIMES = """
import sys
from efficientclip.training import ranks
ranks.JOIN_SECONDS, ranks.LOST_SECONDS = {}, {}
from efficientclip.train import main
main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("launchers")
    tiny.pair_store(path / "store")
    tiny.text_store(path / "texts")
    (path / "impatient.py").write_text(OTHER_TIMES.format(3, 3))
    (path / "patient.py").write_text(OTHER_TIMES.format(60, 30))
    return path


def config(folder: Path, name: str, **changes: Any) -> str:
    given = {"run": str(folder / name), "training__pair_visits": 64, "training__checkpoint_every": 1} | changes
    return str(tiny.config(folder, **given).rename(folder / f"{name}.yaml"))


def catches(pid: int, signum: int) -> bool:
    """Whether the process has a handler for the signal."""
    told = Path(f"/proc/{pid}/status").read_text()
    return bool(int(told.partition("SigCgt:")[2].split()[0], 16) >> (signum - 1) & 1)


def slurm(rank: int) -> dict[str, str]:
    nodes = {"SLURM_JOB_NODELIST": "localhost,other", "SLURM_STEP_NODELIST": "localhost"}
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2"}
    return nodes | job | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_STEP_TASKS_PER_NODE": "2"}


def open_mpi(rank: int) -> dict[str, str]:
    numbers = {"SIZE": 2, "LOCAL_SIZE": 2, "RANK": rank, "LOCAL_RANK": rank}
    return {f"OMPI_COMM_WORLD_{name}": str(number) for name, number in numbers.items()} | {
        "PMIX_NAMESPACE": f"{os.getpid()}@1"
    }


@pytest.mark.parametrize("variables", [slurm, open_mpi])
def test_ranks_of_srun_and_mpirun_train_one_run(folder: Path, variables: Any) -> None:
    file = config(folder, variables.__name__)
    ranks = [start(folder / f"log-{rank}", file, **variables(rank)) for rank in range(2)]
    codes, output = ended(folder, ranks, 120)
    assert codes == [0, 0], output
    assert output.count("64 pair visits on 2 rank(s)") == 1


def test_a_process_that_cannot_tell_its_rank_leaves_with_a_message(folder: Path) -> None:
    file = config(folder, "unknown")
    for module in ("efficientclip.train", "efficientclip.profile"):
        output = run(1, file, module=module, code=2, WORLD_SIZE="2")
        assert output.count("error: RANK: not set") == 1 and "Traceback" not in output
        assert "error: RANK: 'x' is no number" in run(1, file, module=module, code=2, RANK="x", WORLD_SIZE="2")
    assert not (folder / "unknown").exists()


def test_two_nodes_of_torchrun_and_then_one_rank(folder: Path) -> None:
    file, port = config(folder, "nodes"), free_port()
    torchrun = [str(Path(sys.executable).with_name("torchrun")), "--nnodes", "2", "--nproc_per_node", "1"]
    rendezvous = ["--rdzv_backend", "c10d", "--rdzv_id", "nodes", "--rdzv_endpoint", f"localhost:{port}"]
    nodes = [
        subprocess.Popen(
            [*torchrun, *rendezvous, "--node_rank", str(node), "--module", "efficientclip.train", file],
            env=environment(OMP_NUM_THREADS="1"),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for node in range(2)
    ]
    try:
        output = "".join(node.communicate(timeout=240)[0] for node in nodes)
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0], output
    assert output.count("64 pair visits on 2 rank(s)") == 1
    run_folder = folder / "nodes"
    # As it was after the first step.
    for left in (run_folder / "model", run_folder / "checkpoints" / "step-00000002"):
        left.rename(folder / left.name)
    assert "at step 1 " in run(1, file)
    assert len(metrics(run_folder)) == 2


@pytest.fixture
def taken() -> Iterator[int]:
    """A port where another program takes connections and says nothing."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        yield other.getsockname()[1]


def test_a_port_that_another_program_has(folder: Path, taken: int) -> None:
    file, message = (
        config(folder, "taken"),
        f"error: 127.0.0.1:{taken}: in use by another process; give all ranks another",
    )
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken)}
    output = run(1, file, code=2, **alone)
    assert output.count("error: ") == 1 and message in output and "Traceback" not in output
    with patch.object(launch, "free_port", lambda: taken):
        ranks = start_ranks(folder, (file,), (file,), script=folder / "impatient.py")
    codes, output = ended(folder, ranks, 60)
    assert codes == [2, 2] and message in output and "Traceback" not in output
    assert f"error: rank 0 cannot be reached at 127.0.0.1:{taken}" in (folder / "log-1").read_text()


def test_a_port_that_another_run_has_and_that_run_goes_on(folder: Path) -> None:
    """Told to end, the second run's rank 1 must not tell so to the first run's ranks."""
    endless = {"training__pair_visits": 1_000_000, "training__checkpoint_every": 1000}
    first, second = config(folder, "first", **endless), config(folder, "second", **endless)
    port = free_port()
    for name in ("one", "two"):
        (folder / name).mkdir()
    with patch.object(launch, "free_port", lambda: port):
        there = start_ranks(folder / "one", (first,), (first,))
        wait_for(folder / "first" / "metrics.jsonl")
        ranks = start_ranks(folder / "two", (second,), (second,), script=folder / "patient.py")
    ranks[0].join(60)
    assert ranks[1].pid is not None
    # Rank 0 may have come and gone before this one has imported anything.
    deadline = time.monotonic() + 60
    while not catches(ranks[1].pid, signal.SIGTERM):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(ranks[1].pid, signal.SIGTERM)
    codes, output = ended(folder / "two", ranks, 30)
    there[1].join(3)
    still = [rank.is_alive() for rank in there]
    _, first_output = ended(folder / "one", there, 0)
    assert still == [True, True] and "stopped" not in first_output
    assert codes == [2, 143] and output.count("error: ") == 1 and "Traceback" not in output
    assert f"error: 127.0.0.1:{port}: in use by another process" in output
