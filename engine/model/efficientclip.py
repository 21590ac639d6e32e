"""The model: a trained tower, its partner where it is needed, and the logit scale, in one Hugging Face class."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForZeroShotImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.clip.modeling_clip import CLIPOutput

from .. import config as settings
from ..data.batches import Segments
from ..errors import UserError, reading
from ..files import digests
from .pretrained import load_clip_text, load_image_tower, load_text_tower, require_finite
from .towers import ImageTower, TextTower, architecture

RESTORE = "restore it from a copy, or remove it and run the command that made it again"


class EfficientCLIPConfig(PreTrainedConfig):
    model_type = "efficientclip"
    # By this name other libraries ask how wide features are.
    attribute_map = {"projection_dim": "width"}

    def __init__(
        self,
        text: dict[str, Any] | None = None,
        image: dict[str, Any] | None = None,
        width: int = 512,
        pooling: Literal["cls", "mean", "last"] = "cls",
        logit_scale: float = 14.3,
        logit_scale_max: float = 100.0,
        **kwargs: Any,
    ) -> None:
        self.text, self.image = text, image
        self.width, self.pooling = width, pooling
        self.logit_scale, self.logit_scale_max = logit_scale, logit_scale_max
        super().__init__(**{"tie_word_embeddings": True, **kwargs})


class Capped(torch.autograd.Function):
    """min(value, most), whose gradient still lowers a value above `most`: a clamp's would be 0 for ever.

    It lives in forward: an in-place clamp of the parameter is lost at ZeRO 2 and 3. At the cap each rank masks its own
    gradient, so ranks that disagree move by less than their mean.
    """

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, most: float) -> torch.Tensor:
        ctx.above = value > most
        return value.clamp(max=most)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad.masked_fill(ctx.above & (grad < 0), 0), None


class EfficientCLIP(PreTrainedModel):
    """Text and image towers in one embedding space; either may be absent.

    `forward` computes everything a training step needs, since under ZeRO-3 parameters exist only inside it. It does so
    by autocast in `compute`, wherever it runs: training, validation, copies, cross-fit. None leaves that to the caller.
    """

    compute: torch.dtype | None = None
    # Whether the seed drew the image tower's projection, since the tower came without one.
    drawn = False

    config_class = EfficientCLIPConfig
    _keys_to_ignore_on_load_missing = [r"text\.mlm_head\.decoder\.weight"]

    def __init__(
        self,
        config: EfficientCLIPConfig,
        text_backbone: PreTrainedModel | None = None,
        image_backbone: PreTrainedModel | None = None,
    ) -> None:
        super().__init__(config)
        self.text: TextTower | None = None
        self.image: ImageTower | None = None
        if config.text is not None:
            self.text = TextTower(architecture(config.text), config.width, config.pooling, text_backbone)
        if config.image is not None:
            self.image = ImageTower(architecture(config.image), config.width, image_backbone)
        # Shape (1,): DeepSpeed fails on 0-dim parameters.
        self.logit_scale = nn.Parameter(torch.full((1,), math.log(config.logit_scale)))
        if self.text is not None:
            embedding = self.text.backbone.get_input_embeddings().weight
            name = next(name for name, parameter in self.text.backbone.named_parameters() if parameter is embedding)
            self._tied_weights_keys = {"text.mlm_head.decoder.weight": f"text.backbone.{name}"}
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        segments: Segments | None = None,
        texts: torch.Tensor | None = None,
        masked_positions: torch.Tensor | None = None,
        masked_labels: torch.Tensor | None = None,
        pixels: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """Features of the trained side [M, width], the clamped logit scale (1,), and the MLM loss summed over masks.

        Text: packed `input_ids` and `position_ids` int64 [T], `segments`, and `texts` int64 [M], the segment numbers of
        the captions in pair order. Image: `pixels` float [M, 3, S, S]. With both, "features" are the texts' and
        "image_features" the images'.
        """
        with nullcontext() if self.compute is None else torch.autocast(self.logit_scale.device.type, self.compute):
            scale = Capped.apply(self.logit_scale.float(), math.log(self.config.logit_scale_max)).exp()
            if pixels is not None:
                if self.image is None:
                    raise UserError("model: pixels were given but model.image_tower is not set")
                images_MD = self.image(pixels)
                if input_ids is None:
                    return {"features": images_MD, "logit_scale": scale}
            if self.text is None or input_ids is None or position_ids is None or segments is None or texts is None:
                raise UserError("model: a text batch needs text_tower, input_ids, position_ids, segments and texts")
            places = self.text.places(len(input_ids), segments, texts)
            masked = places[:0] if masked_positions is None else masked_positions
            states_KH = self.text.states(input_ids, position_ids, segments, torch.cat([places, masked]))
            pooled_KH, masked_KH = states_KH.split([len(places), len(masked)])
            output = {"features": self.text.pool(pooled_KH, segments, texts), "logit_scale": scale}
            if pixels is not None:
                output["image_features"] = images_MD
            if masked_positions is not None and masked_labels is not None:
                logits = self.text.vocabulary_logits(masked_KH)
                output["mlm_loss_sum"] = F.cross_entropy(logits.float(), masked_labels, reduction="sum")
            return output

    def recompute_layers(self) -> None:
        """Have backward compute the activations of each layer again, from its input (Chen et al. 2016, 1604.06174)."""
        for tower in (self.text, self.image):
            if tower is not None:
                backbone: Any = tower.backbone
                if not backbone.supports_gradient_checkpointing:
                    raise UserError(
                        f"training.recompute: a {backbone.config.model_type} cannot compute its layers again; remove it"
                    )
                backbone.config.use_cache = False
                # The older name is deprecated where the newer one is known.
                newer = getattr(backbone, "activation_checkpointing_enable", None)
                (newer or backbone.gradient_checkpointing_enable)({"use_reentrant": False})

    @torch.no_grad()
    def get_text_features(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """L2-normalised features [n, width] of padded texts, as a tokenizer gives them: int64 [n, L]."""
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        lengths = real.sum(1)
        # Shortest first: neighbours of equal length share one attention call on CPUs.
        by_length = torch.argsort(lengths, stable=True)
        chosen = real[by_length].bool()
        cu_seqlens = F.pad(lengths[by_length].cumsum(0), (1, 0)).to("cpu", torch.int32).numpy()
        features: torch.Tensor = EfficientCLIP.forward(
            self,
            input_ids=input_ids[by_length][chosen],
            position_ids=(real.cumsum(1) - 1)[by_length][chosen],
            segments=Segments.of(cu_seqlens).to(input_ids.device),
            texts=torch.argsort(by_length),
        )["features"]
        return features

    @torch.no_grad()
    def get_image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """L2-normalised features [n, width] of pictures float [n, 3, S, S]."""
        features: torch.Tensor = EfficientCLIP.forward(self, pixels=pixel_values)["features"]
        return features


class EfficientCLIPForZeroShotImageClassification(EfficientCLIP):
    """The same weights, called as Hugging Face's pipeline calls a CLIP."""

    @torch.no_grad()
    def forward(  # type: ignore[override]
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
    ) -> CLIPOutput:
        """Padded texts int64 [n, L] and pictures float [m, 3, S, S]: both L2-normalised features, and their cosines
        times the logit scale, logits_per_image [m, n]."""
        text_ND = self.get_text_features(input_ids, attention_mask)
        image_MD = self.get_image_features(pixel_values)
        logits_MN = self.logit_scale.exp().clamp(max=self.config.logit_scale_max) * image_MD @ text_ND.T
        return CLIPOutput(
            logits_per_image=logits_MN, logits_per_text=logits_MN.T, text_embeds=text_ND, image_embeds=image_MD
        )


