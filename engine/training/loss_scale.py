"""The loss scale of fp16: gradients that overflow cost a step, not the run (Micikevicius et al. 2018, 1710.03740)."""

from __future__ import annotations

from typing import Any

import deepspeed
import numpy as np
import torch

from ..errors import UserError

START, LEAST, MOST = 2.0**16, 2.0**-10, 2.0**24
# Steps without an overflow before the scale is doubled.
PATIENCE = 500


class LossScale:
    """What the loss is multiplied with before backward, so that gradients of half precision do not vanish."""

    def __init__(self, engine: deepspeed.DeepSpeedEngine) -> None:
        self.engine = engine
        self.value, self.sound = START, 0
        self.zero = engine.zero_optimization_stage() > 0
        self._tell()

    def _tell(self) -> None:
        if self.zero:
            # ZeRO multiplies the loss and divides the gradients, which only it holds.
            self.engine.optimizer.override_loss_scale(self.value)

    def scaled(self, loss: torch.Tensor) -> torch.Tensor:
        return loss if self.zero else loss * self.value

    def unscale(self, gradients: list[torch.Tensor]) -> None:
        torch._foreach_mul_(gradients, 1 / self.value)

    def update(self, overflowed: bool) -> None:
        """Halve after an overflow, double after many sound steps; UserError when nothing is left to halve."""
        self.sound = 0 if overflowed else self.sound + 1
        if overflowed:
            self.value /= 2
        elif self.sound % PATIENCE == 0:
            self.value = min(2 * self.value, MOST)
        if self.value < LEAST:
            raise UserError(
                f"training.precision=fp16: gradients overflow even at a loss scale of {2 * self.value:g}; choose bf16"
                " or fp32, or lower optimizer.lr"
            )
        self._tell()

    def state(self) -> dict[str, Any]:
        return {"value": np.float64(self.value), "sound": np.int64(self.sound)}

    def restore(self, state: dict[str, Any]) -> None:
        self.value, self.sound = float(state["value"]), int(state["sound"])
        self._tell()
