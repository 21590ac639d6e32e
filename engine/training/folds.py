"""Two fold towers and what they say about the pairs.

CROSS_FIT/fold-0, fold-1       ordinary runs on half of the pairs each, resumable
          model/               the mean of the two towers: the joint run's start
          cross_fit.parquet    a row a pair: fold, score, p, competence, clean_log_odds; the rates in its metadata
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from tqdm import tqdm

from ..config import Confidence, Config, MaskedLanguageModelling
from ..data.store import Store
from ..errors import UserError, writing
from ..files import digests
from ..files.atomic import as_umask, put_in_place
from ..model.efficientclip import load_model
from ..model.encode import BATCH, encode_rows
from ..noise.rate import NEGLIGIBLE, folds, judge, near, pair_groups, write_cross_fit
from .distributed import process_group
from .ranks import assembled
from .run_folder import owned, proven
from .runs import new_trainer, text_run, told_to_stop
from .trainer import Trainer


def cross_fit(config: Config) -> int:
    """Train the fold towers that `config` describes, or go on with them, and write what they say: the exit code.

    A signal while the folds train saves first; while the captions are encoded and judged there is nothing to save.
    """
    folder = config.confidence.cross_fit
    if folder is None:
        raise UserError("confidence.cross_fit: not set; name the folder that the fold towers are to be written to")
    if config.data.store is None or config.training.tower != "text":
        raise UserError("cross-fit: needs data.store and training.tower=text; other runs have no captions to judge")
    with process_group(config) as rank, owned(folder, "cross-fit", "cross-fit"):
        store = Store(config.data.store)
        proven({"store": store})
        groups = pair_groups(store, near(store.features, config.seed))
        fold = folds(groups, config.seed)
        runs = [folder / f"fold-{number}" for number in range(2)]
        encoded = [folder / f"captions-{number}.bin" for number in range(2)]
        text_2KD, visits = [], 0
        for number in range(2):
            with owned(runs[number], "run", "cross-fit"):
                trainer = _fold_trainer(config, runs[number], np.flatnonzero(fold == number))
                if (stopped_by := trainer.train()) is not None:
                    return told_to_stop(trainer, stopped_by)
            text_2KD.append(captions_by(trainer, store, encoded[number]))
            visits += trainer.visits
        if rank == 0:
            found = judge(store, groups, fold, text_2KD, visits, config.seed)
            save_mean(folder / "model", runs)
            write_cross_fit(folder, store, found)
            for file in encoded:
                file.unlink()
            print(f"{folder}: {found.rate:.1%} of {len(store):,} pairs are estimated to be wrong")
            for source in found.sources if len(found.sources) > 1 else ():
                none = f", below {NEGLIGIBLE:.0%}: none is dropped for it" if source.rate < NEGLIGIBLE else ""
                interval = f"95 % interval {source.low:.1%} to {source.high:.1%}"
                print(f"  {source.name}: {source.rate:.1%} ({interval}) of {source.pairs:,} pairs{none}")
        assembled()
    return 0


def _fold_trainer(config: Config, run: Path, rows: npt.NDArray[np.int64]) -> Trainer:
    """The trainer of a text tower on the pairs `rows`."""
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
    fold_config = config.model_copy(update=changes)
    return new_trainer(fold_config, Trainer, text_run(fold_config, rows))


def captions_by(trainer: Trainer, store: Store, file: Path) -> npt.NDArray[np.float32]:
    """Features float32 [captions, width] of all captions by the trained tower, mapped on rank 0, which alone writes
    them; the other ranks, which share the encoding, get none."""
    model, rank, ranks = trainer.engine.module, trainer.rank, trainer.world_size
    K, D = len(store.offsets) - 1, trainer.config.model.width
    rounds = -(-K // (BATCH * ranks))
    size = -(-K // (rounds * ranks))
    text_KD = _mapped(file, (K, D)) if rank == 0 else np.empty((0, D), np.float32)
    gathered = [torch.empty(size, D, device=trainer.device) for _ in range(ranks)]
    model.eval()
    for first in tqdm(range(0, rounds * ranks, ranks), f"{file.stem} of {file.parent}", unit="batch", disable=rank > 0):
        # All ranks go forward alike, as ZeRO-3 needs: the last parts overlap rather than run out.
        starts = [min((first + other) * size, K - size) for other in range(ranks)]
        rows = np.arange(starts[rank], starts[rank] + size)
        features = encode_rows(model, store, rows, trainer.config.training.max_caption_tokens)
        dist.all_gather(gathered, torch.from_numpy(features).to(trainer.device))
        if rank == 0:
            for start, part in zip(starts, gathered, strict=True):
                text_KD[start : start + size] = part.cpu().numpy()
    return text_KD


def _mapped(file: Path, shape: tuple[int, int]) -> npt.NDArray[np.float32]:
    """A new file as an array, with its room taken: a mapped page that finds the disk full would kill the process."""
    with writing(file), file.open("wb") as stream:
        os.posix_fallocate(stream.fileno(), 0, max(4 * shape[0] * shape[1], 1))
    return np.memmap(file, np.float32, "r+", shape=shape)


def save_mean(folder: Path, runs: list[Path]) -> None:
    """Write the mean of the weights of finished runs."""
    model, *others = (load_model(run) for run in runs)
    # Parameters, since tied weights stand twice in a state_dict.
    with torch.no_grad():
        for parameter, *theirs in zip(model.parameters(), *(other.parameters() for other in others), strict=True):
            parameter.copy_(torch.stack([parameter, *theirs]).mean(0))
    aside = folder.with_name(f".{folder.name}.partial")
    with writing(folder):
        shutil.rmtree(aside, ignore_errors=True)
        model.save_pretrained(aside)
        as_umask(aside)
        digests.write_digests(aside)
    put_in_place(aside, folder)