def build_model(config: settings.Model, *, seed: int, vocabulary: int | None, sides: Sequence[str]) -> EfficientCLIP:
    """The towers of `config` named in `sides` ("text", "image"): from hub, folder or run, or fresh by `seed`.

    What `start_from` holds of them takes their place; where both sides train, its logit scale goes on, too.
    `vocabulary` is the size of the store's tokenizer; a pretrained text tower that has fewer rows is refused.
    """
    torch.manual_seed(seed)
    text, image = config.text_tower, config.image_tower
    text_backbone = image_backbone = None
    text_config = image_config = None
    text_projection = image_projection = clip = None
    if "text" in sides:
        if text is None:
            raise UserError("model.text_tower: not set, but this command needs a text tower")
        if text.pretrained is not None:
            text_backbone, text_projection = load_text_tower("model.text_tower", text)
            text_config = text_backbone.config
        else:
            extra: dict[str, Any] = {"vocab_size": vocabulary} if vocabulary else {}
            if text.clip_layers is not None:
                clip = load_clip_text("model.text_tower.clip_layers", text.clip_layers, text.revision)
                text_projection = clip.text_projection.weight.detach()
                extra["clip"] = clip.config.to_dict()
            text_config = architecture(text.architecture or {}, **extra)
        if vocabulary is not None and text_config.vocab_size < vocabulary:
            raise UserError(
                f"model.text_tower: {text_config.vocab_size} vocabulary rows, but the store's tokenizer"
                f" has {vocabulary} tokens; prepare the store with this tower's tokenizer (data.tokenizer)"
            )
    image_run = None
    if "image" in sides:
        if image is None:
            raise UserError("model.image_tower: not set, but this command needs an image tower")
        if image.pretrained is not None and is_ours(Path(image.pretrained)):
            image_run = load_model(Path(image.pretrained))
        elif image.pretrained is not None:
            image_backbone, image_projection = load_image_tower("model.image_tower", image)
            image_config = backbone_config(image_backbone, image)
        else:
            image_config = {**architecture(image.architecture or {}).to_dict(), "image_size": image.size}
    model = EfficientCLIP(
        EfficientCLIPConfig(
            text=None if text_config is None else text_config.to_dict(),
            image=image_config,
            width=config.width,
            pooling=text.pooling if text else "cls",
            logit_scale=config.logit_scale,
            logit_scale_max=config.logit_scale_max,
        ),
        text_backbone=text_backbone,
        image_backbone=image_backbone,
    )
    if clip is not None and model.text is not None:
        backbone: Any = model.text.backbone
        backbone.take_clip(clip.text_model)
    if text_projection is not None and model.text is not None:
        _project(model.text.projection, text_projection, "model.text_tower")
    if image_projection is not None and model.image is not None:
        _project(model.image.projection, image_projection, "model.image_tower")
    elif model.image is not None and image_run is None:
        model.drawn = model.image.projection is not None
    if image_run is not None:
        _same_width(image_run, config.width, "model.image_tower.pretrained")
        model.image, model.config.image = image_run.image, image_run.config.image
    if config.start_from is not None:
        start = load_model(config.start_from)
        _same_width(start, config.width, "model.start_from")
        if start.text is not None and model.text is not None and start.text.pooling != model.text.pooling:
            raise UserError(
                f"model.text_tower.pooling: {model.text.pooling}, but model.start_from {config.start_from} was trained"
                f" with {start.text.pooling}; set it to that"
            )
        if model.text is not None and model.image is not None:
            if start.image is None and model.drawn:
                raise UserError(
                    f"model.image_tower: {image.pretrained if image else None} has no projection, and that which"
                    f" model.start_from {config.start_from} learned behind was drawn; start from a text run against a"
                    " tower that has one: a CLIP, or an image run"
                )
            with torch.no_grad():
                model.logit_scale.copy_(start.logit_scale)
        for side in sides:
            ours, theirs = getattr(model, side), getattr(start, side)
            if theirs is not None and ours is not None:
                _copy(theirs, ours, f"model.start_from {config.start_from}: its {side} tower")
    return model


