"""Worker of the parity test: trains as usual, and saves the first step's gradients from rank 0."""

from __future__ import annotations

import os
import sys

import torch
from deepspeed.utils import safe_get_full_grad

from efficientclip import train
from efficientclip.training.trainer import Trainer

step = Trainer._step


def step_after_saving(self: Trainer) -> None:
    if self.step == 0 and self.engine.is_gradient_accumulation_boundary():
        gradients = {
            name: safe_get_full_grad(p) for name, p in self.engine.module.named_parameters() if p.requires_grad
        }
        if self.rank == 0:
            torch.save({name: g.clone() for name, g in gradients.items() if g is not None}, os.environ["GRADIENTS"])
    step(self)


Trainer._step = step_after_saving  # type: ignore[method-assign]
train.main(sys.argv[1:])
