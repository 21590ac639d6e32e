"""Towers start from any Hugging Face folder, with the weights, projection and outputs that it had."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    BertConfig,
    CLIPVisionModel,
    ResNetConfig,
    ResNetModel,
    ViTConfig,
    ViTMAEConfig,
    ViTModel,
)

from efficientclip.config import Model, load_config
from efficientclip.data.batches import Segments
from efficientclip.data.tokenizer import load_tokenizer
from efficientclip.errors import UserError
from efficientclip.files import digests
from efficientclip.model.efficientclip import EfficientCLIP, build_model, load_model
from efficientclip.model.pretrained import image_width
from efficientclip.training.runs import check_positions
from tests import tiny
from tests.model import hub


@pytest.fixture(autouse=True)
def seed() -> None:
    seed = int(np.random.default_rng().integers(2**31))
    print(f"seed {seed}")
    torch.manual_seed(seed)


def build(side: str, folder: Path, **changes: Any) -> EfficientCLIP:
    model = Model.model_validate({"width": tiny.WIDTH, f"{side}_tower": {"pretrained": str(folder), **changes}})
    return build_model(model, seed=0, vocabulary=60 if side == "text" else None, sides=(side,))


def texts() -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask int64 [5, 12], padded on the right."""
    ids = torch.randint(5, 60, (5, 12))
    mask = (torch.arange(12) < torch.tensor([[3], [12], [1], [7], [7]])).long()
    return torch.where(mask.bool(), ids, 1), mask


@pytest.mark.parametrize("saved", [hub.bert, hub.masked_bert, hub.roberta])
def test_text_towers_keep_their_hidden_states(tmp_path: Path, saved: Callable[[Path], Any]) -> None:
    source = saved(tmp_path / "model")
    # In training mode: dropout is off there, whatever the checkpoint says.
    model = build("text", tmp_path / "model").train()
    assert model.text is not None
    ids, mask = texts()
    with torch.no_grad():
        states = source(input_ids=ids, attention_mask=mask).last_hidden_state[:, 0]
        expected = F.normalize(model.text.projection(states), dim=-1)
    torch.testing.assert_close(model.get_text_features(ids, mask), expected, rtol=0, atol=2e-6)


def test_left_padding_gives_the_same_features(tmp_path: Path) -> None:
    hub.bert(tmp_path / "model")
    model = build("text", tmp_path / "model")
    ids, mask = texts()
    left = torch.argsort(mask, dim=1, stable=True)
    torch.testing.assert_close(
        model.get_text_features(ids.gather(1, left), mask.gather(1, left)), model.get_text_features(ids, mask)
    )


def test_both_halves_of_chinese_clip_keep_their_features(tmp_path: Path) -> None:
    source = hub.chinese_clip(tmp_path / "model")
    text, image = build("text", tmp_path / "model"), build("image", tmp_path / "model", size=hub.PIXELS)
    ids, mask = texts()
    pixels = torch.randn(3, 3, hub.PIXELS, hub.PIXELS)
    with torch.no_grad():
        texts_ND = F.normalize(source.get_text_features(ids, mask).pooler_output, dim=-1)
        images_ND = F.normalize(source.get_image_features(pixels).pooler_output, dim=-1)
    torch.testing.assert_close(text.get_text_features(ids, mask), texts_ND, rtol=0, atol=2e-6)
    torch.testing.assert_close(image.get_image_features(pixels), images_ND, rtol=0, atol=2e-6)
    # The other half is neither memory nor a parameter without gradient.
    assert not any("vision" in name for name, _ in text.named_parameters())
    assert not any("text" in name for name, _ in image.named_parameters())
    for model, run in ((text, tmp_path / "text"), (image, tmp_path / "image")):
        model.save_pretrained(run / "model")
    torch.testing.assert_close(load_model(tmp_path / "text").get_text_features(ids, mask), texts_ND)
    torch.testing.assert_close(load_model(tmp_path / "image").get_image_features(pixels), images_ND)


@pytest.mark.parametrize("saved", [hub.clip, hub.clip_vision])
def test_clips_image_tower_keeps_its_features(tmp_path: Path, saved: Callable[[Path], Any]) -> None:
    source = saved(tmp_path / "model")
    model = build("image", tmp_path / "model", size=hub.PIXELS)
    pixels = torch.randn(3, 3, hub.PIXELS, hub.PIXELS)
    with torch.no_grad():
        features = source.visual_projection(source.vision_model(pixels).pooler_output)
    torch.testing.assert_close(model.get_image_features(pixels), F.normalize(features, dim=-1), rtol=0, atol=2e-6)


