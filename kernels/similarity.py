"""Scores against a bank of features, with no M x Q matrix: cosines of pairs, ranks of positives, nearest rows.

Cost model, for M queries, Q bank rows, width D, E positives and b bytes a feature:

- `paired_similarity`: reads 2 M D b bytes and M indices, writes 4 M; no workspace on CUDA, elsewhere a few
  chunks of `CHUNK_ROWS` rows in fp32.
- `positive_ranks`: one product of M Q D multiply-adds, plus E D (CUDA: up to 128 E D) for the positives. CUDA: a
  program keeps its queries' counts in registers and walks the bank; workspace 4 bytes a query and strip and 12
  bytes a tile of 128 x 128 (fp32: 64 x 64) of `SLAB_ROWS` queries, and a copy of the features unless D is a
  multiple of 16. Elsewhere: two tiles of `TILE_CELLS` scores
  and one panel of the bank in fp64.
- `top_k`: one product of M Q D, one selection a tile; the same workspace and 12 M k bytes.

Chunked products are taken in fp64 and rounded to fp32 once: that costs 1.7 times an fp32 product on a CPU, and
makes equal bank rows score equally wherever in a panel they lie. The Triton kernels add in fp32, each
score in one order over D.

Shapes: M queries, Q bank rows, D width, E positives, R x C one tile, K features at a time.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# Chunked path: 16 MB of fp64 scores stay in the last-level cache.
TILE_CELLS = 1 << 21
TILE_ROWS = 512
CHUNK_ROWS = 4096


class Tile(NamedTuple):
    """Geometry of a Triton product; tiles are square, so that a diagonal can hold a positive each."""

    BLOCK: int
    BLOCK_K: int
    num_warps: int
    num_stages: int


# By bytes a feature: the largest that spill no register on sm_80, sm_90 and sm_100.
TILES = {2: Tile(128, 64, 8, 3), 4: Tile(64, 32, 4, 3)}
PAIRED_ROWS, PAIRED_K = 16, 128
# Queries a launch: bounds the list of tiles, 12 MB (fp32: 48 MB) at a million bank rows.
SLAB_ROWS = 1 << 14
# Programs a launch aims at, by cutting the bank into strips.
PROGRAMS = 512


def jit(kernel: Any) -> Any:
    """`triton.jit` where Triton is installed."""
    return kernel if triton is None else triton.jit(kernel)


def uses_triton(features: Tensor) -> bool:
    """CUDA tensors take the Triton kernels, except fp64 ones: the kernels add in fp32."""
    if not features.is_cuda or features.dtype == torch.float64:
        return False
    if triton is None:
        warnings.warn("CUDA tensors fall back to chunked torch: Triton is missing, pip install triton", stacklevel=3)
        return False
    return True


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, which multiplies bf16 operands as bit patterns."""
    return bool(triton.knobs.runtime.interpret)


# Naive references


def paired_similarity_naive(text_MD: Tensor, bank_QD: Tensor, rows_M: Tensor) -> Tensor:
    """The definition of `paired_similarity`: fp64 throughout."""
    text_MD, bank_MD = text_MD.double(), bank_QD.double()[rows_M]
    text_MD = text_MD / text_MD.norm(dim=1, keepdim=True).where(text_MD.any(1, keepdim=True), 1)
    bank_MD = bank_MD / bank_MD.norm(dim=1, keepdim=True).where(bank_MD.any(1, keepdim=True), 1)
    return (text_MD * bank_MD).sum(1)


def positive_ranks_naive(query_MD: Tensor, bank_QD: Tensor, rows_E: Tensor, groups: Tensor) -> Tensor:
    """The definition of `positive_ranks`: the whole matrix."""
    scores_MQ = (query_MD.double() @ bank_QD.double().T).float()
    positive_MQ = torch.zeros_like(scores_MQ, dtype=torch.bool)
    positive_MQ[torch.arange(len(query_MD)).repeat_interleave(groups.diff()), rows_E] = True
    best_M1 = scores_MQ.masked_fill(~positive_MQ, -math.inf).amax(1, keepdim=True)
    better_M = ((scores_MQ > best_M1) & ~positive_MQ).sum(1)
    equal_M = ((scores_MQ == best_M1) & ~positive_MQ).sum(1)
    return 1 + better_M.double() + equal_M.double() / 2


