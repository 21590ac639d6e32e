"""Process group and DeepSpeed configuration of a run."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import sys
from pathlib import Path
from typing import Any, NoReturn

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from torch.utils.cpp_extension import _get_build_directory

from ..config import Config
from ..errors import UserError

# What the YAML decides; DeepSpeed's JSON owns ZeRO, precision, communication and offload.
OWNED = {
    "train_batch_size": "training.batch_size",
    "train_micro_batch_size_per_gpu": "training.micro_batch_size",
    "gradient_accumulation_steps": "training.micro_batch_size",
    "gradient_clipping": "optimizer.clip",
    "optimizer": "optimizer",
    "scheduler": "optimizer",
    "steps_per_print": "training.log_every",
}


def join_process_group() -> tuple[int, int]:
    """Start torch.distributed from the launcher's environment, or alone; returns (rank, world size)."""
    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        os.environ["MASTER_PORT"] = str(port)
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    else:
        _load_shared_memory_operator()
    deepspeed.init_distributed("nccl" if cuda else "gloo", auto_mpi_discovery=False, verbose=False)
    if not cuda:
        _forget_shared_memory()
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


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


def deepspeed_config(config: Config, world_size: int) -> dict[str, Any]:
    """The user's DeepSpeed JSON with the keys that the YAML owns."""
    user: dict[str, Any] = {}
    if config.deepspeed is not None:
        if not config.deepspeed.is_file():
            raise UserError(f"deepspeed: {config.deepspeed} is missing; configs/deepspeed/ holds samples")
        try:
            user = json.loads(config.deepspeed.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise UserError(f"deepspeed: {config.deepspeed} is not JSON: {error}") from error
    for key in user.keys() & OWNED.keys():
        raise UserError(
            f"deepspeed: {config.deepspeed} sets {key}, which {OWNED[key]} of the YAML owns; remove it there"
        )
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
    autocast = user.get("torch_autocast", {})
    emulated = not torch.cuda.is_available() and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if autocast.get("enabled") and autocast.get("dtype") == "bfloat16" and emulated:
        if os.environ.get("RANK", "0") == "0":
            print(
                "this CPU only emulates bfloat16, up to 80 times slower than float32: training in float32", flush=True
            )
        user = {**user, "torch_autocast": {"enabled": False}}
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
