"""One run, from its config to its model folder: what it trains on, and its trainer."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from .. import stopping
from ..config import Augmentation, Config, ImageTower
from ..data.cache import Cache
from ..data.image_pairs import HeldOutImages, ImagePairs
from ..data.pairs import CaptionPairs, MaskedTexts, PairSource
from ..data.pixels import PicturePairs, load_pictures
from ..data.sources import Source, open_source
from ..data.store import Store, TextStore, edges
from ..data.tables import USUAL, Columns
from ..data.tokenizer import fingerprint, load_tokenizer
from ..errors import UserError
from ..files.digests import digest_of
from ..files.places import Location
from ..hardware import compute_dtype, device_name
from ..model.efficientclip import build_model
from ..model.encode import encode_pictures, encode_store
from ..model.frozen import frozen_name, image_tower_name, teacher_name, tower_difference
from ..model.teacher import Teacher
from ..noise.by_hand import read_by_hand
from ..noise.cross_fit import FILE as CROSS_FIT
from ..noise.cross_fit import read_cross_fit
from ..objectives.retrieval import retrieval_report
from .deepspeed_json import deepspeed_digest
from .distributed import process_group
from .ranks import agree
from .run_folder import describe, owned, proven, run_config, run_identity
from .trainer import Trainer, Validate

AnyTrainer = TypeVar("AnyTrainer", bound=Trainer)


@dataclass(frozen=True)
class Inputs:
    """What a run trains on. `identity` tells it by digest; `tokenizer`, or the folder of one, is that of its texts, and
    `vocabulary` its size."""

    source: PairSource
    validate: Validate
    identity: dict[str, Any]
    vocabulary: int | None = None
    tokenizer: PreTrainedTokenizerBase | Path | None = None


def train(config: Config) -> int:
    """Run `config` to its end, or on from its newest whole checkpoint; returns the exit code."""
    started = time.time()
    with set_up(config, Trainer) as trainer:
        stopped_by = trainer.train()
        if stopped_by is not None:
            return told_to_stop(trainer, stopped_by)
        if trainer.rank == 0:
            spent, ranks = time.time() - started, trainer.world_size
            print(f"{config.run}: {trainer.visits} pair visits on {ranks} rank(s) in {spent:.0f} s")
    return 0


def told_to_stop(trainer: Trainer, signum: int) -> int:
    """Say so, once; returns the exit code."""
    if trainer.rank == 0:
        saved = f"checkpoint of step {trainer.step} saved"
        print(f"stopped by {stopping.name_of(signum)}; {saved}; {stopping.GOES_ON}", flush=True)
    return 128 + signum


@contextmanager
def set_up(config: Config, kind: Callable[..., AnyTrainer]) -> Iterator[AnyTrainer]:
    """A trainer of `config` in its own folder, within the process group of all ranks."""
    starts = {"text": text_run, "image": _image_start, "both": both_towers}
    with process_group(config), owned(config.run, "run", "training"):
        yield new_trainer(config, kind, starts[config.training.tower](config))


def new_trainer(config: Config, kind: Callable[..., AnyTrainer], inputs: Inputs) -> AnyTrainer:
    """The trainer of a run on `inputs`, with the towers that `config` describes; `config.run` is owned."""
    identity = inputs.identity
    agreed = identity | {"deepspeed": deepspeed_digest(config)}
    agree({name: json.dumps(value, sort_keys=True) for name, value in agreed.items()}, {})
    if dist.get_rank() == 0:
        describe(config, identity, inputs.tokenizer)
    dist.barrier()
    sides = ("text", "image") if config.training.tower == "both" else (config.training.tower,)
    start = config.model
    if config.confidence.selection == "calibrated":
        # The fold towers are the warm-up.
        start = start.model_copy(update={"start_from": config.confidence.cross_fit})
    model = build_model(start, seed=config.seed, vocabulary=inputs.vocabulary, sides=sides)
    if model.text is not None:
        check_positions(config, model.text.positions)
    model.compute = compute_dtype(config.training.precision)
    if config.training.recompute:
        model.recompute_layers()
    lacking = model.compute is None and config.training.precision != "fp32"
    if lacking and torch.cuda.is_available():
        raise UserError(f"training.precision=bf16: {device_name()} has no bfloat16; choose fp16 or fp32")
    if lacking and dist.get_rank() == 0:
        print("this CPU only emulates bfloat16, up to 80 times slower than float32: training in float32", flush=True)
    return kind(config, model, inputs.source, inputs.validate)


def text_run(config: Config, rows: npt.NDArray[np.int64] | None = None) -> Inputs:
    """Pairs of the store (those of `rows`), and the measure of the validation stores."""
    if config.data.store is None:
        raise UserError("data.store: not set; make one with `efficientclip prepare SOURCE STORE`")
    store = Store(config.data.store)
    _check_store(config, store)
    stores: dict[str, TextStore] = {"store": store}
    if (masked := masked_texts(config)) is not None:
        stores["texts"] = masked.texts
        _same_tokenizer("mlm.texts", masked.texts, store)
    held_out = {name: Store(_local(name, path)) for name, path in config.data.validation.items()}
    for name, held in held_out.items():
        _check_store(config, held)
        _same_tokenizer(f"data.validation.{name}", held, store)
    proofs = proven(stores | {f"validation.{name}": held for name, held in held_out.items()})
    identity: dict[str, Any] = {
        "store": proofs["store"],
        "texts": proofs.get("texts"),
        "tower": store.manifest["tower"],
        "tokenizer": store.manifest["tokenizer"],
        "vocabulary": store.manifest["vocabulary"],
        "width": store.width,
        "validation": {name: proofs[f"validation.{name}"] for name in held_out},
    }
    if config.confidence.selection == "calibrated" and config.confidence.cross_fit is not None:
        # A run that a file about other pairs would mislead ends here.
        read_cross_fit(config.confidence.cross_fit, store)
        identity["cross_fit"] = digest_of(config.confidence.cross_fit / CROSS_FIT)
    by_hand = None
    if config.data.verdicts is not None:
        found = read_by_hand(config.data.verdicts, store)
        by_hand, identity["verdicts"] = found.of_pairs, found.identity
        if dist.get_rank() == 0:
            print(f"{config.run}: obeys {config.data.verdicts}: {found}", flush=True)

    weights = {name: source.weight for name, source in config.data.sources.items()}

    def validate(module: torch.nn.Module) -> dict[str, dict[str, Any]]:
        return {
            name: store_report(encode_store(module, held, config.training.max_caption_tokens), held)
            for name, held in held_out.items()
        }

    pairs = CaptionPairs(store, masked, rows, weights, by_hand)
    return Inputs(pairs, validate, identity, store.manifest["vocabulary"], store.path / "tokenizer")


def masked_texts(config: Config) -> MaskedTexts | None:
    """The unpaired texts of a run; None: it has none."""
    if config.mlm.texts is None or not config.mlm.texts_per_batch:
        return None
    return MaskedTexts(
        TextStore(config.mlm.texts),
        per_batch=config.mlm.texts_per_batch,
        mask_share=config.mlm.mask_share,
        max_tokens=config.data.max_text_tokens,
        whole_words=config.mlm.whole_word,
    )


def _local(name: str, path: Location) -> Path:
    if not isinstance(path, Path):
        raise UserError(f"data.validation.{name}: {path} is no store on a disk; prepare one, and give its folder")
    return path


def _same_tokenizer(field: str, other: TextStore, store: Store) -> None:
    if other.manifest["tokenizer"] != store.manifest["tokenizer"]:
        raise UserError(f"{field}: {other.path} was made with another tokenizer than {store.path}; prepare it anew")


def store_report(text_ND: Any, store: Store) -> dict[str, Any]:
    """Retrieval between a store's captions, encoded as `text_ND`, and its frozen features."""
    return retrieval_report(
        text_ND,
        store.features.astype("float32"),
        store.caption_edges,
        edges(store.image_ids, store.caption_ids, len(store.features)),
    )


