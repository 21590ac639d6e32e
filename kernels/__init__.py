"""Fused losses and scores: each with a naive reference, a chunked path and a public function."""

if __name__ == "kernels":
    # In a checkout's root, transformers' `import kernels` finds this folder instead of Hugging Face's package. A second
    # import would register the operators anew and free those that the first one calls.
    raise ImportError("this package is efficientclip.kernels")

from .contrastive import ContrastiveOutput, contrastive_loss, contrastive_loss_naive, explain
from .sigmoid import sigmoid_loss, sigmoid_loss_naive
from .similarity import paired_similarity, positive_ranks, top_k

__all__ = [
    "ContrastiveOutput",
    "contrastive_loss",
    "contrastive_loss_naive",
    "explain",
    "paired_similarity",
    "positive_ranks",
    "sigmoid_loss",
    "sigmoid_loss_naive",
    "top_k",
]
