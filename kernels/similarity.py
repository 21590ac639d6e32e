"""Scores against a bank of features, with no M x Q matrix: cosines of pairs, ranks of positives, nearest rows.

Cost model of the chunked path, for M queries, Q bank rows, width D and E positives (for CUDA see `triton.similarity`):

- `paired_similarity`: a few chunks of `CHUNK_ROWS` rows in fp32.
- `positive_ranks`: one product of M Q D multiply-adds, plus E D for the positives; workspace two tiles of `TILE_CELLS`
  scores and one panel of the bank in fp64.
- `top_k`: one product of M Q D, rough in fp32 on CPUs, and again in fp64 for the bank rows that it leaves in doubt, few
  behind the first panels; workspace a panel of the bank, a tile of `TILE_CELLS` rough scores, and 12 M k bytes.

Scores are products in fp64, rounded to fp32 once: that costs 1.7 times an fp32 product on a CPU, and makes equal bank
rows score equally wherever in a panel they lie.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .contract import accumulated, require_features, require_finite, require_integers, require_range
from .paths import no_kernels, takes_kernels

# 16 MB of fp64 scores stay in the last-level cache.
TILE_CELLS = 1 << 21
TILE_ROWS = 512
CHUNK_ROWS = 4096
# 1 MB of fp32, a core's share of a panel that is converted and used once, stays in the core's own cache.
PANEL_CELLS = 1 << 18


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
    dtype = accumulated(text_MD.dtype)

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
    best_M1 = torch.full((M, 1), -math.inf, dtype=torch.float32, device=query_MD.device)
    best_M1[:, 0].scatter_reduce_(0, owners_E, scores_E, "amax")
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


def _rough_dtype(query_MD: Tensor, bank_QD: Tensor) -> torch.dtype:
    """Of products whose error is known, and that cost least: no TF32 on CUDA, no bf16 in their place on CPUs."""
    wide = torch.float64 in (query_MD.dtype, bank_QD.dtype) or query_MD.device.type != "cpu"
    whole = torch.backends.mkldnn.matmul.fp32_precision in ("none", "ieee")  # type: ignore[attr-defined]
    return torch.float32 if whole and not wide else torch.float64


def _nearest_chunked(query_MD: Tensor, bank_QD: Tensor, k: int) -> tuple[Tensor, Tensor]:
    (M, D), device, dtype = query_MD.shape, query_MD.device, _rough_dtype(query_MD, bank_QD)
    row_step = max(1, min(TILE_ROWS, M))
    cells = PANEL_CELLS * torch.get_num_threads() if device.type == "cpu" else TILE_CELLS
    col_step = max(1, min(cells // D, TILE_CELLS // row_step, len(bank_QD)))
    buffer_CD = torch.empty(col_step, D, dtype=dtype, device=device)
    tile = torch.empty(row_step * col_step, dtype=dtype, device=device)
    scores_MK = torch.empty(M, k, dtype=torch.float32, device=device)
    rows_MK = torch.empty(M, k, dtype=torch.int64, device=device)
    # What rounding, here and of the exact score to fp32, may add to or take from a score, for a bank row of length 1.
    rounding = D * torch.finfo(dtype).eps + 4 * torch.finfo(torch.float32).eps
    error_M1 = query_MD.double().norm(dim=1, keepdim=True) * rounding
    for cols in _chunks(len(bank_QD), col_step):
        panel_CD = buffer_CD[: cols.stop - cols.start].copy_(bank_QD[cols])
        longest = torch.linalg.vector_norm(panel_CD, dim=1).amax()
        # Infinite too where squares overflow; then all rows are in doubt.
        if not math.isfinite(longest.item()):
            require_finite("bank_QD", bank_QD[cols], cols.start)
        held = min(k, cols.start)
        for rows in _chunks(M, row_step):
            query_RD = query_MD[rows].to(dtype)
            rough_RC = torch.mm(query_RD, panel_CD.T, out=tile[: len(query_RD) * len(panel_CD)].view(-1, len(panel_CD)))
            error_R1 = (error_M1[rows] * longest + D * torch.finfo(dtype).tiny).to(dtype)
            if held == k:
                least_R1 = scores_MK[rows, -1:] - error_R1
            elif k <= len(panel_CD):
                least_R1 = rough_RC.topk(k, dim=1).values[:, -1:] - 2 * error_R1
            else:
                least_R1 = torch.full_like(error_R1, -math.inf)
            # Not `>=`: a rough score that overflowed to NaN is in doubt.
            near_C = (~(rough_RC < least_R1)).any(0).nonzero().squeeze(1)
            if not len(near_C):
                continue
            exact_RC = (query_MD[rows].double() @ panel_CD[near_C].double().T).float()
            scores, columns = _select(exact_RC, min(k, len(near_C)))
            # Rows held so far are the smaller ones: a stable sort keeps them first among equals.
            scores = torch.cat([scores_MK[rows, :held], scores], 1)
            columns = torch.cat([rows_MK[rows, :held], near_C[columns] + cols.start], 1)
            scores, order = scores.sort(dim=1, descending=True, stable=True)
            now = min(k, cols.stop)
            scores_MK[rows, :now], rows_MK[rows, :now] = scores[:, :now], columns.gather(1, order[:, :now])
    return scores_MK, rows_MK


# Public functions


@torch.no_grad()
def paired_similarity(text_MD: Tensor, bank_QD: Tensor, rows_M: Tensor) -> Tensor:
    """Cosine of text i and bank row rows_M[i]; a zero vector's is 0.

    These are the scores by which EfficientCLIP's ensemble confident learning keeps pairs (Wang et al. 2021).
    fp16, bf16 and fp32 on CUDA take one Triton kernel, everything else chunks of torch. No gradient.

    Args:
        text_MD: [M, D] fp16, bf16, fp32 or fp64, of any length.
        bank_QD: [Q, D] on the same device, of any of these dtypes.
        rows_M: [M] int64 in [0, Q).

    Returns:
        [M] fp32, fp64 for fp64 features; NaN where a feature is not finite.

    Raises:
        TypeError, ValueError: before any compute, an argument of the wrong kind, shape, device, dtype or
        range.
    """
    require_features("text_MD", text_MD)
    require_features("bank_QD", bank_QD, text_MD, "text_MD")
    require_integers("rows_M", rows_M, len(text_MD), text_MD, "one bank row a text")
    require_range("rows_M", rows_M, bank_QD)
    with torch.cuda.device_of(text_MD):
        if takes_kernels(text_MD, "paired_similarity", no_kernels(text_MD) or no_kernels(bank_QD)):
            from .triton.similarity import paired

            return paired(text_MD, bank_QD, rows_M)
        return _paired_chunked(text_MD, bank_QD, rows_M)


@torch.no_grad()
def positive_ranks(query_MD: Tensor, bank_QD: Tensor, rows_E: Tensor, groups: Tensor) -> Tensor:
    """Rank of each query's best positive: 1 + bank rows that beat it + half of those that equal it.

    Scores are dot products in fp32. The query's other positives do not compete, whatever they score; with one
    positive this is the expected rank under random order of ties. Chunks of torch round an fp64 product, so
    equal bank rows tie; fp16, bf16 and fp32 on CUDA take Triton kernels that add in fp32 (fp32 features by
    3xTF32, and so those of different dtypes), where the positive's score comes from a tile of the same arithmetic. Both
    are deterministic.

    Args:
        query_MD: [M, D] fp16, bf16, fp32 or fp64, used as given.
        bank_QD: [Q, D] on the same device, of any of these dtypes.
        rows_E: [E] int64 in [0, Q): the positives of query 0, then of query 1, and so on; repeats count once.
        groups: [M + 1] int64: those of query i are rows_E[groups[i] : groups[i + 1]], at least one (a CSR
            graph's offsets).

    Returns:
        [M] fp64.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, device, dtype or range, a query without
        positives, or a row that is not finite, which is named.
    """
    require_features("query_MD", query_MD)
    require_features("bank_QD", bank_QD, query_MD, "query_MD")
    require_integers("rows_E", rows_E, None, query_MD, "the positives of all queries")
    require_integers("groups", groups, len(query_MD) + 1, query_MD, "where each query's positives begin")
    if int(groups[0]) != 0 or int(groups[-1]) != len(rows_E):
        raise ValueError(f"groups runs from {int(groups[0])} to {int(groups[-1])}, expected 0 to {len(rows_E)}")
    sizes_M = groups.diff()
    if bool((sizes_M < 1).any()):
        query = int((sizes_M < 1).nonzero()[0, 0])
        raise ValueError(f"query {query} has no positive, expected at least one: leave such queries out")
    require_range("rows_E", rows_E, bank_QD)
    require_finite("query_MD", query_MD)
    require_finite("bank_QD", bank_QD)
    if not len(query_MD):
        return torch.empty(0, dtype=torch.float64, device=query_MD.device)
    owners_E = torch.arange(len(query_MD), device=query_MD.device).repeat_interleave(sizes_M)
    cells_E = (owners_E * len(bank_QD) + rows_E).unique()
    owners_E, rows_E = cells_E // len(bank_QD), cells_E % len(bank_QD)
    with torch.cuda.device_of(query_MD):
        if takes_kernels(query_MD, "positive_ranks", no_kernels(query_MD) or no_kernels(bank_QD)):
            from .triton.similarity import ranks

            return ranks(query_MD, bank_QD, owners_E, rows_E)
        return _ranks_chunked(query_MD, bank_QD, owners_E, rows_E)


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
    require_features("query_MD", query_MD)
    require_features("bank_QD", bank_QD, query_MD, "query_MD")
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"k is a {type(k).__name__}, expected an int from 1 to {len(bank_QD)}")
    if not 1 <= k <= len(bank_QD):
        raise ValueError(f"k is {k} and bank_QD has {len(bank_QD)} rows: pass a k from 1 to len(bank_QD)")
    require_finite("query_MD", query_MD)
    return _nearest_chunked(query_MD, bank_QD, k)
