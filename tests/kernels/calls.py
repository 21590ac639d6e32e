"""What a computation calls: the sizes of its tensors, and how many matrix products it takes."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from efficientclip.kernels import contrastive, sigmoid

OPERATORS = [
    operator
    for operators in (contrastive.OPERATORS, sigmoid.OPERATORS)
    for operator in (operators.sums, operators.gradients)
]


class Calls(TorchDispatchMode):
    """Bytes of the largest tensor that any operation returned, and the number of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for operator in OPERATORS:
            if func is operator._opoverload:
                # An operator hides what it calls.
                with self:
                    return operator._init_fn(*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        self.products += str(func).split(".")[1] in ("mm", "addmm", "addmm_")
        for value in out if isinstance(out, tuple | list) else [out]:
            if isinstance(value, Tensor):
                self.largest = max(self.largest, value.untyped_storage().nbytes())
        return out
