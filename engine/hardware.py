"""The machine and the software that a run, a report or a profile names."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

from . import __version__
from .errors import reading
from .files import digests
from .files.atomic import write_atomically

RESTORE = "restore it from a copy, or remove it: then the machine is not recorded"
PACKAGES = ("torch", "deepspeed", "transformers", "triton", "numpy")


def device_name() -> str:
    """The CUDA device's name, or else the processor's."""
    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


def cores_of_rank() -> int:
    """The cores that this process may use: its share where a launcher started several here, and bound none."""
    mine, all_cores = len(os.sched_getaffinity(0)), os.cpu_count() or 1
    return max(1, mine // (ranks_here() if mine == all_cores else 1))


def ranks_here() -> int:
    """How many ranks a launcher started on this machine."""
    return int(os.environ.get("LOCAL_SIZE", 1))


# `training.precision` as torch names it; None: no autocast.
COMPUTED_IN = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def compute_dtype(precision: str) -> torch.dtype | None:
    """What towers compute in on this machine; None: fp32, also for bf16 where it would only be emulated."""
    cuda = torch.cuda.is_available()
    native = torch.cuda.is_bf16_supported(False) if cuda else torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return None if precision == "bf16" and not native else COMPUTED_IN[precision]


def machine_name() -> str:
    """This machine in words."""
    devices = f"{torch.cuda.device_count()} × {device_name()}, " if torch.cuda.is_available() else f"{device_name()}, "
    return f"{devices}{os.cpu_count()} CPU cores"


def hardware(world_size: int) -> dict[str, Any]:
    """Machine, ranks and versions, as JSON."""
    versions = {"efficientclip": __version__, "python": platform.python_version(), "cuda": torch.version.cuda}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "machine": machine_name(),
        "world_size": world_size,
        # What torch's matrix products can use decides their speed: AVX2 has no bf16.
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "versions": versions,
    }


def record_hardware(file: Path, step: int, world_size: int) -> None:
    """Note in `file` what a run goes on with from `step`: a list, one entry for each change."""
    entries = read_hardware(file)
    found = hardware(world_size)
    if not entries or {**entries[-1], "from_step": 0} != {"from_step": 0, **found}:
        entries = [entry for entry in entries if entry["from_step"] < step]
        write_atomically(file, json.dumps([*entries, {"from_step": step, **found}], indent=1).encode())


def read_hardware(file: Path) -> list[dict[str, Any]]:
    """Entries of a run's hardware.json in the order of its starts; none for runs of earlier versions."""
    digests.check_written(file.parent, file.name, remedy=RESTORE)
    if not file.is_file():
        return []
    with reading("hardware", file, RESTORE):
        entries: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))
        for entry in entries:
            if not isinstance(entry["from_step"], int) or not entry.keys() >= {"world_size", "machine"}:
                raise ValueError("an entry names no step, machine or world size")
    return entries


def in_words(entries: list[dict[str, Any]]) -> str:
    """What a run was trained on, by the entries of its hardware.json."""
    ranks = {f"{entry['world_size']} ranks on {entry['machine']}": None for entry in entries}
    return "; then ".join(ranks) or "not recorded"
