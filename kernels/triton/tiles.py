"""What kernels share: blocks of matrices in and out, the product of a tile, which of its cells have equal ids.

Names: R x C a tile of rows and columns, K features (or columns of a chunk) at a time.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .tuning import Launch

# The greatest magnitude that fp16 numbers are scaled to: it ends at 2^16.
TOP_EXPONENT = 14


@triton.jit
def load_block(
    source, stride, row, col, rows, cols, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, UPCAST: tl.constexpr
):
    """A block of a matrix [rows, cols], 0 beyond it; `source` is a descriptor, or a pointer if `stride` is given."""
    if stride is None:
        block = source.load([row, col])
    else:
        in_rows = tl.arange(0, BLOCK_R)
        in_cols = tl.arange(0, BLOCK_C)
        # Rows times stride may pass 2^31; within a block they do not.
        at = source + tl.cast(row, tl.int64) * stride + col + (in_rows[:, None] * stride + in_cols[None, :])
        block = tl.load(at, mask=(row + in_rows < rows)[:, None] & (col + in_cols < cols)[None, :], other=0.0)
    if UPCAST:
        block = block.to(tl.float32)
    return block


@triton.jit
def load_rows(source, stride, row_R, open_R, col, cols, BLOCK_C: tl.constexpr, UPCAST: tl.constexpr):
    """The same of rows by name, each with an address of its own, 0 where not open."""
    col_C = col + tl.arange(0, BLOCK_C)
    at = source + row_R.to(tl.int64)[:, None] * stride + col_C[None, :]
    block = tl.load(at, mask=open_R[:, None] & (col_C < cols)[None, :], other=0.0)
    if UPCAST:
        block = block.to(tl.float32)
    return block


@triton.jit
def rounded(target, stride, block):
    """The block as `store_block` would write it."""
    return block.to(target.dtype if stride is None else target.dtype.element_ty)


@triton.jit
def store_block(target, stride, row, col, rows, cols, block, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """The counterpart of `load_block`; nothing is written beyond the matrix."""
    if stride is None:
        target.store([row, col], rounded(target, stride, block))
    else:
        in_rows = tl.arange(0, BLOCK_R)
        in_cols = tl.arange(0, BLOCK_C)
        at = target + tl.cast(row, tl.int64) * stride + col + (in_rows[:, None] * stride + in_cols[None, :])
        inside = (row + in_rows < rows)[:, None] & (col + in_cols < cols)[None, :]
        tl.store(at, rounded(target, stride, block), mask=inside)


@triton.jit
def tile_product(
    a, a_stride, a_row, a_rows, b, b_stride, b_row, b_rows, D, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, NAMED: tl.constexpr = False,
    PARTS: tl.constexpr = 1, stop=None,
):  # fmt: skip
    """fp32 [R, C]: dot products of rows of two matrices, in one order over D, or over none if `stop` is 0.

    Rows are the block's first one and how many the matrix has; if `NAMED`, a vector and which of it are there. `a` may
    be the sum of `PARTS` matrices, side by side: what is read of `b` then serves them all.
    """
    acc_RC = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for k in range(0, D if stop is None else stop, BLOCK_K):
        if NAMED:
            a_RK = load_rows(a, a_stride, a_row, a_rows, k, D, BLOCK_K, UPCAST)
            b_CK = load_rows(b, b_stride, b_row, b_rows, k, D, BLOCK_K, UPCAST)
        else:
            a_RK = load_block(a, a_stride, a_row, k, a_rows, PARTS * D, BLOCK_R, BLOCK_K, UPCAST)
            b_CK = load_block(b, b_stride, b_row, k, b_rows, D, BLOCK_C, BLOCK_K, UPCAST)
        acc_RC = tl.dot(a_RK, b_CK.T, acc_RC, input_precision=PRECISION)
        for part in tl.static_range(1, PARTS):
            # The last block may reach into the next part: there `b` is 0.
            a_RK = load_block(a, a_stride, a_row, part * D + k, a_rows, PARTS * D, BLOCK_R, BLOCK_K, UPCAST)
            acc_RC = tl.dot(a_RK, b_CK.T, acc_RC, input_precision=PRECISION)
    return acc_RC


@triton.jit
def same_ids(row_codes, col_codes, row, col, M, N, IDS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Which cells of a tile have equal ids of any of `IDS` kinds; none beyond the last row or column."""
    rows = row + tl.arange(0, BLOCK_R)
    cols = col + tl.arange(0, BLOCK_C)
    of_rows = tl.load(row_codes + rows, mask=rows < M, other=-1)
    of_cols = tl.load(col_codes + cols, mask=cols < N, other=-2)
    same = of_rows[:, None] == of_cols[None, :]
    if IDS == 2:
        of_rows = tl.load(row_codes + M + rows, mask=rows < M, other=-1)
        of_cols = tl.load(col_codes + N + cols, mask=cols < N, other=-2)
        same = same | (of_rows[:, None] == of_cols[None, :])
    return same


