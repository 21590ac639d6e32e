"""A trained run, opened for use: its text tower, its tokenizer, and the frozen tower behind its features."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from ..config import Config, load_config
from ..data.shards import BadSample, Sample
from ..data.sources import Source
from ..data.store import Store, Texts, TextStore, read_manifest
from ..data.tokenizer import fingerprint, load_tokenizer
from ..errors import UserError
from ..model.efficientclip import EfficientCLIP, load_model
from ..model.encode import encode_store
from ..model.frozen import FrozenImages, frozen_name
from ..prepare import prepare

TEXTS_AT_ONCE = 4096


@dataclass
class Run:
    """`store` is the path of the store that the run trained on, `manifest` that store's manifest.

    A run that trained both towers from shards has no store: its manifest names tower and tokenizer alone.
    """

    folder: Path
    config: Config
    model: EfficientCLIP
    tokenizer: PreTrainedTokenizerBase
    store: Path | None
    manifest: dict[str, Any]

    @cached_property
    def frozen(self) -> FrozenImages:
        """The image tower, for pictures that lie in no store."""
        self.require_frozen()
        return FrozenImages(self.config)

    def require_frozen(self) -> None:
        """UserError when the frozen tower is not the one that the run trained against."""
        expected, found = self.manifest["tower"], frozen_name(self.config)
        if found != expected:
            raise UserError(
                f"run {self.folder}: its image tower is {found} now, but it was trained against {expected};"
                " put that one back, or train the run anew"
            )

    def encode_texts(self, texts: list[str], *, progress: bool = False) -> npt.NDArray[np.float32]:
        """L2-normalised features float32 [len(texts), D]; `progress` shows a bar with the rate."""
        return self.encode_store(Texts.of(self.tokenizer(texts)["input_ids"]), progress=progress)

    def encode_store(self, texts: TextStore, *, progress: bool = False) -> npt.NDArray[np.float32]:
        """L2-normalised features float32 [captions, D] of a store; `progress` shows a bar with the rate."""
        n = len(texts.offsets) - 1
        features = []
        with tqdm(total=n, desc="texts", unit="text", disable=not progress) as bar:
            for start in range(0, n, TEXTS_AT_ONCE):
                part = Texts(texts.tokens, texts.offsets[start : start + TEXTS_AT_ONCE + 1])
                features.append(encode_store(self.model, part, self.config.training.max_caption_tokens))
                bar.update(len(features[-1]))
        return np.concatenate(features)

    def encode_source(self, source: Source) -> Iterator[tuple[Sample, npt.NDArray[np.float32]]]:
        """Each sample with the L2-normalised feature float32 [D] of its picture, under a bar with the rate.

        UserError at the first sample that is bad: a result over part of a data set would pass for one over all of it.
        """
        with tqdm(total=source.pictures, desc=source.path.name, unit="picture") as bar:
            for found in self.frozen.encode_samples(source):
                if isinstance(found, BadSample):
                    raise UserError(f"source {source.path}, {found.key}: {found.cause}; mend the sample or take it out")
                yield found
                bar.update()


def run_config(folder: Path) -> Config:
    """The config that a run was made with; UserError when the folder is no run."""
    if not (folder / "config.yaml").is_file():
        raise UserError(f"run {folder}: no config.yaml; give the folder that `efficientclip train` wrote")
    return load_config(folder / "config.yaml")


def open_run(folder: Path) -> Run:
    """Open a text run: its finished model, or else its best checkpoint, or else its latest.

    UserError when the folder is no run, has nothing to load yet, trained an image tower, or lost its store.
    """
    config = run_config(folder)
    both = config.training.tower == "both"
    if config.training.tower == "image" or (config.data.store is None and not both):
        raise UserError(f"run {folder}: trained an image tower, not a text tower; give a text run that builds on it")
    trained = _trained(folder)
    model = load_model(trained)
    if torch.cuda.is_available():
        # On GPUs the packed attention takes half precision alone.
        torch.nn.Module.to(model, "cuda", torch.bfloat16)
    store = None if both else config.data.store
    tokenizer = load_tokenizer(config.data.tokenizer if store is None else store / "tokenizer")
    if both and config.model.image_tower is not None:
        tower = config.model.image_tower.model_copy(update={"pretrained": str(trained), "architecture": None})
        config = config.model_copy(update={"model": config.model.model_copy(update={"image_tower": tower})})
    return Run(
        folder=folder,
        config=config,
        model=model,
        tokenizer=tokenizer,
        store=store,
        manifest=read_manifest(store)
        if store is not None
        else {"tower": frozen_name(config), "tokenizer": fingerprint(tokenizer)},
    )


def read_metrics(file: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Lines of metrics.jsonl: those of training steps, and those of validations."""
    lines = []
    for text in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            # A killed run leaves its last line cut short.
            break
    return [line for line in lines if "validation" not in line], [line for line in lines if "validation" in line]


def _trained(folder: Path) -> Path:
    """The folder whose `model/` is to be loaded."""
    if (folder / "model" / "config.json").is_file():
        return folder
    for pointer in (folder / "checkpoints" / "best", folder / "checkpoints" / "latest"):
        if pointer.is_file():
            return pointer.with_name(pointer.read_text().strip())
    raise UserError(f"run {folder}: holds neither a model nor a checkpoint yet; train it first")


@contextmanager
def open_data(run: Run, data: Path | None) -> Iterator[Store]:
    """The store at `data`; a tar, or a folder of tars, becomes a store that lasts as long as the context.

    UserError when there is none, or the store's features or tokens are not those that the run was trained with.
    """
    if data is None:
        raise UserError(f"run {run.folder}: trained from shards, it has no store; name the data to look at")
    expected, remedy = run.manifest["tower"], f"prepare it with --config {run.folder / 'config.yaml'}"
    if (data / "manifest.json").is_file():
        store = Store(data)
        if store.manifest["tower"] != expected:
            found = store.manifest["tower"]
            raise UserError(f"store {data}: features of {found}, but {run.folder} needs {expected}; {remedy}")
        if store.manifest["tokenizer"] != run.manifest["tokenizer"]:
            raise UserError(f"store {data}: tokens of another tokenizer than {run.store} has; {remedy}")
        yield store
        return
    run.require_frozen()
    config = run.config
    if run.store is not None:
        tokenizer = config.data.model_copy(update={"tokenizer": str(run.store / "tokenizer")})
        config = config.model_copy(update={"data": tokenizer})
    with TemporaryDirectory(prefix="efficientclip-") as folder:
        path = Path(folder) / data.stem
        prepare(data, path, config)
        yield Store(path)
