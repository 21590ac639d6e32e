"""Checkpoints: written aside, renamed when whole, and believed only when their digests hold.

checkpoints/step-00000400/model/         consolidated Hugging Face folder, fp32: the weights
                          optimizer-*    moments, a file a rank
                          state.npz      counters, ECL table, bank rows
                          digests.json   of all of these
checkpoints/latest, best                 names of folders: hints for people; the newest whole checkpoint is what counts
"""

from __future__ import annotations

import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
import torch.distributed as dist

from ..errors import UserError, reading, tell, writing
from ..files import digests
from ..files.atomic import as_umask, put_in_place, recover, write_atomically
from ..model.efficientclip import EfficientCLIP, load_model
from . import optimizer_state
from .ranks import gathered, told

Arrays = dict[str, Any]
STEP = re.compile(r"step-(\d{8})")
RESTORE = "restore it from a copy, or remove this checkpoint to go on from an earlier one"


class Checkpoints:
    """The checkpoint folder of one run. Every rank calls every method but `point`; rank 0 decides for all."""

    def __init__(self, run: Path, keep: int) -> None:
        self.folder = run / "checkpoints"
        self.keep = keep
        if dist.get_rank() == 0:
            with writing(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
                for leftover in self.folder.glob("*.partial"):
                    if STEP.fullmatch(leftover.stem):
                        shutil.rmtree(leftover)
                for aside in self.folder.glob(".step-*.replaced"):
                    recover(self.folder / aside.stem.removeprefix("."))
                    if aside.exists():
                        shutil.rmtree(aside)
        dist.barrier()

    def save(self, engine: deepspeed.DeepSpeedEngine, step: int, arrays: Arrays, best_step: int | None) -> None:
        """Write step's checkpoint; the last `keep` and `best_step`'s stay. UserError where weights are not finite."""
        name = _name(step)
        staging = self.folder / f"{name}.partial"
        if dist.get_rank() == 0:
            with writing(staging):
                shutil.rmtree(staging, ignore_errors=True)
                staging.mkdir()
        dist.barrier()
        with writing(staging), ThreadPoolExecutor(1) as hasher:
            # Each rank reads what it wrote: elsewhere it would have to come over the network first.
            mine = hasher.submit(digests.described, staging, [optimizer_state.save(engine, staging)])
            save_model(engine, staging / "model")
            if dist.get_rank() == 0:
                with (staging / "state.npz").open("wb") as file:
                    np.savez(file, **arrays)
            described = {name: entry for part in gathered(mine.result()) for name, entry in part.items()}
            if dist.get_rank() == 0:
                rest = [name for name in digests.files_in(staging) if name not in described]
                digests.write_digests(staging, described | digests.described(staging, rest))
                put_in_place(staging, self.folder / name)
                self.point(step, best_step)
                self._remove_old(step, best_step)
        dist.barrier()

    def point(self, step: int, best_step: int | None) -> None:
        """Have `latest` and `best` name these steps' checkpoints. Rank 0 alone."""
        with writing(self.folder):
            write_atomically(self.folder / "latest", _name(step).encode())
            if best_step is not None and (self.folder / _name(best_step)).is_dir():
                write_atomically(self.folder / "best", _name(best_step).encode())
            else:
                (self.folder / "best").unlink(missing_ok=True)

    def newest(self) -> Path | None:
        """The newest checkpoint whose digests hold, or None where there is none at all.

        UserError where there are some and none is whole: to begin again would cost what they hold.
        """
        found = told(sorted((path.name for path in self._all()), reverse=True))
        broken: list[str] = []
        for name in found:
            mistake = self._mistake(name)
            if mistake is None:
                if broken and dist.get_rank() == 0:
                    tell(f"notice: {'; '.join(broken)}; going on from {name}, the newest whole checkpoint")
                return self.folder / name
            broken.append(mistake)
        if broken:
            raise UserError(
                f"{self.folder}: no checkpoint is whole ({'; '.join(broken)}); restore one from a copy, or choose"
                " another run folder to begin anew"
            )
        return None

    def whole(self, step: int | None) -> Path | None:
        """The checkpoint of `step`, if there is one and its digests hold; where they do not, that is told."""
        step = told(step)
        if step is None or not told((self.folder / _name(step)).is_dir()):
            return None
        mistake = self._mistake(_name(step))
        if mistake is not None and dist.get_rank() == 0:
            tell(f"notice: the best checkpoint cannot be used: {mistake}")
        return self.folder / _name(step) if mistake is None else None

    def load_weights(self, model: EfficientCLIP, checkpoint: Path) -> None:
        """Give `model` the weights of a checkpoint."""
        if not list(checkpoint.glob(optimizer_state.FILES)):
            raise UserError(
                f"checkpoint {checkpoint}: is of an earlier version, whose optimiser this one cannot read; finish the"
                f" run with that version, or begin another run with model.start_from={checkpoint}"
            )
        model.load_state_dict(load_model(checkpoint).state_dict())

    def load(self, engine: deepspeed.DeepSpeedEngine, checkpoint: Path) -> Arrays:
        """Put the optimiser's state back and return the arrays saved beside it."""
        with reading("checkpoint", checkpoint, RESTORE):
            optimizer_state.load(engine, checkpoint)
        with reading("checkpoint", checkpoint / "state.npz", RESTORE), np.load(checkpoint / "state.npz") as arrays:
            return {name: arrays[name] for name in arrays.files}

    def _all(self) -> list[Path]:
        return [path for path in self.folder.glob("step-*") if STEP.fullmatch(path.name)]

    def _mistake(self, name: str) -> str | None:
        """What is wrong with a checkpoint; None: it is whole. Ranks share the reading."""
        rank, ranks = dist.get_rank(), dist.get_world_size()
        try:
            described = digests.read_digests(self.folder / name)
            if "state.npz" not in described:
                raise UserError(f"{self.folder / name / digests.NAME}: does not tell of state.npz")
            mine = {file: described[file] for file in sorted(described)[rank::ranks]}
            digests.check(self.folder / name, mine, "it is passed over", anew=True)
            mistake = None
        except UserError as error:
            mistake = str(error)
        except OSError as error:
            mistake = f"{self.folder / name}: {error.strerror}"
        return next((found for found in gathered(mistake) if found is not None), None)

    def _remove_old(self, step: int, best_step: int | None) -> None:
        """Of those up to `step`; later ones, which a resumed run has not come to again, are no part of what is kept."""
        past = sorted(path.name for path in self._all() if path.name <= _name(step))
        for name in past[: -self.keep]:
            if best_step is None or name != _name(best_step):
                # The new one is whole: an old one that stays costs room alone.
                shutil.rmtree(self.folder / name, ignore_errors=True)


def _name(step: int) -> str:
    return f"step-{step:08d}"


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint folder is named for."""
    return int(checkpoint.name.removeprefix("step-"))


def save_model(engine: deepspeed.DeepSpeedEngine, folder: Path) -> None:
    """Write the consolidated Hugging Face folder from rank 0, whatever the ZeRO stage; UserError at a weight that is
    not finite."""
    module: EfficientCLIP = engine.module
    parameters = list(module.parameters()) if engine.zero_optimization_stage() == 3 else []
    with deepspeed.zero.GatheredParameters(parameters, enabled=bool(parameters)):
        if dist.get_rank() == 0:
            state = {name: value.detach().cpu().float().clone() for name, value in module.state_dict().items()}
            wrong = next((name for name, value in state.items() if not torch.isfinite(value).all()), None)
            if wrong is not None:
                raise UserError(
                    f"{folder}: parameter {wrong} is not finite, and is not saved; begin another run with a lower"
                    " optimizer.lr or with optimizer.clip; model.start_from takes the weights of a checkpoint before"
                )
            module.save_pretrained(folder, state_dict=state)
            as_umask(folder)
