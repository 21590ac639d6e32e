"""Packed attention: half precision is attended in fp32, and a row of many lengths costs no more than one of few."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from efficientclip.data.batches import Segments
from efficientclip.model.packed import packed_attention

HEADS, WIDTH = 2, 8


def attended(segments: Segments, given: list[torch.Tensor]) -> torch.Tensor:
    """Of rows [1, T, HEADS * WIDTH], as a BERT's layer asks for it."""
    parts = (x.view(1, -1, HEADS, WIDTH).transpose(1, 2) for x in given)
    return packed_attention(torch.nn.Module(), *parts, None, segments=segments)[0].flatten(2)


def rows(lengths: list[int], dtype: torch.dtype) -> tuple[Segments, list[torch.Tensor]]:
    bounds = np.cumsum([0, *lengths]).astype(np.int32)
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(1, int(bounds[-1]), HEADS * WIDTH, generator=generator) for _ in range(3)]
    return Segments.of(bounds), [row.to(dtype).requires_grad_() for row in made]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_is_attended_in_fp32(dtype: torch.dtype, autocast: bool) -> None:
    segments, given = rows([1, 3, 3, 9, 20], dtype)
    wide = [row.detach().float().requires_grad_() for row in given]
    with torch.autocast("cpu", dtype, enabled=autocast):
        states = attended(segments, given)
    exact = attended(segments, wide)
    assert torch.equal(states, exact.to(dtype))
    states.backward(torch.ones_like(states))
    exact.backward(torch.ones_like(exact))
    for one, other in zip(given, wide, strict=True):
        assert one.grad is not None and other.grad is not None
        assert torch.equal(one.grad, other.grad.to(dtype))


def test_lengths_do_not_multiply_what_backward_writes() -> None:
    class Written(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made = function(*args, **(kwargs or {}))
            fresh = function._schema.returns and not function._schema.returns[0].alias_info
            self.numbers += made.numel() if fresh and isinstance(made, torch.Tensor) else 0
            return made

    found = []
    for lengths in ([15] * 20, list(range(5, 25))):
        segments, given = rows(lengths, torch.float32)
        states = attended(segments, given)
        with Written() as written:
            states.backward(torch.ones_like(states))
        found.append(written.numbers / states.numel())
    assert found[1] <= found[0] + 1
