"""Momentum copies of both towers and the queues of their features: WenLan's BriVL (arXiv 2103.06561), after MoCo."""

from __future__ import annotations

import copy
from typing import Any

import deepspeed
import numpy as np
import torch
import torch.nn.functional as F

from ..model.efficientclip import EfficientCLIP
from ..objectives.losses import Keys
from .ranks import all_rows


class MomentumCopies:
    """Towers that follow the trained ones slowly, and what they made of the last `size` pairs, alike on all ranks."""

    def __init__(self, model: EfficientCLIP, momentum: float, size: int, seed: int, device: torch.device) -> None:
        self.model = copy.deepcopy(model).train().requires_grad_(False)
        torch.nn.Module.to(self.model, device)
        self.momentum, self.cursor = momentum, 0
        generator = torch.Generator().manual_seed(seed)
        # As in MoCo, the queues begin with random directions.
        self.queues = {
            side: F.normalize(torch.randn(size, model.config.width, generator=generator), dim=1).to(device)
            for side in ("text", "image")
        }

    @torch.no_grad()
    def keys(self, inputs: list[dict[str, Any]]) -> Keys:
        """Features of this rank's pairs, and the queues as they are before these pairs."""
        outputs = [self.model(**arguments) for arguments in inputs]
        return Keys(
            text_MD=torch.cat([output["features"] for output in outputs]),
            image_MD=torch.cat([output["image_features"] for output in outputs]),
            text_queue_QD=self.queues["text"].clone(),
            image_queue_QD=self.queues["image"].clone(),
        )

    @torch.no_grad()
    def follow(self, engine: deepspeed.DeepSpeedEngine, keys: Keys) -> None:
        """Move the copies toward the trained towers and put the batch's keys in the place of the oldest."""
        parameters = list(engine.module.parameters())
        with deepspeed.zero.GatheredParameters(parameters, enabled=engine.zero_optimization_stage() == 3):
            trained = engine.module.state_dict()
            for name, value in self.model.state_dict().items():
                if value.is_floating_point():
                    value.lerp_(trained[name].to(value.dtype), 1 - self.momentum)
                else:
                    value.copy_(trained[name])
        for side, key_MD in (("text", keys.text_MD), ("image", keys.image_MD)):
            queue = self.queues[side]
            new = all_rows(key_MD)[: len(queue)]
            queue[(self.cursor + torch.arange(len(new), device=queue.device)) % len(queue)] = new
        self.cursor = (self.cursor + len(new)) % len(queue)

    def state(self) -> dict[str, Any]:
        state = {f"model.{name}": value.cpu().numpy() for name, value in self.model.state_dict().items()}
        state |= {f"queue.{side}": queue.cpu().numpy() for side, queue in self.queues.items()}
        return {**state, "cursor": np.int64(self.cursor)}

    def restore(self, state: dict[str, Any]) -> None:
        self.cursor = int(state["cursor"])
        for side, queue in self.queues.items():
            queue.copy_(torch.from_numpy(state[f"queue.{side}"]))
        prefix = "model."
        weights = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        self.model.load_state_dict({name: torch.as_tensor(value) for name, value in weights.items()})
