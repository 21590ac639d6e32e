"""Fused losses and scores: each with a naive reference, a chunked path and a public function."""

from .contrastive import ContrastiveOutput, contrastive_loss, contrastive_loss_naive, explain

__all__ = ["ContrastiveOutput", "contrastive_loss", "contrastive_loss_naive", "explain"]
