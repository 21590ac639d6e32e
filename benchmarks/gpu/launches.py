"""Every Triton kernel that a call launches, by name, to be launched again alone.

`python -m benchmarks.gpu --part launches` is one loss with its gradients, for a profiler to look at.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any
from unittest import mock

import efficientclip.kernels.triton as kernels
from benchmarks.gpu.lab import SCALE, Lab
from efficientclip.kernels import contrastive_loss

ROWS = 32768


@dataclass
class Launch:
    kernel: Any
    grid: tuple[int, ...]
    given: tuple[Any, ...]
    named: dict[str, Any]

    def __call__(self) -> Any:
        return self.kernel[self.grid](*self.given, **self.named)

    @property
    def name(self) -> str:
        """With what makes it another kernel."""
        arguments = self.arguments
        marks = [mark for mark in ("BANK", "TRANSPOSED", "SMOOTH", "POSITIVES") if arguments.get(mark)]
        return " ".join([self.kernel.__name__, *(mark.lower() for mark in marks)])

    @property
    def arguments(self) -> dict[str, Any]:
        return dict(zip(self.kernel.arg_names, self.given, strict=False)) | self.named

    @property
    def flop(self) -> float:
        """Of the matrix product, 0 where there is none."""
        a, grid = self.arguments, (*self.grid, 1)
        products: dict[str, Callable[[], int]] = {
            "forward_kernel": lambda: a["M"] * (a["last"] - a["first"]),
            "gradient_kernel": lambda: grid[0] * a["BLOCK_N"] * grid[1] * a["BLOCK_M"],
            "product_kernel": lambda: a["rows"] * a["K"],
            "loss_kernel": lambda: a["M"] * a["C"],
            "slope_kernel": lambda: grid[0] * grid[1] * a["BLOCK"] ** 2,
            "count_kernel": lambda: a["M"] * a["Q"],
        }
        count = products.get(self.kernel.__name__)
        return 2.0 * count() * a["D"] if count else 0.0


class _Recorder:
    def __init__(self, kernel: Any, seen: list[Launch]) -> None:
        self.kernel, self.seen = kernel, seen

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        def launch(*given: Any, **named: Any) -> Any:
            self.seen.append(Launch(self.kernel, tuple(grid), given, named))
            return self.seen[-1]()

        return launch


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Launches while this lasts, with their tensors."""
    seen: list[Launch] = []
    with ExitStack() as stack:
        for one in pkgutil.iter_modules(kernels.__path__):
            module = import_module(f"{kernels.__name__}.{one.name}")
            for name in [name for name in vars(module) if name.endswith("_kernel")]:
                stack.enter_context(mock.patch.object(module, name, _Recorder(getattr(module, name), seen)))
        yield seen


def run(lab: Lab) -> None:
    rows = lab.device.size(ROWS)
    text, image = (lab.device.unit(rows, seed=seed).requires_grad_() for seed in (0, 1))
    contrastive_loss(text, image, logit_scale=SCALE).loss.backward()
