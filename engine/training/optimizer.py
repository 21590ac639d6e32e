"""Optimisers by name, and the learning rate as a function of pair visits."""

from __future__ import annotations

import fcntl
import importlib.metadata
import importlib.util
import math
import os
import sys
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch import nn
from torch.utils.cpp_extension import _get_build_directory

from ..config import Optimizer
from ..errors import UserError, short


def build_optimizer(module: nn.Module, config: Optimizer, zero_stage: int) -> torch.optim.Optimizer:
    """The optimiser that `optimizer.name` asks for; weight decay spares vectors (norms, biases, logit scale)."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    arguments: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "eps": config.eps}
    if "lamb" in config.name and zero_stage >= 1:
        raise UserError(
            f"optimizer.name={config.name}: LAMB needs the norm of each whole tensor, ZeRO stage {zero_stage} keeps"
            " flat shards; set zero_optimization.stage to 0 in the DeepSpeed JSON, or choose adamw"
        )
    if config.name.startswith("apex"):
        optimizers = _apex_optimizers(config.name)
        return (optimizers.FusedAdam if config.name == "apex-fused-adam" else optimizers.FusedLAMB)(groups, **arguments)
    if config.name in ("deepspeed-fused-adam", "lamb") and not torch.cuda.is_available():
        raise UserError(f"optimizer.name={config.name}: needs a CUDA device; choose adamw or deepspeed-cpu-adam")
    if config.name == "deepspeed-fused-adam":
        from deepspeed.ops.adam import FusedAdam

        load_operator("FusedAdamBuilder", config.name)
        return FusedAdam(groups, **arguments)
    if config.name == "deepspeed-cpu-adam":
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        load_operator("CPUAdamBuilder", config.name)
        return DeepSpeedCPUAdam(groups, **arguments)
    if config.name == "lamb":
        from deepspeed.ops.lamb import FusedLamb

        load_operator("FusedLambBuilder", config.name)
        return FusedLamb(groups, **arguments)
    # One pass over memory: on CPUs torch's default takes a pass for every term of the update.
    return torch.optim.AdamW(groups, fused=True, **arguments)


def load_operator(builder_name: str, optimizer: str) -> None:
    """DeepSpeed compiles an optimiser's operator at its first use; this is that use, made safe.

    PyTorch marks a build by a file, and a build that was killed leaves it behind: every later start would wait for
    ever. The system frees a lock with its process, so whoever holds ours knows such a mark to be stale.
    """
    # What another environment's packages or ninja built is built anew, each time they take turns: each has its own.
    if sys.prefix != sys.base_prefix and os.access(sys.prefix, os.W_OK):
        os.environ.setdefault("TORCH_EXTENSIONS_DIR", os.path.join(sys.prefix, "torch_extensions"))
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    builder = get_accelerator().create_op_builder(builder_name)
    folder = Path(_get_build_directory(builder.name, False))
    with (folder / "builder").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        if not (folder / f"{builder.name}.so").exists():
            print(f"optimizer.name={optimizer}: DeepSpeed compiles it, some minutes, once", flush=True)
        (folder / "lock").unlink(missing_ok=True)
        try:
            builder.load(verbose=False)
        except Exception as error:
            raise UserError(
                f"optimizer.name={optimizer}: DeepSpeed could not compile it ({short(error)}); it needs g++,"
                " Python's headers (Debian: apt-get install g++ python3-dev) and, on GPUs, CUDA's nvcc; or choose adamw"
            ) from error


def clip(optimizer: torch.optim.Optimizer, gradients: list[torch.Tensor], norm: torch.Tensor, most: float) -> None:
    """Have the next step of `optimizer` take `gradients` of total `norm`, 0-dim, at a norm of `most`, if it is above.

    No device is waited for.
    """
    over = ((norm + 1e-6) / most).clamp(min=1)
    if optimizer.defaults.get("fused"):
        # Divided by in the pass that the update takes anyway.
        optimizer.grad_scale = over  # type: ignore[attr-defined]
    else:
        torch._foreach_div_(gradients, over)


def _apex_optimizers(name: str) -> Any:
    if importlib.util.find_spec("apex") is None:
        raise UserError(
            f"optimizer.name={name}: NVIDIA Apex is not installed; build it from NVIDIA's source (it is not on PyPI)"
            " or choose deepspeed-fused-adam"
        )
    if importlib.util.find_spec("apex.optimizers") is None or _is_pyramid_toolkit():
        raise UserError(
            f"optimizer.name={name}: the package `apex` here is PyPI's Pyramid toolkit, not NVIDIA Apex;"
            " pip uninstall apex, then build NVIDIA's from source, or choose deepspeed-fused-adam"
        )
    return importlib.import_module("apex.optimizers")


def _is_pyramid_toolkit() -> bool:
    try:
        metadata = importlib.metadata.metadata("apex")
    except importlib.metadata.PackageNotFoundError:
        return False
    return "pyramid" in str(metadata).lower()


def learning_rate(done: float, config: Optimizer) -> float:
    """Linear warm-up, then cosine to `final_lr_share`, by the share of pair visits done: it ends when training ends."""
    if done < config.warmup_share:
        return config.lr * done / config.warmup_share
    progress = (done - config.warmup_share) / (1 - config.warmup_share)
    floor = config.final_lr_share
    return config.lr * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))
