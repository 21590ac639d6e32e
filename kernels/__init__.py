"""Fused losses and scores: each with a naive reference, a chunked path and a public function."""

# In a checkout's root, transformers looks for Hugging Face's package `kernels` and imports this folder. A second import
# of what is in it would register the operators anew and free those that the first one calls: it gets an empty package.
if __name__ != "kernels":
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
