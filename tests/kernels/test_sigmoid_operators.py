"""The operators of `sigmoid_loss`: their registrations, gradients whenever made, autocast."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from efficientclip.kernels import sigmoid_loss
from efficientclip.kernels.sigmoid import OPERATORS
from tests.kernels.sigmoid_cases import everything, features

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "bank": {"Q": 5},
    "pairs": {"Q": 5, "ids": True, "excluded": True},
    "positives": {"Q": 5, "ids": True, "excluded": True, "as_positives": True},
    "none of the columns is a row's own": {"ids": True, "offset": 9},
}
MADE = pytest.mark.parametrize("made", [0, 1, 2, 3], ids=["nothing", "of texts", "of images", "of both"])


def arguments(rng: torch.Generator, dtype: torch.dtype, M: int = 9, D: int = 6, **case: Any) -> list[Any]:
    Q = case.get("Q", 0)
    data, options = features(rng, M, Q, D), everything(rng, M, Q)
    share = options["pair_weights"].double() / 7
    text, image, bank = (None if data[name] is None else data[name].to(dtype) for name in ("text", "image", "bank"))
    ids_KM = torch.stack([options["image_ids"], options["caption_ids"]]) if case.get("ids") else None
    return [
        text, image, bank, torch.tensor([14.0], dtype=dtype), torch.tensor(-3.0, dtype=dtype), share, ids_KM, ids_KM,
        options["bank_ids"] if case.get("ids") else None,
        torch.stack(options["excluded"]) if case.get("excluded") else None,
        case.get("offset", 0), case.get("as_positives", False), False, False, case.get("made_in_forward", 0),
    ]  # fmt: skip


@DTYPES
@MADE
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_operators(rng: torch.Generator, case: dict[str, Any], made: int, dtype: torch.dtype) -> None:
    given = arguments(rng, dtype, **case, made_in_forward=made)
    sums = OPERATORS.sums(*given)
    assert [bool(part.numel()) for part in sums] == [True] * 3 + [bool(made & 1), bool(made & 2), *[made > 0] * 2]
    for needs in ((True, True), (True, False), (False, True), (False, False)):
        torch.library.opcheck(OPERATORS.gradients, (*given, *OPERATORS.keep(sums), [torch.rand_like(sums[0])], *needs))
    for at in (0, 1, 3, 4):
        given[at].requires_grad_()
    torch.library.opcheck(OPERATORS.sums, tuple(given))


@MADE
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_gradients_of_the_loss(rng: torch.Generator, case: dict[str, Any], made: int) -> None:
    """Whatever of them forward made: backward makes what it lacks."""
    case = case | {"made_in_forward": made} | ({"offset": 5} if "offset" in case else {})
    given = arguments(rng, torch.float64, M=5, D=3, **case)
    inputs = [given[at].requires_grad_() for at in (0, 1, 3, 4)]

    def loss(text: Any, image: Any, scale: Any, bias: Any) -> Any:
        return OPERATORS.sums(text, image, given[2], scale, bias, *given[5:])[0]

    assert torch.autograd.gradcheck(loss, inputs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_autocast_changes_no_dtype(rng: torch.Generator, dtype: torch.dtype) -> None:
    text, image = (features(rng, 9, 0, 8)[name].to(dtype).requires_grad_() for name in ("text", "image"))
    scale, bias = (torch.tensor(value, requires_grad=True) for value in (10.0, -3.0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = sigmoid_loss(text, image, logit_scale=scale, logit_bias=bias)
        out.loss.backward()
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert {value.dtype for value in out} == {expected}
    for leaf in (text, image, scale, bias):
        assert leaf.grad is not None and leaf.grad.dtype == leaf.dtype and leaf.grad.shape == leaf.shape
