"""Gradients are clipped as torch clips them, whichever pass over memory does it."""

from __future__ import annotations

import pytest
import torch

from efficientclip.config import Optimizer
from efficientclip.training.optimizer import build_optimizer, clip


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("most", [0.1, 1e3])
def test_steps_are_those_of_clipped_gradients(fused: bool, most: float) -> None:
    one, other = (torch.nn.Linear(5, 3) for _ in range(2))
    other.load_state_dict(one.state_dict())
    optimizers = [
        build_optimizer(module, Optimizer(lr=0.1), 0) if fused else torch.optim.SGD(module.parameters(), lr=0.1)
        for module in (one, other)
    ]
    for seed in range(3):
        for module in (one, other):
            inputs = torch.randn(7, 5, generator=torch.Generator().manual_seed(seed))
            module(inputs * 10**seed).square().sum().backward()
        gradients = [parameter.grad for parameter in one.parameters() if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        clip(optimizers[0], gradients, norm, most)
        torch.testing.assert_close(torch.nn.utils.clip_grad_norm_(other.parameters(), most), norm)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        for mine, theirs in zip(one.parameters(), other.parameters(), strict=True):
            # Weights that nearly cancel keep the rounding of the steps that they were made of.
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6 * max(1.0, theirs.abs().max().item()))
