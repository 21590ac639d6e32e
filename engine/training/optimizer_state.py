"""The optimiser's moments in pieces, which any number of ranks and any ZeRO stage take up again.

optimizer-00000.safetensors    one a rank: of every trained parameter the elements that this rank updates, flat, as
                               `moment/first element/parameter`; in the metadata how many steps were taken, and
                               which parameters have no moments, since no loss reaches them

Masters are fp32, as the weights are: the checkpoint's model folder holds them once for all.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import deepspeed
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import UserError

FILES = "optimizer-*.safetensors"


class Piece(NamedTuple):
    """Elements of a parameter that this rank updates: those from `start`, from `offset` on in `flat`."""

    name: str
    flat: Tensor
    offset: int
    start: int
    numel: int


class Stored(NamedTuple):
    """Where a checkpoint holds elements of a parameter."""

    start: int
    numel: int
    file: Any
    key: str


class Held(NamedTuple):
    """A rank's moments, copied to the host, what is told beside them, and the file that they make."""

    tensors: dict[str, Tensor]
    beside: dict[str, str]
    file: str


def held(engine: deepspeed.DeepSpeedEngine) -> Held:
    """This rank's pieces as they are now."""
    optimizer, stage = _base(engine), engine.zero_optimization_stage()
    rank, ranks = dist.get_rank(), dist.get_world_size()
    # Without ZeRO all ranks hold all: they take turns.
    mine = [piece for number, piece in enumerate(_pieces(engine)) if stage > 0 or number % ranks == rank]
    moments, without = {}, []
    for piece in mine:
        state = optimizer.state.get(piece.flat, {})
        if not state:
            without.append(piece.name)
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == piece.flat.shape:
                elements = value.flatten()[piece.offset : piece.offset + piece.numel]
                moments[f"{name}/{piece.start}/{piece.name}"] = elements.detach().to("cpu", copy=True)
    beside = {"steps": json.dumps(_steps(optimizer)), "without": json.dumps(without)}
    return Held(moments, beside, f"optimizer-{rank:05d}.safetensors")


def write(held: Held, folder: Path) -> str:
    """Write the file into `folder`; returns its name."""
    save_file(held.tensors, folder / held.file, held.beside)
    return held.file


def load(engine: deepspeed.DeepSpeedEngine, folder: Path) -> None:
    """Give the optimiser the moments that `folder` holds, whichever ranks and ZeRO stage wrote them."""
    optimizer, pieces = _base(engine), list(_pieces(engine))
    stored: dict[tuple[str, str], list[Stored]] = defaultdict(list)
    steps: dict[str, float] = {}
    without: set[str] = set()
    files = sorted(folder.glob(FILES))
    for file in files:
        opened = safe_open(file, "pt")
        steps |= json.loads(opened.metadata()["steps"])
        without |= {*json.loads(opened.metadata()["without"])}
        for key in opened.keys():  # noqa: SIM118
            moment, start, name = key.split("/", 2)
            numel = opened.get_slice(key).get_shape()[0]
            stored[moment, name].append(Stored(int(start), numel, opened, key))
    moments = sorted({moment for moment, _ in stored})
    for piece in pieces:
        if piece.name in without:
            continue
        if not optimizer.state.get(piece.flat):
            try:
                state: dict[str, Any] = {moment: torch.zeros_like(piece.flat) for moment in moments}
            except torch.OutOfMemoryError as error:
                # The checkpoint is not to blame.
                raise MemoryError(str(error)) from error
            optimizer.state[piece.flat] = state | _counters(optimizer, steps, piece.flat)
        for moment in moments:
            held = optimizer.state[piece.flat][moment].view(-1)[piece.offset : piece.offset + piece.numel]
            _fill(held, piece, moment, stored[moment, piece.name], folder)
    if "group" in steps:
        for group in optimizer.param_groups:
            group["step"] = int(steps["group"])


def _fill(held: Tensor, piece: Piece, moment: str, stored: list[Stored], folder: Path) -> None:
    found = 0
    for part in stored:
        first, end = max(part.start, piece.start), min(part.start + part.numel, piece.start + piece.numel)
        if first < end:
            values = part.file.get_slice(part.key)[first - part.start : end - part.start]
            held[first - piece.start : end - piece.start] = values
            found += end - first
    if found != piece.numel:
        raise UserError(
            f"checkpoint {folder}: holds {found} of {piece.numel} elements of {moment} of {piece.name}; it is of"
            " another model or of another optimizer.name: choose another run folder"
        )


def _base(engine: deepspeed.DeepSpeedEngine) -> torch.optim.Optimizer:
    """The optimiser inside of ZeRO's."""
    inner: torch.optim.Optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    return inner


def _pieces(engine: deepspeed.DeepSpeedEngine) -> Iterator[Piece]:
    """What this rank updates, by the layout of the engine's ZeRO stage."""
    stage, zero = engine.zero_optimization_stage(), engine.optimizer
    named = [(name, parameter) for name, parameter in engine.module.named_parameters() if parameter.requires_grad]
    if stage == 0:
        yield from (Piece(name, parameter, 0, 0, parameter.numel()) for name, parameter in named)
    elif stage < 3:
        names = {id(parameter): name for name, parameter in named}
        for flat, group in zip(zero.single_partition_of_fp32_groups, zero.bit16_groups, strict=True):
            for parameter in group:
                held = parameter._hp_mapping
                if held is not None:
                    there, here = held.lp_fragment_address, held.hp_fragment_address
                    yield Piece(names[id(parameter)], flat, here.start, there.start, here.numel)
    else:
        for name, parameter in named:
            group, offset, share = zero.grad_position[zero.get_param_id(parameter)]
            start = share * dist.get_rank()
            # The last ranks' shares are padded.
            numel = min(share, parameter.ds_numel - start)
            if numel > 0:
                yield Piece(name, zero.fp32_partitioned_groups_flat[group], offset, start, numel)


def _steps(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """How many steps were taken, as the optimiser counts them: by parameter or by group.

    DeepSpeed's FusedAdam counts at the last parameter of a group alone.
    """
    states = [state for state in optimizer.state.values() if "step" in state]
    groups = [group for group in optimizer.param_groups if "step" in group]
    return {
        kind: max(float(one["step"]) for one in held) for kind, held in (("state", states), ("group", groups)) if held
    }


def _counters(optimizer: torch.optim.Optimizer, steps: dict[str, float], flat: Tensor) -> dict[str, Any]:
    if "state" not in steps:
        return {}
    # torch's optimisers count in a tensor beside the moments, the others in an int.
    of_torch = isinstance(optimizer, torch.optim.AdamW)
    return {"step": torch.tensor(steps["state"], device=flat.device) if of_torch else int(steps["state"])}
