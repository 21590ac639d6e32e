from __future__ import annotations

from pathlib import Path

import pytest
from transformers import ResNetConfig

from efficientclip.config import Config, load_config
from efficientclip.model.efficientclip import EfficientCLIP, EfficientCLIPConfig
from tests import tiny


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """Of `prepare`, with an image tower; it lies in config.yaml."""
    tiny.tokenizer(tmp_path)
    resnet = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    model = EfficientCLIP(EfficientCLIPConfig(image={**resnet.to_dict(), "image_size": 16}, width=tiny.WIDTH))
    model.save_pretrained(tmp_path / "image-run" / "model")
    return load_config(
        tiny.config(
            tmp_path,
            data__tokenizer=str(tmp_path / "vocab.txt"),
            data__max_text_tokens=8,
            data__max_bad_share=0.9,
            model__image_tower={"pretrained": str(tmp_path / "image-run"), "size": 16},
        )
    )
