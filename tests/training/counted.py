"""Worker: trains as usual and writes for each step what it read of the device and what it told other ranks.

A read is whatever makes the host wait for a device: a scalar or a tensor that comes to the host, and an index by a
mask, whose length the host must know. On CPUs every tensor plays the device's part. What goes on in the losses'
operators is left out: on a GPU they are other ones.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from efficientclip import train
from efficientclip.data.batches import Batch
from efficientclip.training.trainer import Trainer

READS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique2", "unique_dim", "equal")
READING_METHODS = ("cpu", "numpy", "tolist", "__array__")


class Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.reads: Counter[str] = Counter()
        self.told: Counter[str] = Counter()
        self.in_operator = False

    def note(self, what: str) -> None:
        if not self.in_operator:
            places = [frame for frame in traceback.extract_stack()[:-2] if "torch/" not in frame.filename]
            place = next((frame for frame in reversed(places) if frame.filename != __file__), None)
            self.reads[f"{what} {place and os.path.basename(place.filename)}:{place and place.name}"] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        space, name = func._schema.name.split("::")
        if space == "c10d":
            self.told[name] += 1
        mask = name == "index" and any(index is not None and index.dtype == torch.bool for index in args[1])
        if mask or (space == "aten" and name in READS):
            self.note(name)
        before, self.in_operator = self.in_operator, self.in_operator or space == "efficientclip"
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.in_operator = before


counting = Counting()
steps: list[dict[str, dict[str, int]]] = []


def method(name: str) -> Any:
    real = getattr(torch.Tensor, name)

    def counted(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        counting.note(name)
        return real(self, *args, **kwargs)

    return counted


for name in READING_METHODS:
    setattr(torch.Tensor, name, method(name))

train_step, anywhere = Trainer.train_step, Trainer.anywhere


def step(self: Trainer, batch: Batch) -> None:
    counting.reads.clear()
    counting.told.clear()
    with counting:
        train_step(self, batch)


def end(self: Trainer) -> tuple[int, bool]:
    with counting:
        found = anywhere(self)
    steps.append({"reads": dict(counting.reads), "told": dict(counting.told)})
    if self.rank == 0:
        Path(os.environ["COUNTED"]).write_text(json.dumps(steps))
    return found


Trainer.train_step, Trainer.anywhere = step, end  # type: ignore[method-assign]
train.main(sys.argv[1:])
