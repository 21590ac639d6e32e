"""The process group of a run, and what its ranks must agree on."""

from __future__ import annotations

import ctypes
import gc
import hashlib
import importlib.metadata
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NoReturn

import deepspeed
import torch
import torch.distributed as dist
import torch.utils.deterministic
from deepspeed.accelerator import get_accelerator
from transformers.utils import logging

import efficientclip.kernels

from .. import __version__
from ..config import Config, identity_keys
from ..launchers import stand_alone
from ..stopping import end_children
from .ranks import agree, join, take_device
from .trackers import require_installed


@contextmanager
def process_group(config: Config) -> Iterator[int]:
    """This process set up for training, as its rank, once all are known to have the same config and code."""
    # Bars over the writing of small weight files would tear the progress bar.
    logging.disable_progress_bar()
    if not torch.cuda.is_available():
        _keep_freed_memory()
        # Batches differ in their tokens, so most of the 1,024 compiled products kept by default never return.
        for cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
            os.environ.setdefault(cache, "128")
    if config.training.threads:
        torch.set_num_threads(config.training.threads)
    torch.use_deterministic_algorithms(not torch.cuda.is_available())
    # Filling every torch.empty would write DeepSpeed's buckets anew in each step.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    rank, _ = join_process_group()
    _require_agreement(config)
    if rank == 0:
        require_installed(config.training.report_to)
    yield rank
    # After an error the others are not there to take leave of, and the process ends anyway.
    dist.destroy_process_group()


def _require_agreement(config: Config) -> None:
    """UserError, naming rank and host, unless all ranks have the same config and code; nothing else is said before."""
    described = json.dumps(identity_keys(config, aside=True), sort_keys=True, default=str)
    found = {
        "config": hashlib.sha256(described.encode()).hexdigest(),
        "efficientclip": f"{__version__} {_code()}",
        **{package: importlib.metadata.version(package) for package in ("torch", "deepspeed", "numpy")},
    }
    remedies = {
        "config": "give all nodes the same YAML, overrides and DeepSpeed JSON",
        "efficientclip": "install the same version on all nodes",
    }
    agree(found, remedies)


@cache
def _code() -> str:
    """Digest of this package's own modules, its kernels and its C++ loader."""
    state = hashlib.sha256()
    for root in (Path(__file__).parent.parent, *map(Path, efficientclip.kernels.__path__)):
        for file in sorted([*root.rglob("*.py"), *root.glob("_loader*.so")]):
            state.update(file.read_bytes())
    return state.hexdigest()[:16]


def _keep_freed_memory() -> None:
    """glibc hands large tensors back to the kernel and faults them in anew: up to a fifth of a step on CPUs."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-4, 0)  # M_MMAP_MAX
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def join_process_group() -> tuple[int, int]:
    """Start torch.distributed from the launcher's environment, or alone; returns (rank, world size)."""
    if "RANK" not in os.environ:
        stand_alone()
    cuda = torch.cuda.is_available()
    if cuda:
        take_device()
    else:
        # It sums for inference alone, and would be compiled here, for a minute, by a compiler that need not be there.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # Before torch may find another run's ranks there.
    join()
    deepspeed.init_distributed("nccl" if cuda else "gloo", auto_mpi_discovery=False, verbose=False)
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def release_memory() -> None:
    """Give back what a trainer held that nobody names any more: its engine holds itself by hooks, and a device's memory
    with it."""
    gc.collect()
    get_accelerator().empty_cache()


def end_process(code: int) -> NoReturn:
    """Leave at once, with what this process started: a gloo worker still dropping its last tensors would meet a Python
    half torn down, and abort."""
    sys.stdout.flush()
    sys.stderr.flush()
    end_children()
    os._exit(code)
