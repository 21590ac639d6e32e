"""A trained run, opened for use: its text tower, its tokenizer, and the frozen tower behind its features."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
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
from ..data.store import Store, TextStore, read_manifest
from ..data.tokenizer import load_tokenizer
from ..errors import UserError
from ..model.efficientclip import EfficientCLIP, load_model
from ..model.encode import encode_store
from ..model.frozen import FrozenImages, frozen_name
from ..prepare import prepare

TEXTS_AT_ONCE = 4096


@dataclass
class Run:
    """`store` is the path of the store that the run trained on, `manifest` that store's manifest."""

    folder: Path
    config: Config
    model: EfficientCLIP
    tokenizer: PreTrainedTokenizerBase
    store: Path
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
        token_lists = self.tokenizer(texts)["input_ids"]
        offsets = np.cumsum([0, *map(len, token_lists)], dtype=np.int64)
        tokens = np.fromiter(chain.from_iterable(token_lists), np.int32, int(offsets[-1]))
        return self.encode_store(_Texts(tokens, offsets), progress=progress)

    def encode_store(self, texts: TextStore, *, progress: bool = False) -> npt.NDArray[np.float32]:
        """L2-normalised features float32 [captions, D] of a store; `progress` shows a bar with the rate."""
        n = len(texts.offsets) - 1
        features = []
        with tqdm(total=n, desc="texts", unit="text", disable=not progress) as bar:
            for start in range(0, n, TEXTS_AT_ONCE):
                part = _Texts(texts.tokens, texts.offsets[start : start + TEXTS_AT_ONCE + 1])
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


class _Texts(TextStore):
    """Texts at hand, or some of a store's, in the shape of a store: one path encodes all."""

    def __init__(self, tokens: npt.NDArray[Any], offsets: npt.NDArray[np.int64]) -> None:
        self.tokens, self.offsets = tokens, offsets


def open_run(folder: Path) -> Run:
    """Open a text run: its finished model, or else its best checkpoint, or else its latest.

    UserError when the folder is no run, has nothing to load yet, trained an image tower, or lost its store.
    """
    if not (folder / "config.yaml").is_file():
        raise UserError(f"run {folder}: no config.yaml; give the folder that `efficientclip train` wrote")
    config = load_config(folder / "config.yaml")
    if config.training.tower == "image" or config.data.store is None:
        raise UserError(f"run {folder}: trained an image tower, not a text tower; give a text run that builds on it")
    model = load_model(_trained(folder))
    if torch.cuda.is_available():
        # On GPUs the packed attention takes half precision alone.
        torch.nn.Module.to(model, "cuda", torch.bfloat16)
    return Run(
        folder=folder,
        config=config,
        model=model,
        tokenizer=load_tokenizer(config.data.store / "tokenizer"),
        store=config.data.store,
        manifest=read_manifest(config.data.store),
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
def open_data(run: Run, data: Path) -> Iterator[Store]:
    """The store at `data`; a tar, or a folder of tars, becomes a store that lasts as long as the context.

    UserError when the store's features or tokens are not those that the run was trained with.
    """
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
    tokenizer = run.config.data.model_copy(update={"tokenizer": str(run.store / "tokenizer")})
    with TemporaryDirectory(prefix="efficientclip-") as folder:
        path = Path(folder) / data.stem
        prepare(data, path, run.config.model_copy(update={"data": tokenizer}))
        yield Store(path)
