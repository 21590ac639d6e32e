"""EfficientNet-Lite computes what its released weights were trained for, and opens as any Hugging Face folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModel, AutoModelForImageClassification

from efficientclip import config as settings
from efficientclip.errors import UserError
from efficientclip.model import towers
from efficientclip.model.lite import (
    STAGES,
    EfficientNetLiteConfig,
    EfficientNetLiteForImageClassification,
    EfficientNetLiteModel,
    from_released,
)
from efficientclip.model.pretrained import load_classes, load_image_tower

Weights = dict[str, torch.Tensor]


def released() -> Weights:
    """Random weights by the names, and in the shapes, of Lite0's PyTorch releases."""
    weights: Weights = {}

    def conv(name: str, norm: str, outside: int, inside: int, kernel: int) -> None:
        scale = (inside * kernel**2) ** -0.5
        weights[f"{name}.weight"] = torch.randn(outside, inside, kernel, kernel) * scale * 1.5
        for part, value in (("weight", torch.rand), ("bias", torch.randn), ("running_mean", torch.randn)):
            weights[f"{norm}.{part}"] = value(outside) * 0.5 + (part == "weight")
        weights[f"{norm}.running_var"] = torch.rand(outside) + 0.5
        weights[f"{norm}.num_batches_tracked"] = torch.tensor(7)

    conv("_conv_stem", "_bn0", 32, 3, 3)
    number, inside = 0, 32
    for count, kernel, _, expansion, outside in STAGES:
        for _ in range(count):
            block, wide = f"_blocks.{number}", inside * expansion
            if expansion > 1:
                conv(f"{block}._expand_conv", f"{block}._bn0", wide, inside, 1)
            conv(f"{block}._depthwise_conv", f"{block}._bn1", wide, 1, kernel)
            conv(f"{block}._project_conv", f"{block}._bn2", outside, wide, 1)
            number, inside = number + 1, outside
    conv("_conv_head", "_bn1", 1280, inside, 1)
    return weights | {"_fc.weight": torch.randn(1000, 1280), "_fc.bias": torch.randn(1000)}


