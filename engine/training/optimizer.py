"""Optimisers by name, and the learning rate as a function of pair visits."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
from typing import Any

import torch
from torch import nn

from ..config import Optimizer
from ..errors import UserError


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

        return FusedAdam(groups, **arguments)
    if config.name == "deepspeed-cpu-adam":
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, **arguments)
    if config.name == "lamb":
        from deepspeed.ops.lamb import FusedLamb

        return FusedLamb(groups, **arguments)
    # One pass over memory: on CPUs torch's default takes a pass for every term of the update.
    return torch.optim.AdamW(groups, fused=True, **arguments)


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
