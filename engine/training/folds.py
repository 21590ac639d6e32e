"""Two fold towers and what they say about the pairs: three stages, each of which goes on where it was cut short.

CROSS_FIT/groups.npz         the group of each pair, and the store that they are of, until the verdicts stand
          fold-0, fold-1     ordinary runs on half of the pairs each
          judging/           what encoding and judging have finished, until then
              made_of.json   store, towers and settings; of others all is made anew
              captions-0.bin, captions-1.bin    fp16 [captions, width], by fold 0's and 1's tower
              answers.bin    float64 [pairs, 3]: p twice and cosine, in the docket's order
          model/             the mean of the two towers: the joint run's start
          cross_fit.parquet  a row a pair: fold, score, p, competence, clean_log_odds, company; rates in its metadata

All ranks train together; then each encodes and judges parts of its own; rank 0 sums up when the others have left.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from tqdm import tqdm

from .. import __version__
from ..config import Confidence, Config, MaskedLanguageModelling
from ..data.store import Store
from ..errors import UserError, reading, writing
from ..files import digests
from ..files.atomic import write_atomically, written_aside
from ..files.parts import Parts
from ..hardware import compute_dtype
from ..model.efficientclip import check_model, load_model
from ..model.encode import BATCH, encode_rows
from ..noise.answers import Answers
from ..noise.cross_fit import CrossFit, SourceRate, near_in_words, read_cross_fit, write_cross_fit
from ..noise.docket import VERDICTS, Docket
from ..noise.neighbourhoods import folds, near, pair_groups
from .distributed import process_group, release_memory
from .ranks import assembled, told
from .run_folder import finished, owned, place_model, proven
from .runs import new_trainer, text_run, told_to_stop
from .trainer import Trainer

ENCODED = 32 * BATCH  # captions that a rank encodes at a time
GROUPS, MADE_OF = "groups.npz", "made_of.json"


def cross_fit(config: Config) -> int:
    """Train the fold towers that `config` describes, encode and judge by them, or go on with it: the exit code.

    A signal while the folds train saves first; while captions are encoded and judged, parts that are finished stand.
    """
    folder = config.confidence.cross_fit
    if folder is None:
        raise UserError("confidence.cross_fit: not set; name the folder that the fold towers are to be written to")
    if config.data.store is None or config.training.tower != "text":
        raise UserError("cross-fit: needs data.store and training.tower=text; other runs have no captions to judge")
    with process_group(config) as rank, owned(folder, "cross-fit", "cross-fit"):
        store = Store(config.data.store)
        identity = proven({"store": store})["store"]
        groups = _groups(folder / GROUPS, store, identity, config.seed, rank)
        fold = folds(groups, config.seed)
        runs = [folder / f"fold-{number}" for number in range(2)]
        fold_configs = [_fold_config(config, run) for run in runs]
        for number, fold_config in enumerate(fold_configs):
            if stopped := _train(fold_config, np.flatnonzero(fold == number), rank):
                return stopped
        judging = folder / "judging"
        # The others may be here before rank 0 has written the towers.
        made_of = _made_of(config, store, identity, runs) if rank == 0 else {}
        standing = _standing(folder, store, made_of) if rank == 0 else None
        if told(standing is not None):
            if standing is not None:
                # It may have been cut short right after the verdicts were written.
                if (judging / MADE_OF).is_file():
                    end(judging)
                (folder / GROUPS).unlink()
                _tell(folder, standing)
            return 0
        if rank == 0:
            begin(judging, made_of)
        encoded = [
            _encoded(judging / f"captions-{number}.bin", fold_config, store, number)
            for number, fold_config in enumerate(fold_configs)
        ]
        assembled()
        docket = Docket(store, fold, [parts.read() for parts in encoded], config.seed, _device())
        answers = Parts(
            judging / "answers.bin", [end - begin for _, begin, end in docket.parts], len(Answers._fields), np.float64
        )
        for part in _dealt(answers, 0, "judging", "pair"):
            answers.write(part, docket.answers(part))
        assembled()
        # From here on no rank waits for this one.
        if rank == 0:
            found = docket.verdicts(answers.read(), groups, sum(map(_visits, fold_configs)))
            save_mean(folder / "model", runs)
            write_cross_fit(folder, store, replace(found, made_of=_digest(made_of)))
            end(judging)
            (folder / GROUPS).unlink()
            _tell(folder, found)
    return 0


def _groups(file: Path, store: Store, identity: str, seed: int, rank: int) -> npt.NDArray[np.int64]:
    """Groups of the pairs, as rank 0 finds them, once: folds that trained by others would judge what they had seen."""
    if rank == 0 and not (file.is_file() and _read_groups(file)[0] == f"{identity} {seed}"):
        groups = pair_groups(store, near(store.features, seed), _device())
        with written_aside(file) as aside, aside.open("wb") as stream:
            np.savez(stream, of=f"{identity} {seed}", groups=groups)
    assembled()
    return _read_groups(file)[1]


def _read_groups(file: Path) -> tuple[str, npt.NDArray[np.int64]]:
    anew = "remove it and run `efficientclip cross-fit CONFIG` again"
    with reading("groups of pairs", file, anew), np.load(file) as found:
        return str(found["of"]), found["groups"]


def _fold_config(config: Config, run: Path) -> Config:
    """That of a run of a text tower on half of the pairs."""
    training, judging = config.training, config.confidence
    budget = {
        "pair_visits": max(1, round(judging.cross_fit_share * training.pair_visits / 2)),
        "batch_size": judging.cross_fit_batch_size or training.batch_size,
    }
    changes = {
        "run": run,
        "confidence": Confidence(),
        "data": config.data.model_copy(update={"validation": {}}),
        "mlm": MaskedLanguageModelling(),
        "optimizer": config.optimizer.model_copy(update={"lr": judging.cross_fit_lr or config.optimizer.lr}),
        "training": training.model_copy(update=budget),
    }
    return config.model_copy(update=changes)


def _train(config: Config, rows: npt.NDArray[np.int64], rank: int) -> int:
    """Train a fold's tower on the pairs `rows`, unless that is done; the exit code where a signal ended it, or 0."""
    inputs = text_run(config, rows)
    with owned(config.run, "run", "cross-fit"):
        if told(rank == 0 and finished(config, inputs.identity)):
            return 0
        trainer = new_trainer(config, Trainer, inputs)
        stopped_by = trainer.train()
        if stopped_by is not None:
            return told_to_stop(trainer, stopped_by)
    del trainer
    release_memory()
    return 0


