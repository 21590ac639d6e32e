"""Ours beside other packages' losses, in turn; wheels that are brought along are unpacked for it."""

from __future__ import annotations

import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from benchmarks.gpu.lab import Lab, Work
from benchmarks.peers import IMPLEMENTATIONS, PASSES, Case, Implementation, Inputs, inputs

# Loss and gradients of halves against plain torch in fp32.
TOLERANCE = 1e-2


def cases(lab: Lab) -> list[Case]:
    size = lab.device.size
    half: dict[str, Any] = {"D": lab.device.width, "dtype": torch.bfloat16, "device": lab.device.type}
    frozen: dict[str, Any] = {"frozen": True, "one_way": True}
    return [
        *(Case(size(N), **half) for N in (4096, 32768)),
        *(Case(size(N), sigmoid=True, **half) for N in (16384, 32768, 65536)),
        Case(size(16384), **half, **frozen),
        Case(size(16384), **half | {"dtype": torch.float32}, **frozen, frozen_dtype=torch.float16),
        Case(size(16384), **half),
    ]


def measure(lab: Lab, case: Case, compiled: bool) -> None:
    data = inputs(case)
    calls: dict[str, Callable[[], Any]] = {}
    gradients: dict[str, list[torch.Tensor]] = {}
    for one in IMPLEMENTATIONS:
        if one.name == "compiled":
            if not compiled:
                continue
            one = replace(one, loss=lab.device.compiled(IMPLEMENTATIONS[0].loss), refuses=lambda case: None)
        what = f"{case}: {one.name}"
        reason = one.refuses(case)
        if reason:
            lab.note(what, verdict="skipped", note=reason)
            continue
        with lab.attempt(what, must=one.name == "ours"):
            call = gradients_of(one, data)
            gradients[one.name] = [value.float() for value in call()]
            calls[one.name] = call
    if "ours" not in calls:
        return
    truth: Any = ()
    with lab.attempt(f"{case}: plain in fp32", must=False):
        exact = data.float()
        truth = torch.autograd.grad(IMPLEMENTATIONS[0].loss(exact), exact.trained)
    work = Work(case.flop(PASSES[1]))
    for name, seconds in lab.race(calls).items():
        off = [float((one - value).norm() / value.norm()) for one, value in zip(gradients[name], truth, strict=False)]
        verdict = "" if name != "ours" or not off else "ok" if max(off) <= TOLERANCE else "WRONG"
        note = f"gradients {max(off):.1e} from plain torch in fp32" if off else ""
        mib = f"{lab.device.peak(calls[name]) / 2**20:.0f}"
        lab.note(f"{case}: {name}", seconds, work, figure=mib, unit="MiB at most", verdict=verdict, note=note)


def gradients_of(one: Implementation, data: Inputs) -> Callable[[], tuple[torch.Tensor, ...]]:
    return lambda: torch.autograd.grad(one.loss(data), data.trained)


def run(lab: Lab) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for wheel in sorted(lab.wheels.glob("*.whl")) if lab.wheels else ():
            zipfile.ZipFile(wheel).extractall(folder)
        # Triton reads a kernel's source from a file.
        sys.path.append(folder)
        planned = cases(lab)
        for case in planned:
            with lab.attempt(str(case)):
                # At one size alone, and last: Inductor takes longer than all the rest here.
                measure(lab, case, compiled=case is planned[-1])
