"""Retrieval measures: recall@k, mean and median rank, with several right answers allowed."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from efficientclip.kernels import positive_ranks

from ..data.store import Edges
from ..errors import UserError

Ranks = npt.NDArray[np.float64]
Features = npt.NDArray[np.float16] | npt.NDArray[np.float32]
CUTOFFS = (1, 5, 10)


def best_ranks(
    query_ND: Features,
    candidate_KD: Features,
    positives: Edges,
) -> Ranks:
    """Rank of each query's best positive: 1 + candidates that beat it + half of those that equal it.

    `positives` is a CSR graph query -> candidates; other positives of the query do not compete. A query without any
    positive, or a feature that is not finite, is a UserError.
    """
    indptr, indices = positives
    device = "cuda" if torch.cuda.is_available() else "cpu"
    query, candidate, groups, rows = (
        read_only(array).to(device) for array in (query_ND, candidate_KD, indptr, indices.astype(np.int64))
    )
    try:
        return positive_ranks(query, candidate, rows, groups).cpu().numpy()
    except ValueError as error:
        raise UserError(f"retrieval: {error}; the model or the store is broken") from error


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


def retrieval_report(text_ND: Features, image_KD: Features, text_edges: Edges, image_edges: Edges) -> dict[str, Any]:
    """Both directions: {"t2i": …, "i2t": …, "candidates": images, "texts": texts}.

    An image without text, and a text without image, is a candidate for the others but no query.
    """
    return {
        "t2i": summary(best_ranks(*_queries(text_ND, text_edges, image_KD))),
        "i2t": summary(best_ranks(*_queries(image_KD, image_edges, text_ND))),
        "candidates": len(image_KD),
        "texts": len(text_ND),
    }


def _queries(query_ND: Features, edges: Edges, candidate_KD: Features) -> tuple[Features, Features, Edges]:
    indptr, indices = edges
    asked = np.diff(indptr) > 0
    return query_ND[asked], candidate_KD, (np.concatenate([indptr[:1], indptr[1:][asked]]), indices)