def _visits(config: Config) -> int:
    training = config.training
    return math.ceil(training.pair_visits / training.batch_size) * training.batch_size


def _device() -> torch.device:
    return torch.device(get_accelerator().current_device_name())


def _made_of(config: Config, store: Store, identity: str, runs: Iterable[Path]) -> dict[str, Any]:
    """What the parts of encoding and judging follow from."""
    for run in runs:
        check_model(run)
    return {
        "efficientclip": __version__,
        "store": identity,
        "pairs": store.manifest["files"]["pairs.parquet"]["xxh3"],
        "answers": list(Answers._fields),
        "verdicts": VERDICTS,
        "towers": [digests.read_digests(run / "model") for run in runs],
        "max_caption_tokens": config.training.max_caption_tokens,
        "precision": config.training.precision,
        "seed": config.seed,
    }


def _digest(made_of: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()


def _standing(folder: Path, store: Store, made_of: dict[str, Any]) -> CrossFit | None:
    """The verdicts in `folder`, if they and the mean of the towers are whole and follow from the same."""
    try:
        found = read_cross_fit(folder, store)
        check_model(folder)
    except UserError:
        return None
    return found if found.made_of == _digest(made_of) else None


def begin(folder: Path, made_of: dict[str, Any]) -> None:
    """`folder` with what was `made_of` the same, or empty; UserError where it was not begun here."""
    file = folder / MADE_OF
    with writing(folder):
        folder.mkdir(exist_ok=True)
        if not file.is_file() and any(path.name != f".{MADE_OF}.partial" for path in folder.iterdir()):
            raise UserError(f"{folder}: holds files, but no {MADE_OF}, so cross-fit did not write it; move it away")
        if file.is_file():
            with reading("cross-fit", file, f"remove {folder} and run `efficientclip cross-fit CONFIG` again"):
                if json.loads(file.read_text(encoding="utf-8")) == made_of:
                    return
            end(folder)
            folder.mkdir()
        write_atomically(file, json.dumps(made_of, indent=1).encode())


def end(folder: Path) -> None:
    """Remove what `begin` began; cut short, it is known as begun until nothing else is left."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != MADE_OF:
            path.unlink()
    shutil.rmtree(folder)


def _dealt(parts: Parts, first: int, doing: str, unit: str) -> Iterator[int]:
    """The missing parts that are this rank's, dealt out from rank `first` on, under rank 0's bar."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    missing = parts.begin() if rank == 0 else []
    # Taking the room may be long.
    assembled()
    mine = told(missing)[(rank - first) % ranks :: ranks]
    total = sum(parts.rows[part] for part in mine)
    with tqdm(total=total, desc=doing, unit=unit, unit_scale=True, disable=rank > 0 or not mine) as bar:
        for part in mine:
            yield part
            bar.update(parts.rows[part])


def _encoded(file: Path, config: Config, store: Store, first: int) -> Parts:
    """This rank's share, dealt out from rank `first` on, of the features fp16 [captions, width] of all captions by a
    fold's tower."""
    captions, model = len(store.offsets) - 1, None
    rows = [min(ENCODED, captions - start) for start in range(0, captions, ENCODED)]
    parts = Parts(file, rows, config.model.width, np.float16)
    for part in _dealt(parts, first, f"captions by {config.run.name}", "caption"):
        if model is None:
            model = load_model(config.run)
            torch.nn.Module.to(model, _device())
            model.compute = compute_dtype(config.training.precision)
        begin, end = int(parts.starts[part]), int(parts.starts[part + 1])
        # The same batches on any number of ranks: the last bits of a product follow its shape.
        batches = [np.arange(start, min(start + BATCH, end)) for start in range(begin, end, BATCH)]
        found = [encode_rows(model, store, batch, config.training.max_caption_tokens) for batch in batches]
        parts.write(part, np.concatenate(found))
    return parts


def save_mean(folder: Path, runs: list[Path]) -> None:
    """Write the mean of the weights of finished runs."""
    model, *others = (load_model(run) for run in runs)
    # Parameters, since tied weights stand twice in a state_dict.
    with torch.no_grad():
        for parameter, *theirs in zip(model.parameters(), *(other.parameters() for other in others), strict=True):
            parameter.copy_(torch.stack([parameter, *theirs]).mean(0))
    place_model(model, folder)


def _tell(folder: Path, found: CrossFit) -> None:
    if found.whole is not None:
        print(f"{folder}: {_told(found.whole)}")
    for source in found.sources if len(found.sources) > 1 else ():
        print(f"  {source.name}: {_told(source)}")
    if near := near_in_words(found.near):
        print(f"  {near}")
    if any(source.open for source in found.sources):
        print("  More visits (confidence.cross_fit_share) or more pairs may tell more.")


def _told(source: SourceRate) -> str:
    interval = f"90 % interval {source.low:.1%} to {source.high:.1%}"
    beats = f"towers tell a right pair from {source.skill:.1%} of mismatches"
    if source.open:
        return f"cannot tell how many of {source.pairs:,} pairs are wrong ({interval}; {beats}): none is dropped for it"
    none = "" if source.droppable else ": none is dropped for it"
    return f"{source.rate:.1%} of {source.pairs:,} pairs are estimated to be wrong ({interval}; {beats}){none}"
