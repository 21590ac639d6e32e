"""Fused losses and scores: each with a naive reference, a chunked path, Triton kernels and a public function.

From the bottom up; an import never points up, and `triton` is loaded only where its kernels run:

- `contract`: what arguments mean and what is refused, what operators are told, what comes out;
- `paths`: Triton or chunked torch, and why;
- `chunked`: the tiles of both losses in plain torch;
- `triton/`: `tuning` (the table of every chip), `tiles` (blocks, products, ids and cells of a tile), `cells` (ids and
  excluded cells as kernels read them), and the kernels of `contrastive`, `sigmoid` and `similarity`;
- `operators`: a loss's operators of torch, their fakes and gradients;
- `ranks`: exchange over ranks, and a loss's sums over the images of all;
- `contrastive`, `sigmoid`, `similarity`: references, choice of the path, public functions.
"""

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
