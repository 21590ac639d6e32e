"""Retrieval measures: recall@k, mean and median rank, with several right answers allowed."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from efficientclip.kernels import positive_ranks

from ..data.store import Edges, first_not_finite, ranges
from ..errors import UserError

Ranks = npt.NDArray[np.float64]
Features = npt.NDArray[np.float16] | npt.NDArray[np.float32]
CUTOFFS = (1, 5, 10)
QUERIES_AT_ONCE = 1 << 15


def best_ranks(
    query_ND: Features, candidate_KD: Features, positives: Edges, asked: npt.NDArray[np.int64] | None = None
) -> Ranks:
    """Rank of each query's best positive: 1 + candidates that beat it + half of those that equal it.

    `positives` is a CSR graph query -> candidates; other positives of the query do not compete. `asked`: rows of the
    queries to rank, in their order, else all. Features may be mapped; QUERIES_AT_ONCE of the queries are held. A query
    without any positive, or a feature that is not finite, is a UserError.
    """
    indptr, indices = positives
    device = "cuda" if torch.cuda.is_available() else "cpu"
    candidate = read_only(candidate_KD).to(device)
    n = len(query_ND) if asked is None else len(asked)
    ranks = np.empty(n)
    for start in range(0, n, QUERIES_AT_ONCE):
        block = slice(start, min(start + QUERIES_AT_ONCE, n))
        rows = np.arange(block.start, block.stop) if asked is None else asked[block]
        sizes = indptr[rows + 1] - indptr[rows]
        groups = np.concatenate([[0], np.cumsum(sizes)])
        linked = indices[ranges(indptr[rows], sizes)].astype(np.int64)
        query = query_ND[block] if asked is None else query_ND[rows]
        if (wrong := first_not_finite(query)) is not None:
            raise UserError(f"retrieval: query {rows[wrong]} holds NaN or infinity; the model or the store is broken")
        given = (read_only(array).to(device) for array in (query, linked, groups))
        try:
            ranks[block] = positive_ranks(next(given), candidate, *given).cpu().numpy()
        except ValueError as error:
            raise UserError(f"retrieval: {error}; the model or the store is broken") from error
    return ranks


def read_only(array: npt.NDArray[Any]) -> torch.Tensor:
    """The same memory, a store's mapped features and edges for instance, which nobody writes to."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(array)


def summary(ranks: Ranks) -> dict[str, float]:
    """Recall@1/5/10 and their mean in per cent, mean and median rank, and the number of queries."""
    recalls = {f"R@{k}": float((ranks <= k).mean() * 100) for k in CUTOFFS}
    measures = {
        **recalls,
        "mean_recall": sum(recalls.values()) / len(recalls),
        "mean_rank": float(ranks.mean()),
        "median_rank": float(np.median(ranks)),
    }
    return {**{name: round(value, 2) for name, value in measures.items()}, "queries": len(ranks)}


def retrieval_report(
    text_ND: Features,
    image_KD: Features,
    text_edges: Edges,
    image_edges: Edges,
    queries: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Both directions: {"t2i": …, "i2t": …, "candidates": images, "texts": texts}.

    An image without text, and a text without image, is a candidate for the others but no query. `queries`: as many
    are drawn of each direction by `seed`, if there are more; all images and texts stay candidates.
    """
    return {
        "t2i": summary(best_ranks(text_ND, image_KD, text_edges, _asked(text_edges, queries, seed))),
        "i2t": summary(best_ranks(image_KD, text_ND, image_edges, _asked(image_edges, queries, seed))),
        "candidates": len(image_KD),
        "texts": len(text_ND),
    }


def _asked(edges: Edges, most: int | None, seed: int) -> npt.NDArray[np.int64]:
    """The queries that have an answer, or `most` of them, ascending."""
    asked = np.flatnonzero(np.diff(edges[0]))
    if most is None or len(asked) <= most:
        return asked
    return np.sort(np.random.default_rng(seed).choice(asked, most, replace=False))
