"""A trained run, opened for use: its text tower, its tokenizer, and the frozen tower behind its features."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from ..config import Config
from ..data.images import ImageBatch
from ..data.sources import Source, require_few
from ..data.store import Store, Texts, TextStore
from ..data.tables import USUAL, Columns
from ..data.tokenizer import fingerprint, load_tokenizer
from ..errors import UserError, reading, tell
from ..files import digests
from ..files.ownership import kind_of
from ..files.places import Location
from ..hardware import compute_dtype
from ..model.efficientclip import EfficientCLIP, check_model, load_model
from ..model.encode import encode_store
from ..model.frozen import FrozenImages, frozen_name, tower_difference
from ..prepare.build import prepare
from ..stopping import scratch
from ..training.run_folder import RESTORE, run_config, run_identity

TEXTS_AT_ONCE = 4096
BAD_SHARDS = "shard that cannot be had, or is not whole"


@dataclass
class Run:
    """`store` is where the store that the run trained on lies, if it had one; it is needed by `trained_on` alone.

    `manifest` names the tower and the tokenizer that the run was trained with; it is the store's own, where that one
    is there. `earlier`: an earlier version trained it, which told less of the tower.
    """

    folder: Path
    config: Config
    model: EfficientCLIP
    tokenizer: PreTrainedTokenizerBase
    store: Path | None
    manifest: dict[str, Any]
    earlier: bool

    @cached_property
    def frozen(self) -> FrozenImages:
        """The image tower, for pictures that lie in no store."""
        self.require_frozen()
        return FrozenImages(self.config)

    def require_frozen(self) -> None:
        """UserError when the frozen tower is not the one that the run trained against."""
        found = frozen_name(self.config)
        if (difference := self.tower_difference(found)) is not None:
            raise UserError(
                f"run {self.folder}: its image tower is {found} now, but it was trained against"
                f" {self.manifest['tower']}: {difference}; put that one back, or train the run anew"
            )

    def tower_difference(self, found: str | None) -> str | None:
        """In what the tower of that name differs from the one that the run was trained against; None: in nothing."""
        return tower_difference(found, self.manifest["tower"], earlier=self.earlier)

    def encode_texts(self, texts: list[str], *, progress: bool = False) -> npt.NDArray[np.float32]:
        """L2-normalised features float32 [len(texts), D]; `progress` shows a bar with the rate."""
        return self.encode_store(Texts.of(self.tokenizer(texts)["input_ids"]), progress=progress)

    def encode_store(
        self, texts: TextStore, *, progress: bool = False, out: npt.NDArray[np.float32] | None = None
    ) -> npt.NDArray[np.float32]:
        """L2-normalised features float32 [captions, D] of a store, in `out` if given; `progress` shows a bar with the
        rate."""
        n = len(texts.offsets) - 1
        features_KD = np.empty((n, self.config.model.width), np.float32) if out is None else out
        with tqdm(total=n, desc="texts", unit="text", disable=not progress) as bar:
            for start in range(0, n, TEXTS_AT_ONCE):
                part = Texts(texts.tokens, texts.offsets[start : start + TEXTS_AT_ONCE + 1])
                end = start + len(part)
                features_KD[start:end] = encode_store(self.model, part, self.config.training.max_caption_tokens)
                bar.update(len(part))
        return features_KD

    def encode_source(
        self, source: Source, bad: Counter[str], *, keep_encoded: bool = False
    ) -> Iterator[tuple[ImageBatch, npt.NDArray[np.float32]]]:
        """Batches of pictures, each with L2-normalised features float32 [pictures, D], under a bar with the rate.

        A picture without captions passes. Bad samples are left out and counted in `bad`, by cause, and so are shards,
        up to data.max_bad_shards. UserError at the end when samples are more than data.max_bad_share: a result over
        part of a data set would pass for one over all of it.
        """
        first, good = "", 0
        limit = self.config.data.max_bad_shards
        loader = self.frozen.loader(source, captions=False, keep_encoded=keep_encoded, max_bad_shards=limit)
        with loader, tqdm(total=source.pictures, desc=source.path.name, unit="picture") as bar:
            for batch in loader:
                yield batch, self.frozen.encode_pixels(batch.images)
                good += len(batch)
                bar.update(len(batch))
            for sample in loader.bad_samples:
                bad[sample.cause] += 1
                first = first or f"{sample.key} in {sample.shard}"
            for shard in loader.bad_shards:
                tell(f"notice: left out: {shard.cause}")
        samples = good + bad.total()
        if not samples:
            raise UserError(f"source {source.path}: empty, no sample found")
        require_few(source.path, bad, first, samples, self.config.data.max_bad_share, "mend the source")
        bad.update({BAD_SHARDS: len(loader.bad_shards)} if loader.bad_shards else {})


def open_run(folder: Path, store: Path | None = None) -> Run:
    """Open a text run, wherever it lies now: its finished model, or else its best checkpoint, or else its newest.

    `store` is where the store that it trained on lies now, if it is not where the config has it. UserError when the
    folder is no run, has nothing whole to load, or trained an image tower.
    """
    config = run_config(folder)
    both = config.training.tower == "both"
    if config.training.tower == "image" or (config.data.store is None and not both):
        raise UserError(f"run {folder}: trained an image tower, not a text tower; give a text run that builds on it")
    identity = run_identity(folder)
    place = None if both else store or config.data.store
    manifest: dict[str, Any] = {}
    if place is not None and (store is not None or identity is None or _is_of(place, identity)):
        manifest = _store_of(folder, config, place, identity).manifest
    trained = _trained(folder)
    model = load_model(trained)
    model.compute = compute_dtype(config.training.precision)
    if torch.cuda.is_available():
        torch.nn.Module.to(model, "cuda")
    tokenizer = _tokenizer(folder, config, place, identity)
    if both:
        if config.model.image_tower is not None:
            tower = config.model.image_tower.model_copy(update={"pretrained": str(trained), "architecture": None})
            config = config.model_copy(update={"model": config.model.model_copy(update={"image_tower": tower})})
        manifest = {"tower": frozen_name(config), "tokenizer": fingerprint(tokenizer)}
    if identity is not None and not manifest:
        manifest = {
            key: value for key, value in identity.items() if key in ("tower", "tokenizer", "vocabulary", "width")
        }
    return Run(folder, config, model, tokenizer, place, manifest, earlier=identity is None)


def trained_on(folder: Path, config: Config, store: Path | None = None) -> Store:
    """The whole store that the run in `folder` trained on, which lies at `store`, or where its config has it."""
    place = store or config.data.store
    if place is None:
        raise UserError(f"run {folder}: trained from shards, it has no store; name the data to look at")
    found = _store_of(folder, config, place, run_identity(folder))
    found.prove()
    return found


def is_store(path: Location) -> bool:
    """Whether a store lies at `path`, be it broken."""
    return isinstance(path, Path) and ((path / "manifest.json").is_file() or kind_of(path) == "store")


def _store_of(folder: Path, config: Config, place: Path, identity: dict[str, Any] | None) -> Store:
    """The store at `place`; UserError when none is there, or another one than the run trained on."""
    if not is_store(place):
        if place != config.data.store:
            raise UserError(
                f"--store {place}: there is no store; give the one that run {folder} was trained on, which lay at"
                f" {config.data.store}"
            )
        raise UserError(
            f"run {folder}: trained on the store {place}, which is not there now; put it back, or say where"
            " it lies with --store PATH"
        )
    found = Store(place)
    if identity is not None and found.identity != identity["store"]:
        raise UserError(
            f"store {place}: is another one than that of run {folder}, which was trained on {config.data.store}; say"
            " where that one lies now with --store PATH"
        )
    return found


def _is_of(place: Path, identity: dict[str, Any]) -> bool:
    """Whether the store that the run trained on lies at `place`."""
    try:
        return Store(place).identity == identity["store"]
    except UserError:
        return False


def _tokenizer(
    folder: Path, config: Config, store: Path | None, identity: dict[str, Any] | None
) -> PreTrainedTokenizerBase:
    """The run's own; runs of earlier versions have their store's."""
    own = folder / "tokenizer"
    digests.check_written(folder, "tokenizer/*", remedy=RESTORE)
    if identity is None and not own.is_dir():
        return load_tokenizer(config.data.tokenizer if store is None else store / "tokenizer")
    if not own.is_dir():
        raise UserError(f"run {folder}: its tokenizer/ is missing; {RESTORE}")
    tokenizer = load_tokenizer(own)
    return tokenizer


def read_metrics(file: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Lines of metrics.jsonl: those of training steps, and those of validations."""
    lines: list[dict[str, Any]] = []
    digests.check_written(file.parent, file.name, remedy=RESTORE)
    with reading("metrics", file, RESTORE):
        texts = file.read_bytes().splitlines() if file.is_file() else []
        for number, text in enumerate(texts, 1):
            try:
                line = json.loads(text)
            except ValueError:
                # A killed run leaves its last line cut short.
                if number == len(texts):
                    break
                raise
            if not isinstance(line, dict) or not line.keys() >= {"step", "visits"}:
                raise ValueError(f"line {number} is not one of a step")
            lines.append(line)
    return [line for line in lines if "validation" not in line], [line for line in lines if "validation" in line]


