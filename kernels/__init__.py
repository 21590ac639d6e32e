"""Fused losses and scores: each has a naive reference, a chunked path, an autograd function and a public function."""

from .contrastive import ContrastiveOutput, contrastive_loss, contrastive_loss_naive, explain

__all__ = ["ContrastiveOutput", "contrastive_loss", "contrastive_loss_naive", "explain"]