def _check_store(config: Config, store: Store) -> None:
    expected, found = frozen_name(config), store.manifest["tower"]
    if (difference := tower_difference(found, expected)) is not None:
        raise UserError(
            f"store {store.path}: holds features of {found}, but model.image_tower or model.teacher is {expected}:"
            f" {difference}; prepare the store with this config, or give the tower it was made with"
        )
    if store.width != config.model.width:
        raise UserError(f"store {store.path}: features are {store.width} wide, model.width is {config.model.width}")
    if config.data.tokenizer is not None:
        tokenizer = fingerprint(load_tokenizer(config.data.tokenizer))
        if tokenizer != store.manifest["tokenizer"]:
            raise UserError(f"data.tokenizer: not the one that made {store.path}; prepare the store anew")


def check_positions(config: Config, positions: int | None) -> None:
    """UserError when texts may be longer than the text tower's `positions`; None: it has no such limit."""
    longest = {"training.max_caption_tokens": config.training.max_caption_tokens}
    if config.mlm.texts_per_batch:
        longest["data.max_text_tokens"] = config.data.max_text_tokens
    for field, tokens in longest.items():
        if positions is not None and tokens > positions:
            raise UserError(
                f"{field}: {tokens}, but model.text_tower has {positions} positions; set it to {positions} or less"
            )


def _image_start(config: Config) -> Inputs:
    tower = config.model.image_tower
    if tower is None or config.model.teacher is None:
        raise UserError("model: training.tower=image needs image_tower (what trains) and teacher (what it learns from)")
    teacher = Teacher(config.model.teacher)
    cache = Cache.of(config.data)
    sources = opened_sources(config, cache)
    weights = [source.weight for source in config.data.sources.values()]
    pictures = load_pictures(sources, tower.size, config.data.max_bad_shards)
    source = PicturePairs(pictures, teacher.encode, tower, config.training.augmentation, config.seed, weights)
    identity = {"store": None, "tower": None, "tokenizer": None, "pictures": listed(sources)}
    return Inputs(
        source,
        picture_reports(config, tower, teacher, cache),
        identity | {"teacher": teacher_name(config.model.teacher)},
    )


