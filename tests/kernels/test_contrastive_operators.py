"""`contrastive_loss` as a citizen of torch: its operators' registrations, torch.compile, autocast."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from efficientclip.kernels import contrastive, contrastive_loss
from tests.kernels.test_contrastive import everything, features, run

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "bank": {"Q": 5},
    "pairs": {"Q": 5, "ids": True, "excluded": True, "smooth": True},
    "positives": {"Q": 5, "ids": True, "excluded": True, "smooth": True, "as_positives": True},
    "none of the columns is a row's own": {"ids": True, "offset": 9, "smooth": True},
}


def arguments(rng: torch.Generator, dtype: torch.dtype, M: int = 9, D: int = 6, **case: Any) -> list[Any]:
    Q = case.get("Q", 0)
    data, options = features(rng, M, Q, D), everything(rng, M, Q)
    text, image, bank = (None if data[name] is None else data[name].to(dtype) for name in ("text", "image", "bank"))
    ids_KM = torch.stack([options["image_ids"], options["caption_ids"]]) if case.get("ids") else None
    return [
        text, image, bank, torch.tensor([14.0], dtype=dtype), ids_KM, ids_KM,
        options["bank_ids"] if case.get("ids") else None,
        torch.stack(options["excluded"]) if case.get("excluded") else None,
        case.get("offset", 0), case.get("as_positives", False), case.get("smooth", False),
    ]  # fmt: skip


@DTYPES
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_operators(rng: torch.Generator, case: dict[str, Any], dtype: torch.dtype) -> None:
    given = arguments(rng, dtype, **case)
    sums = contrastive.contrastive_sums(*given)
    grads = [torch.rand_like(part) for part in sums[: len(contrastive._Gradients._fields)]]
    for needs in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(contrastive.contrastive_gradients, (*given, *sums[1:3], grads, *needs))
    for at in (0, 1, 3):
        given[at].requires_grad_()
    torch.library.opcheck(contrastive.contrastive_sums, tuple(given))


@functools.cache
def compiled() -> Any:
    return torch.compile(contrastive_loss, fullgraph=True, backend="aot_eager", dynamic=False)


@DTYPES
@pytest.mark.parametrize("positives", [None, "pair", "ids"], ids=["plain", "pair", "ids"])
def test_compiled_equals_eager(rng: torch.Generator, positives: str | None, dtype: torch.dtype) -> None:
    Q = 0 if positives is None else 7
    data = features(rng, 20, Q, 8)
    options = {} if positives is None else {"positives": positives, **everything(rng, 20, Q)}
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=positives == "pair"):
        eager, other = (run(loss, data, dtype, 14, **options) for loss in (contrastive_loss, compiled()))
    for name, value in eager.items():
        torch.testing.assert_close(other[name], value, rtol=1e-6, atol=1e-9, msg=name)


def test_sizes_that_vary_compile_once(rng: torch.Generator) -> None:
    torch._dynamo.reset()
    loss = torch.compile(contrastive_loss, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for M in (20, 31):
            data = features(rng, M, 0, 8)
            eager, other = (run(given, data, torch.float32, 14) for given in (contrastive_loss, loss))
            for name, value in eager.items():
                torch.testing.assert_close(other[name], value, rtol=1e-6, atol=1e-9, msg=name)


def test_second_derivatives_are_refused(rng: torch.Generator) -> None:
    text, image = (torch.randn(4, 3, generator=rng).requires_grad_() for _ in "12")
    loss = contrastive_loss(text, image, logit_scale=2.0).loss
    (grad,) = torch.autograd.grad(loss, text, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        grad.sum().backward()
