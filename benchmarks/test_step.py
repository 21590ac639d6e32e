"""One text step, forward, loss and backward: packed tokens beside rows padded to the longest and to 77 tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from efficientclip.config import Model, TextTower
from efficientclip.data.batches import PackedTexts, packed_inputs
from efficientclip.kernels import contrastive_loss
from efficientclip.model.efficientclip import EfficientCLIP, build_model

PAIRS, WIDTH, VOCABULARY = 256, 256, 21_128
PADDINGS = {"packed": None, "padded to the longest": 0, "padded to 77": 77}


def tower() -> EfficientCLIP:
    shape = {
        "model_type": "bert",
        "hidden_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 1024,
        "max_position_embeddings": 128,
    }
    config = Model(width=WIDTH, text_tower=TextTower(pretrained=None, architecture=shape))
    return build_model(config, seed=0, vocabulary=VOCABULARY, sides=("text",))


def captions() -> list[torch.Tensor]:
    """Token ids of captions with a mean of 20 tokens."""
    random = np.random.default_rng(0)
    lengths = np.clip(random.poisson(20, PAIRS), 3, 77)
    return [torch.from_numpy(random.integers(5, VOCABULARY, n)) for n in np.sort(lengths)]


def packed_features(model: EfficientCLIP, texts: list[torch.Tensor]) -> torch.Tensor:
    bounds = np.concatenate([[0], np.cumsum([len(t) for t in texts])]).astype(np.int32)
    positions = torch.cat([torch.arange(len(t)) for t in texts])
    order = np.arange(len(texts))
    return model(**packed_inputs(PackedTexts(torch.cat(texts), positions, bounds, order)))["features"]


def padded_features(model: EfficientCLIP, texts: list[torch.Tensor], length: int) -> torch.Tensor:
    assert model.text is not None
    length = length or max(len(t) for t in texts)
    ids = torch.stack([F.pad(t, (0, length - len(t))) for t in texts])
    mask = torch.stack([torch.arange(length) < len(t) for t in texts]).long()
    states: Any = model.text.backbone(input_ids=ids, attention_mask=mask).last_hidden_state
    return F.normalize(model.text.projection(states[:, 0]), dim=-1)


def path(name: str) -> tuple[EfficientCLIP, Callable[[EfficientCLIP, list[torch.Tensor]], torch.Tensor]]:
    model, length = tower(), PADDINGS[name]
    if length is None:
        return model, packed_features
    assert model.text is not None
    model.text.backbone.set_attn_implementation("sdpa")
    return model, lambda m, texts: padded_features(m, texts, length)


@pytest.mark.parametrize("name", PADDINGS)
def test_text_step(benchmark: Any, name: str) -> None:
    model, features = path(name)
    texts, images = captions(), F.normalize(torch.randn(PAIRS, WIDTH), dim=1)
    reference, ours = path("padded to the longest"), features(model, texts)
    # A speed-up of something else is no speed-up.
    torch.testing.assert_close(ours, reference[1](reference[0], texts), atol=1e-5, rtol=1e-4)
    slots = {"packed": 1.0, "padded to the longest": None, "padded to 77": None}
    real = sum(len(t) for t in texts)
    if slots[name] is None:
        slots[name] = PAIRS * (PADDINGS[name] or max(len(t) for t in texts)) / real
    benchmark.extra_info["token slots / real tokens"] = slots[name]

    def step() -> None:
        contrastive_loss(features(model, texts), images, logit_scale=14.0).loss.backward()
        model.zero_grad()

    benchmark.pedantic(step, rounds=5, warmup_rounds=1)
