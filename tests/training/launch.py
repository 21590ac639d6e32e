"""Starting real runs: ranks as any launcher starts them, or those of `deepspeed`."""

from __future__ import annotations

import json
import multiprocessing
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from importlib import import_module
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest.mock import patch

from efficientclip.launchers import free_port

# Imports take ten seconds: a server does them once, and ranks are forked from it.
SERVER = multiprocessing.get_context("forkserver")
# DeepSpeed imports that module of its own at each start of ZeRO, and torch's compiler with it.
SERVER.set_forkserver_preload(
    ["efficientclip.training.folds", "efficientclip.planning.profile", "deepspeed.runtime.zero.muon.original_muon"]
)


def environment(**extra: str) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    quiet = {"PYTHONWARNINGS": "ignore", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    return os.environ | {"DS_ACCELERATOR": "cpu", "PATH": path} | quiet | extra


def start(
    log: Path, *arguments: str, script: Path | None = None, module: str = "efficientclip.train", **extra: str
) -> BaseProcess:
    """One rank, which prints into `log`."""
    given = (log, arguments, script, module, environment(**extra))
    process = SERVER.Process(target=_enter, args=given)
    # The first start is that of the server, too: its imports see this environment.
    with patch.dict(os.environ, environment()):
        process.start()
    return process


def _enter(
    log: Path, arguments: tuple[str, ...], script: Path | None, module: str, environment: dict[str, str]
) -> None:
    with log.open("wb") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    # Where the tests run under nohup, or behind a shell, a run would ignore these.
    for signum in (signal.SIGHUP, signal.SIGINT):
        signal.signal(signum, signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [str(script or module), *arguments]
    if script is not None:
        runpy.run_path(str(script), run_name="__main__")
    else:
        import_module(module).main()


def start_ranks(
    folder: Path,
    *given: tuple[str, ...],
    script: Path | None = None,
    module: str = "efficientclip.train",
    **extra: str,
) -> list[BaseProcess]:
    """Ranks with their own arguments, as launchers of as many nodes start them; rank n prints to folder/log-n."""
    shared = {"WORLD_SIZE": str(len(given)), "LOCAL_RANK": "0", "OMP_NUM_THREADS": "1"}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [
        start(folder / f"log-{rank}", *arguments, script=script, module=module, RANK=str(rank), **shared, **extra)
        for rank, arguments in enumerate(given)
    ]


def ended(folder: Path, ranks: list[BaseProcess], within: float) -> tuple[list[int | None], str]:
    """Exit codes, and what all printed beside progress; those that do not end in time are killed."""
    deadline = time.monotonic() + within
    for rank in ranks:
        rank.join(max(0.1, deadline - time.monotonic()))
    codes = [rank.exitcode for rank in ranks]
    for rank in ranks:
        rank.kill()
    output = "".join((folder / f"log-{number}").read_text() for number in range(len(ranks)))
    return codes, output


def run(
    ranks: int,
    *arguments: str,
    script: Path | None = None,
    module: str = "efficientclip.train",
    code: int = 0,
    by_deepspeed: bool = False,
    **extra: str,
) -> str:
    """Run to the end; every exit code must be `code`. Returns what was printed. `deepspeed` takes 20 s to import."""
    if by_deepspeed:
        command = launcher(ranks, *arguments, script=script, module=module)
        done = subprocess.run(command, env=environment(**extra), capture_output=True, text=True, timeout=300)
        codes, output = [done.returncode], done.stdout + done.stderr
    else:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            if ranks == 1:
                started = [start(folder / "log-0", *arguments, script=script, module=module, **extra)]
            else:
                started = start_ranks(folder, *[arguments] * ranks, script=script, module=module, **extra)
            codes, output = ended(folder, started, 300)
    if codes != [code] * len(codes):
        raise RuntimeError(f"exit codes {codes}, expected {code}:\n{output[-6000:]}")
    return output


def launcher(ranks: int, *arguments: str, script: Path | None, module: str) -> list[str]:
    """The command of several ranks."""
    target = [str(script)] if script else ["--module", module]
    program = Path(sys.executable).with_name("deepspeed")
    return [str(program), "--num_accelerators", str(ranks), "--master_port", str(free_port()), *target, *arguments]


def back_to(run: Path, step: int) -> None:
    """Leave of a finished run what it had behind the checkpoint of `step`."""
    shutil.rmtree(run / "model")
    kept = f"step-{step:08d}"
    assert (run / "checkpoints" / kept).is_dir()
    for checkpoint in (run / "checkpoints").glob("step-*"):
        if checkpoint.name > kept:
            shutil.rmtree(checkpoint)


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Training lines of metrics.jsonl, without those of validation."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]
