"""Tiny checkpoints as Hugging Face saves them, each in a folder of its own."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    AltCLIPConfig,
    AltCLIPModel,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    ChineseCLIPConfig,
    ChineseCLIPModel,
    CLIPConfig,
    CLIPModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2Model,
    PreTrainedModel,
    RobertaConfig,
    RobertaModel,
    SiglipConfig,
    SiglipModel,
)

from tests import tiny

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
PIXELS = 16
VISION = {**SIZES, "image_size": PIXELS, "patch_size": 8}
BERT = {**SIZES, "vocab_size": 60, "max_position_embeddings": 64}


def clip_config(positions: int = 20) -> CLIPConfig:
    text = {**SIZES, "vocab_size": 58, "max_position_embeddings": positions, "bos_token_id": 56, "eos_token_id": 57}
    return CLIPConfig(text_config=text, vision_config=VISION, projection_dim=tiny.WIDTH)


def save(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Save it with weights of unit-like spread: Hugging Face's own are so small that every tower looks the same."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=0.2)
            elif parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return model.eval()


def clip(folder: Path, positions: int = 20) -> CLIPModel:
    return save(CLIPModel(clip_config(positions)), folder)


def clip_text(folder: Path) -> CLIPTextModelWithProjection:
    config = clip_config().text_config
    config.projection_dim = tiny.WIDTH
    return save(CLIPTextModelWithProjection(config), folder)


def clip_vision(folder: Path) -> CLIPVisionModelWithProjection:
    config = clip_config().vision_config
    config.projection_dim = tiny.WIDTH
    return save(CLIPVisionModelWithProjection(config), folder)


def chinese_clip(folder: Path) -> ChineseCLIPModel:
    return save(
        ChineseCLIPModel(ChineseCLIPConfig(text_config=BERT, vision_config=VISION, projection_dim=tiny.WIDTH)), folder
    )


def bert(folder: Path) -> BertModel:
    return save(BertModel(BertConfig(**BERT)), folder)


def masked_bert(folder: Path, positions: int = 64) -> BertModel:
    """As Chinese RoBERTa-wwm is published: a BERT for masked-language modelling."""
    model = save(BertForMaskedLM(BertConfig(**BERT | {"max_position_embeddings": positions})), folder)
    return model.bert


def roberta(folder: Path) -> RobertaModel:
    return save(RobertaModel(RobertaConfig(**{**BERT, "type_vocab_size": 1, "pad_token_id": 1})), folder)


def taiyi(folder: Path) -> BertForSequenceClassification:
    """Taiyi-CLIP's text half: its classifier projects."""
    return save(BertForSequenceClassification(BertConfig(**BERT, num_labels=tiny.WIDTH)), folder)


def altclip(folder: Path) -> AltCLIPModel:
    text = {**BERT, "project_dim": 24, "pad_token_id": 1}
    return save(AltCLIPModel(AltCLIPConfig(text_config=text, vision_config=VISION, projection_dim=tiny.WIDTH)), folder)


def dinov2(folder: Path) -> Dinov2Model:
    """Its positions are of larger pictures than it is shown."""
    return save(Dinov2Model(Dinov2Config(**VISION | {"image_size": 2 * PIXELS})), folder)


def siglip(folder: Path) -> SiglipModel:
    text = {**SIZES, "vocab_size": 60, "max_position_embeddings": 64}
    return save(SiglipModel(SiglipConfig(text_config=text, vision_config=VISION)), folder)


def clip_tokenizer(folder: Path) -> CLIPTokenizer:
    """Every letter is a token; saved beside the weights of `clip`, whose vocabulary it fills."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [*letters, *(f"{letter}</w>" for letter in letters), "!", ",", ".", "?", "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={word: number for number, word in enumerate(words)}, merges=[])
    tokenizer.save_pretrained(folder)
    return tokenizer
