"""Encoding texts with a trained text tower, packed, and pictures with an image tower, outside of training."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from .. import config as settings
from ..data.batches import Segments, pack, packed_inputs
from ..data.pictures import normalise
from ..data.store import TextStore

BATCH = 512


@torch.no_grad()
def encode_store(model: nn.Module, texts: TextStore, max_tokens: int) -> npt.NDArray[np.float32]:
    """Features float32 [texts, width] of all texts of a store. Every rank must call it under ZeRO-3."""
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    n = len(texts.offsets) - 1
    features = []
    for start in range(0, n, BATCH):
        inputs = packed_inputs(pack(texts, np.arange(start, min(start + BATCH, n)), max_tokens))
        features.append(model(**to_device(inputs, device))["features"].float().cpu().numpy())
    model.train(was_training)
    return np.concatenate(features)


@torch.no_grad()
def encode_pictures(model: nn.Module, pixels: torch.Tensor, tower: settings.ImageTower) -> npt.NDArray[np.float32]:
    """Features float32 [n, width] of square pictures uint8 [n, S, S, 3]. Every rank must call it under ZeRO-3."""
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    features = [
        model(pixels=normalise(batch, tower.mean, tower.std).to(device))["features"].float().cpu().numpy()
        for batch in pixels.split(BATCH)
    ]
    model.train(was_training)
    return np.concatenate(features)


def to_device(inputs: dict[str, torch.Tensor | Segments], device: torch.device) -> dict[str, torch.Tensor | Segments]:
    """The model's arguments on `device`."""
    return {
        name: value.to(device) if isinstance(value, Segments) else moved(value, device)
        for name, value in inputs.items()
    }


def moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`tensor` on `device`; to CUDA by way of pinned memory, so that the copy is not waited for."""
    if device.type == "cuda" and not tensor.is_cuda:
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