@triton.jit
def fill_cells(x_RC, cells, bounds, row, col, N, value, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """The tile with `value` in its listed cells; marked in place, so that one tensor alone lives through the loop."""
    tile = row // BLOCK_R * tl.cdiv(N, BLOCK_C) + col // BLOCK_C
    row_R = row + tl.arange(0, BLOCK_R)
    col_C = col + tl.arange(0, BLOCK_C)
    for at in range(tl.load(bounds + tile), tl.load(bounds + tile + 1)):
        here_RC = (row_R == tl.load(cells + 2 * at))[:, None] & (col_C == tl.load(cells + 2 * at + 1))[None, :]
        x_RC = tl.where(here_RC, value, x_RC)
    return x_RC


@triton.jit
def is_flagged(flags, words, row, col, WIDE_R: tl.constexpr, WIDE_C: tl.constexpr):
    """Not 0 if the tile that a row and a column lie in is flagged: see `cells.Masked`."""
    block = row // WIDE_R
    return (tl.load(flags + col // WIDE_C * words + block // 32) >> (block % 32)) & 1


@triton.jit
def _first_at(keys, size, key):
    """Where, in ascending keys, the first one stands that is no less than `key`."""
    low = tl.zeros((), tl.int32)
    high = low + size
    while low < high:
        middle = (low + high) // 2
        before = tl.load(keys + middle) < key
        low = tl.where(before, middle + 1, low)
        high = tl.where(before, high, middle)
    return low


@triton.jit
def fill_sorted_cells(x_RC, cells, listed, row, col, N, value, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """`fill_cells` of `listed` cells that need no bounds: see `cells.Masked`."""
    first = (tl.cast(row // BLOCK_R, tl.int64) * tl.cdiv(N, BLOCK_C) + col // BLOCK_C) * (BLOCK_R * BLOCK_C)
    start = _first_at(cells, listed, first)
    for at in range(start, _first_at(cells, listed, first + BLOCK_R * BLOCK_C)):
        cell = (tl.load(cells + at) - first).to(tl.int32)
        here_RC = (tl.arange(0, BLOCK_R) == cell // BLOCK_C)[:, None] & (tl.arange(0, BLOCK_C) == cell % BLOCK_C)[None]
        x_RC = tl.where(here_RC, value, x_RC)
    return x_RC


@triton.jit
def product_kernel(
    chunk, features, out, chunk_stride, features_stride, out_stride, rows, step, K, D, span, out_step,
    TRANSPOSED: tl.constexpr, SPLIT: tl.constexpr, PARTS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """A tile a program: out [rows, D] += chunk (or its transpose) [rows, K] @ features [K, D].

    A chunk that is not transposed may be the sum of `PARTS`, one `step` rows below the other. If `SPLIT`, program z
    takes `span` of K, and writes to rows z * `out_step` and on what others add up.
    """
    row = tl.program_id(1) * BLOCK_R
    d = tl.program_id(0) * BLOCK_D
    acc_RD = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    start = 0
    end = K
    if SPLIT:
        start = tl.program_id(2) * span
        end = tl.minimum(K, start + span)
    for k in range(start, end, BLOCK_K):
        if TRANSPOSED:
            chunk_RK = load_block(chunk, chunk_stride, k, row, K, rows, BLOCK_K, BLOCK_R, UPCAST).T
        else:
            chunk_RK = load_block(chunk, chunk_stride, row, k, rows, K, BLOCK_R, BLOCK_K, UPCAST)
        feature_KD = load_block(features, features_stride, k, d, K, D, BLOCK_K, BLOCK_D, UPCAST)
        acc_RD = tl.dot(chunk_RK, feature_KD, acc_RD, input_precision=PRECISION)
        for part in tl.static_range(1, PARTS):
            below = part * step + rows
            chunk_RK = load_block(chunk, chunk_stride, part * step + row, k, below, K, BLOCK_R, BLOCK_K, UPCAST)
            acc_RD = tl.dot(chunk_RK, feature_KD, acc_RD, input_precision=PRECISION)
    if SPLIT:
        at = tl.program_id(2) * out_step
        store_block(out, out_stride, at + row, d, at + out_step, D, acc_RD, BLOCK_R, BLOCK_D)
    else:
        acc_RD += load_block(out, out_stride, row, d, rows, D, BLOCK_R, BLOCK_D, False)
        store_block(out, out_stride, row, d, rows, D, acc_RD, BLOCK_R, BLOCK_D)


# Launching


def arithmetic(dtype: torch.dtype) -> dict[str, Any]:
    """How features are multiplied: fp32 by 3xTF32. The interpreter knows no TF32, and takes bf16 for bit patterns."""
    interpreted = bool(triton.knobs.runtime.interpret)
    return {
        "PRECISION": "tf32x3" if dtype == torch.float32 and not interpreted else "ieee",
        "UPCAST": interpreted,
    }


def matrix(name: str, matrix: Tensor, block: tuple[int, int], descriptors: bool) -> dict[str, Any]:
    """Arguments for a matrix that is read or written by blocks."""
    if descriptors:
        descriptor = TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), list(block))
        return {name: descriptor, f"{name}_stride": None}
    return {name: matrix, f"{name}_stride": matrix.stride(0)}


def add_product(
    out_RD: Tensor,
    chunk: Tensor,
    features_KD: Tensor,
    transposed: bool,
    launch: Launch,
    descriptors: bool,
    parts: int = 1,
    splits: int = 1,
) -> None:
    """out [R, D] += chunk [R, K] @ features [K, D], or the transpose of a chunk [K, R]; deterministic.

    In `parts`, a chunk that is not transposed is their sum: equally many rows of each, below one another, R or more.
    K may be cut into `splits`, whose sums are added up in one order.
    """
    rows, K = len(out_RD), chunk.shape[0 if transposed else 1]
    D = out_RD.shape[1]
    block = (launch.depth, launch.rows) if transposed else (launch.rows, launch.depth)
    span = triton.cdiv(triton.cdiv(K, splits), launch.depth) * launch.depth
    splits = triton.cdiv(K, span)
    # Each with room for whole tiles: what lies beyond the last row of one is not the next one's.
    out_step = triton.cdiv(rows, launch.rows) * launch.rows
    target = out_RD if splits == 1 else out_RD.new_empty(splits * out_step, D)
    product_kernel[triton.cdiv(D, launch.columns), triton.cdiv(rows, launch.rows), splits](
        **matrix("chunk", chunk, block, descriptors),
        **matrix("features", features_KD, (launch.depth, launch.columns), descriptors),
        **matrix("out", target, (launch.rows, launch.columns), descriptors),
        rows=rows,
        step=len(chunk) // parts,
        K=K,
        D=D,
        span=span,
        out_step=out_step,
        TRANSPOSED=transposed,
        SPLIT=splits > 1,
        PARTS=parts,
        BLOCK_R=launch.rows,
        BLOCK_K=launch.depth,
        BLOCK_D=launch.columns,
        **arithmetic(features_KD.dtype),
        num_warps=launch.warps,
        num_stages=launch.stages,
    )
    if splits > 1:
        out_RD += target.view(splits, out_step, D)[:, :rows].sum(0)


def add_library_product(out_RD: Tensor, chunk: Tensor, features_KD: Tensor, transposed: bool, parts: int = 1) -> None:
    """The same by torch's products, cuBLAS on CUDA."""
    rows, step = len(out_RD), len(chunk) // parts
    for part in range(parts):
        of_part = chunk.T if transposed else chunk[part * step : part * step + rows]
        if not out_RD.is_cuda or chunk.dtype == torch.float32:
            out_RD.addmm_(of_part.float(), features_KD.float())
        else:
            torch.addmm(out_RD, of_part, features_KD, out_dtype=torch.float32, out=out_RD)


def split(features: Tensor, dtype: torch.dtype, parts: int) -> tuple[Tensor, Tensor]:
    """Features times a power of two, which is 1 for one part of their own dtype, as a sum of parts side by side.

    The power brings the largest entry near the top of fp16: what is left of an entry is then as little as fp32's
    rounding, or 2^-39 of the largest. It is made without waiting for the device.
    """
    if features.dtype == dtype:
        return features, features.new_ones(1, dtype=torch.float32)
    left = features.float()
    # A row of NaN is no reason to give up the others.
    top = torch.where(left.isfinite(), left, 0).abs().amax().double()
    exponent = (TOP_EXPONENT - top.log2().ceil()).clamp(-100, 100)
    power = torch.where(top > 0, exponent.exp2(), 1.0).float().reshape(1)
    left = left * power
    found = []
    for _ in range(parts):
        found.append(left.to(dtype))
        left = left - found[-1].float()
    return torch.cat(found, 1), power


def addressable(features: Tensor) -> Tensor:
    """The features, copied where TMA, wide loads or 32-bit offsets in a block do not reach, zeros appended to D."""
    D, stride = features.shape[1], features.stride(0)
    wide = D % 16 == stride % 16 == features.data_ptr() % 16 == 0
    if wide and features.stride(1) == 1 and D <= stride < 1 << 22:
        return features
    padded = features.new_zeros(len(features), triton.cdiv(D, 16) * 16)
    padded[:, :D] = features
    return padded
