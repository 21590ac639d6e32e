"""Process group and DeepSpeed configuration of a run."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import importlib.metadata
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import deepspeed
import torch
import torch.distributed as dist
import torch.utils.deterministic
from deepspeed.accelerator import get_accelerator
from torch.utils.cpp_extension import _get_build_directory
from transformers.utils import logging

import efficientclip.kernels

from .. import __version__
from ..config import Config, identity_keys
from ..errors import UserError
from ..launchers import stand_alone
from .ranks import agree, join

# What the YAML decides; DeepSpeed's JSON owns ZeRO, communication and offload.
OWNED = {
    "train_batch_size": "training.batch_size",
    "train_micro_batch_size_per_gpu": "training.micro_batch_size",
    "gradient_accumulation_steps": "training.micro_batch_size",
    "gradient_clipping": "optimizer.clip",
    "optimizer": "optimizer",
    "scheduler": "optimizer",
    "steps_per_print": "training.log_every",
    # Autocast over fp32 weights: DeepSpeed's engine modes round the weights themselves, or have no fp32 averages.
    **dict.fromkeys(("bf16", "fp16", "torch_autocast", "amp", "bfloat16"), "training.precision"),
}


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
        _take_device()
    else:
        _load_shared_memory_operator()
    # Before torch may find another run's ranks there.
    join()
    deepspeed.init_distributed("nccl" if cuda else "gloo", auto_mpi_discovery=False, verbose=False)
    if not cuda:
        _forget_shared_memory()
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def _take_device() -> None:
    """The device of this rank's number on its node; where a launcher shows each rank its own alone, that one."""
    rank, devices = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if devices == 1:
        # DeepSpeed reads it, too.
        rank, os.environ["LOCAL_RANK"] = 0, "0"
    if rank >= devices:
        raise UserError(
            f"LOCAL_RANK: {rank}, but this node shows {devices} devices; start a rank a device at most"
            " (CUDA_VISIBLE_DEVICES says which are shown)"
        )
    torch.cuda.set_device(rank)


def _load_shared_memory_operator() -> None:
    """DeepSpeed compiles the operator that CPU ranks talk through at its first start; this is that start, made safe.

    PyTorch marks a build by a file, and a build that was killed leaves it behind: every later start would wait for
    ever. The system frees a lock with its process, so whoever holds ours knows such a mark to be stale.
    """
    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if builder is None or not builder.is_compatible():
        return
    # What another environment's packages or ninja built is built anew, each time they take turns: each has its own.
    if sys.prefix != sys.base_prefix and os.access(sys.prefix, os.W_OK):
        os.environ.setdefault("TORCH_EXTENSIONS_DIR", os.path.join(sys.prefix, "torch_extensions"))
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    folder = Path(_get_build_directory(builder.name, False))
    with (folder / "builder").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        if not (folder / f"{builder.name}.so").exists():
            print("DeepSpeed compiles its shared-memory operator, about a minute, once", flush=True)
        (folder / "lock").unlink(missing_ok=True)
        builder.load(verbose=False)


def _forget_shared_memory() -> None:
    """Unlink the 66 MiB that DeepSpeed's operator maps for this rank and never removes: the last process frees them."""
    torch.distributed.barrier()
    parts = os.getuid(), os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"], torch.distributed.get_rank()
    Path("/dev/shm", "_".join(map(str, ("deepspeed_allreduce_buffer", *parts)))).unlink(missing_ok=True)


def end_process(code: int) -> NoReturn:
    """Leave at once: a gloo worker still dropping its last tensors would meet a Python half torn down, and abort."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def deepspeed_digest(config: Config) -> str:
    """Equal for configs whose DeepSpeed JSON says the same."""
    return hashlib.sha256(json.dumps(_users_json(config), sort_keys=True).encode()).hexdigest()


def _users_json(config: Config) -> dict[str, Any]:
    if config.deepspeed is None:
        return {}
    if not config.deepspeed.is_file():
        raise UserError(f"deepspeed: {config.deepspeed} is missing; configs/deepspeed/ holds samples")
    try:
        user = json.loads(config.deepspeed.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"deepspeed: {config.deepspeed} is not JSON: {error}") from error
    if not isinstance(user, dict):
        raise UserError(f"deepspeed: {config.deepspeed} holds a {type(user).__name__}, not an object of keys")
    return user


def _check_zero(config: Config, zero: dict[str, Any]) -> None:
    """UserError at what checkpoints cannot hold, or would keep an overflow from being seen."""
    offload = zero.get("offload_optimizer") or {}
    refused = {
        "round_robin_gradients": (zero.get("round_robin_gradients", False), "moments would lie in another order"),
        "compute_grad_norm": (not zero.get("compute_grad_norm", True), "steps that are not finite would pass"),
        "offload_optimizer.device": (offload.get("device") == "nvme", "moments on NVMe are in no checkpoint"),
        "offload_optimizer.ratio": (offload.get("ratio", 1.0) != 1.0, "a part of the moments is in no checkpoint"),
    }
    for key, (given, why) in refused.items():
        if given:
            raise UserError(f"deepspeed: {config.deepspeed} sets zero_optimization.{key}: {why}; remove it there")


def deepspeed_config(config: Config, world_size: int) -> dict[str, Any]:
    """The user's DeepSpeed JSON with the keys that the YAML owns."""
    user = _users_json(config)
    for key in user.keys() & OWNED.keys():
        raise UserError(
            f"deepspeed: {config.deepspeed} sets {key}, which {OWNED[key]} of the YAML owns; remove it there"
        )
    _check_zero(config, user.get("zero_optimization", {}))
    if config.training.batch_size % world_size:
        fitting = config.training.batch_size // world_size * world_size
        raise UserError(
            f"training.batch_size: {config.training.batch_size} pairs cannot be divided by {world_size} ranks;"
            f" choose a multiple, for instance {max(fitting, world_size)}"
        )
    local = config.training.batch_size // world_size
    micro = config.training.micro_batch_size or local
    if local % micro:
        raise UserError(f"training.micro_batch_size: {micro} does not divide the {local} pairs of a rank")
    return {
        **user,
        "train_micro_batch_size_per_gpu": micro,
        # With a token budget the number differs from step to step: the trainer marks the last micro-batch. DeepSpeed
        # must know only that gradients accumulate.
        "gradient_accumulation_steps": 2 if config.training.tokens_per_micro_batch else local // micro,
        "gradient_clipping": config.optimizer.clip,
        "steps_per_print": 2**31,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
