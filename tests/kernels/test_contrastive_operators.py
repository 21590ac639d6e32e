"""The operators of `contrastive_loss`: their registrations."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from efficientclip.kernels.contrastive import OPERATORS
from tests.kernels.test_contrastive import everything, features

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "bank": {"Q": 5},
    "pairs": {"Q": 5, "ids": True, "excluded": True, "smooth": True},
    "positives": {"Q": 5, "ids": True, "excluded": True, "smooth": True, "as_positives": True},
    "bank in forward": {"Q": 5, "excluded": True, "made_in_forward": 1},
    "all in forward": {"Q": 5, "ids": True, "one_way": True, "made_in_forward": 2},
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
        case.get("one_way", False), case.get("made_in_forward", 0),
    ]  # fmt: skip


@DTYPES
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_operators(rng: torch.Generator, case: dict[str, Any], dtype: torch.dtype) -> None:
    given = arguments(rng, dtype, **case)
    sums = OPERATORS.sums(*given)
    grads = [torch.rand_like(part) for part in sums[: OPERATORS.differentiable]]
    for needs in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(OPERATORS.gradients, (*given, *OPERATORS.keep(sums), grads, *needs))
    for at in (0, 1, 3):
        given[at].requires_grad_()
    torch.library.opcheck(OPERATORS.sums, tuple(given))
