"""Retrieval measures: recall@k and mean rank, with several right answers allowed."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from efficientclip.kernels import positive_ranks

from ..errors import UserError

Ranks = npt.NDArray[np.float64]
CUTOFFS = (1, 5, 10)


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
    device = "cuda" if torch.cuda.is_available() else "cpu"
    query, candidate, groups, rows = (
        torch.from_numpy(array).to(device)
        # A store's edges are mapped read-only, which torch warns of.
        for array in (query_ND, candidate_KD, np.array(indptr), indices.astype(np.int64))
    )
    try:
        return positive_ranks(query, candidate, rows, groups).cpu().numpy()
    except ValueError as error:
        raise UserError(f"retrieval: {error}; the model or the store is broken") from error


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
