"""Checkpoints: written aside, renamed when whole, pointed to last; a killed run goes on from the newest whole one.

checkpoints/step-00000400/deepspeed/   DeepSpeed's files, one a rank where ZeRO shards
                          state.npz    counters, ECL table, bank rows
                          model/       consolidated Hugging Face folder, needs no DeepSpeed
checkpoints/latest, best               names of folders
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch.distributed as dist

from ..errors import UserError
from ..files.atomic import sync, write_atomically
from ..model.efficientclip import EfficientCLIP

Arrays = dict[str, Any]


class Checkpoints:
    """The checkpoint folder of one run; every rank calls every method."""

    def __init__(self, run: Path, keep: int) -> None:
        self.folder = run / "checkpoints"
        self.keep = keep
        if dist.get_rank() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            for leftover in self.folder.glob("*.partial"):
                shutil.rmtree(leftover)
        dist.barrier()

    def save(self, engine: deepspeed.DeepSpeedEngine, step: int, arrays: Arrays, best: bool) -> None:
        """Write step's checkpoint; the last `keep` and the best stay."""
        name = f"step-{step:08d}"
        staging = self.folder / f"{name}.partial"
        if dist.get_rank() == 0:
            # A checkpoint of this step from before a resume is replaced.
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir()
        dist.barrier()
        engine.save_checkpoint(str(staging), tag="deepspeed")
        save_model(engine, staging / "model")
        if dist.get_rank() == 0:
            with (staging / "state.npz").open("wb") as file:
                np.savez(file, **arrays)
            for file_path in staging.rglob("*"):
                if file_path.is_file():
                    _fsync(file_path)
        dist.barrier()
        if dist.get_rank() == 0:
            final = self.folder / name
            shutil.rmtree(final, ignore_errors=True)
            os.replace(staging, final)
            sync(self.folder)
            write_atomically(self.folder / "latest", name.encode())
            if best:
                write_atomically(self.folder / "best", name.encode())
            self._remove_old()
        dist.barrier()

    def latest(self) -> Path | None:
        """The newest whole checkpoint, or None."""
        return self._pointed("latest")

    def best(self) -> Path | None:
        return self._pointed("best")

    def load(self, engine: deepspeed.DeepSpeedEngine, checkpoint: Path) -> Arrays:
        """Put weights and optimiser state back and return the arrays saved beside them."""
        loaded, _ = engine.load_checkpoint(str(checkpoint), tag="deepspeed")
        if loaded is None:
            raise UserError(
                f"checkpoint {checkpoint}: DeepSpeed cannot load it with this world size and ZeRO stage; resume with"
                " the ones it was written with, or start a new run"
            )
        with np.load(checkpoint / "state.npz") as arrays:
            return {name: arrays[name] for name in arrays.files}

    def _pointed(self, pointer: str) -> Path | None:
        file = self.folder / pointer
        if not file.is_file():
            return None
        checkpoint = self.folder / file.read_text().strip()
        return checkpoint if (checkpoint / "state.npz").is_file() else None

    def _remove_old(self) -> None:
        best = self.best()
        checkpoints = sorted(path for path in self.folder.glob("step-*") if path.suffix != ".partial")
        for path in checkpoints[: -self.keep]:
            if path != best:
                shutil.rmtree(path)


def save_model(engine: deepspeed.DeepSpeedEngine, folder: Path) -> None:
    """Write the consolidated Hugging Face folder from rank 0, whatever the ZeRO stage."""
    module: EfficientCLIP = engine.module
    parameters = list(module.parameters()) if engine.zero_optimization_stage() == 3 else []
    with deepspeed.zero.GatheredParameters(parameters, enabled=bool(parameters)):
        if dist.get_rank() == 0:
            state = {name: value.detach().cpu().float().clone() for name, value in module.state_dict().items()}
            module.save_pretrained(folder, state_dict=state)


def _fsync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