def test_a_vit_without_its_pooler_is_read_at_cls(tmp_path: Path) -> None:
    source = hub.save(ViTModel(ViTConfig(**hub.VISION), add_pooling_layer=False), tmp_path / "model")
    model = build("image", tmp_path / "model", size=hub.PIXELS)
    pixels = torch.randn(3, 3, hub.PIXELS, hub.PIXELS)
    with torch.no_grad():
        states_ML = source(pixels).last_hidden_state[:, 0]
    assert model.image is not None
    torch.testing.assert_close(model.image.pooled(pixels), states_ML)
    model.save_pretrained(tmp_path / "run" / "model")
    again = load_model(tmp_path / "run")
    torch.testing.assert_close(again.get_image_features(pixels), model.get_image_features(pixels))
    # Any other weight that lacks is missed still.
    weights = load_file(tmp_path / "model" / "model.safetensors")
    del weights["layernorm.bias"]
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 weights, layernorm\.bias"):
        build("image", tmp_path / "model", size=hub.PIXELS)


def test_a_tower_of_another_size_than_it_is_shown_opens_again(tmp_path: Path) -> None:
    hub.dinov2(tmp_path / "model")
    model = build("image", tmp_path / "model", size=hub.PIXELS)
    model.save_pretrained(tmp_path / "run" / "model")
    pixels = torch.randn(3, 3, hub.PIXELS, hub.PIXELS)
    features_MD = load_model(tmp_path / "run").get_image_features(pixels)
    torch.testing.assert_close(features_MD, model.get_image_features(pixels))


