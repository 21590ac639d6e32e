"""`deepspeed --module efficientclip.train CONFIG [key=value …]`: one run, from its config to its model folder."""

from __future__ import annotations

import argparse
import ctypes
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
import torch.utils.deterministic
from transformers.utils import logging

from .config import Augmentation, Config, load_config
from .data.image_pairs import HeldOutImages, ImagePairs
from .data.pairs import CaptionPairs, MaskedTexts, PairSource
from .data.pixels import PicturePairs, load_pictures
from .data.store import Store, TextStore, edges
from .data.tokenizer import fingerprint, load_tokenizer
from .errors import UserError, reported
from .model.efficientclip import build_model
from .model.encode import encode_pictures, encode_store
from .model.frozen import frozen_name
from .model.teacher import Teacher
from .noise_rate import read_cross_fit
from .objectives.retrieval import retrieval_report
from .training.distributed import end_process, join_process_group
from .training.trainer import Trainer, Validate

AnyTrainer = TypeVar("AnyTrainer", bound=Trainer)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Entry of the `deepspeed` launcher; ends the process."""
    launched(train, "train", __doc__, arguments)


def launched(
    run: Callable[[Config], None], command: str, description: str | None, arguments: list[str] | None
) -> NoReturn:
    """`run` the config that the command line names, on one of the launcher's ranks; ends the process."""
    parser = argparse.ArgumentParser(prog=f"efficientclip {command}", description=description)
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    end_process(reported(lambda: run(load_config(given.config, given.overrides))))


def train(config: Config) -> None:
    """Run `config` to its end, or on from its newest checkpoint."""
    started = time.time()
    with set_up(config, Trainer) as trainer:
        finished = trainer.train()
        if trainer.rank > 0:
            return
        if finished:
            spent, ranks = time.time() - started, trainer.world_size
            print(f"{config.run}: {trainer.visits} pair visits on {ranks} rank(s) in {spent:.0f} s")
        else:
            print(f"stopped by SIGTERM; checkpoint of step {trainer.step} saved; the same command goes on")


@contextmanager
def set_up(config: Config, kind: Callable[..., AnyTrainer]) -> Iterator[AnyTrainer]:
    """A trainer of `config`, within the process group of all ranks."""
    with process_group(config):
        starts: dict[str, Callable[[Config], tuple[PairSource, int | None, Validate]]]
        starts = {"text": text_run, "image": _image_start, "both": _both_towers}
        yield new_trainer(config, kind, *starts[config.training.tower](config))


def new_trainer(
    config: Config, kind: Callable[..., AnyTrainer], source: PairSource, vocabulary: int | None, validate: Validate
) -> AnyTrainer:
    """The trainer of a run on `source`, with the towers that `config` describes and the run's folder made."""
    if dist.get_rank() == 0:
        config.run.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    sides = ("text", "image") if config.training.tower == "both" else (config.training.tower,)
    start = config.model
    if config.confidence.selection == "calibrated":
        # The fold towers are the warm-up.
        start = start.model_copy(update={"start_from": config.confidence.cross_fit})
    model = build_model(start, seed=config.seed, vocabulary=vocabulary, sides=sides)
    if model.text is not None:
        check_positions(config, model.text.positions)
    return kind(config, model, source, validate)


@contextmanager
def process_group(config: Config) -> Iterator[int]:
    """This process set up for training, as its rank."""
    # Bars over the writing of small weight files would tear the progress bar.
    logging.disable_progress_bar()
    if not torch.cuda.is_available():
        _keep_freed_memory()
        # Batches differ in their tokens, so most of the 1,024 compiled products kept by default never return.
        for cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
            os.environ.setdefault(cache, "128")
    if config.training.threads:
        torch.set_num_threads(config.training.threads)
    torch.use_deterministic_algorithms(not torch.cuda.is_available())
    # Filling every torch.empty would write DeepSpeed's buckets anew in each step.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    rank, _ = join_process_group()
    try:
        yield rank
    finally:
        dist.destroy_process_group()


