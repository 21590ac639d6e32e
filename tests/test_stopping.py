from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest

from efficientclip import stopping

STUBBORN = """
import signal, sys
from pathlib import Path
from efficientclip import stopping

# Under nohup the tests, and so this, would ignore it.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
stopping.watch()
with stopping.scratch(Path(sys.argv[1])) as folder:
    print("ready", flush=True)
    while True:
        (folder / "run").mkdir(parents=True, exist_ok=True)
"""


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_scratch_goes_while_the_main_thread_makes_it_again(tmp_path: Path, signum: signal.Signals) -> None:
    folders = [tmp_path / f"scratch-{number}" for number in range(4)]
    processes = [
        subprocess.Popen([sys.executable, "-c", STUBBORN, str(folder)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for folder in folders
    ]
    try:
        for process in processes:
            assert process.stdout is not None and process.stdout.readline() == b"ready\n"
            process.send_signal(signum)
        told = [process.communicate(timeout=20)[1].decode() for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [128 + signum] * 4
    assert set(told) == {f"stopped by {signum.name}; the same command goes on\n"}
    assert not [folder for folder in folders if folder.exists()]


def test_two_threads_that_leave_say_so_once() -> None:
    script = (
        "import threading\nfrom efficientclip.stopping import leave\n"
        "ready = threading.Barrier(2)\n"
        "def go(name):\n    ready.wait()\n    leave(3, f'left by {name}')\n"
        "threads = [threading.Thread(target=go, args=(name,)) for name in 'ab']\n"
        "[thread.start() for thread in threads]\n[thread.join() for thread in threads]\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 3 and done.stderr.count("left by ") == 1


@pytest.mark.parametrize(
    ("words", "launches"),
    [
        (["/opt/openmpi/bin/mpirun", "-n", "2", "python"], True),
        (["orted", "-mca", "ess", "env"], True),
        (["/usr/bin/hydra_pmi_proxy", "--rank"], True),
        (["slurmstepd: [12.0]"], True),
        (["python", "/venv/bin/torchrun", "--nnodes", "2"], True),
        (["bash", "mpirun"], False),
        (["python", "-m", "efficientclip.train"], False),
        ([], False),
    ],
)
def test_launchers_are_known_by_their_command_line(words: list[str], launches: bool) -> None:
    assert stopping._launches(Mock(cmdline=lambda: words)) is launches
