"""Weights from Hugging Face ids and folders: a tower with the projection it came with, whatever it was saved as."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    CLIPModel,
    CLIPTextModelWithProjection,
    CLIPVisionModelWithProjection,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.activations import ACT2FN

from .. import config as settings
from ..errors import UserError, reading
from ..files import digests
from . import packed
from .towers import without_dropout, without_pooler

CLIP_TYPES = ("clip", "clip_text_model")
# Their position embeddings hold for one size of picture.
FIXED_SIZE = ("clip_vision_model", "chinese_clip_vision_model", "vit")
USUAL_SIZE = 224
ANEW = "copy or download it anew"
ALONE = "give a BERT or RoBERTa alone, saved in a folder of its own"
Loaded = tuple[PreTrainedModel, torch.Tensor | None]


def load_text_tower(field: str, tower: settings.Tower) -> Loaded:
    """A text model that attends within packed segments, and its projection [width, hidden] where it brings one."""
    config = _config(field, tower)
    if config.model_type in CLIP_TYPES:
        raise UserError(
            f"{field}.pretrained: {tower.pretrained} is a CLIP, which reads English; put its text layers on a Chinese"
            " vocabulary: architecture: {model_type: efficientclip_text}, clip_layers: " + str(tower.pretrained)
        )
    if behind := _behind_states(config):
        raise UserError(
            f"{field}.pretrained: {tower.pretrained} is of type {behind}, which no text tower here has; {ALONE}"
        )
    half = getattr(config, "text_config", config)
    if not hasattr(half, "vocab_size"):
        raise UserError(f"{field}.pretrained: {tower.pretrained} is a {config.model_type}, no text tower")
    without_dropout(half)
    # No text is read at its pooler, which few checkpoints have.
    model, _ = _load(field, tower, config, unused="pooler", attn_implementation=packed.NAME, **without_pooler(config))
    return _half(model, "text_model", "text_projection")


def _behind_states(config: PreTrainedConfig) -> str | None:
    """What a model has between the states of its layers and its features, beside a linear projection; None: nothing."""
    classifiers = [name for name in config.architectures or () if name.endswith("ForSequenceClassification")]
    if classifiers:
        return f"{classifiers[0]}: its features, like Taiyi's, are a classifier's behind a pooler"
    if config.model_type in ("altclip", "altclip_text_model"):
        return f"{config.model_type}: its features pass a norm and a layer with a bias before the projection"
    if config.model_type in ("siglip", "siglip2"):
        return f"{config.model_type}: its text features come from a head with a bias"
    return None


def load_image_tower(field: str, tower: settings.ImageTower) -> Loaded:
    """An image model, and its projection [width, hidden] where it brings one."""
    config = _config(field, tower)
    half = getattr(config, "vision_config", config)
    size = getattr(half, "image_size", tower.size)
    if half.model_type in FIXED_SIZE and size not in (tower.size, [tower.size] * 2, (tower.size,) * 2):
        raise UserError(f"{field}.size: {tower.size}, but {tower.pretrained} takes pictures of {size} pixels")
    # Classifiers' and DINO's ViTs are saved without the pooler that transformers gives them.
    pooler = "pooler.dense" if hasattr(half, "pooler_act") else None
    model, lacks_pooler = _load(field, tower, config, unused=pooler)
    if lacks_pooler:
        _pool_at_cls(model)
    model, projection = _half(model, "vision_model", "visual_projection")
    _require_eyes(f"{field}.pretrained: {tower.pretrained}", model)
    return model, projection


def load_classes(field: str, tower: settings.ImageTower) -> tuple[torch.Tensor, list[str]]:
    """Of an image classifier: weight float32 [classes, features] of its last layer, and what the classes are called."""
    config = _config(field, tower)
    named = f"{field}.pretrained: {tower.pretrained}"
    wanted = "save a *ForImageClassification with its id2label there"
    if not any(name.endswith("ForImageClassification") for name in config.architectures or ()):
        raise UserError(f"{named} was saved without a classifier, whose names head.classes reads; {wanted}")
    called: dict[Any, str] = config.id2label or {}
    labels = [called[number] for number in range(len(called))]
    if labels[0] == "LABEL_0":
        raise UserError(f"{named} does not tell what its {len(labels)} classes are called; {wanted}")
    with _loading(f"{field}.pretrained", tower.pretrained or ""):
        model = AutoModelForImageClassification.from_pretrained(
            tower.pretrained or "", config=config, revision=tower.revision or "main", dtype=torch.float32
        )
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear) and len(layer.weight) == len(labels)]
    if not layers:
        raise UserError(f"{named}: its classifier does not end in a linear layer; leave head.classes out")
    require_finite(layers[-1], named, ANEW)
    return layers[-1].weight.detach(), labels


def image_width(named: str, config: PreTrainedConfig) -> tuple[int, bool]:
    """How wide the features of an image model are, and whether they lie in a space of its own: if not, they are its
    pooled output. UserError beginning with `named` where it has neither."""
    size = getattr(getattr(config, "vision_config", config), "image_size", None) or USUAL_SIZE
    height, width = size if isinstance(size, list | tuple) else (size, size)
    with torch.device("meta"):
        projecting: Any = CLIPVisionModelWithProjection
        whole = projecting(config) if _projects(config) else AutoModel.from_config(config)
        model, projection = _half(whole.eval(), "vision_model", "visual_projection")
        _require_eyes(named, model)
        if projection is not None:
            return len(projection), True
        answers: Any = getattr(model, "get_image_features", model)
        output = answers(pixel_values=torch.zeros(1, 3, height, width))
    features = getattr(output, "pooler_output", None if answers is model else output)
    if features is None:
        raise UserError(
            f"{named} is a {config.model_type}, which has no pooled output; choose a tower that has: a ViT, DINOv2 or"
            " ConvNeXT for instance"
        )
    return features.flatten(1).shape[1], answers is not model


def _require_eyes(named: str, model: PreTrainedModel) -> None:
    if model.main_input_name != "pixel_values" and not hasattr(model, "get_image_features"):
        raise UserError(f"{named} is a {model.config.model_type}, no image tower")


@torch.no_grad()
def _pool_at_cls(model: Any) -> None:
    """Have the pooler hand on the state at [CLS] as it is."""
    nn.init.eye_(model.pooler.dense.weight)
    nn.init.zeros_(model.pooler.dense.bias)
    model.config.pooler_act = "linear"
    model.pooler.activation = ACT2FN["linear"]


def load_clip_text(field: str, name: str, revision: str | None) -> CLIPTextModelWithProjection:
    """CLIP's text half with its projection, from a CLIPModel or CLIPTextModelWithProjection, in eval mode."""
    arguments: dict[str, Any] = {"revision": revision or "main"}
    with _loading(field, name):
        config = AutoConfig.from_pretrained(name, **arguments)
        if config.model_type not in CLIP_TYPES:
            raise UserError(f"{field}: {name} is a {config.model_type}; a CLIP is wanted")
        # The text half of a whole CLIP does not know how wide its projection is.
        whole = config.model_type == "clip"
        model_class: Any = CLIPModel if whole else CLIPTextModelWithProjection
        model, loading = model_class.from_pretrained(name, **arguments, dtype=torch.float32, output_loading_info=True)
    if missing := sorted(loading["missing_keys"]):
        raise UserError(f"{field}: {name} lacks {len(missing)} weights of a CLIP, {missing[0]} for one")
    require_finite(model, f"{field}: {name}", ANEW)
    if not whole:
        text: CLIPTextModelWithProjection = model
        return text.eval()
    config.text_config.projection_dim = config.projection_dim
    text = CLIPTextModelWithProjection(config.text_config)
    text.text_model, text.text_projection = model.text_model, model.text_projection
    return text.eval()


