"""The work of a run, counted on the towers themselves, built without memory on the meta device.

- a trained token costs three forwards (backward is two of them); forward is counted operator by operator on a packed
  row of texts of the mean length, so attention is in it;
- a masked position adds the vocabulary head; a pair adds its projection and the loss, 6 D (N + Q) operations for a
  batch of N and a bank of Q: three products, of which one is the recompute, since images are frozen; on CPUs forward
  makes what a bank adds to d text, and takes two;
- where both towers train, a pair adds its picture, three forwards too, and the loss a fourth product for the N;
  momentum copies add a forward of each side, and tell each side from a queue of its own;
- activations are the bytes that autograd keeps of that row, without parameters.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, PreTrainedConfig

from ..config import Config, Tower
from ..data.batches import Segments
from ..data.store import read_manifest
from ..errors import UserError
from ..model.towers import ImageTower, TextTower, architecture
from .settings import Settings


@dataclass(frozen=True)
class Work:
    """What the towers ask for: operations, bytes and parameters."""

    token: float
    """Operations of one text token, forward."""
    masked: float
    """Those of one masked position in the vocabulary head, forward."""
    pair: float
    """Those of a caption's projection, and of its picture where both towers train, forward."""
    picture: float
    """Those of one picture through the frozen tower; 0 without one."""
    kept_by_token: float
    """Bytes of activations a token leaves for backward, of the dtype that the forward runs in."""
    kept_by_pair: float
    """Those of a picture, where both towers train."""
    kept_once: float
    """Those left once a forward, whatever its size: under autocast, narrow copies of the weights."""
    parameters: int
    vocabulary: int
    layers: int
    hidden: int
    """Width of a token's state between layers."""


def measure_work(
    config: Config,
    caption_tokens: float,
    dtype: torch.dtype = torch.float32,
    autocast: torch.dtype | None = None,
    *,
    on_cpu: bool = False,
) -> Work:
    """Count the towers' work: nothing is downloaded but their configs, no weight is held.

    `dtype` is that of the weights, `autocast` what products are computed in where it is another. Attention is in fp32
    `on_cpu`.
    """
    if config.model.text_tower is None:
        raise UserError("model.text_tower: not set; a plan is made for a run that trains a text tower")
    described = _described("model.text_tower", config.model.text_tower)
    described_fully = "vocab_size" in (config.model.text_tower.architecture or {"vocab_size": None})
    if config.data.store is not None and (config.data.store / "manifest.json").is_file() and not described_fully:
        described.vocab_size = read_manifest(config.data.store)["vocabulary"]
    length = max(3, round(caption_tokens))
    with torch.device("meta"):
        text = TextTower(described, config.model.width, "cls").to(dtype)
    forward, few = _counted(text, lambda: _states(text, 16, length))
    _, many = _counted(text, lambda: _states(text, 32, length))
    if autocast is not None:
        # Meta tensors know no autocast, fake ones not all operations of attention.
        with FakeTensorMode(), torch.autocast("cpu", dtype=autocast):
            fake = TextTower(described, config.model.width, "cls")
            attention = None if on_cpu else autocast
            _, few = _counted(fake, lambda: _states(fake, 16, length), attention)
            _, many = _counted(fake, lambda: _states(fake, 32, length), attention)
    hidden, vocabulary = described.hidden_size, described.vocab_size
    both = config.training.tower == "both"
    picture = _picture_work(config, dtype, training=both)
    return Work(
        token=forward / (16 * length),
        masked=2.0 * hidden * (hidden + vocabulary),
        pair=2.0 * hidden * config.model.width + both * picture.forward,
        picture=(not both) * picture.forward,
        kept_by_token=(many - few) / (16 * length),
        kept_by_pair=both * picture.kept,
        kept_once=2 * few - many,
        parameters=sum(p.numel() for p in text.parameters()) + both * picture.parameters,
        vocabulary=vocabulary,
        layers=getattr(described, "num_hidden_layers", 1),
        hidden=hidden,
    )


def _states(tower: TextTower, texts: int, length: int) -> torch.Tensor:
    """Forward of a packed row of equally long texts."""
    row = torch.zeros(texts * length, dtype=torch.int64, device=next(tower.parameters()).device)
    return tower.states(row, row, Segments.of(np.arange(0, texts * length + 1, length, dtype=np.int32)))