def naive(weights: Weights, pixels: torch.Tensor) -> list[torch.Tensor]:
    """The states behind each stage, and the pooled features, in fp64, straight from the weights."""

    def step(
        states: torch.Tensor, name: str, norm: str, stride: int = 1, groups: int = 1, act: bool = True
    ) -> torch.Tensor:
        weight = weights[f"{name}.weight"].double()
        kernel, size = weight.shape[-1], states.shape[-1]
        pad = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        states = F.pad(states, (pad // 2, pad - pad // 2) * 2)
        states = F.conv2d(states, weight, stride=stride, groups=groups)
        mean, var, scale, bias = (
            weights[f"{norm}.{part}"].double()[:, None, None]
            for part in ("running_mean", "running_var", "weight", "bias")
        )
        states = (states - mean) / (var + 1e-3).sqrt() * scale + bias
        return states.clamp(0, 6) if act else states

    states = step(pixels, "_conv_stem", "_bn0", 2)
    number, behind = 0, []
    for count, _, stride, expansion, _ in STAGES:
        for at in range(count):
            block, before = f"_blocks.{number}", states
            if expansion > 1:
                states = step(states, f"{block}._expand_conv", f"{block}._bn0")
            by = stride if at == 0 else 1
            states = step(states, f"{block}._depthwise_conv", f"{block}._bn1", by, states.shape[1])
            states = step(states, f"{block}._project_conv", f"{block}._bn2", act=False)
            states = states + before if states.shape == before.shape else states
            number += 1
        behind.append(states)
    return [*behind, step(states, "_conv_head", "_bn1").mean((2, 3))]


# An even edge pads unevenly at strides of 2, an odd one evenly.
@pytest.mark.parametrize("size", [33, 64])
def test_features_are_those_of_the_released_weights(size: int) -> None:
    weights, pixels = released(), torch.randn(2, 3, size, size)
    labels = [f"thing {number}" for number in range(1000)]
    whole, pixels = from_released(weights, labels).double(), pixels.double()
    model = whole.efficientnet_lite
    with torch.no_grad():
        output = model(pixels, output_hidden_states=True)
        assert model(pixels).hidden_states is None
        logits = whole(pixels).logits
    expected = naive(weights, pixels)[-1] @ weights["_fc.weight"].double().T + weights["_fc.bias"].double()
    assert (logits - expected).norm() <= 1e-12 * expected.norm()
    assert whole.config.id2label[999] == "thing 999"
    assert output.hidden_states is not None and len(output.hidden_states) == len(STAGES)
    for mine, expected in zip((*output.hidden_states, output.pooler_output), naive(weights, pixels), strict=True):
        assert (mine - expected).norm() <= 1e-12 * expected.norm()


def test_other_weights_are_refused() -> None:
    weights = released()
    labels = ["thing"] * 1000
    for wrong in (weights | {"_se.weight": torch.ones(1)}, {k: v for k, v in weights.items() if k != "_bn1.bias"}):
        with pytest.raises(ValueError, match=r"1 weights are not those of an EfficientNet-Lite0, (_se|_bn1)"):
            from_released(wrong, labels)
    with pytest.raises(ValueError, match="999 names are not those of 1000 classes"):
        from_released(weights, labels[1:])


def test_a_saved_tower_opens_by_its_type(tmp_path: Path) -> None:
    config = EfficientNetLiteConfig(stages=[[1, 3, 2, 6, 8]], stem_channels=8, hidden_size=24)
    model, pixels = EfficientNetLiteModel(config).eval(), torch.randn(2, 3, 16, 16)
    model.save_pretrained(tmp_path)
    assert towers.AutoModel is AutoModel
    opened = AutoModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(opened(pixels).pooler_output, model(pixels).pooler_output)


def test_a_saved_classifier_opens_as_a_tower_too(tmp_path: Path) -> None:
    config = EfficientNetLiteConfig(
        stages=[[1, 3, 2, 6, 8]], stem_channels=8, hidden_size=24, id2label={0: "cat", 1: "dog", 2: "saw"}
    )
    model, pixels = EfficientNetLiteForImageClassification(config).eval(), torch.randn(2, 3, 16, 16)
    model.save_pretrained(tmp_path)
    tower = AutoModel.from_pretrained(tmp_path).eval()
    opened = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(tower(pixels).pooler_output, model.efficientnet_lite(pixels).pooler_output)
        assert torch.equal(opened(pixels).logits, model(pixels).logits)
    described = settings.ImageTower(pretrained=str(tmp_path), size=16)
    weight_CP, labels = load_classes("model.image_tower", described)
    assert torch.equal(weight_CP, model.classifier.weight) and labels == ["cat", "dog", "saw"]
    assert load_image_tower("model.image_tower", described)[1] is None


def test_a_tower_without_named_classes_is_told(tmp_path: Path) -> None:
    config = EfficientNetLiteConfig(stages=[[1, 3, 2, 6, 8]], stem_channels=8, hidden_size=24)
    EfficientNetLiteModel(config).save_pretrained(tmp_path / "tower")
    EfficientNetLiteForImageClassification(config).save_pretrained(tmp_path / "unnamed")
    for name, message in (("tower", "was saved without a classifier"), ("unnamed", "what its 2 classes are called")):
        with pytest.raises(UserError, match=rf"image_tower\.pretrained: .*{name} .*{message}"):
            load_classes("model.image_tower", settings.ImageTower(pretrained=str(tmp_path / name), size=16))


def test_it_learns_from_scratch() -> None:
    """As a tower that tells two pictures of each of four kinds apart, by its own statistics afterwards."""
    torch.manual_seed(0)
    stages = [[1, 3, 1, 1, 8], [2, 3, 2, 4, 12], [1, 5, 2, 4, 16]]
    described = {"model_type": "efficientnet_lite", "stages": stages, "stem_channels": 8, "hidden_size": 32}
    tower = towers.ImageTower(towers.architecture(described), 8)
    kinds = torch.arange(4).repeat(2)
    pixels = torch.randn(4, 3, 32, 32)[kinds] + 0.3 * torch.randn(8, 3, 32, 32)
    optimizer = torch.optim.AdamW(tower.parameters(), lr=3e-3)

    def loss() -> torch.Tensor:
        features = tower(pixels)
        return F.cross_entropy(10 * features[:4] @ features[4:].T, kinds[:4])

    for _ in range(40):
        optimizer.zero_grad()
        loss().backward()
        assert all(weight.grad is not None and weight.grad.abs().max() > 0 for weight in tower.parameters())
        optimizer.step()
    with torch.no_grad():
        assert loss() < 0.1
        tower.eval()
        assert loss() < 0.3
