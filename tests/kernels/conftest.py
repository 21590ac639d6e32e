"""What the kernels' tests share: fresh random inputs, and memory that shows what was never written."""

from __future__ import annotations

import dataclasses
import os
import secrets
from collections.abc import Iterator
from typing import Any

import pytest
import torch


@pytest.fixture
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter as a GPU computes, and without what takes it two fifths of its time and tells nothing here.

    It cuts fp32 off to bf16, twice the error of a GPU, which rounds.
    At each call of a device function it patches its language anew, though a call before it has; and it checks each sum
    of int32 for an overflow, which tensors this small cannot have (`test_far_rows` keeps the check).
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    import triton.language as tl
    from triton.runtime import interpreter as triton_interpreter

    def call(self: triton_interpreter.InterpretedFunction, *args: Any, **kwargs: Any) -> Any:
        known = [value for value in self.fn.__globals__.values() if value is tl or value is tl.core]
        if any(tl.core.is_builtin(lang.arange) for lang in known):
            triton_interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    cut = triton_interpreter.InterpreterBuilder.create_fp_trunc

    def rounded(self: Any, source: Any, dtype: Any) -> Any:
        if (source.dtype.scalar, dtype.scalar) != (tl.float32, tl.bfloat16):
            return cut(self, source, dtype)
        bits = torch.from_numpy(source.data.copy()).bfloat16().view(torch.uint16)
        return triton_interpreter.TensorHandle(bits.numpy(), tl.bfloat16)

    monkeypatch.setattr(triton_interpreter.InterpretedFunction, "__call__", call)
    monkeypatch.setattr(triton_interpreter.InterpreterBuilder, "create_fp_trunc", rounded)
    builder = triton_interpreter.interpreter_builder
    monkeypatch.setattr(builder, "options", dataclasses.replace(builder.options, sanitize_overflow=False))


@pytest.fixture
def poisoned_memory(interpreter: None) -> Iterator[None]:
    """Every `torch.empty` is full of NaN; one thread, as tiles this small gain nothing from more."""
    before = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.set_num_threads(1)
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.set_num_threads(before[1])


@pytest.fixture
def rng() -> torch.Generator:
    seed = secrets.randbelow(1 << 31)
    print(f"seed {seed}")
    return torch.Generator().manual_seed(seed)
