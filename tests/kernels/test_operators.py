"""Both losses as citizens of torch: torch.compile, and what autograd is not asked for."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from efficientclip.kernels import contrastive_loss, sigmoid_loss
from tests.kernels import sigmoid_cases, test_contrastive

LOSSES = {"contrastive": (contrastive_loss, test_contrastive), "sigmoid": (sigmoid_loss, sigmoid_cases)}
pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.parametrize(("loss", "cases"), LOSSES.values(), ids=LOSSES.keys()),
]


@functools.cache
def compiled(loss: Any) -> Any:
    return torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("positives", [None, "pair", "ids"], ids=["plain", "pair", "ids"])
def test_compiled_equals_eager(
    rng: torch.Generator, loss: Any, cases: Any, positives: str | None, dtype: torch.dtype
) -> None:
    Q = 0 if positives is None else 7
    data = cases.features(rng, 20, Q, 8)
    options = {} if positives is None else {"positives": positives, **cases.everything(rng, 20, Q)}
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=positives == "pair"):
        eager, other = (cases.run(given, data, dtype, 14, **options) for given in (loss, compiled(loss)))
    for name, value in eager.items():
        torch.testing.assert_close(other[name], value, rtol=1e-6, atol=1e-9, msg=name)


def test_sizes_that_vary_compile_once(rng: torch.Generator, loss: Any, cases: Any) -> None:
    torch._dynamo.reset()
    dynamic = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for M in (20, 31):
            data = cases.features(rng, M, 0, 8)
            eager, other = (cases.run(given, data, torch.float32, 14) for given in (loss, dynamic))
            for name, value in eager.items():
                torch.testing.assert_close(other[name], value, rtol=1e-6, atol=1e-9, msg=name)


def test_second_derivatives_are_refused(rng: torch.Generator, loss: Any, cases: Any) -> None:
    text, image = (torch.randn(4, 3, generator=rng).requires_grad_() for _ in "12")
    value = loss(text, image, logit_scale=2.0).loss
    (grad,) = torch.autograd.grad(value, text, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        grad.sum().backward()