def top_k_naive(query_MD: Tensor, bank_QD: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The definition of `top_k`: the whole matrix, sorted."""
    scores_MQ, rows_MQ = (query_MD.double() @ bank_QD.double().T).float().sort(dim=1, descending=True, stable=True)
    return scores_MQ[:, :k], rows_MQ[:, :k]


# Triton kernels


@jit
def tile_product(  # type: ignore[no-untyped-def]
    a_ptr, a_rows_R, a_open_R, b_ptr, b_rows_C, b_open_C, D,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """fp32 [BLOCK, BLOCK]: dot products of the named rows of two matrices, in one order over D."""
    a_base_R1 = a_ptr + a_rows_R.to(tl.int64)[:, None] * D
    b_base_1C = b_ptr + b_rows_C.to(tl.int64)[None, :] * D
    acc_RC = tl.zeros([BLOCK, BLOCK], tl.float32)
    for start in range(0, D, BLOCK_K):
        k_K = start + tl.arange(0, BLOCK_K)
        a_RK = tl.load(a_base_R1 + k_K[None, :], mask=a_open_R[:, None] & (k_K < D)[None, :], other=0.0)
        b_KC = tl.load(b_base_1C + k_K[:, None], mask=b_open_C[None, :] & (k_K < D)[:, None], other=0.0)
        if UPCAST:
            a_RK = a_RK.to(tl.float32)
            b_KC = b_KC.to(tl.float32)
        acc_RC = tl.dot(a_RK, b_KC, acc_RC, input_precision="tf32x3")
    return acc_RC


@jit
def _paired_kernel(  # type: ignore[no-untyped-def]
    text_ptr, bank_ptr, rows_ptr, out_ptr, M, D, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    at_R = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    open_R1 = (at_R < M)[:, None]
    text_R1 = text_ptr + at_R.to(tl.int64)[:, None] * D
    bank_R1 = bank_ptr + tl.load(rows_ptr + at_R, mask=at_R < M, other=0).to(tl.int64)[:, None] * D
    text_top_R = tl.zeros([BLOCK_R], tl.float32)
    bank_top_R = tl.zeros([BLOCK_R], tl.float32)
    for start in range(0, D, BLOCK_K):
        k_1K = start + tl.arange(0, BLOCK_K)[None, :]
        text_RK = tl.load(text_R1 + k_1K, mask=open_R1 & (k_1K < D), other=0.0).to(tl.float32)
        bank_RK = tl.load(bank_R1 + k_1K, mask=open_R1 & (k_1K < D), other=0.0).to(tl.float32)
        text_top_R = tl.maximum(text_top_R, tl.max(tl.abs(text_RK), 1))
        bank_top_R = tl.maximum(bank_top_R, tl.max(tl.abs(bank_RK), 1))
    # Divided by their largest entry, features of any size have squares that neither overflow nor vanish.
    text_top_R = tl.where(text_top_R == 0, 1.0, text_top_R)
    bank_top_R = tl.where(bank_top_R == 0, 1.0, bank_top_R)
    dot_R = tl.zeros([BLOCK_R], tl.float32)
    text_square_R = tl.zeros([BLOCK_R], tl.float32)
    bank_square_R = tl.zeros([BLOCK_R], tl.float32)
    for start in range(0, D, BLOCK_K):
        k_1K = start + tl.arange(0, BLOCK_K)[None, :]
        text_RK = tl.load(text_R1 + k_1K, mask=open_R1 & (k_1K < D), other=0.0).to(tl.float32)
        bank_RK = tl.load(bank_R1 + k_1K, mask=open_R1 & (k_1K < D), other=0.0).to(tl.float32)
        text_RK = text_RK / text_top_R[:, None]
        bank_RK = bank_RK / bank_top_R[:, None]
        dot_R += tl.sum(text_RK * bank_RK, 1)
        text_square_R += tl.sum(text_RK * text_RK, 1)
        bank_square_R += tl.sum(bank_RK * bank_RK, 1)
    length_R = tl.sqrt(text_square_R) * tl.sqrt(bank_square_R)
    tl.store(out_ptr + at_R, dot_R / tl.where(length_R == 0, 1.0, length_R), mask=at_R < M)


@jit
def _positive_kernel(  # type: ignore[no-untyped-def]
    query_ptr, bank_ptr, owners_ptr, rows_ptr, out_ptr, E, D,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The score of each (owner, row), as the diagonal of the tile of the block's owners and rows."""
    at_R = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    open_R = at_R < E
    owners_R = tl.load(owners_ptr + at_R, mask=open_R, other=0)
    rows_R = tl.load(rows_ptr + at_R, mask=open_R, other=0)
    score_RC = tile_product(
        query_ptr, owners_R, open_R, bank_ptr, rows_R, open_R, D, BLOCK, BLOCK_K, UPCAST,
    )  # fmt: skip
    own_RC = tl.arange(0, BLOCK)[:, None] == tl.arange(0, BLOCK)[None, :]
    tl.store(out_ptr + at_R, tl.sum(tl.where(own_RC, score_RC, 0.0), 1), mask=open_R)


@jit
def _count_kernel(  # type: ignore[no-untyped-def]
    query_ptr, bank_ptr, best_ptr, count_ptr, owners_ptr, rows_ptr, bounds_ptr, M, Q, D, strip_tiles,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """2 x better + equal of one block of queries among one strip of the bank, positives left out."""
    block = tl.program_id(0)
    strip = tl.program_id(1)
    tiles = tl.cdiv(Q, BLOCK)
    query_R = block * BLOCK + tl.arange(0, BLOCK)
    best_R = tl.load(best_ptr + query_R, mask=query_R < M, other=float("inf"))
    count_R = tl.zeros([BLOCK], tl.int32)
    for tile in range(strip * strip_tiles, tl.minimum((strip + 1) * strip_tiles, tiles)):
        row_C = tile * BLOCK + tl.arange(0, BLOCK)
        score_RC = tile_product(
            query_ptr, query_R, query_R < M, bank_ptr, row_C, row_C < Q, D, BLOCK, BLOCK_K, UPCAST,
        )  # fmt: skip
        score_RC = tl.where((row_C < Q)[None, :], score_RC, float("-inf"))
        at = block * tiles + tile
        for cell in range(tl.load(bounds_ptr + at), tl.load(bounds_ptr + at + 1)):
            owner = tl.load(owners_ptr + cell)
            row = tl.load(rows_ptr + cell)
            score_RC = tl.where((query_R == owner)[:, None] & (row_C == row)[None, :], float("-inf"), score_RC)
        better_RC = (score_RC > best_R[:, None]).to(tl.int32)
        equal_RC = (score_RC == best_R[:, None]).to(tl.int32)
        count_R += tl.sum(2 * better_RC + equal_RC, 1)
    tl.store(count_ptr + strip.to(tl.int64) * M + query_R, count_R, mask=query_R < M)


def aligned(features: Tensor) -> Tensor:
    """Rows without gaps of whole 16 features, zeros appended: in tiles of other widths loads are narrow and spill."""
    padding = -features.shape[1] % 16
    return torch.nn.functional.pad(features, (0, padding)) if padding else features.contiguous()


def by_tile(rows_E: Tensor, columns_E: Tensor, rows: int, columns: int, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """Cells sorted by their square tile, and where each tile's cells begin: int32 [E], [E], [tiles + 1]."""
    across = -(-columns // block)
    tiles = -(-rows // block) * across
    tile_E, order_E = (rows_E // block * across + columns_E // block).sort(stable=True)
    bounds = torch.searchsorted(tile_E, torch.arange(tiles + 1, device=tile_E.device), out_int32=True)
    return rows_E[order_E].int(), columns_E[order_E].int(), bounds


def _paired_triton(text_MD: Tensor, bank_QD: Tensor, rows_M: Tensor) -> Tensor:
    M, D = text_MD.shape
    out_M = torch.empty(M, dtype=torch.float32, device=text_MD.device)
    if M:
        _paired_kernel[-(-M // PAIRED_ROWS),](
            text_MD.contiguous(), bank_QD.contiguous(), rows_M.contiguous(), out_M, M, D,
            BLOCK_R=PAIRED_ROWS, BLOCK_K=PAIRED_K,
        )  # fmt: skip
    return out_M


def _ranks_triton(query_MD: Tensor, bank_QD: Tensor, owners_E: Tensor, rows_E: Tensor) -> Tensor:
    query_MD, bank_QD = aligned(query_MD), aligned(bank_QD)
    M, Q, D, device = len(query_MD), len(bank_QD), query_MD.shape[1], query_MD.device
    tile = TILES[query_MD.element_size()]
    options = {**tile._asdict(), "UPCAST": interpreted()}
    scores_E = torch.empty(len(rows_E), dtype=torch.float32, device=device)
    _positive_kernel[-(-len(rows_E) // tile.BLOCK),](
        query_MD, bank_QD, owners_E, rows_E, scores_E, len(rows_E), D, **options,
    )  # fmt: skip
    best_M = _best(scores_E, owners_E, M)
    ranks_M = torch.empty(M, dtype=torch.float64, device=device)
    tiles = -(-Q // tile.BLOCK)
    for start in range(0, M, SLAB_ROWS):
        slab = slice(start, min(start + SLAB_ROWS, M))
        rows = slab.stop - start
        low, high = torch.searchsorted(owners_E, torch.tensor([start, slab.stop], device=device)).tolist()
        cells = by_tile(owners_E[low:high] - start, rows_E[low:high], rows, Q, tile.BLOCK)
        blocks = -(-rows // tile.BLOCK)
        strip_tiles = -(-tiles // min(tiles, max(1, PROGRAMS // blocks)))
        strips = -(-tiles // strip_tiles)
        counts = torch.empty(strips, rows, dtype=torch.int32, device=device)
        _count_kernel[blocks, strips](
            query_MD[slab], bank_QD, best_M[slab], counts, *cells, rows, Q, D, strip_tiles, **options,
        )  # fmt: skip
        ranks_M[slab] = 1 + counts.sum(0).double() / 2
    return ranks_M


def _best(scores_E: Tensor, owners_E: Tensor, M: int) -> Tensor:
    best_M = torch.full((M,), -math.inf, dtype=torch.float32, device=scores_E.device)
    return best_M.scatter_reduce_(0, owners_E, scores_E, "amax")


# Chunked path


def _chunks(total: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, total)) for start in range(0, total, size))


class _Panels:
    """Walks fp32 scores tile by tile, each the rounded fp64 product, in buffers that all tiles share."""

    def __init__(self, query_MD: Tensor, bank_QD: Tensor) -> None:
        self.query_MD, self.bank_QD = query_MD, bank_QD
        self.row_step = max(1, min(TILE_ROWS, len(query_MD)))
        # Few queries do not make panels ever wider: a panel is held in fp64.
        self.col_step = max(1, TILE_CELLS // max(self.row_step, TILE_ROWS))
        width, D = min(self.col_step, len(bank_QD)), query_MD.shape[1]
        self.query_RD, self.panel_CD = (
            torch.empty(size, D, dtype=torch.float64, device=query_MD.device) for size in (self.row_step, width)
        )
        self.product = torch.empty(self.row_step * width, dtype=torch.float64, device=query_MD.device)
        self.scores = torch.empty(self.row_step * width, dtype=torch.float32, device=query_MD.device)

    def __iter__(self) -> Iterator[tuple[int, slice, slice, Tensor]]:
        """(number of the tile, its queries, its bank rows, its scores [R, C]), panel by panel."""
        number = 0
        for cols in _chunks(len(self.bank_QD), self.col_step):
            panel_CD = self.panel_CD[: cols.stop - cols.start].copy_(self.bank_QD[cols])
            for rows in _chunks(len(self.query_MD), self.row_step):
                query_RD = self.query_RD[: rows.stop - rows.start].copy_(self.query_MD[rows])
                size = len(query_RD) * len(panel_CD)
                product_RC = self.product[:size].view(len(query_RD), len(panel_CD))
                torch.mm(query_RD, panel_CD.T, out=product_RC)
                yield number, rows, cols, self.scores[:size].view_as(product_RC).copy_(product_RC)
                number += 1


def _paired_chunked(text_MD: Tensor, bank_QD: Tensor, rows_M: Tensor) -> Tensor:
    dtype = torch.float64 if text_MD.dtype == torch.float64 else torch.float32

    def unit(features_RD: Tensor) -> Tensor:
        features_RD = features_RD.to(dtype)
        top_R1 = features_RD.abs().amax(1, keepdim=True)
        features_RD = features_RD / top_R1.masked_fill_(top_R1 == 0, 1)
        length_R1 = features_RD.norm(dim=1, keepdim=True)
        return features_RD / length_R1.masked_fill_(length_R1 == 0, 1)

    out_M = torch.empty(len(text_MD), dtype=dtype, device=text_MD.device)
    for chunk in _chunks(len(text_MD), CHUNK_ROWS):
        out_M[chunk] = (unit(text_MD[chunk]) * unit(bank_QD.index_select(0, rows_M[chunk]))).sum(1)
    return out_M


def _ranks_chunked(query_MD: Tensor, bank_QD: Tensor, owners_E: Tensor, rows_E: Tensor) -> Tensor:
    M = len(query_MD)
    scores_E = torch.empty(len(rows_E), dtype=torch.float32, device=query_MD.device)
    for chunk in _chunks(len(rows_E), CHUNK_ROWS):
        scores_E[chunk] = (query_MD[owners_E[chunk]].double() * bank_QD[rows_E[chunk]]).sum(1)
    best_M1 = _best(scores_E, owners_E, M)[:, None]
    panels = _Panels(query_MD, bank_QD)
    across = -(-M // panels.row_step)
    tile_E, order_E = (rows_E // panels.col_step * across + owners_E // panels.row_step).sort(stable=True)
    owners_E, rows_E = owners_E[order_E], rows_E[order_E]
    tiles = across * -(-len(bank_QD) // panels.col_step)
    bounds = torch.searchsorted(tile_E, torch.arange(tiles + 1, device=tile_E.device)).tolist()
    doubled_M = torch.zeros(M, dtype=torch.int64, device=query_MD.device)
    for number, rows, cols, scores_RC in panels:
        cells = slice(bounds[number], bounds[number + 1])
        # Positives of a query do not compete with its best one.
        scores_RC[owners_E[cells] - rows.start, rows_E[cells] - cols.start] = -math.inf
        doubled_M[rows] += 2 * (scores_RC > best_M1[rows]).sum(1) + (scores_RC == best_M1[rows]).sum(1)
    return 1 + doubled_M.double() / 2


def _select(scores_RC: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k highest of each row, equal ones by smaller column: scores and columns [R, k]."""
    scores_RK, columns_RK = scores_RC.topk(k, dim=1)
    # torch.topk takes any of those that equal the last one, in any order.
    unclear = ((scores_RC >= scores_RK[:, -1:]).sum(1) > k).nonzero().squeeze(1)
    if len(unclear):
        scores, columns = scores_RC[unclear].sort(dim=1, descending=True, stable=True)
        scores_RK[unclear], columns_RK[unclear] = scores[:, :k], columns[:, :k]
    columns_RK, order_RK = columns_RK.sort(dim=1)
    scores_RK, order_RK = scores_RK.gather(1, order_RK).sort(dim=1, descending=True, stable=True)
    return scores_RK, columns_RK.gather(1, order_RK)


# Validation


def _require_features(name: str, features: Any, like: Tensor | None = None, like_name: str = "") -> None:
    if not isinstance(features, Tensor):
        raise TypeError(f"{name} is a {type(features).__name__}, expected a tensor of features [rows, D]")
    if features.dim() != 2 or features.shape[1] < 1:
        raise ValueError(f"{name} has shape {tuple(features.shape)}, expected [rows, D] with D from 1")
    if features.dtype not in DTYPES:
        raise TypeError(f"{name} is {features.dtype}, expected float16, bfloat16, float32 or float64")
    if like is None:
        return
    if features.shape[1] != like.shape[1]:
        raise ValueError(f"{name} is {features.shape[1]} wide and {like_name} {like.shape[1]}: pass equal widths")
    if features.device != like.device:
        raise ValueError(f"{name} is on {features.device}, expected {like.device}, where {like_name} is")


def _require_one_dtype(bank_QD: Tensor, like: Tensor, like_name: str) -> None:
    if bank_QD.dtype != like.dtype:
        raise TypeError(f"bank_QD is {bank_QD.dtype} and {like_name} is {like.dtype}: cast them to one dtype")


def _require_integers(name: str, values: Any, size: int | None, like: Tensor, meaning: str) -> None:
    if not isinstance(values, Tensor):
        raise TypeError(f"{name} is a {type(values).__name__}, expected an int64 tensor: {meaning}")
    if values.dim() != 1 or (size is not None and len(values) != size):
        expected = "[E]" if size is None else f"[{size}]"
        raise ValueError(f"{name} has shape {tuple(values.shape)}, expected {expected}: {meaning}")
    if values.dtype != torch.int64:
        raise TypeError(f"{name} is {values.dtype}, expected int64: {meaning}")
    if values.device != like.device:
        raise ValueError(f"{name} is on {values.device}, expected {like.device}, where the features are")


def _require_range(name: str, rows: Tensor, bank_QD: Tensor) -> None:
    if len(rows):
        low, high = (int(end) for end in torch.stack(rows.aminmax()).tolist())
        if low < 0 or high >= len(bank_QD):
            raise ValueError(f"{name} spans {low} to {high}, expected 0 to {len(bank_QD) - 1}, the rows of bank_QD")


def _require_finite(name: str, features: Tensor, first: int = 0) -> None:
    for chunk in _chunks(len(features), 1 << 16):
        finite = features[chunk].isfinite().all(1)
        if not bool(finite.all()):
            row = first + chunk.start + int((~finite).nonzero()[0, 0])
            raise ValueError(f"{name} row {row} holds NaN or infinity, expected finite features")


# Public functions


@torch.no_grad()
def paired_similarity(text_MD: Tensor, bank_QD: Tensor, rows_M: Tensor) -> Tensor:
    """Cosine of text i and bank row rows_M[i]; a zero vector's is 0.

    These are the scores by which EfficientCLIP's ensemble confident learning keeps pairs (Wang et al. 2021).
    fp16, bf16 and fp32 on CUDA take one Triton kernel, everything else chunks of torch. No gradient.

    Args:
        text_MD: [M, D] fp16, bf16, fp32 or fp64, of any length.
        bank_QD: [Q, D], same dtype and device.
        rows_M: [M] int64 in [0, Q).

    Returns:
        [M] fp32, fp64 for fp64 features; NaN where a feature is not finite.

    Raises:
        TypeError, ValueError: before any compute, an argument of the wrong kind, shape, device, dtype or
        range.
    """
    _require_features("text_MD", text_MD)
    _require_features("bank_QD", bank_QD, text_MD, "text_MD")
    _require_one_dtype(bank_QD, text_MD, "text_MD")
    _require_integers("rows_M", rows_M, len(text_MD), text_MD, "one bank row a text")
    _require_range("rows_M", rows_M, bank_QD)
    with torch.cuda.device_of(text_MD):
        return (_paired_triton if uses_triton(text_MD) else _paired_chunked)(text_MD, bank_QD, rows_M)


@torch.no_grad()
def positive_ranks(query_MD: Tensor, bank_QD: Tensor, rows_E: Tensor, groups: Tensor) -> Tensor:
    """Rank of each query's best positive: 1 + bank rows that beat it + half of those that equal it.

    Scores are dot products in fp32. The query's other positives do not compete, whatever they score; with one
    positive this is the expected rank under random order of ties. Chunks of torch round an fp64 product, so
    equal bank rows tie; fp16, bf16 and fp32 on CUDA take Triton kernels that add in fp32 (fp32 features by
    3xTF32), where the positive's score comes from a tile of the same arithmetic. Both are deterministic.

    Args:
        query_MD: [M, D] fp16, bf16, fp32 or fp64, used as given.
        bank_QD: [Q, D], same dtype and device.
        rows_E: [E] int64 in [0, Q): the positives of query 0, then of query 1, and so on; repeats count once.
        groups: [M + 1] int64: those of query i are rows_E[groups[i] : groups[i + 1]], at least one (a CSR
            graph's offsets).

    Returns:
        [M] fp64.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, device, dtype or range, a query without
        positives, or a row that is not finite, which is named.
    """
    _require_features("query_MD", query_MD)
    _require_features("bank_QD", bank_QD, query_MD, "query_MD")
    _require_one_dtype(bank_QD, query_MD, "query_MD")
    _require_integers("rows_E", rows_E, None, query_MD, "the positives of all queries")
    _require_integers("groups", groups, len(query_MD) + 1, query_MD, "where each query's positives begin")
    if int(groups[0]) != 0 or int(groups[-1]) != len(rows_E):
        raise ValueError(f"groups runs from {int(groups[0])} to {int(groups[-1])}, expected 0 to {len(rows_E)}")
    sizes_M = groups.diff()
    if bool((sizes_M < 1).any()):
        query = int((sizes_M < 1).nonzero()[0, 0])
        raise ValueError(f"query {query} has no positive, expected at least one: leave such queries out")
    _require_range("rows_E", rows_E, bank_QD)
    _require_finite("query_MD", query_MD)
    _require_finite("bank_QD", bank_QD)
    if not len(query_MD):
        return torch.empty(0, dtype=torch.float64, device=query_MD.device)
    owners_E = torch.arange(len(query_MD), device=query_MD.device).repeat_interleave(sizes_M)
    cells_E = (owners_E * len(bank_QD) + rows_E).unique()
    owners_E, rows_E = cells_E // len(bank_QD), cells_E % len(bank_QD)
    with torch.cuda.device_of(query_MD):
        return (_ranks_triton if uses_triton(query_MD) else _ranks_chunked)(query_MD, bank_QD, owners_E, rows_E)


@torch.no_grad()
def top_k(query_MD: Tensor, bank_QD: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k bank rows nearest to each query by dot product, best first; equal ones by smaller row.

    Streamed over panels of the bank, so that a memory-mapped bank is read once; chunks of torch on every device.

    Args:
        query_MD: [M, D] fp16, bf16, fp32 or fp64, used as given.
        bank_QD: [Q, D] on the same device, of any of these dtypes.
        k: from 1 to Q.

    Returns:
        (scores [M, k] fp32, the fp64 dot products rounded once; rows [M, k] int64).

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, device, dtype or range, or a row that is
        not finite, which is named.
    """
    _require_features("query_MD", query_MD)
    _require_features("bank_QD", bank_QD, query_MD, "query_MD")
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"k is a {type(k).__name__}, expected an int from 1 to {len(bank_QD)}")
    if not 1 <= k <= len(bank_QD):
        raise ValueError(f"k is {k} and bank_QD has {len(bank_QD)} rows: pass a k from 1 to len(bank_QD)")
    _require_finite("query_MD", query_MD)
    M, device = len(query_MD), query_MD.device
    scores_MK = torch.empty(M, k, dtype=torch.float32, device=device)
    rows_MK = torch.empty(M, k, dtype=torch.int64, device=device)
    for _, rows, cols, tile_RC in _Panels(query_MD, bank_QD):
        if rows.start == 0:
            _require_finite("bank_QD", bank_QD[cols], cols.start)
        held = min(k, cols.start)
        scores, columns = _select(tile_RC, min(k, tile_RC.shape[1]))
        # Rows held so far are the smaller ones: a stable sort keeps them first among equals.
        scores = torch.cat([scores_MK[rows, :held], scores], 1)
        columns = torch.cat([rows_MK[rows, :held], columns + cols.start], 1)
        scores, order = scores.sort(dim=1, descending=True, stable=True)
        now = min(k, cols.stop)
        scores_MK[rows, :now], rows_MK[rows, :now] = scores[:, :now], columns.gather(1, order[:, :now])
    return scores_MK, rows_MK