@pytest.mark.parametrize(
    ("saved", "width"),
    [
        (hub.clip, (tiny.WIDTH, True)),
        (hub.clip_vision, (tiny.WIDTH, True)),
        (hub.siglip, (32, True)),
        (lambda folder: hub.save(CLIPVisionModel(hub.clip_config().vision_config), folder), (32, False)),
        (hub.dinov2, (32, False)),
        (lambda folder: hub.save(ResNetModel(ResNetConfig(hidden_sizes=[8, 16, 24, 40])), folder), (40, False)),
    ],
)
def test_the_width_of_an_image_tower_is_known_without_its_weights(
    tmp_path: Path, saved: Callable[[Path], Any], width: tuple[int, bool]
) -> None:
    saved(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert image_width("tower:", AutoConfig.from_pretrained(tmp_path)) == width


def test_what_pools_nothing_has_no_width() -> None:
    with pytest.raises(UserError, match=r"^tower: is a vit_mae, which has no pooled output; choose"):
        image_width("tower:", ViTMAEConfig(**hub.VISION))
    with pytest.raises(UserError, match=r"^tower: is a bert, no image tower$"):
        image_width("tower:", BertConfig(**hub.BERT))


def test_every_parameter_gets_a_gradient(tmp_path: Path) -> None:
    hub.chinese_clip(tmp_path / "model")
    model = build("text", tmp_path / "model")
    features = model(
        input_ids=torch.randint(0, 60, (12,)),
        position_ids=torch.tensor([*range(5), *range(7)]),
        segments=Segments.of(np.array([0, 5, 12], np.int32)),
        texts=torch.tensor([0, 1]),
        masked_positions=torch.tensor([2, 8]),
        masked_labels=torch.tensor([4, 7]),
    )
    (features["features"].sum() + features["mlm_loss_sum"] + features["logit_scale"].sum()).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize(
    ("saved", "side", "changes", "message"),
    [
        (hub.clip, "text", {}, "is a CLIP, which reads English.*efficientclip_text"),
        (hub.clip_vision, "text", {}, "is a clip_vision_model, no text tower"),
        (hub.bert, "image", {}, "is a bert, no image tower"),
        (
            hub.taiyi,
            "text",
            {},
            "is of type BertForSequenceClassification: its features, like Taiyi's, are a classifier's .*alone",
        ),
        (hub.altclip, "text", {}, "is of type altclip: its features pass a norm and a layer with a bias .*alone"),
        (hub.siglip, "text", {}, "is of type siglip: its text features come from a head with a bias"),
        (hub.clip, "image", {"size": 32}, "model.image_tower.size: 32, but .* takes pictures of 16 pixels"),
        (None, "text", {}, "is no model folder, run or reachable hub id"),
    ],
)
def test_folders_of_another_kind_are_refused(
    tmp_path: Path, saved: Callable[[Path], Any] | None, side: str, changes: dict[str, Any], message: str
) -> None:
    if saved is not None:
        saved(tmp_path / "model")
    with pytest.raises(UserError, match=message):
        build(side, tmp_path / "model", **changes)


@pytest.mark.parametrize(("saved", "positions"), [(hub.bert, 64), (hub.chinese_clip, 64), (hub.roberta, 62)])
def test_texts_longer_than_a_towers_positions_are_refused(
    tmp_path: Path, saved: Callable[[Path], Any], positions: int
) -> None:
    saved(tmp_path / "tower")
    tower = build("text", tmp_path / "tower").text
    assert tower is not None

    def reads(tokens: int) -> torch.Tensor:
        segments = Segments.of(np.array([0, tokens], np.int32))
        return tower.states(torch.ones(tokens, dtype=torch.int64), torch.arange(tokens), segments)

    assert tower.positions == positions and len(reads(positions)) == positions
    with pytest.raises(IndexError):
        reads(positions + 1)
    fits = {"training__max_caption_tokens": positions, "data__max_text_tokens": positions}
    check_positions(load_config(tiny.config(tmp_path, **fits)), tower.positions)
    for field in fits:
        config = load_config(tiny.config(tmp_path, **fits | {field: positions + 1}))
        with pytest.raises(UserError, match=rf"{field.replace('__', '.')}: {positions + 1}, .* has {positions} pos"):
            check_positions(config, tower.positions)
    check_positions(load_config(tiny.config(tmp_path, **fits | {field: 99}, mlm__texts_per_batch=0)), tower.positions)


@pytest.mark.parametrize(
    ("saved", "side"), [(hub.bert, "text"), (hub.chinese_clip, "text"), (hub.clip, "image"), (hub.clip_vision, "image")]
)
def test_towers_saved_in_half_precision_train_in_float32(
    tmp_path: Path, saved: Callable[[Path], Any], side: str
) -> None:
    source = saved(tmp_path / "model").half()
    source.save_pretrained(tmp_path / "model")
    model = build(side, tmp_path / "model", **({"size": hub.PIXELS} if side == "image" else {}))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    if side == "image":
        assert model.get_image_features(torch.randn(2, 3, hub.PIXELS, hub.PIXELS)).isfinite().all()
    else:
        assert model.get_text_features(*texts()).isfinite().all()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("not finite", r"model_tower.pretrained: .*model: the weight .*embeddings.* is not finite"),
        ("cut", r"model_tower\.pretrained: model folder .*model: broken \("),
        ("empty config", r"model_tower\.pretrained: model folder .*model: broken \("),
        ("a bit", r"model\.safetensors: is not what was written"),
        ("a weight less", r"lacks 1 weights, .*query.weight for one"),
    ],
)
@pytest.mark.parametrize("side", ["text", "image"])
def test_weights_that_are_broken_are_refused(tmp_path: Path, side: str, damage: str, message: str) -> None:
    model = tmp_path / "model"
    (hub.bert if side == "text" else hub.clip_vision)(model)
    file = model / "model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if "embedding" in name and weights[name].ndim > 1)
    if damage == "not finite":
        weights[name][0] = torch.nan
        save_file(weights, file, {"format": "pt"})
    elif damage == "a weight less":
        del weights[next(name for name in weights if name.endswith(("query.weight", "q_proj.weight")))]
        save_file(weights, file, {"format": "pt"})
        message = message.replace("query.weight", r"q(uery|_proj)\.weight")
    elif damage == "a bit":
        digests.write_digests(model)
        file.write_bytes(file.read_bytes()[:-1] + bytes([file.read_bytes()[-1] ^ 1]))
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    else:
        (model / "config.json").write_bytes(b"")
    with pytest.raises(UserError, match=message.replace("model_tower", rf"model\.{side}_tower")):
        build(side, model, **({"size": hub.PIXELS} if side == "image" else {}))


@pytest.mark.parametrize("saved", [hub.bert, hub.roberta, hub.clip])
def test_weights_without_a_tokenizer_give_none(tmp_path: Path, saved: Callable[[Path], Any]) -> None:
    saved(tmp_path / "model")
    with pytest.raises(UserError, match=r"tokenizer .*model: holds no vocabulary"):
        load_tokenizer(tmp_path / "model")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("vocab.txt", b"", "holds no vocabulary"),
        ("vocab.txt", b"\xff\xfe\0", "broken"),
        ("tokenizer.json", b"", "broken"),
        ("tokenizer.json", b"{", "broken"),
    ],
)
def test_a_broken_tokenizer_is_one_message(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    tiny.tokenizer(tmp_path / "made").save_pretrained(tmp_path / "made")
    (tmp_path / "made" / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"tokenizer {tmp_path}.*: {message}"):
        load_tokenizer(tmp_path / "made" / name if name == "vocab.txt" else tmp_path / "made")
