"""Features whose rows lie 2^31 elements apart, or beyond that many: 64-bit addresses, in every path.

The file runs twice, the second time in a process where Triton interprets and CPU tensors take its kernels.
"""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from efficientclip.kernels import (
    contrastive_loss,
    paired_similarity,
    paths,
    positive_ranks,
    sigmoid_loss,
    top_k,
)
from efficientclip.kernels.triton import similarity, tiles, tuning

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
FAR = 1 << 31
# Linux's number: Python gives it no name.
MAP_NORESERVE = 0x4000
DTYPES = [torch.float16, torch.float32]


@pytest.mark.skipif(INTERPRETED, reason="the kernels run here")
def test_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-header", "--tb=short", __file__]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.fixture(autouse=True)
def kernels_where_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    if not INTERPRETED:
        return
    launch = tuning.Launch(16, 16, 16, 4, 2)
    config = tuning.Config(
        launch, launch, launch, launch, descriptors=True, kept=8, programs=2, chunk=(64, 64), processors=2, panel=64
    )
    monkeypatch.setattr(tuning, "tile_config", lambda *given: config)
    monkeypatch.setattr(paths, "KERNELS_ON_CPU", True)
    monkeypatch.setattr(tuning, "TILES", {2: tuning.Tile(16, 16, 4, 2), 4: tuning.Tile(16, 16, 4, 2)})


def lazy(elements: int, dtype: torch.dtype) -> Tensor:
    """Zeros in pages that take no memory until they are written."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    return torch.frombuffer(mmap.mmap(-1, elements * dtype.itemsize, flags=flags), dtype=dtype)


def far_apart(features: Tensor) -> Tensor:
    """The same rows, each 2^31 elements behind the one before."""
    rows, D = features.shape
    far = lazy((rows - 1) * FAR + D, features.dtype).as_strided((rows, D), (FAR, 1))
    return far.copy_(features)


def unit(rng: torch.Generator, rows: int, D: int, dtype: torch.dtype) -> Tensor:
    return F.normalize(torch.randn(rows, D, generator=rng, dtype=torch.float64), dim=1).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("loss", [contrastive_loss, sigmoid_loss])
def test_losses(rng: torch.Generator, loss: Any, dtype: torch.dtype) -> None:
    near = [unit(rng, 3, 24, dtype) for _ in range(3)]
    results = []
    for text, image, bank in (near, [far_apart(features) for features in near]):
        text.requires_grad_()
        image.requires_grad_()
        out = loss(text, image, bank, logit_scale=14.0)
        out.loss.backward()
        results.append([*out, text.grad, image.grad])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores(rng: torch.Generator, dtype: torch.dtype) -> None:
    near = unit(rng, 3, 24, dtype), unit(rng, 3, 24, dtype)
    rows, groups = torch.tensor([2, 0, 1]), torch.arange(4)
    far = tuple(far_apart(features) for features in near)
    assert torch.equal(paired_similarity(*far, rows), paired_similarity(*near, rows))
    assert torch.equal(positive_ranks(*far, rows, groups), positive_ranks(*near, rows, groups))
    for one, other in zip(top_k(*far, 2), top_k(*near, 2), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_of_a_bank_beyond_them(rng: torch.Generator, dtype: torch.dtype) -> None:
    """Rows are gathered by index from a bank without gaps, 2^31 elements and a few rows long."""
    D = 1024
    bank = lazy(FAR + 8 * D, dtype).view(-1, D)
    rows = torch.tensor([len(bank) - 1, 5, len(bank) - 3])
    text, bank[rows] = unit(rng, 3, D, dtype), unit(rng, 3, D, dtype)
    assert torch.equal(paired_similarity(text, bank, rows), paired_similarity(text, bank[rows], torch.arange(3)))


@triton.jit
def copy(
    source: tl.tensor, target: tl.tensor, stride: tl.tensor, row: tl.tensor, rows: tl.tensor, cols: tl.tensor
) -> None:
    block = tiles.load_block(source, stride, row, 0, rows, cols, 16, 32, True)
    tiles.store_block(target, stride, row, 0, rows, cols, block, 16, 32)


@pytest.mark.skipif(not INTERPRETED, reason="the kernels run in the interpreter, or on a GPU")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tiles_beyond_them(rng: torch.Generator, dtype: torch.dtype) -> None:
    """What walks over all rows would take hours here: its loads and stores, and the product by named rows."""
    D, tall = 1024, (FAR >> 10) + 8
    source, target = (lazy(tall * D, dtype).view(-1, D) for _ in "12")
    source[-8:, :24] = unit(rng, 8, 24, dtype)
    copy[1,](source, target, D, tall - 8, tall, 24)
    assert torch.equal(target[-8:, :24], source[-8:, :24]) and not target[-9].any()

    queries, scores = unit(rng, 2, D, dtype), torch.empty(2)
    owners, rows = torch.arange(2), torch.tensor([tall - 1, tall - 8])
    similarity.positive_kernel[1,](
        queries, source, D, D, owners, rows, scores, 2, D, BLOCK=16, BLOCK_K=32, **tiles.arithmetic(dtype)
    )
    torch.testing.assert_close(scores, (queries.double() * source[rows]).sum(1).float())
