"""Towers: any Hugging Face image or text model, with a projection into the shared space."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from difflib import get_close_matches
from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    ChineseCLIPTextConfig,
    ChineseCLIPTextModel,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.bert.modeling_bert import BertLMPredictionHead

from ..data.batches import Segments
from ..errors import UserError
from . import packed
from .published import EfficientCLIPTextConfig, EfficientCLIPTextModel

# Hugging Face knows Chinese-CLIP's text half only as a part of the whole.
AutoModel.register(ChineseCLIPTextConfig, ChineseCLIPTextModel, exist_ok=True)
AutoConfig.register(EfficientCLIPTextConfig.model_type, EfficientCLIPTextConfig)
AutoModel.register(EfficientCLIPTextConfig, EfficientCLIPTextModel)


class ImageTower(nn.Module):
    """Pixels float [M, 3, S, S] to L2-normalised features [M, width].

    The pooled output is projected by a linear layer, CLIP's own or a new one; a model of two towers that has none
    (SigLIP) answers by its `get_image_features`.
    """

    def __init__(self, config: PreTrainedConfig, width: int, backbone: PreTrainedModel | None = None) -> None:
        super().__init__()
        self.backbone = backbone if backbone is not None else AutoModel.from_config(config)
        self.projection = None if hasattr(self.backbone, "get_image_features") else nn.LazyLinear(width, bias=False)
        if self.projection is not None:
            self._materialise(config)

    @torch.no_grad()
    def _materialise(self, config: PreTrainedConfig) -> None:
        size = getattr(config, "image_size", 64)
        training = self.training
        self.eval()
        self.forward(torch.zeros(1, 3, size, size))
        self.train(training)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        # Channels last makes convolutions 1.4 times as fast on CPUs, and is what tensor cores read.
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        if self.projection is None:
            encode: Any = self.backbone.get_image_features
            output = encode(pixel_values=pixels)
            features = getattr(output, "pooler_output", output)
        else:
            features = self.projection(self.backbone(pixel_values=pixels).pooler_output.flatten(1))
        return F.normalize(features.float(), dim=-1)


class TextTower(nn.Module):
    """Packed tokens to L2-normalised text features [texts, width] and vocabulary logits at chosen positions."""

    def __init__(
        self,
        config: PreTrainedConfig,
        width: int,
        pooling: Literal["cls", "mean", "last"],
        backbone: PreTrainedModel | None = None,
    ) -> None:
        super().__init__()
        if backbone is None:
            without_dropout(config)
            backbone = AutoModel.from_config(config, attn_implementation=packed.NAME, **without_pooler(config))
        if not backbone._supports_attention_backend:
            raise UserError(f"model.text_tower: a {config.model_type} cannot attend within packed texts; choose a BERT")
        self.backbone = backbone
        self.pooling = pooling
        self.projection = nn.Linear(config.hidden_size, width, bias=False)
        self.mlm_head = BertLMPredictionHead(config)
        # BERT's head has this bias twice; the decoder adds its own.
        self.mlm_head.register_parameter("bias", None)
        self.mlm_head.decoder.weight = self.backbone.get_input_embeddings().weight  # type: ignore[assignment]
        # RoBERTa counts positions from behind its padding index.
        table = getattr(getattr(backbone, "embeddings", None), "position_embeddings", None)
        padding = getattr(table, "padding_idx", None)
        self.first_position = 0 if padding is None else padding + 1
        table = getattr(backbone, "position_embedding", table)
        # The longest text it has positions for; None where they are not learned one by one.
        self.positions: int | None = (
            table.num_embeddings - self.first_position if isinstance(table, nn.Embedding) else None
        )

    def states(self, input_ids_T: torch.Tensor, position_ids_T: torch.Tensor, segments: Segments) -> torch.Tensor:
        """Hidden states [T, hidden] of one packed row."""
        output = self.backbone(
            input_ids=input_ids_T[None],
            position_ids=position_ids_T[None] + self.first_position,
            token_type_ids=torch.zeros_like(input_ids_T)[None],
            segments=segments,
        )
        states_TH: torch.Tensor = output.last_hidden_state[0]
        return states_TH

    def pool(self, states_TH: torch.Tensor, segments: Segments, texts: torch.Tensor) -> torch.Tensor:
        """Features [len(texts), width] of the texts at the given segment numbers."""
        starts, ends = segments.cu_seqlens[:-1].long(), segments.cu_seqlens[1:].long()
        if self.pooling == "cls":
            pooled = F.embedding(starts[texts], states_TH)
        elif self.pooling == "last":
            pooled = F.embedding(ends[texts] - 1, states_TH)
        else:
            lengths = ends - starts
            owner = torch.repeat_interleave(torch.arange(len(lengths), device=starts.device), lengths)
            sums = states_TH.new_zeros(len(lengths), states_TH.shape[1]).index_add(0, owner, states_TH)
            pooled = F.embedding(texts, sums / lengths[:, None])
        return F.normalize(self.projection(pooled).float(), dim=-1)

    def vocabulary_logits(self, states_TH: torch.Tensor, positions_K: torch.Tensor) -> torch.Tensor:
        """Logits [K, vocabulary] at the masked positions alone."""
        logits: torch.Tensor = self.mlm_head(F.embedding(positions_K, states_TH))
        return logits


def without_dropout(config: PreTrainedConfig) -> None:
    """Dropout off: masks drawn per rank would make 2 ranks differ from 1; ECL and MLM regularise."""
    for part in (config, *(getattr(config, name) for name in config.sub_configs)):
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "attention_dropout", "dropout"):
            if hasattr(part, name):
                setattr(part, name, 0.0)


def without_pooler(config: PreTrainedConfig) -> dict[str, Any]:
    """BERT's unused pooler would be a parameter without gradient."""
    pooled = {"bert", "roberta", "xlm-roberta", "chinese_clip_text_model"}
    return {"add_pooling_layer": False} if config.model_type in pooled else {}


def architecture(description: dict[str, Any], **extra: Any) -> PreTrainedConfig:
    """The Hugging Face config that `architecture` in the YAML, or a saved config's `to_dict`, describes."""
    arguments = {**extra, **description}
    name = arguments.pop("model_type")
    if name not in CONFIG_MAPPING:
        raise UserError(f"architecture: no model_type {name!r}{_nearest(name, CONFIG_MAPPING.keys())}")
    try:
        config: PreTrainedConfig = AutoConfig.for_model(name, **arguments)
    except (ValueError, TypeError, AttributeError, StrictDataclassError) as error:
        raise UserError(f"architecture {name}: {error}") from error
    # Hugging Face keeps any key; a saved config may hold some of another version.
    if "transformers_version" not in description:
        for key in sorted(arguments.keys() & vars(config).keys() - _keys(name)):
            raise UserError(f"architecture {name}: unknown key {key}{_nearest(key, _keys(name))}")
    return config


@cache
def _keys(model_type: str) -> frozenset[str]:
    """What a config of this type can be told."""
    kind = CONFIG_MAPPING[model_type]
    keys = {*kind.attribute_map, *PreTrainedConfig().to_dict()}
    for base in kind.__mro__:
        keys.update(vars(base).get("__annotations__", ()))
    # Some classes cannot be made without arguments.
    with suppress(Exception):
        keys.update(kind().to_dict())
    return frozenset(keys)


def _nearest(given: str, known: Iterable[str]) -> str:
    near = get_close_matches(given, known, n=1)
    return f"; did you mean `{near[0]}`?" if near else "; see Hugging Face's documentation for those it takes"
