"""The kernels of `contrastive`: a tile's products, forward, the merge of its strips, the rescue, the gradient."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import fill_sorted_cells, is_flagged, rounded, same_ids, store_block, tile_product

# Stands for the maximum of nothing: finite, so that differences of two of them are 0 and not NaN.
LOWEST: tl.constexpr = tl.constexpr(-1e38)
WEAK: tl.constexpr = tl.constexpr(2.0**-80)


@triton.jit
def _tile_products(
    text, columns, text_stride, columns_stride, scale, row, col, row_codes, col_codes, flags, words, cells, listed, M,
    N, D, offset, BANK: tl.constexpr, IDS: tl.constexpr, POSITIVES: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, WIDE_M: tl.constexpr, WIDE_N: tl.constexpr, PARTS: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Inner products, and the factor > 0 that makes logits over ln 2 of them; a negative scale turns their sign.

    They are -inf on the diagonal, at masked cells and beyond the last column. Products, since a logit need never be
    rounded: what is taken from it comes in the same fma. Without `cells`, a flagged tile is left to those who have
    them: all of it is -inf.
    """
    left = 0
    stop = D
    if flags is not None:
        left = is_flagged(flags, words, row, col, WIDE_M, WIDE_N)
        if cells is None:
            stop = tl.where(left != 0, 0, D)
    acc = tile_product(
        text, text_stride, row, M, columns, columns_stride, col, N, D, BLOCK_M, BLOCK_N, BLOCK_D, PRECISION, UPCAST,
        PARTS=PARTS, stop=stop,
    )  # fmt: skip
    factor = tl.load(scale)
    if factor < 0:
        acc = -acc
    # Not 0: -inf times 0 is NaN.
    factor = tl.maximum(tl.abs(factor), 1e-30)
    cols = col + tl.arange(0, BLOCK_N)
    if col + BLOCK_N > N:
        acc = tl.where((cols < N)[None, :], acc, float("-inf"))
    if not BANK:
        own = row + offset
        if (own < col + BLOCK_N) & (col < own + BLOCK_M):
            acc = tl.where((own + tl.arange(0, BLOCK_M))[:, None] == cols[None, :], float("-inf"), acc)
    if IDS > 0 and not POSITIVES:
        same = same_ids(row_codes, col_codes, row, col, M, N, IDS, BLOCK_M, BLOCK_N)
        acc = tl.where(same, float("-inf"), acc)
    if flags is not None:
        if cells is None:
            acc = tl.where(left != 0, float("-inf"), acc)
        elif left != 0:
            acc = fill_sorted_cells(acc, cells, listed, row, col, N, float("-inf"), BLOCK_M, BLOCK_N)
    return acc, factor


