"""What the tuning table chose beside what else it might have: other entries of the table, the same code."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.gpu.device import Cuda
from benchmarks.gpu.lab import SCALE, Lab, Work
from benchmarks.peers import PASSES, Case
from efficientclip.kernels import contrastive_loss
from efficientclip.kernels.triton import tuning

AS_CHOSEN = "as the table has it"
Launch = tuning.Launch
Changes = dict[str, Any]
# By what they change; the second number of pairs fills the last wave of programs badly.
FORWARD: dict[str, Changes] = {
    AS_CHOSEN: {},
    "128 x 256, 8 warps": {"forward": Launch(128, 256, 64, 8, 3), "programs": 132},
    "128 x 256, 8 warps, 4 stages": {"forward": Launch(128, 256, 64, 8, 4), "programs": 132},
    "128 x 128, 8 warps": {"forward": Launch(128, 128, 64, 8, 3)},
    "128 x 128, 4 warps, 4 stages": {"forward": Launch(128, 128, 64, 4, 4)},
    **{f"{programs} programs": {"programs": programs} for programs in (132, 256, 272, 528)},
    "panels of 16,384 columns": {"panel": 16384},
}
BACKWARD: dict[str, Changes] = {
    AS_CHOSEN: {},
    **{f"chunks of {rows} x {columns}": {"chunk": (rows, columns)} for rows, columns in (
        (2048, 2048), (4096, 8192), (8192, 8192), (16384, 16384),
    )},
    **{f"cuBLAS, chunks of {edge}": {"chunk": (edge, edge), "products": "library"} for edge in (4096, 8192, 16384)},
}  # fmt: skip
SIZES = (32768, 34816)


@contextmanager
def changed(changes: Changes) -> Iterator[None]:
    """The table with other entries."""
    config = tuning.tile_config

    def other(*given: Any) -> tuning.Config:
        return replace(config(*given), **changes)

    with mock.patch.object(tuning, "tile_config", other):
        yield


def inputs(device: Cuda, rows: int) -> tuple[Tensor, Tensor]:
    text, image = (device.unit(device.size(rows), seed=seed).requires_grad_() for seed in (0, 1))
    return text, image


def compile_one(device: Cuda, changes: Changes) -> None:
    """At a size that compiles what the large ones take."""
    text, image = inputs(device, 2048)
    with changed(changes):
        contrastive_loss(text, image, logit_scale=SCALE).loss.backward()


def forward(text: Tensor, image: Tensor) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return (contrastive_loss(text, image, logit_scale=SCALE).per_pair_loss_M,)


def both(text: Tensor, image: Tensor) -> tuple[Tensor, ...]:
    """A graph takes no backward alone: autograd runs it on the stream of its forward."""
    return torch.autograd.grad(contrastive_loss(text, image, logit_scale=SCALE).loss, (text, image))


def compare(lab: Lab, pass_: str, rows: int, choices: dict[str, Changes]) -> None:
    text, image = inputs(lab.device, rows)
    work = Work(Case(len(text), lab.device.width).flop(pass_))
    call = partial(forward if pass_ == PASSES[0] else both, text, image)
    graphs: dict[str, Callable[[], Any]] = {}
    found: dict[str, Tensor] = {}
    for name, changes in choices.items():
        # What does not fit is an answer, too; but the table's own must run.
        with lab.attempt(f"{pass_}, {rows}: {name}", must=name == AS_CHOSEN), changed(changes):
            found[name] = call()[0].float()
            graphs[name] = lab.device.graph(call)
    for name, seconds in lab.race(graphs).items():
        truth = found.get(AS_CHOSEN, found[name])
        difference = float((found[name] - truth).norm() / truth.norm())
        # Another order of additions, and logit gradients rounded to bf16 alike.
        same = difference <= 1e-3
        verdict, note = ("ok", "") if same else ("WRONG", f"differs from the table's by {difference:.1e}")
        lab.note(f"{pass_}, {rows}: {name}", seconds, work, verdict=verdict, note=note)


def run(lab: Lab) -> None:
    changes = [*FORWARD.values(), *BACKWARD.values()]
    for _ in lab.spread(compile_one, [(one,) for one in changes]):
        pass
    compare(lab, PASSES[0], SIZES[0], FORWARD)
    compare(lab, PASSES[1], SIZES[0], BACKWARD)
    compare(lab, PASSES[0], SIZES[1], FORWARD)
