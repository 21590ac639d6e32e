"""Which path a computation takes, Triton kernels or chunked torch, and why; Triton is imported by those alone."""

from __future__ import annotations

import warnings
from importlib.util import find_spec

import torch
from torch import Tensor

# Set by tests that run the kernels in Triton's interpreter.
KERNELS_ON_CPU = False


def no_kernels(features: Tensor) -> str | None:
    """Why no Triton kernel takes such features; None if one does."""
    if features.device.type != "cuda" and not KERNELS_ON_CPU:
        return f"{features.device.type.upper()} tensors"
    if find_spec("triton") is None:
        return "Triton is not installed, which the fused kernels need: pip install triton"
    if features.dtype == torch.float64:
        return "fp64 has no fused kernel, cast the features to fp32 for it"
    if features.is_cuda:
        if torch.version.hip is not None:
            return "the fused kernels have no tuning table for ROCm"
        major, minor = torch.cuda.get_device_capability(features.device)
        if (major, minor) < (8, 0):
            return f"the fused kernels need compute capability 8.0, this GPU has {major}.{minor}"
    return None


def takes_kernels(features: Tensor, op: str, reason: str | None) -> bool:
    """Whether `reason` is None; on CUDA a fallback is told, but for fp64, which only ever means chunked torch."""
    if reason is not None and features.is_cuda and features.dtype != torch.float64:
        warnings.warn(f"{op} falls back to chunked torch on CUDA: {reason}", stacklevel=3)
    return reason is None