def _trained(folder: Path) -> Path:
    """The folder whose `model/` is to be loaded.

    A finished model that is broken is an error: a checkpoint in its stead would give other results.
    """
    if any((folder / "model" / name).is_file() for name in ("config.json", digests.NAME)):
        check_model(folder)
        return folder
    checkpoints = folder / "checkpoints"
    best = pointed(checkpoints / "best")
    newest = sorted((path for path in checkpoints.glob("step-*") if path.suffix != ".partial"), reverse=True)
    wrong = []
    for checkpoint in (*([] if best is None else [best]), *newest):
        try:
            check_model(checkpoint)
        except UserError as error:
            wrong.append(str(error))
            continue
        found = f"; {wrong[0]}" if wrong else ""
        tell(f"notice: run {folder}: holds no finished model, so its checkpoint {checkpoint.name} is used{found}")
        return checkpoint
    found = f"; {wrong[0]}" if wrong else "; train it first"
    raise UserError(f"run {folder}: holds neither a model nor a checkpoint yet that could be used{found}")


def pointed(pointer: Path) -> Path | None:
    """The checkpoint that `latest` or `best` names; None where it is missing, empty or dangling."""
    try:
        name = pointer.read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return None
    found = pointer.with_name(name) if re.fullmatch(r"[\w-]+", name) else pointer
    return found if found.is_dir() else None