@triton.jit
def _fold(x, KEPT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Column sums as far as one thread can take them: [KEPT, BLOCK_N] (KEPT = 1: all the way)."""
    if KEPT == 1:
        folded = tl.sum(x, 0)[None, :]
    else:
        # In the layouts of mma and wgmma, rows 8 apart and rows beyond all warps' share a thread.
        parts = tl.reshape(x, (BLOCK_M // (2 * KEPT), KEPT // 8, 2, 8, BLOCK_N))
        folded = tl.reshape(tl.sum(tl.sum(parts, 2), 0), (KEPT, BLOCK_N))
    return folded


@triton.jit
def _add_sums(
    row_sums, row_at, real, col_sums, col_at, inside, products, factor, BANK: tl.constexpr,
):  # fmt: skip
    """Adds a tile's logits, without the masked ones, to sums in memory: registers have no room for these too."""
    values = tl.where(products == float("-inf"), 0.0, products * factor)
    before = tl.load(row_sums + row_at, mask=real, other=0.0)
    tl.store(row_sums + row_at, before + tl.sum(values, 1), mask=real)
    if not BANK:
        # Beyond the last row logits are 0.
        before = tl.load(col_sums + col_at, mask=inside, other=0.0)
        tl.store(col_sums + col_at, before + tl.sum(values, 0), mask=inside)


@triton.jit
def _add_tile(
    top, kept, row, col, text, columns, text_stride, columns_stride, scale, row_codes, col_codes, flags, words, cells,
    listed, row_top, row_sum, row_extra, row_logits, col_extra, col_logits, slice_at, col_at, inside, M, N, D, offset,
    BANK: tl.constexpr, IDS: tl.constexpr, POSITIVES: tl.constexpr, SMOOTH: tl.constexpr, KEPT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, WIDE_M: tl.constexpr, WIDE_N: tl.constexpr,
    PARTS: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Adds a tile to its rows' sums in memory, and to the column sums `kept` over 2^`top` of its strip."""
    products, factor = _tile_products(
        text, columns, text_stride, columns_stride, scale, row, col, row_codes, col_codes, flags, words, cells, listed,
        M, N, D, offset, BANK, IDS, POSITIVES, BLOCK_M, BLOCK_N, BLOCK_D, WIDE_M, WIDE_N, PARTS, PRECISION, UPCAST,
    )  # fmt: skip
    rows = row + tl.arange(0, BLOCK_M)
    real = rows < M
    at = slice_at + rows
    if POSITIVES and IDS > 0:
        same = same_ids(row_codes, col_codes, row, col, M, N, IDS, BLOCK_M, BLOCK_N)
        positive = tl.where(same, products, 0.0)
        _add_sums(row_extra, at, real, col_extra, col_at, inside, positive, factor, BANK)
    if SMOOTH:
        _add_sums(row_logits, at, real, col_logits, col_at, inside, products, factor, BANK)
    tile_top = tl.maximum(tl.max(products, 1) * factor, LOWEST)
    e = tl.exp2(tl.fma(products, factor, -tile_top[:, None]))
    old_top = tl.load(row_top + at, mask=real, other=0.0)
    old_sum = tl.load(row_sum + at, mask=real, other=0.0)
    new_top = tl.maximum(old_top, tile_top)
    new_sum = old_sum * tl.exp2(old_top - new_top) + tl.sum(e, 1) * tl.exp2(tile_top - new_top)
    tl.store(row_top + at, new_top, mask=real)
    tl.store(row_sum + at, new_sum, mask=real)
    if not BANK:
        tile_top = tl.where(real, tile_top, LOWEST)
        higher = tl.maximum(top, tl.max(tile_top, 0))
        weight = tl.where(real, tl.exp2(tile_top - higher), 0.0)
        kept = kept * tl.exp2(top - higher) + _fold(e * weight[:, None], KEPT, BLOCK_M, BLOCK_N)
        top = higher
    # What was stored is read again, perhaps by other threads.
    tl.debug_barrier()
    return top, kept


@triton.jit
def forward_kernel(
    text, columns, text_stride, columns_stride, scale, row_codes, col_codes, flags, words, cells, listed, row_top,
    row_sum, row_extra, row_logits, col_top, col_sum, col_extra, col_logits, M, N, D, offset, first, last, width,
    BANK: tl.constexpr, IDS: tl.constexpr, POSITIVES: tl.constexpr, SMOOTH: tl.constexpr, KEPT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, WIDE_M: tl.constexpr, WIDE_N: tl.constexpr,
    PARTS: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Grid (P, S): row sums of columns [first, last) into slice s of [S, M], column sums into row p of [P, width].

    Without `cells`, of the tiles that are not flagged; with them, of those that are, 32 blocks of rows a word.
    """
    p = tl.program_id(0)
    P = tl.num_programs(0)
    s = tl.program_id(1)
    slice_at = s.to(tl.int64) * M
    for col in range(first + s * BLOCK_N, last, tl.num_programs(1) * BLOCK_N):
        cols = col + tl.arange(0, BLOCK_N)
        top = tl.full((), LOWEST, tl.float32)
        kept = tl.zeros((KEPT, BLOCK_N), tl.float32)
        inside = cols < last
        col_at = p * width + cols - first
        if cells is None:
            for row in range(p * BLOCK_M, M, P * BLOCK_M):
                top, kept = _add_tile(
                    top, kept, row, col, text, columns, text_stride, columns_stride, scale, row_codes, col_codes, flags,
                    words, cells, listed, row_top, row_sum, row_extra, row_logits, col_extra, col_logits, slice_at,
                    col_at, inside, M, N, D, offset, BANK, IDS, POSITIVES, SMOOTH, KEPT, BLOCK_M, BLOCK_N, BLOCK_D,
                    WIDE_M, WIDE_N, PARTS, PRECISION, UPCAST,
                )  # fmt: skip
        else:
            for group in range(p, words, P):
                word = tl.load(flags + col // WIDE_N * words + group)
                blocks = tl.where(word == 0, 0, 32 * (WIDE_M // BLOCK_M))
                for block in range(0, blocks):
                    if ((word >> (block // (WIDE_M // BLOCK_M))) & 1) != 0:
                        row = group * 32 * WIDE_M + block * BLOCK_M
                        top, kept = _add_tile(
                            top, kept, row, col, text, columns, text_stride, columns_stride, scale, row_codes,
                            col_codes, flags, words, cells, listed, row_top, row_sum, row_extra, row_logits, col_extra,
                            col_logits, slice_at, col_at, inside, M, N, D, offset, BANK, IDS, POSITIVES, SMOOTH, KEPT,
                            BLOCK_M, BLOCK_N, BLOCK_D, WIDE_M, WIDE_N, PARTS, PRECISION, UPCAST,
                        )  # fmt: skip
        if not BANK:
            tl.store(col_top + (col - first) // BLOCK_N * P + p, top)
            tl.store(col_sum + col_at, tl.sum(kept, 0), mask=inside)


@triton.jit
def _highest(tops, block, P, top, BLOCK_P: tl.constexpr):
    for p in range(0, P, BLOCK_P):
        strips = p + tl.arange(0, BLOCK_P)
        top = tl.maximum(top, tl.max(tl.load(tops + block * P + strips, mask=strips < P, other=LOWEST), 0))
    return top


@triton.jit
def _total(tops, parts, block, cols, inside, P, width, top, sums, BLOCK_P: tl.constexpr):
    for p in range(0, P, BLOCK_P):
        strips = p + tl.arange(0, BLOCK_P)
        weights = tl.exp2(tl.load(tops + block * P + strips, mask=strips < P, other=LOWEST) - top)
        of_strips = tl.load(
            parts + strips[:, None] * width + cols[None, :], mask=(strips < P)[:, None] & inside[None, :], other=0.0
        )
        sums += tl.sum(of_strips.to(tl.float64) * weights.to(tl.float64)[:, None], 0)
    return sums


@triton.jit
def merge_kernel(
    col_top, col_sum, P, more_top, more_sum, more_P, highest, total, first, last, width, BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr, WIDE_N: tl.constexpr,
):  # fmt: skip
    """A block of columns a program: total * 2^highest over the strips, in fixed order and in fp64.

    P strips by blocks of `WIDE_N` columns, and perhaps `more_P` by this kernel's blocks.
    """
    block = tl.program_id(0)
    wide = block * BLOCK_N // WIDE_N
    cols = block * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = first + cols < last
    top = _highest(col_top, wide, P, tl.full((), LOWEST, tl.float32), BLOCK_P)
    if more_top is not None:
        top = _highest(more_top, block, more_P, top, BLOCK_P)
    sums = tl.zeros((BLOCK_N,), tl.float64)
    sums = _total(col_top, col_sum, wide, cols, inside, P, width, top, sums, BLOCK_P)
    if more_top is not None:
        sums = _total(more_top, more_sum, block, cols, inside, more_P, width, top, sums, BLOCK_P)
    tl.store(highest + first + cols, top.to(tl.float64) + tl.zeros((BLOCK_N,), tl.float64), mask=inside)
    tl.store(total + first + cols, sums, mask=inside)


@triton.jit
def rescue_kernel(
    text, columns, text_stride, columns_stride, scale, row_codes, col_codes, flags, words, cells, listed, highest,
    total, M, N, D, offset, BANK: tl.constexpr, IDS: tl.constexpr, POSITIVES: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, WIDE_M: tl.constexpr, WIDE_N: tl.constexpr, PARTS: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """A block of columns a program: those of weak sums again, each by its own maximum."""
    col = tl.program_id(0) * BLOCK_N
    cols = col + tl.arange(0, BLOCK_N)
    weak = tl.load(total + cols, mask=cols < N, other=1.0) < WEAK
    if tl.max(weak.to(tl.int32), 0) > 0:
        top = tl.full((BLOCK_N,), LOWEST, tl.float32)
        sums = tl.zeros((BLOCK_N,), tl.float32)
        for row in range(0, M, BLOCK_M):
            products, factor = _tile_products(
                text, columns, text_stride, columns_stride, scale, row, col, row_codes, col_codes, flags, words, cells,
                listed, M, N, D, offset, BANK, IDS, POSITIVES, BLOCK_M, BLOCK_N, BLOCK_D, WIDE_M, WIDE_N, PARTS,
                PRECISION, UPCAST,
            )  # fmt: skip
            rows = row + tl.arange(0, BLOCK_M)
            products = tl.where((rows < M)[:, None], products, float("-inf"))
            higher = tl.maximum(top, tl.max(products, 0) * factor)
            e = tl.exp2(tl.fma(products, factor, -higher[None, :]))
            sums = sums * tl.exp2(top - higher) + tl.sum(e, 0)
            top = higher
        tl.store(highest + cols, top.to(tl.float64), mask=weak)
        tl.store(total + cols, sums.to(tl.float64), mask=weak)


@triton.jit
def _gradient_tile(
    in_row, in_col, text, columns, text_stride, columns_stride, scale, row_codes, col_codes, flags, words, cells,
    listed, row_vectors, col_vectors, out, out_stride, out_step, M, N, D, offset, first_row, first_col,
    BANK: tl.constexpr, IDS: tl.constexpr, POSITIVES: tl.constexpr, SMOOTH: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, WIDE_M: tl.constexpr, WIDE_N: tl.constexpr, PARTS: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    row = first_row + in_row
    col = first_col + in_col
    products, factor = _tile_products(
        text, columns, text_stride, columns_stride, scale, row, col, row_codes, col_codes, flags, words, cells, listed,
        M, N, D, offset, BANK, IDS, POSITIVES, BLOCK_M, BLOCK_N, BLOCK_D, WIDE_M, WIDE_N, PARTS, PRECISION, UPCAST,
    )  # fmt: skip
    rows = row + tl.arange(0, BLOCK_M)
    cols = col + tl.arange(0, BLOCK_N)
    real = rows < M
    inside = cols < N
    lse = tl.load(row_vectors + rows, mask=real, other=0.0)
    slope = tl.load(row_vectors + M + rows, mask=real, other=0.0)
    dz = slope[:, None] * tl.exp2(tl.fma(products, factor, -lse[:, None]))
    if not BANK:
        lse = tl.load(col_vectors + cols, mask=inside, other=0.0)
        slope = tl.load(col_vectors + N + cols, mask=inside, other=0.0)
        dz += slope[None, :] * tl.exp2(tl.fma(products, factor, -lse[None, :]))
    if POSITIVES and IDS > 0:
        same = same_ids(row_codes, col_codes, row, col, M, N, IDS, BLOCK_M, BLOCK_N)
        slopes = tl.load(row_vectors + 2 * M + rows, mask=real, other=0.0)[:, None]
        if not BANK:
            slopes = slopes + tl.load(col_vectors + 2 * N + cols, mask=inside, other=0.0)[None, :]
        dz += tl.where(same & (products != float("-inf")), slopes, 0.0)
    if SMOOTH:
        slopes = tl.load(row_vectors + 3 * M + rows, mask=real, other=0.0)[:, None]
        if not BANK:
            slopes = slopes + tl.load(col_vectors + 3 * N + cols, mask=inside, other=0.0)[None, :]
        dz += tl.where(products == float("-inf"), 0.0, slopes)
    # Taken here in fp32: from d text it would have the rounding of dZ.
    # Times a finite product, as dz is 0 at masked cells.
    shares = tl.sum(dz * tl.maximum(products, LOWEST), 1)
    share = tl.sum(tl.where(real, shares, 0.0), 0)
    share = tl.where(tl.load(scale) < 0, -share, share)
    for part in tl.static_range(PARTS):
        at = part * out_step + in_row
        below = (PARTS - 1) * out_step + M - first_row
        store_block(out, out_stride, at, in_col, below, N - first_col, dz, BLOCK_M, BLOCK_N)
        if part + 1 < PARTS:
            dz -= rounded(out, out_stride, dz).to(tl.float32)
    return share


@triton.jit
def gradient_kernel(
    text, columns, text_stride, columns_stride, scale, row_codes, col_codes, flags, words, cells, listed, row_vectors,
    col_vectors, out, out_stride, out_step, scale_slopes, M, N, D, offset, first_row, first_col, BANK: tl.constexpr,
    IDS: tl.constexpr, POSITIVES: tl.constexpr, SMOOTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, WIDE_M: tl.constexpr, WIDE_N: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """A tile a program: d loss / d logit into the chunk `out`, and its share of d scale; vectors: see `_pack`.

    In several parts, each is rounded to the chunk's dtype and the next, `out_step` rows below, is what that left.
    Without `cells`, flagged tiles are 0; with them, they alone are written, over that.
    """
    in_row = tl.program_id(1) * BLOCK_M
    in_col = tl.program_id(0) * BLOCK_N
    share = 0.0
    mine = 1
    if cells is not None:
        mine = is_flagged(flags, words, first_row + in_row, first_col + in_col, WIDE_M, WIDE_N)
    if mine != 0:
        share = _gradient_tile(
            in_row, in_col, text, columns, text_stride, columns_stride, scale, row_codes, col_codes, flags, words,
            cells, listed, row_vectors, col_vectors, out, out_stride, out_step, M, N, D, offset, first_row, first_col,
            BANK, IDS, POSITIVES, SMOOTH, BLOCK_M, BLOCK_N, BLOCK_D, WIDE_M, WIDE_N, PARTS, PRECISION, UPCAST,
        )  # fmt: skip
    tl.store(scale_slopes + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0), share)
