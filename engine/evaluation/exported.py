"""A folder that `export` wrote, or a Chinese-CLIP as Hugging Face has it, opened for use as a run is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import ChineseCLIPProcessor

from ..config import Config, Model, Training
from ..config import ImageTower as Pictures
from ..config import TextTower as Texts
from ..data.tokenizer import fingerprint, load_tokenizer
from ..errors import UserError, reading
from ..model.efficientclip import build_model, is_ours, load_model
from ..model.frozen import frozen_name
from .run import Run, open_run

RESTORE = "restore it from a copy, or export the run again"
LONGEST = 512


def is_exported(folder: Path) -> bool:
    return (folder / "config.json").is_file() and not (folder / "config.yaml").is_file()


def open_model(folder: Path) -> Run:
    """The run in `folder`, by `open_run`, or the model in it, whose weights, pixels and longest text are its own.

    UserError when it is neither, or not as it was written.
    """
    if not is_exported(folder):
        return open_run(folder)
    described: dict[str, Any] = {}
    with reading("model folder", folder / "config.json", RESTORE):
        described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    own = is_ours(folder)
    if not own and described.get("model_type") != "chinese_clip":
        raise UserError(
            f"model {folder}: is a {described.get('model_type')}; give a run, a folder that `efficientclip export`"
            " wrote, or a Chinese-CLIP"
        )
    with reading("model folder", folder, RESTORE):
        processor = ChineseCLIPProcessor.from_pretrained(folder)
        pixels, longest = processor.image_processor, min(processor.tokenizer.model_max_length, LONGEST)
        tower = Pictures(
            pretrained=str(folder), size=pixels.crop_size["height"], mean=pixels.image_mean, std=pixels.image_std
        )
        width = described["width" if own else "projection_dim"]
        towers = Model(image_tower=tower, text_tower=Texts(pretrained=str(folder)), width=width)
        config = Config(
            run=folder, model=towers, training=Training(pair_visits=1, batch_size=1, max_caption_tokens=longest)
        )
    model = load_model(folder) if own else build_model(towers, seed=0, vocabulary=None, sides=("text",))
    if torch.cuda.is_available():
        torch.nn.Module.to(model, "cuda")
    tokenizer = load_tokenizer(folder)
    manifest = {"tower": frozen_name(config), "tokenizer": fingerprint(tokenizer), "width": width}
    return Run(folder, config, model, tokenizer, None, manifest, earlier=False)
