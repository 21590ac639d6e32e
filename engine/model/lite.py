"""EfficientNet-Lite: ImageNet towers for small devices (1905.11946, without squeeze-and-excitation, with ReLU6)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, initialization
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput

# Blocks, kernel, stride, expansion and channels of each stage, as EfficientNet-B0 has them.
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


class EfficientNetLiteConfig(PreTrainedConfig):
    """Sizes of the tower; the defaults are Lite0's."""

    model_type = "efficientnet_lite"

    stages: Any = STAGES
    stem_channels: int = 32
    hidden_size: int = 1280
    batch_norm_eps: float = 1e-3
    image_size: int = 224


class SameConv(nn.Conv2d):
    """A convolution whose output is ceil(size / stride): TensorFlow's "same" pads one pixel more behind than before."""

    def __init__(self, inside: int, outside: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(inside, outside, kernel, stride, groups=groups, bias=False)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        (kernel, _), (stride, _) = self.kernel_size, self.stride
        height, width = (max((-(-size // stride) - 1) * stride + kernel - size, 0) for size in pixels.shape[-2:])
        if height % 2 or width % 2:
            pixels = F.pad(pixels, (width // 2, width - width // 2, height // 2, height - height // 2))
            height = width = 0
        return F.conv2d(pixels, self.weight, None, self.stride, (height // 2, width // 2), 1, self.groups)


class Normed(nn.Sequential):
    """A convolution and its batch norm, and ReLU6 unless it is `linear`."""

    def __init__(self, config: EfficientNetLiteConfig, conv: SameConv, *, linear: bool = False) -> None:
        norm = nn.BatchNorm2d(conv.out_channels, eps=config.batch_norm_eps)
        super().__init__(conv, norm, *([] if linear else [nn.ReLU6(inplace=True)]))


class Block(nn.Module):
    """Widen, filter each channel by itself, narrow; the input is added where shapes allow (1801.04381)."""

    def __init__(
        self, config: EfficientNetLiteConfig, inside: int, outside: int, kernel: int, stride: int, expansion: int
    ) -> None:
        super().__init__()
        wide = inside * expansion
        self.expand = Normed(config, SameConv(inside, wide, 1)) if expansion > 1 else None
        self.depthwise = Normed(config, SameConv(wide, wide, kernel, stride, groups=wide))
        self.project = Normed(config, SameConv(wide, outside, 1), linear=True)
        self.residual = stride == 1 and inside == outside

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        wide = states if self.expand is None else self.expand(states)
        narrow: torch.Tensor = self.project(self.depthwise(wide))
        return states + narrow if self.residual else narrow


class EfficientNetLiteModel(PreTrainedModel):
    """Pixels float [M, 3, S, S] to states [M, hidden_size, S/32, S/32], and their mean: features [M, hidden_size].

    `output_hidden_states` adds the states behind each stage.
    """

    config_class = EfficientNetLiteConfig
    main_input_name = "pixel_values"
    base_model_prefix = "efficientnet_lite"

    def __init__(self, config: EfficientNetLiteConfig) -> None:
        super().__init__(config)
        self.stem = Normed(config, SameConv(3, config.stem_channels, 3, 2))
        blocks, inside, self.ends = [], config.stem_channels, []
        for count, kernel, stride, expansion, outside in config.stages:
            for number in range(count):
                blocks.append(Block(config, inside, outside, kernel, 1 if number else stride, expansion))
                inside = outside
            self.ends.append(len(blocks))
        self.blocks = nn.ModuleList(blocks)
        self.head = Normed(config, SameConv(inside, config.hidden_size, 1))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        # Variances near 1 from the start: those that batch norms keep for evaluation begin there.
        if isinstance(module, nn.Conv2d):
            initialization.kaiming_normal_(module.weight, nonlinearity="relu")

    def forward(
        self, pixel_values: torch.Tensor, output_hidden_states: bool = False, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        states, behind = self.stem(pixel_values), []
        for number, block in enumerate(self.blocks, 1):
            states = block(states)
            if output_hidden_states and number in self.ends:
                behind.append(states)
        states = self.head(states)
        hidden = tuple(behind) if output_hidden_states else None
        pooled = states.mean((2, 3))
        return BaseModelOutputWithPooling(last_hidden_state=states, pooler_output=pooled, hidden_states=hidden)


class EfficientNetLiteForImageClassification(PreTrainedModel):
    """The tower and what it was trained by: logits [M, num_labels] of the pooled features."""

    config_class = EfficientNetLiteConfig
    main_input_name = "pixel_values"
    base_model_prefix = "efficientnet_lite"

    def __init__(self, config: EfficientNetLiteConfig) -> None:
        super().__init__(config)
        self.efficientnet_lite = EfficientNetLiteModel(config)
        self.classifier = nn.Linear(config.hidden_size, len(config.id2label or {}))
        self.post_init()

    def forward(self, pixel_values: torch.Tensor, **kwargs: Any) -> ImageClassifierOutput:
        return ImageClassifierOutput(logits=self.classifier(self.efficientnet_lite(pixel_values).pooler_output))


def from_released(weights: Mapping[str, torch.Tensor], labels: Sequence[str]) -> EfficientNetLiteForImageClassification:
    """Lite0 with `weights` as its PyTorch releases name them, and its classes' names. ValueError where a weight lacks
    or is left, or the names are not as many as the classes."""
    if len(labels) != (classes := len(weights.get("_fc.bias", ()))):
        raise ValueError(f"{len(labels)} names are not those of {classes} classes")
    named = dict(enumerate(labels))
    config = EfficientNetLiteConfig(id2label=named, label2id={label: at for at, label in named.items()})
    model = EfficientNetLiteForImageClassification(config)
    names = {f"_fc.{part}": f"classifier.{part}" for part in ("weight", "bias")}
    for ours in model.efficientnet_lite.state_dict():
        place, rest = ours.rsplit(".", 2)[0], ours.rsplit(".", 2)[1:]
        norm = rest[0] == "1"
        if place.startswith("blocks."):
            _, number, part = place.split(".")
            bn = {"expand": "_bn0", "depthwise": "_bn1", "project": "_bn2"}[part]
            theirs = f"_blocks.{number}.{bn if norm else f'_{part}_conv'}"
        else:
            theirs = {"stem": ("_conv_stem", "_bn0"), "head": ("_conv_head", "_bn1")}[place][norm]
        names[f"{theirs}.{rest[1]}"] = f"efficientnet_lite.{ours}"
    left = weights.keys() ^ names.keys()
    if left:
        raise ValueError(f"{len(left)} weights are not those of an EfficientNet-Lite0, {min(left)} for one")
    model.load_state_dict({ours: weights[theirs] for theirs, ours in names.items()})
    return model.eval()