def picture_reports(config: Config, tower: ImageTower, teacher: Teacher, cache: Cache | None) -> Validate:
    """How well the names of the pictures of data.validation, by the teacher, find these by an image tower."""
    held_out: dict[str, PicturePairs] = {}
    for name, path in config.data.validation.items():
        pictures = load_pictures([open_source(path, cache=cache)], tower.size)
        names = [captions[:1] for captions in pictures.captions]
        held_out[name] = PicturePairs(
            replace(pictures, captions=names), teacher.encode, tower, Augmentation(), config.seed
        )

    def validate(module: torch.nn.Module) -> dict[str, dict[str, Any]]:
        return {name: _picture_report(module, held) for name, held in held_out.items()}

    return validate


def opened_sources(
    config: Config, cache: Cache | None, images: Location | None = None, columns: Columns = USUAL
) -> list[Source]:
    """Those of data.sources; `images` and `columns` as `open_source` takes them."""
    given = (source.path for source in config.data.sources.values())
    return [open_source(path, images, columns, cache) for path in given if path is not None]


def listed(sources: Sequence[Source]) -> list[list[Any]]:
    """Names and sizes of the files: their bytes are read by every epoch, and too many to be read before."""
    return [[file.name, _size(file)] for source in sources for file in source.files]


def _size(file: Location) -> int | None:
    """None where it is remote, or left out: it is asked for when it is read."""
    return file.stat().st_size if isinstance(file, Path) and file.is_file() else None


def _picture_report(module: torch.nn.Module, held: PicturePairs) -> dict[str, Any]:
    images_ND = encode_pictures(module, held.pictures.pixels, held.tower)
    names_KD = held.table.rows(np.arange(len(held.table))).numpy()
    to_image = edges(held.frozen_ids, held.trained_ids, len(names_KD))
    return retrieval_report(names_KD, images_ND, to_image, held.edges)


def both_towers(config: Config) -> Inputs:
    tower = config.model.image_tower
    if tower is None or config.model.text_tower is None:
        raise UserError("model: training.tower=both needs image_tower and text_tower")
    tokenizer = load_tokenizer(config.data.tokenizer)
    if config.model.start_from is not None:
        _check_pair(config.model.start_from, tower, fingerprint(tokenizer))
    cache = Cache.of(config.data)
    sources = opened_sources(config, cache)
    held_out = {
        name: HeldOutImages(open_source(path, cache=cache), tower, tokenizer)
        for name, path in config.data.validation.items()
    }

    def validate(module: torch.nn.Module) -> dict[str, dict[str, Any]]:
        return {
            name: retrieval_report(
                encode_store(module, held.texts, config.training.max_caption_tokens),
                encode_pictures(module, held.pixels, tower),
                held.to_images,
                held.to_texts,
            )
            for name, held in held_out.items()
        }

    identity = {
        "store": None,
        "tower": None,
        "pictures": listed(sources),
        "tokenizer": fingerprint(tokenizer),
        "vocabulary": len(tokenizer),
        "width": config.model.width,
    }
    return Inputs(ImagePairs(sources, tower, tokenizer), validate, identity, len(tokenizer), tokenizer)


def _check_pair(start: Path, tower: ImageTower, tokenizer: str) -> None:
    """UserError unless `start` holds both towers, or a text tower that learned from `tower`, and reads its `tokenizer`.

    Chinese-CLIP's second stage (arXiv 2211.01335) trains on what fits together already.
    """
    run = start.parents[1] if start.parent.name == "checkpoints" else start
    before, identity = run_config(run), run_identity(run)
    if before.training.tower == "image":
        raise UserError(
            f"model.start_from {start}: holds no text tower; give it as model.image_tower.pretrained, and start from a"
            " text run against it"
        )
    if identity is None:
        raise UserError(
            f"model.start_from {start}: is of an earlier version, which did not tell what a run was trained on; train"
            " it anew"
        )
    if before.training.tower == "text":
        if before.model.image_tower is None:
            raise UserError(
                f"model.start_from {start}: learned from a teacher's texts, and knows no pictures; start from a text"
                " run against model.image_tower, which may start from this one"
            )
        name = "fresh" if tower.pretrained is None else image_tower_name(tower)
        if (difference := tower_difference(identity["tower"], name)) is not None:
            raise UserError(
                f"model.start_from {start}: learned from {identity['tower']}, but model.image_tower is {name}:"
                f" {difference}; give that of {run / 'config.yaml'}, or start from another run"
            )
    if identity["tokenizer"] != tokenizer:
        raise UserError(f"data.tokenizer: not that of model.start_from {start}; give {run / 'tokenizer'}")
