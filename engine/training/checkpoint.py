"""Checkpoints: copied to the host, written aside while training goes on, renamed when whole, and believed only when
their digests hold. Each is whole in itself: files that several shared would be lost to all by one flipped bit.

checkpoints/step-00000400/model/         consolidated Hugging Face folder, fp32: the weights
                          optimizer-*    moments, a file a rank
                          state.npz      counters, ECL table, bank rows
                          digests.json   of all of these
checkpoints/latest, best                 names of folders: hints for people; the newest whole checkpoint is what counts
"""

from __future__ import annotations

import re
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import deepspeed
import numpy as np
import psutil
import torch
import torch.distributed as dist

from ..errors import UserError, reading, tell, writing
from ..files import digests
from ..files.atomic import as_umask, put_in_place, recover, write_atomically
from ..model.efficientclip import EfficientCLIP, load_model
from . import optimizer_state
from .ranks import gathered, told

Arrays = dict[str, Any]
Weights = dict[str, torch.Tensor]
STEP = re.compile(r"step-(\d{8})")
RESTORE = "restore it from a copy, or remove this checkpoint to go on from an earlier one"


class UnderWay(NamedTuple):
    """A checkpoint that this rank's thread writes: of which step, which one is the best, and the rank's files."""

    step: int
    best_step: int | None
    files: Future[digests.Described]


class Checkpoints:
    """The checkpoint folder of one run. Every rank calls every method but `point`; rank 0 decides for all."""

    def __init__(self, run: Path, keep: int) -> None:
        self.folder = run / "checkpoints"
        self.keep = keep
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._under_way: UnderWay | None = None
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
        """Begin step's checkpoint; `finish` has it appear, and the last `keep` and `best_step`'s stay.

        It is written before this returns where less memory is left than the copies take.
        """
        self.finish()
        staging = self.folder / f"{_name(step)}.partial"
        if dist.get_rank() == 0:
            with writing(staging):
                shutil.rmtree(staging, ignore_errors=True)
                staging.mkdir()
        dist.barrier()
        moments, weights = optimizer_state.held(engine), weights_of(engine)
        # Training changes them while they are written.
        arrays = {name: np.array(value) for name, value in arrays.items()} if weights else {}
        files = self._writer.submit(_write, staging, moments, engine.module, weights, arrays)
        self._under_way = UnderWay(step, best_step, files)
        copied = sum(tensor.nbytes for tensor in (*moments.tensors.values(), *weights.values()))
        if psutil.virtual_memory().available < copied:
            with writing(staging):
                files.result()

    @property
    def written(self) -> bool:
        """Whether this rank's files of a checkpoint under way are, or have failed to be."""
        return self._under_way is not None and self._under_way.files.done()

    def finish(self) -> None:
        """Have the checkpoint under way appear, if there is one, once all ranks have written theirs.

        UserError where one could not be, or where weights are not finite.
        """
        if self._under_way is None:
            return
        (step, best_step, files), self._under_way = self._under_way, None
        staging = self.folder / f"{_name(step)}.partial"
        with writing(staging):
            described = {name: entry for part in gathered(files.result()) for name, entry in part.items()}
            if dist.get_rank() == 0:
                digests.write_digests(staging, described)
                put_in_place(staging, self.folder / _name(step))
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

    def load(self, engine: deepspeed.DeepSpeedEngine, checkpoint: Path, without: tuple[str, ...] = ()) -> Arrays:
        """Put the optimiser's state back and return the arrays saved beside it, but for names that begin so."""
        with reading("checkpoint", checkpoint, RESTORE):
            optimizer_state.load(engine, checkpoint)
        with reading("checkpoint", checkpoint / "state.npz", RESTORE), np.load(checkpoint / "state.npz") as arrays:
            return {name: arrays[name] for name in arrays.files if not name.startswith(without)}

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


def weights_of(engine: deepspeed.DeepSpeedEngine) -> Weights:
    """Copies of all weights as they are now, fp32 on the host, whatever the ZeRO stage; on rank 0, elsewhere none."""
    parameters = list(engine.module.parameters()) if engine.zero_optimization_stage() == 3 else []
    with deepspeed.zero.GatheredParameters(parameters, enabled=bool(parameters)):
        if dist.get_rank() != 0:
            return {}
        state = engine.module.state_dict()
        return {name: value.detach().to("cpu", torch.float32, copy=True) for name, value in state.items()}


def write_model(module: EfficientCLIP, weights: Weights, folder: Path) -> None:
    """Write the consolidated Hugging Face folder; UserError at a weight that is not finite."""
    wrong = next((name for name, value in weights.items() if not torch.isfinite(value).all()), None)
    if wrong is not None:
        raise UserError(
            f"{folder}: parameter {wrong} is not finite, and is not saved; begin another run with a lower"
            " optimizer.lr or with optimizer.clip; model.start_from takes the weights of a checkpoint before"
        )
    module.save_pretrained(folder, state_dict=weights)
    as_umask(folder)


def _write(
    staging: Path, moments: optimizer_state.Held, module: EfficientCLIP, weights: Weights, arrays: Arrays
) -> digests.Described:
    """Write this rank's files. It reads what it wrote: elsewhere they would have to come over the network first."""
    with ThreadPoolExecutor(1) as hasher:
        mine = hasher.submit(digests.described, staging, [optimizer_state.write(moments, staging)])
        if not weights:
            return mine.result()
        write_model(module, weights, staging / "model")
        with (staging / "state.npz").open("wb") as file:
            np.savez(file, **arrays)
        inside = [f"model/{name}" for name in digests.files_in(staging / "model")]
        return mine.result() | digests.described(staging, [*inside, "state.npz"])
