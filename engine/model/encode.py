"""Encoding texts with a trained text tower, packed, and pictures with an image tower, outside of training."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from .. import config as settings
from ..data.batches import Segments, moved, pack, packed_inputs
from ..data.pictures import normalise
from ..data.store import TextStore

BATCH = 512


@torch.no_grad()
def encode_store(model: nn.Module, texts: TextStore, max_tokens: int) -> npt.NDArray[np.float32]:
    """Features float32 [texts, width] of all texts of a store. Every rank must call it under ZeRO-3."""
    was_training = model.training
    model.eval()
    n = len(texts.offsets) - 1
    parts = (np.arange(start, min(start + BATCH, n)) for start in range(0, n, BATCH))
    features = [encode_rows(model, texts, rows, max_tokens) for rows in parts]
    model.train(was_training)
    return np.concatenate(features)


@torch.no_grad()
def encode_rows(
    model: nn.Module, texts: TextStore, rows: npt.NDArray[np.int64], max_tokens: int
) -> npt.NDArray[np.float32]:
    """Features float32 [rows, width] of some texts by one forward, in the mode that the model is in."""
    inputs = to_device(packed_inputs(pack(texts, rows, max_tokens)), next(model.parameters()).device)
    features: npt.NDArray[np.float32] = model(**inputs)["features"].float().cpu().numpy()
    return features


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
