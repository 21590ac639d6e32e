"""`efficientclip export RUN OUT`: both towers of a finished run as one Hugging Face folder with a model card."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.parquet as pq
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
from .errors import UserError, reading
from .evaluation.run import Run, open_run, read_metrics
from .files import digests
from .files.aside import clear_aside, made_aside
from .files.atomic import as_umask
from .files.ownership import claim, kind_of, mark, marked
from .hardware import in_words, read_hardware
from .model.efficientclip import EfficientCLIP, load_model
from .model.towers import ImageTower
from .training.run_folder import RESTORE, run_identity

TEXT_TYPES = ("bert", "chinese_clip_text_model")
IMAGE_TYPES = ("clip_vision_model", "chinese_clip_vision_model")
CARD = "README.md"
Existing = Literal["replace", "refuse"]


def export(run: Path, out: Path, *, replace: bool = False, store: Path | None = None) -> type[PreTrainedModel]:
    """Write the towers of `run` to the folder `out`, with their processor and a card; returns the class to open it.

    ChineseCLIPModel for a BERT read at [CLS] beside CLIP's ViT, EfficientCLIP for any other towers. Features and logit
    scale are those of the run. UserError when the run is unfinished or has no image tower, or `out` is not empty;
    `replace`: an earlier export may be there, whose card was not changed.
    """
    existing: Existing = "replace" if replace else "refuse"

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
        as_umask(folder)
        _require_whole(folder)
        digests.write_digests(folder)
        # It is for its reader to complete, so no digest holds it; the mark tells whether one did.
        (folder / CARD).write_text(_card(opened, whole), encoding="utf-8")
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


def _card(opened: Run, whole: PreTrainedModel) -> str:
    """README.md of the exported folder."""
    steps, validations = read_metrics(opened.folder / "metrics.jsonl")
    chinese = isinstance(whole, ChineseCLIPModel)
    library = "transformers" if chinese else "efficientclip"
    name, tower = type(whole).__name__, opened.config.model.image_tower
    features = ".pooler_output" if chinese else ""
    parts = [
        "---",
        "# The licence is yours to choose; mind those of the data and of the image tower.",
        "license:",
        "language: zh",
        "library_name: transformers",
        "pipeline_tag: zero-shot-image-classification",
        "tags: [chinese-clip, efficientclip]",
        "---",
        "",
        f"# {opened.folder.name}",
        "",
        "Chinese texts and pictures in one space, trained by EfficientCLIP: a text tower learns against the features",
        f"of a frozen image tower (`{tower.pretrained if tower else ''}`).",
        f"{sum(parameter.numel() for parameter in whole.parameters()):,} parameters; features of"
        f" {opened.config.model.width} values.",
        "",
        "## Use",
        "",
        "```python",
        "import torch",
        "from PIL import Image",
        "from transformers import ChineseCLIPProcessor",
        f"from {library} import {name}",
        "",
        'folder = "path/to/this/folder"',
        f"model, processor = {name}.from_pretrained(folder), ChineseCLIPProcessor.from_pretrained(folder)",
        'texts = processor(text=["一只戴帽子的猫", "一条狗"], padding=True, truncation=True, return_tensors="pt")',
        'pictures = processor(images=Image.open("picture.jpg"), return_tensors="pt")',
        "with torch.inference_mode():",
        f"    text = torch.nn.functional.normalize(model.get_text_features(**texts){features}, dim=-1)",
        f"    image = torch.nn.functional.normalize(model.get_image_features(**pictures){features}, dim=-1)",
        "print(image @ text.T)  # cosines",
        "```",
        "",
        f"As a classifier of pictures{'' if chinese else ', where the class was imported as above'}:",
        "",
        "```python",
        "from transformers import pipeline",
        "",
        'classify = pipeline("zero-shot-image-classification", model=folder)',
        'print(classify("picture.jpg", candidate_labels=["猫", "狗"], hypothesis_template="一张{}的照片"))',
        "```",
        "",
        "By sentence-transformers, whose vectors are L2-normalised:",
        "",
        "```python",
        "from sentence_transformers import SentenceTransformer",
        "",
        "encoder = SentenceTransformer(folder)",
        'text, image = encoder.encode("一只戴帽子的猫"), encoder.encode(Image.open("picture.jpg"))',
        "```",
        "",
        f"Texts are cut to {opened.config.training.max_caption_tokens} tokens, as in training.",
        "",
        "## Data",
        "",
        *_data(opened),
        "",
        "## Resources",
        "",
        *_resources(opened, steps),
        "",
        "## Recall",
        "",
        *_recall(opened.folder, validations[-1]["validation"] if validations else {}),
        "",
        "## Intended use",
        "",
        "Research on retrieval between Chinese texts and pictures, and zero-shot classification of pictures. The model",
        "has the biases of its captions, and of the data that its image tower saw. Measure it on your own",
        "data before you rely on it; it is not meant for the identification or surveillance of people.",
        "",
    ]
    return "\n".join(parts)


def _data(opened: Run) -> Iterator[str]:
    manifest = opened.manifest
    if opened.store is None:
        paths = (source.path for source in opened.config.data.sources.values())
        yield f"- images and captions of {', '.join(path.name for path in paths if path is not None)}"
        return
    source = Path(str(manifest["source"])).name if "source" in manifest else opened.store.name
    # Without its store, a run does not know how many pairs it had.
    counts = [f"{manifest[kind]:,} {kind}" for kind in ("pairs", "images", "captions") if kind in manifest]
    yield f"- {f'{counts[0]} of {counts[1]} and {counts[2]}: ' if len(counts) == 3 else ''}{source}"
    if bad := sum(manifest.get("bad_counts", {}).values()):
        yield f"- {bad:,} bad samples were left out"
    if by_hand := (run_identity(opened.folder) or {}).get("verdicts"):
        yield f"- a person's verdicts: {by_hand['right']:,} pairs never dropped, {by_hand['wrong']:,} never trained on"
    kept = opened.folder / "confidence.parquet"
    digests.check_written(opened.folder, kept.name, remedy=RESTORE)
    if kept.is_file():
        with reading("verdicts", kept, RESTORE):
            share = float(np.mean(pq.read_table(kept, columns=["kept"])["kept"].to_numpy()))
        yield f"- {share:.1%} of the pairs were still trained on at the end (Ensemble Confident Learning)"
    if opened.config.mlm.texts_per_batch and opened.config.mlm.texts is not None:
        yield f"- unpaired texts for masked-language modelling: {opened.config.mlm.texts.name}"


def _resources(opened: Run, steps: list[dict[str, Any]]) -> Iterator[str]:
    training = opened.config.training
    yield f"- {training.pair_visits:,} pair visits in batches of {training.batch_size:,}"
    visits = np.diff([0, *(line["visits"] for line in steps)])
    seconds = sum(n / line["pairs_per_s"] for n, line in zip(visits, steps, strict=True))
    if seconds:
        yield f"- {seconds / 3600:.2g} hours of training steps, {training.pair_visits / seconds:,.0f} pairs a second"
    yield f"- hardware: {in_words(read_hardware(opened.folder / 'hardware.json'))}"


def _recall(run: Path, tables: Mapping[str, Any]) -> list[str]:
    """From the report where there is one, else from the last validation: `tables`."""
    results = run / "results.json"
    with reading("results", results, f"write it anew by `efficientclip report {run}`"):
        if results.is_file():
            tables = json.loads(results.read_text(encoding="utf-8"))
        return list(_recall_table({name: report for name, report in tables.items() if name != "made_by"}))


def _recall_table(tables: Mapping[str, Any]) -> Iterator[str]:
    if not tables:
        yield "Not measured: the run has neither validation data nor a report (`efficientclip report`)."
        return
    cutoffs = ("R@1", "R@5", "R@10")
    yield "| data | direction | candidates | " + " | ".join(f"{cutoff} %" for cutoff in cutoffs) + " |"
    yield "|" + "---|" * (3 + len(cutoffs))
    for name, report in tables.items():
        for key, shown, candidates in (("t2i", "text → image", "candidates"), ("i2t", "image → text", "texts")):
            figures = " | ".join(f"{report[key][cutoff]:.1f}" for cutoff in cutoffs)
            yield f"| {name} | {shown} | {report[candidates]:,} | {figures} |"
