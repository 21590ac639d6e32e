"""Retrieval measures: recall@k and mean rank, with several right answers allowed."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import UserError

Ranks = npt.NDArray[np.float64]
CUTOFFS = (1, 5, 10)
QUERY_CHUNK = 512


def best_ranks(
    query_ND: npt.NDArray[np.float32],
    candidate_KD: npt.NDArray[np.float32],
    positives: tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]],
) -> Ranks:
    """Rank of each query's best positive: 1 + candidates that beat it + half of those that equal it.

    `positives` is a CSR graph query -> candidates; other positives of the query do not compete. A query without any
    positive, or a feature that is not finite, is a UserError.
    """
    indptr, indices = positives
    if not (np.isfinite(query_ND).all() and np.isfinite(candidate_KD).all()):
        raise UserError("features: NaN or infinity among the queries or candidates; the model or the store is broken")
    if (np.diff(indptr) == 0).any():
        raise UserError(f"query {int(np.flatnonzero(np.diff(indptr) == 0)[0])}: no right answer among the candidates")
    ranks = np.empty(len(query_ND))
    for start in range(0, len(query_ND), QUERY_CHUNK):
        stop = min(start + QUERY_CHUNK, len(query_ND))
        similarity = query_ND[start:stop] @ candidate_KD.T
        lengths = np.diff(indptr[start : stop + 1])
        owner = np.repeat(np.arange(stop - start), lengths)
        right = indices[indptr[start] : indptr[stop]]
        best = np.full(stop - start, -np.inf)
        np.maximum.at(best, owner, similarity[owner, right])
        similarity[owner, right] = -np.inf
        ranks[start:stop] = 1 + (similarity > best[:, None]).sum(1) + (similarity == best[:, None]).sum(1) / 2
    return ranks


def summary(ranks: Ranks) -> dict[str, float]:
    """Recall@1/5/10 in per cent, mean rank, and the number of queries."""
    recalls = {f"R@{k}": round(float((ranks <= k).mean() * 100), 2) for k in CUTOFFS}
    return {**recalls, "mean_rank": round(float(ranks.mean()), 2), "queries": len(ranks)}


def retrieval_report(
    text_ND: npt.NDArray[np.float32],
    image_KD: npt.NDArray[np.float32],
    text_edges: tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]],
    image_edges: tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]],
) -> dict[str, Any]:
    """Both directions: {"t2i": …, "i2t": …, "candidates": images, "texts": texts}."""
    return {
        "t2i": summary(best_ranks(text_ND, image_KD, text_edges)),
        "i2t": summary(best_ranks(image_KD, text_ND, image_edges)),
        "candidates": len(image_KD),
        "texts": len(text_ND),
    }