def _keep_freed_memory() -> None:
    """glibc hands large tensors back to the kernel and faults them in anew: up to a fifth of a step on CPUs."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-4, 0)  # M_MMAP_MAX
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def text_run(config: Config, rows: npt.NDArray[np.int64] | None = None) -> tuple[CaptionPairs, int, Validate]:
    """Pairs of the store (those of `rows`), its vocabulary, and the measure of the validation stores."""
    if config.data.store is None:
        raise UserError("data.store: not set; make one with `efficientclip prepare SOURCE STORE`")
    store = Store(config.data.store)
    _check_store(config, store)
    masked = None
    if config.mlm.texts_per_batch:
        if config.mlm.texts is None:
            raise UserError("mlm.texts: not set, though mlm.texts_per_batch is; make a text store, or set it to 0")
        texts = TextStore(config.mlm.texts)
        if texts.manifest["tokenizer"] != store.manifest["tokenizer"]:
            raise UserError(
                f"mlm.texts: {texts.path} was made with another tokenizer than {store.path}; prepare it anew"
            )
        masked = MaskedTexts(
            texts,
            per_batch=config.mlm.texts_per_batch,
            mask_share=config.mlm.mask_share,
            max_tokens=config.data.max_text_tokens,
            whole_words=config.mlm.whole_word,
        )
    if config.confidence.selection == "calibrated" and config.confidence.cross_fit is not None:
        # A run that a file about other pairs would mislead ends here.
        read_cross_fit(config.confidence.cross_fit, store)
    source = CaptionPairs(store, masked, rows)
    held_out = {name: Store(path) for name, path in config.data.validation.items()}
    for held in held_out.values():
        _check_store(config, held)

    def validate(module: torch.nn.Module) -> dict[str, dict[str, Any]]:
        return {
            name: store_report(encode_store(module, held, config.training.max_caption_tokens), held)
            for name, held in held_out.items()
        }

    return source, store.manifest["vocabulary"], validate


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
    if expected != found:
        raise UserError(
            f"store {store.path}: holds features of {found}, but model.image_tower or model.teacher is {expected};"
            " prepare the store with this config, or give the tower it was made with"
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


def _image_start(config: Config) -> tuple[PairSource, None, Validate]:
    tower = config.model.image_tower
    if tower is None or config.model.teacher is None:
        raise UserError("model: training.tower=image needs image_tower (what trains) and teacher (what it learns from)")
    teacher = Teacher(config.model.teacher)
    source = PicturePairs(
        load_pictures(config.data.shards, tower.size), teacher.encode, tower, config.training.augmentation, config.seed
    )
    held_out = {}
    for name, path in config.data.validation.items():
        pictures = load_pictures([path], tower.size)
        names = [captions[:1] for captions in pictures.captions]
        held_out[name] = PicturePairs(
            replace(pictures, captions=names), teacher.encode, tower, Augmentation(), config.seed
        )

    def validate(module: torch.nn.Module) -> dict[str, dict[str, Any]]:
        return {name: _picture_report(module, held) for name, held in held_out.items()}

    return source, None, validate


def _picture_report(module: torch.nn.Module, held: PicturePairs) -> dict[str, Any]:
    images_ND = encode_pictures(module, held.pictures.pixels, held.tower)
    names_KD = held.table.rows(np.arange(len(held.table))).numpy()
    to_image = edges(held.frozen_ids, held.trained_ids, len(names_KD))
    return retrieval_report(names_KD, images_ND, to_image, held.edges)


def _both_towers(config: Config) -> tuple[PairSource, int, Validate]:
    tower = config.model.image_tower
    if tower is None or config.model.text_tower is None:
        raise UserError("model: training.tower=both needs image_tower and text_tower")
    tokenizer = load_tokenizer(config.data.tokenizer)
    held_out = {name: HeldOutImages(path, tower, tokenizer) for name, path in config.data.validation.items()}

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

    return ImagePairs(config.data.shards, tower, tokenizer), len(tokenizer), validate


if __name__ == "__main__":
    main()