def backbone_config(backbone: PreTrainedModel, tower: settings.ImageTower) -> dict[str, Any]:
    """What a pretrained image backbone is made again from: pictures are of its own size, which its positions are made
    for, even where it takes others (DINOv2)."""
    return {"image_size": tower.size, **backbone.config.to_dict()}


def load_model(run: Path) -> EfficientCLIP:
    """The consolidated model of a finished run, a checkpoint or an export: float32, as it was written, every weight
    finite."""
    check_model(run)
    folder = _model_in(run)
    with reading("model", folder, RESTORE):
        load: Any = EfficientCLIP.from_pretrained
        model, loading = load(folder, dtype=torch.float32, output_loading_info=True)
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if wrong := sorted(map(str, loading[kind])):
                raise ValueError(f"{len(wrong)} {kind.replace('_keys', '')} weights, {wrong[0]} for one")
    require_finite(model, f"model {folder / 'model.safetensors'}", RESTORE)
    opened: EfficientCLIP = model.eval()
    return opened


def check_model(run: Path) -> None:
    """UserError where its model is not there or not as it was written; those of earlier versions do not tell."""
    folder = _model_in(run)
    digests.check_written(folder, "*", remedy=RESTORE)
    if not (folder / "config.json").is_file():
        raise UserError(f"run {run}: no finished model in {folder}; train it first, or give the right run folder")


def is_ours(folder: Path) -> bool:
    """Whether `folder` is a run, or an export, whose model is of this class; what is broken is none."""
    if (folder / "model" / "config.json").is_file():
        return True
    with suppress(OSError, ValueError, AttributeError):
        described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return described.get("model_type") == EfficientCLIPConfig.model_type
    return False


def _model_in(run: Path) -> Path:
    """An export is the model itself."""
    return run if (run / "config.json").is_file() else run / "model"


def _project(layer: nn.Linear | None, weight: torch.Tensor, field: str) -> None:
    """Put the projection that a tower came with in the place of the new one."""
    if layer is None or layer.weight.shape != weight.shape:
        raise UserError(f"{field}: its projection is {len(weight)} wide; set model.width to {len(weight)}")
    with torch.no_grad():
        layer.weight.copy_(weight)


def _same_width(model: EfficientCLIP, width: int, field: str) -> None:
    if model.config.width != width:
        raise UserError(
            f"{field}: its embedding space has {model.config.width} dimensions, model.width is {width}; set it to"
            f" {model.config.width}, or give another run"
        )


def _copy(source: nn.Module, target: nn.Module, name: str) -> None:
    try:
        target.load_state_dict(source.state_dict())
    except RuntimeError as error:
        raise UserError(f"{name} has another shape than this config describes; {error}") from error


AutoConfig.register(EfficientCLIPConfig.model_type, EfficientCLIPConfig)
AutoModel.register(EfficientCLIPConfig, EfficientCLIP)
AutoModelForZeroShotImageClassification.register(EfficientCLIPConfig, EfficientCLIPForZeroShotImageClassification)
