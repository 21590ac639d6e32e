"""What a computation calls: the sizes of its tensors, and how many matrix products it takes."""

from __future__ import annotations

import weakref
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


class Held(TorchDispatchMode):
    """The most bytes that what operations returned took at one time; views take none."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else [out]:
            if isinstance(value, Tensor) and value.untyped_storage().data_ptr() not in self.known:
                storage = value.untyped_storage()
                self.known.add(storage.data_ptr())
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._gone, storage.data_ptr(), storage.nbytes())
        return out

    def _gone(self, address: int, size: int) -> None:
        self.known.discard(address)
        self.now -= size
