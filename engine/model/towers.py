"""Towers: any Hugging Face image or text model, with a projection into the shared space."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext, suppress
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
    AutoModelForImageClassification,
    ChineseCLIPTextConfig,
    ChineseCLIPTextModel,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.bert.modeling_bert import BertLMPredictionHead, BertSelfOutput
from transformers.models.chinese_clip.modeling_chinese_clip import ChineseCLIPTextSelfOutput
from transformers.models.roberta.modeling_roberta import RobertaSelfOutput
from transformers.models.xlm_roberta.modeling_xlm_roberta import XLMRobertaSelfOutput

from ..data.batches import Segments
from ..errors import UserError
from . import packed
from .lite import EfficientNetLiteConfig, EfficientNetLiteForImageClassification, EfficientNetLiteModel
from .published import EfficientCLIPTextConfig, EfficientCLIPTextModel

# Hugging Face knows Chinese-CLIP's text half only as a part of the whole.
AutoModel.register(ChineseCLIPTextConfig, ChineseCLIPTextModel, exist_ok=True)
AutoConfig.register(EfficientCLIPTextConfig.model_type, EfficientCLIPTextConfig)
AutoModel.register(EfficientCLIPTextConfig, EfficientCLIPTextModel)
AutoConfig.register(EfficientNetLiteConfig.model_type, EfficientNetLiteConfig)
AutoModel.register(EfficientNetLiteConfig, EfficientNetLiteModel)
AutoModelForImageClassification.register(EfficientNetLiteConfig, EfficientNetLiteForImageClassification)

# What follows attention in a BERT's layer: from there on each token is computed by itself.
BEHIND_ATTENTION = (BertSelfOutput, RobertaSelfOutput, XLMRobertaSelfOutput, ChineseCLIPTextSelfOutput)


class ImageTower(nn.Module):
    """Pixels float [M, 3, S, S] to L2-normalised features [M, width].

    The pooled output is projected by a linear layer, CLIP's own or a new one; a model of two towers that has none
    (SigLIP) answers by its `get_image_features`. With a fitted head (`fitted` in the config: which hidden states it
    reads), the layer has a bias and projects the pooled output beside the means of these states, each normalised.
    """

    def __init__(self, config: PreTrainedConfig, width: int, backbone: PreTrainedModel | None = None) -> None:
        super().__init__()
        self.backbone = backbone if backbone is not None else AutoModel.from_config(config)
        self.fitted: list[int] | None = getattr(config, "fitted", None)
        own = self.fitted is None and hasattr(self.backbone, "get_image_features")
        self.projection = None if own else nn.LazyLinear(width, bias=self.fitted is not None)
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
            pooled = self.pooled(pixels)
            # A fitted head raises faint directions: rounding must not come with them.
            with (
                nullcontext()
                if self.fitted is None or pixels.is_meta
                else torch.autocast(pixels.device.type, enabled=False)
            ):
                features = self.projection(pooled)
        return F.normalize(features.float(), dim=-1)

    def pooled(self, pixels: torch.Tensor) -> torch.Tensor:
        """What the projection reads [M, inputs]: the pooled output alone, or for a fitted head beside the means of its
        hidden states, each part normalised."""
        layers = self.fitted
        output = self.backbone(pixel_values=pixels, **({"output_hidden_states": True} if layers else {}))
        if layers is None:
            pooled: torch.Tensor = output.pooler_output.flatten(1)
            return pooled
        hidden = output.hidden_states or ()
        if wrong := [layer for layer in layers if not -len(hidden) <= layer < len(hidden)]:
            raise UserError(f"head.layers: {wrong[0]}, but this tower tells {len(hidden)} hidden states, 0 the first")
        means = [hidden[layer] for layer in layers]
        means = [states.mean((2, 3) if states.dim() == 4 else 1) for states in means]
        return torch.cat([F.normalize(part.float(), dim=-1) for part in (output.pooler_output.flatten(1), *means)], 1)


class TextTower(nn.Module):
    """Packed tokens to L2-normalised text features [texts, width] and vocabulary logits at chosen positions.

    Where the last layer is a BERT's, it computes the states that are read, and no others, from its attention on.
    """

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
        self.narrowing = _narrow(backbone)
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

    def states(
        self,
        input_ids_T: torch.Tensor,
        position_ids_T: torch.Tensor,
        segments: Segments,
        places_K: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hidden states [K, hidden] of one packed row at the tokens `places_K`, int64; None: of all [T, hidden]."""
        output = self.backbone(
            input_ids=input_ids_T[None],
            position_ids=position_ids_T[None] + self.first_position,
            token_type_ids=torch.zeros_like(input_ids_T)[None],
            segments=segments,
            places_K=places_K,
        )
        states_KH: torch.Tensor = output.last_hidden_state.squeeze(0)
        return states_KH if self.narrowing or places_K is None else F.embedding(places_K, states_KH)

    def places(self, tokens: int, segments: Segments, texts: torch.Tensor) -> torch.Tensor:
        """The tokens of a row from whose states `pool` makes the features of these texts, int64: all for a mean."""
        starts, ends = segments.cu_seqlens[:-1].long(), segments.cu_seqlens[1:].long()
        if self.pooling == "mean":
            return torch.arange(tokens, device=starts.device)
        return starts[texts] if self.pooling == "cls" else ends[texts] - 1

    def pool(self, states_KH: torch.Tensor, segments: Segments, texts: torch.Tensor) -> torch.Tensor:
        """Features [len(texts), width] of the texts at the given segment numbers, from the states at their places."""
        pooled = states_KH
        if self.pooling == "mean":
            lengths = segments.cu_seqlens.diff().long()
            owner = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
            sums = states_KH.new_zeros(len(lengths), states_KH.shape[1]).index_add(0, owner, states_KH)
            pooled = F.embedding(texts, sums / lengths[:, None])
        return F.normalize(self.projection(pooled).float(), dim=-1)

    def vocabulary_logits(self, states_KH: torch.Tensor) -> torch.Tensor:
        """Logits [K, vocabulary] of the states at masked positions."""
        logits: torch.Tensor = self.mlm_head(states_KH)
        return logits


def _narrow(backbone: Any) -> bool:
    """Have the last layer of `backbone` go on behind its attention at `places_K` alone; False: it is no BERT's."""
    layers: Any = getattr(getattr(backbone, "encoder", None), "layer", None)
    attention: Any = getattr(layers[-1], "attention", None) if layers else None
    if not isinstance(getattr(attention, "output", None), BEHIND_ATTENTION):
        return False
    # Hooks are copied with their modules and run again where activations are computed again.
    attention.register_forward_pre_hook(_note_places, with_kwargs=True)
    attention.output.register_forward_pre_hook(_at_places)
    return True


def _note_places(attention: Any, _: Any, options: dict[str, Any]) -> None:
    attention.output.places_K = options.get("places_K")


def _at_places(output: Any, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Attended states and those they are added to, [1, T, hidden]: the rows [1, K, hidden] at the noted places."""
    if output.places_K is None:
        return given
    return tuple(F.embedding(output.places_K, states_1TH.squeeze(0))[None] for states_1TH in given)


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
