"""A trained run, opened for use: its text tower, its tokenizer, and the frozen tower behind its features."""

from __future__ import annotations

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
from transformers import PreTrainedTokenizerBase

from ..config import Config, load_config
from ..data.store import Store, TextStore, read_manifest
from ..data.tokenizer import load_tokenizer
from ..errors import UserError
from ..model.efficientclip import EfficientCLIP, load_model
from ..model.encode import encode_store
from ..model.frozen import FrozenImages, frozen_name
from ..prepare import prepare


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
        return FrozenImages(self.config)

    def encode_texts(self, texts: list[str]) -> npt.NDArray[np.float32]:
        """L2-normalised features float32 [len(texts), D]."""
        return self.encode_store(_Typed(self.tokenizer(texts)["input_ids"]))

    def encode_store(self, texts: TextStore) -> npt.NDArray[np.float32]:
        """L2-normalised features float32 [captions, D] of a store."""
        return encode_store(self.model, texts, self.config.training.max_caption_tokens)


class _Typed(TextStore):
    """Texts at hand in the shape of a store: one path encodes both."""

    def __init__(self, token_lists: list[list[int]]) -> None:
        self.tokens = np.fromiter(chain.from_iterable(token_lists), np.int32)
        self.offsets = np.cumsum([0, *map(len, token_lists)], dtype=np.int64)


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
    found = frozen_name(run.config)
    if found != expected:
        raise UserError(
            f"run {run.folder}: its image tower is {found} now, but it was trained against {expected};"
            " put that one back, or train the run anew"
        )
    tokenizer = run.config.data.model_copy(update={"tokenizer": str(run.store / "tokenizer")})
    with TemporaryDirectory(prefix="efficientclip-") as folder:
        path = Path(folder) / data.stem
        prepare(data, path, run.config.model_copy(update={"data": tokenizer}))
        yield Store(path)