def picture_training_work(config: Config) -> Work:
    """The work of an image start, whose trained side are pictures; UserError without an image tower."""
    tower = config.model.image_tower
    if tower is None:
        raise UserError("model.image_tower: not set; training.tower=image trains it")
    pair = _picture_work(config).forward
    return Work(
        token=0, masked=0, pair=pair, picture=0, kept_by_token=0, kept_by_pair=0, kept_once=0, parameters=0,
        vocabulary=0, layers=1, hidden=0,
    )  # fmt: skip


def operations(
    config: Config,
    work: Work,
    settings: Settings,
    pairs: float,
    caption_tokens: float,
    text_tokens: float,
    masked: float,
) -> dict[str, float]:
    """Operations by part of training on `pairs` with this many tokens of captions, unpaired texts, masked positions."""
    training, D = config.training, config.model.width
    forward = caption_tokens * work.token + pairs * work.pair
    local = training.batch_size // settings.world_size
    again = training.tokens_per_micro_batch is not None or (training.micro_batch_size or local) < local
    both, objective = training.tower == "both", config.objective
    # `kernels.chunked` makes the slopes of constant columns in forward, the Triton kernels in backward.
    constant = 2 if settings.on_cpu else 3
    if objective.momentum:
        # Each side apart, against rows that are given.
        products = 2 * constant * (training.batch_size + objective.bank_size)
    else:
        products = (3 + both) * training.batch_size + constant * min(objective.bank_size, settings.images)
    trained = "captions and pictures" if both else "captions"
    flop = {
        trained: 3 * forward,
        f"{trained} once more, to accumulate": forward * again,
        "layers once more, to recompute": (forward + text_tokens * work.token) * training.recompute,
        "momentum copies": forward * bool(objective.momentum),
        "unpaired texts": 3 * (text_tokens * work.token + masked * work.masked),
        "contrastive loss": pairs * 2.0 * D * products * (objective.contrastive_weight > 0),
        "scoring copy": caption_tokens * work.token * (config.confidence.score == "snapshot"),
    }
    return positive(flop)


@dataclass(frozen=True)
class _PictureWork:
    """Operations of a picture forward, the bytes it leaves for backward, and the tower's parameters."""

    forward: float = 0
    kept: float = 0
    parameters: int = 0


def _picture_work(config: Config, dtype: torch.dtype = torch.float32, *, training: bool = False) -> _PictureWork:
    tower = config.model.image_tower
    if tower is None:
        return _PictureWork()
    described = _described("model.image_tower", tower)
    with torch.device("meta"):
        image = ImageTower(described, config.model.width).train(training).to(dtype)
        pixels = torch.zeros(2, 3, tower.size, tower.size, dtype=dtype)
    forward, kept = _counted(image, lambda: image(pixels))
    return _PictureWork(forward / 2, kept / 2, sum(p.numel() for p in image.parameters()))


def _described(field: str, tower: Tower) -> PreTrainedConfig:
    if tower.architecture is not None:
        return architecture(tower.architecture)
    name = str(tower.pretrained)
    own = Path(name) / "model" / "config.json"
    if own.is_file():
        side = "text" if field.endswith("text_tower") else "image"
        return architecture(json.loads(own.read_text())[side])
    try:
        described: PreTrainedConfig = AutoConfig.from_pretrained(name, revision=tower.revision)
    except (OSError, ValueError) as error:
        raise UserError(f"{field}.pretrained: no config of {name!r} in reach ({error}); give a folder") from error
    return described


def _counted(
    module: torch.nn.Module, run: Callable[[], Any], attention: torch.dtype | None = None
) -> tuple[float, float]:
    """Operations of `run`, and the bytes it keeps for backward beside the module's parameters.

    `attention`: what a text tower's keeps it in, where it runs on no CPU.
    """
    owned = {tensor.untyped_storage()._cdata for tensor in (*module.parameters(), *module.buffers())}
    # The tensors are held, so that no storage's address is given twice.
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage()._cdata not in owned:
            kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with FlopCounterMode(display=False) as counter, saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    # Of a text tower, attention alone keeps tensors of four dimensions.
    narrower = {4: attention.itemsize / 4} if attention else {}
    held = sum(tensor.untyped_storage().nbytes() * narrower.get(tensor.ndim, 1) for tensor in kept.values())
    return counter.get_total_flops(), held


def positive(parts: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in parts.items() if value}
