"""Starting real runs: one process, or several by the `deepspeed` launcher."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any


def command(ranks: int, *arguments: str, script: Path | None = None, module: str = "train") -> list[str]:
    """One rank runs plain Python, more run under the launcher."""
    target = [str(script)] if script else ["--module", f"efficientclip.{module}"]
    if ranks == 1:
        return [sys.executable, *(target if script else ["-m", f"efficientclip.{module}"]), *arguments]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = Path(sys.executable).with_name("deepspeed")
    return [str(launcher), "--num_accelerators", str(ranks), "--master_port", str(port), *target, *arguments]


def environment(**extra: str) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return os.environ | {"DS_ACCELERATOR": "cpu", "PYTHONWARNINGS": "ignore", "PATH": path} | extra


def run(
    ranks: int, *arguments: str, script: Path | None = None, module: str = "train", code: int = 0, **extra: str
) -> str:
    """Run to the end; the exit code must be `code`. Returns what was printed."""
    started = command(ranks, *arguments, script=script, module=module)
    done = subprocess.run(started, env=environment(**extra), capture_output=True, text=True, timeout=300)
    output = done.stdout + done.stderr
    if done.returncode != code:
        raise RuntimeError(f"exit code {done.returncode}, expected {code}:\n{output[-6000:]}")
    return output


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Training lines of metrics.jsonl, without those of validation."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]
