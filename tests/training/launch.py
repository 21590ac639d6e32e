"""Starting real runs: one process, or several by the `deepspeed` launcher."""

from __future__ import annotations

import json
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from importlib import import_module
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest.mock import patch

# Imports take ten seconds: a server does them once, and processes of one rank are forked from it.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["efficientclip.training.folds", "efficientclip.planning.profile"])


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


def run(
    ranks: int,
    *arguments: str,
    script: Path | None = None,
    module: str = "efficientclip.train",
    code: int = 0,
    **extra: str,
) -> str:
    """Run to the end; the exit code must be `code`. Returns what was printed."""
    if ranks == 1:
        with tempfile.TemporaryDirectory() as folder:
            log = Path(folder) / "log"
            process = start(log, *arguments, script=script, module=module, **extra)
            process.join(300)
            process.kill()
            found, output = process.exitcode, log.read_text()
    else:
        command = launcher(ranks, *arguments, script=script, module=module)
        done = subprocess.run(command, env=environment(**extra), capture_output=True, text=True, timeout=300)
        found, output = done.returncode, done.stdout + done.stderr
    if found != code:
        raise RuntimeError(f"exit code {found}, expected {code}:\n{output[-6000:]}")
    return output


def launcher(ranks: int, *arguments: str, script: Path | None, module: str) -> list[str]:
    """The command of several ranks."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    target = [str(script)] if script else ["--module", module]
    program = Path(sys.executable).with_name("deepspeed")
    return [str(program), "--num_accelerators", str(ranks), "--master_port", str(port), *target, *arguments]


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Training lines of metrics.jsonl, without those of validation."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]