def left_out(report: Mapping[str, Any]) -> str:
    """What a result was measured without, as the end of a line."""
    return "".join(f"; left out: {count:,} × {cause}" for cause, count in report["left_out"].items())


@contextmanager
def open_data(
    run: Run, data: Location | None, images: Location | None = None, columns: Columns = USUAL
) -> Iterator[Store]:
    """The store at `data`, or else the one that the run trained on; pictures, as `prepare` reads them, become a store
    that lasts as long as the context.

    UserError when there is none, it is not whole, or its features or tokens are not those that the run was trained
    with.
    """
    if data is None or data == run.store:
        yield trained_on(run.folder, run.config, run.store)
        return
    remedy = f"prepare it with --config {run.folder / 'config.yaml'}"
    if isinstance(data, Path) and is_store(data):
        store = Store(data)
        found = store.manifest["tower"]
        if (difference := run.tower_difference(found)) is not None:
            needed = run.manifest["tower"]
            raise UserError(
                f"store {data}: features of {found}, but {run.folder} needs {needed}: {difference}; {remedy}"
            )
        if store.width != run.config.model.width:
            raise UserError(
                f"store {data}: features are {store.width} wide, but those of {run.folder} are"
                f" {run.config.model.width}; {remedy}"
            )
        if store.manifest["tokenizer"] != run.manifest["tokenizer"]:
            raise UserError(f"store {data}: tokens of another tokenizer than {run.folder} has; {remedy}")
        store.prove()
        yield store
        return
    run.require_frozen()
    with scratch(Path(mkdtemp(prefix="efficientclip-"))) as folder:
        run.tokenizer.save_pretrained(folder / "tokenizer")
        tokenizer = run.config.data.model_copy(update={"tokenizer": str(folder / "tokenizer")})
        path = folder / (re.sub(r"[^\w.-]", "_", data.stem) or "data")
        prepare(data, path, run.config.model_copy(update={"data": tokenizer}), images, columns)
        yield Store(path)
