"""Packed attention: texts lie one behind the other in a single row, so no slot is computed for padding.

Any Hugging Face tower that takes its attention from `AttentionInterface` runs on packed rows unchanged: the segments
travel through the model's keyword arguments, positions restart at each text.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface

from ..data.batches import Segments

NAME = "efficientclip_packed"


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    segments: Segments,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention within each text of a packed row. Query, key, value [1, heads, T, d]; result [1, T, heads, d].

    The caller's `is_causal` goes before the module's: CLIP's layers are told by their encoder.
    """
    causal = bool(getattr(module, "is_causal", False) if is_causal is None else is_causal)
    q_THD, k_THD, v_THD = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    # Flash attention takes half precision alone.
    if query.is_cuda and query.dtype != torch.float32:
        from torch.nn.attention.varlen import varlen_attn

        q, k, v = (x.contiguous() for x in (q_THD, k_THD, v_THD))
        cu, longest = segments.cu_seqlens, segments.longest
        window = (-1, 0) if causal else (-1, -1)
        on_gpu: Any = varlen_attn(q, k, v, cu, cu, longest, longest, scale=scaling, window_size=window)
        return on_gpu[None], None
    # Split once: the gradient of a slice is as long as the row, and there are as many slices as lengths.
    sizes = [texts * length for _, texts, length in segments.groups]
    parts = zip(*(x.split(sizes) for x in (q_THD, k_THD, v_THD)), strict=True)
    # On CPUs backward takes three to five times as long in half precision as in fp32, the casts included.
    wide = torch.promote_types(query.dtype, torch.float32) if query.device.type == "cpu" else query.dtype
    pieces = []
    with nullcontext() if wide == query.dtype else torch.autocast("cpu", enabled=False):
        for (_start, texts, length), part in zip(segments.groups, parts, strict=True):
            q, k, v = (x.unflatten(0, (texts, length)).transpose(1, 2).to(wide) for x in part)
            attended = F.scaled_dot_product_attention(q, k, v, scale=scaling, is_causal=causal, dropout_p=dropout)
            pieces.append(attended.transpose(1, 2).to(query.dtype).flatten(0, 1))
    return torch.cat(pieces)[None], None


def _no_mask(*_: Any, **__: Any) -> None:
    """Segments replace the mask."""


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, _no_mask)