def _half(model: PreTrainedModel, name: str, projection: str) -> Loaded:
    """CLIP and its like hold two towers: the other one would be memory and parameters without gradient."""
    if hasattr(model, name) and hasattr(model, projection):
        return getattr(model, name), getattr(model, projection).weight.detach()
    return model, None


def require_finite(model: nn.Module, named: str, remedy: str) -> None:
    """UserError naming the first weight of `model` that has a NaN or an infinity."""
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise UserError(f"{named}: the weight {name} is not finite; {remedy}")


def _config(field: str, tower: settings.Tower) -> PreTrainedConfig:
    with _loading(f"{field}.pretrained", tower.pretrained or ""):
        config: PreTrainedConfig = AutoConfig.from_pretrained(tower.pretrained or "", revision=tower.revision or "main")
    return config


def _load(
    field: str, tower: settings.Tower, config: PreTrainedConfig, *, unused: str | None = None, **arguments: Any
) -> tuple[PreTrainedModel, bool]:
    """The model, and whether its checkpoint lacks weights with `unused` in their names."""
    model_class: Any = CLIPVisionModelWithProjection if _projects(config) else AutoModel
    with _loading(f"{field}.pretrained", tower.pretrained or ""):
        arguments |= {"config": config, "revision": tower.revision or "main", "dtype": torch.float32}
        model, loading = model_class.from_pretrained(tower.pretrained, output_loading_info=True, **arguments)
    absent = {key for key in loading["missing_keys"] if unused is not None and unused in key}
    if missing := sorted(loading["missing_keys"] - absent):
        raise UserError(
            f"{field}.pretrained: {tower.pretrained} lacks {len(missing)} weights, {missing[0]} for one; {ANEW}"
        )
    loaded: PreTrainedModel = model
    require_finite(model, f"{field}.pretrained: {tower.pretrained}", ANEW)
    return loaded, bool(absent)


def _projects(config: PreTrainedConfig) -> bool:
    """Whether it is of a CLIP's pictures' half, whose projection AutoModel would leave behind."""
    return CLIPVisionModelWithProjection.__name__ in (config.architectures or ())


@contextmanager
def _loading(field: str, name: str) -> Iterator[None]:
    """What goes wrong while the block loads `name` is a UserError of `field`."""
    folder = Path(name)
    if not folder.is_dir():
        with _from_hub(field, name):
            yield
        return
    # Exports have them.
    digests.check_written(folder, "*.json", "*.safetensors", remedy=ANEW)
    with reading(f"{field}: model folder", folder, ANEW):
        yield


@contextmanager
def _from_hub(field: str, name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        raise UserError(f"{field}: {name!r} is no model folder, run or reachable hub id ({error})") from error
