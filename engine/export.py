"""`efficientclip export RUN OUT`: both towers of a finished run as one Hugging Face folder with a model card."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import (
    ChineseCLIPConfig,
    ChineseCLIPImageProcessorPil,
    ChineseCLIPModel,
    ChineseCLIPProcessor,
    ChineseCLIPTextConfig,
    ChineseCLIPVisionConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from . import config as settings
from .errors import UserError
from .evaluation.card import licence_of, model_card
from .evaluation.run import Run, open_run
from .files import digests
from .files.aside import clear_aside, made_aside
from .files.atomic import as_umask
from .files.ownership import claim, kind_of, mark, marked
from .model.efficientclip import EfficientCLIP, load_model
from .model.onnx import require_onnx, write_onnx
from .model.towers import ImageTower

TEXT_TYPES = ("bert", "chinese_clip_text_model")
IMAGE_TYPES = ("clip_vision_model", "chinese_clip_vision_model")
CARD = "README.md"
Existing = Literal["replace", "refuse"]


def export(
    run: Path,
    out: Path,
    *,
    replace: bool = False,
    store: Path | None = None,
    onnx: bool = False,
    licence: str | None = None,
) -> type[PreTrainedModel]:
    """Write the towers of `run` to the folder `out`, with their processor and a card; returns the class to open it.

    ChineseCLIPModel for a BERT read at [CLS] beside CLIP's ViT, EfficientCLIP for any other towers. Features and logit
    scale are those of the run. `onnx`: both towers as ONNX, too. `licence`, which the card names: the hub's identifier
    or NAME=LINK. UserError when the run is unfinished or has no image tower, or `out` is not empty; `replace`: an
    earlier export may be there, whose card was not changed.
    """
    existing: Existing = "replace" if replace else "refuse"
    named = licence_of(licence)
    if onnx:
        require_onnx()

    def claimed() -> None:
        claim(out, "model", sources=[run], existing=existing, files=_files_of(out, existing))

    clear_aside(out, "model", "exporting")
    claimed()
    opened = open_run(run, store)
    if not (run / "model" / "config.json").is_file():
        raise UserError(f"run {run}: unfinished, holds checkpoints alone; run the same `train` command to its end")
    tower = opened.config.model.image_tower
    if tower is None:
        raise UserError(
            f"run {run}: trained against a teacher's texts, so it has no image tower to export; start a run against"
            " images from it (model.start_from), and export that one"
        )
    # On the CPU and in fp32, whatever `open_run` made of it.
    model = load_model(run)
    model.image, model.config.image = opened.frozen.model.cpu(), opened.frozen.description
    whole = _chinese_clip(model) if _fits_chinese_clip(model) else model
    with made_aside(out, "model", "exporting", claimed) as folder:
        whole.save_pretrained(folder)
        _processor(opened, tower).save_pretrained(folder)
        _describe_modules(folder, "pooler_output" if isinstance(whole, ChineseCLIPModel) else None)
        if onnx:
            write_onnx(whole, folder / "onnx", size=tower.size, longest=opened.config.training.max_caption_tokens)
        as_umask(folder)
        _require_whole(folder)
        digests.write_digests(folder)
        # It is for its reader to complete, so no digest holds it; the mark tells whether one did.
        (folder / CARD).write_text(model_card(opened, whole, named, onnx=onnx), encoding="utf-8")
        mark(folder, "model", card=digests.digest_of(folder / CARD))
    return type(whole)


def _files_of(out: Path, existing: Existing) -> list[str]:
    """Relative paths of what belongs to the export at `out`, where it is to be replaced."""
    if existing != "replace" or kind_of(out) != "model":
        return []
    try:
        files = [*digests.read_digests(out), digests.NAME]
    except UserError as error:
        raise UserError(
            f"model {out}: what belongs to it is unknown, its {digests.NAME} is missing or broken; remove {out}, or"
            " name another folder"
        ) from error
    card = out / CARD
    if card.is_file() and digests.digest_of(card) != marked(out).get("card"):
        raise UserError(f"{card}: was changed since it was exported, so --replace leaves it; move it away")
    return [*files, CARD]


def _require_whole(folder: Path) -> None:
    names = digests.files_in(folder)
    if "config.json" not in names or not any(name.endswith(".safetensors") for name in names):
        raise UserError(f"{folder}: files vanished from it while it was written; run the same command again")


def _fits_chinese_clip(model: EfficientCLIP) -> bool:
    """Chinese-CLIP is a BERT read at [CLS] and CLIP's ViT, each with a projection without bias of that state alone."""
    text, image = model.text, model.image
    return (
        text is not None
        and text.pooling == "cls"
        and text.backbone.config.model_type in TEXT_TYPES
        and not getattr(text.backbone.config, "is_decoder", False)
        and isinstance(image, ImageTower)
        and image.projection is not None
        and image.fitted is None
        and image.backbone.config.model_type in IMAGE_TYPES
    )


def _chinese_clip(model: EfficientCLIP) -> ChineseCLIPModel:
    text: Any = model.text
    image: Any = model.image
    config = ChineseCLIPConfig(
        text_config=_translated(text.backbone.config, ChineseCLIPTextConfig),
        vision_config=_translated(image.backbone.config, ChineseCLIPVisionConfig),
        projection_dim=model.config.width,
    )
    whole = ChineseCLIPModel(config)
    whole.text_model.load_state_dict(text.backbone.state_dict())
    whole.vision_model.load_state_dict(image.backbone.state_dict())
    whole.text_projection.load_state_dict(text.projection.state_dict())
    whole.visual_projection.load_state_dict(image.projection.state_dict())
    with torch.no_grad():
        # Chinese-CLIP does not clamp it.
        whole.logit_scale.fill_(min(float(model.logit_scale), math.log(model.config.logit_scale_max)))
    return whole


def _translated(config: PreTrainedConfig, wanted: type[PreTrainedConfig]) -> dict[str, Any]:
    """The values of `config` that `wanted` has under the same names."""
    return {name: value for name, value in config.to_dict().items() if name in wanted.__annotations__}


def _processor(opened: Run, tower: settings.ImageTower) -> ChineseCLIPProcessor:
    opened.tokenizer.model_max_length = opened.config.training.max_caption_tokens
    pictures = ChineseCLIPImageProcessorPil(
        size={"shortest_edge": tower.size},
        crop_size={"height": tower.size, "width": tower.size},
        image_mean=list(tower.mean),
        image_std=list(tower.std),
    )
    return ChineseCLIPProcessor(image_processor=pictures, tokenizer=opened.tokenizer)


def _describe_modules(folder: Path, output: str | None) -> None:
    """What `SentenceTransformer(folder)` is made of: features of texts or pictures, in that field of what the model
    returns, or all of it, and L2-normalised."""
    path = "sentence_transformers.base.modules"
    modules = {"": f"{path}.transformer.Transformer", "1_Normalize": f"{path}.normalize.Normalize"}
    listed = [
        {"idx": at, "name": str(at), "path": place, "type": kind} for at, (place, kind) in enumerate(modules.items())
    ]
    asked = {side: {"method": f"get_{side}_features", "method_output_name": output} for side in ("text", "image")}
    told = {"modality_config": asked, "module_output_name": "sentence_embedding"}
    for name, content in (("modules.json", listed), ("sentence_bert_config.json", told)):
        (folder / name).write_text(json.dumps(content, indent=1), encoding="utf-8")
