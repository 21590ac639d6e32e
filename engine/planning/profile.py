"""`efficientclip profile`: where the time of a training step goes.

The trainer's own loop runs for some steps in a scratch folder beside the run's. Each moment of a step counts to the
innermost open span, so the parts add up to the step. CUDA: moments are events on the compute stream, so what is queued
counts where the device does it, and only communication that compute waits for counts as communication. On
CPUs, clock time; communication includes the wait for the slowest rank.
"""

from __future__ import annotations

import gzip
import os
import resource
import secrets
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial, wraps
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from torch.profiler import ProfilerActivity, record_function, schedule
from torch.profiler import profile as torch_profile

from .. import __version__, stopping
from ..config import Config
from ..data.batches import Batch
from ..data.pairs import PairSource
from ..errors import UserError, writing
from ..files.atomic import write_atomically, written_aside
from ..files.ownership import MADE_BY, claim_file
from ..hardware import device_name, hardware, ranks_here
from ..model.efficientclip import EfficientCLIP
from ..training.distributed import join_process_group
from ..training.runs import set_up
from ..training.trainer import Trainer, Validate
from .measured import COMPUTED, ONCE, PARTS, Profile
from .settings import Device, Machine, Settings
from .tables import profile_tables
from .work import measure_work, operations, picture_training_work

COLLECTIVES = (
    "allreduce", "allreduce_coalesced", "allgather", "_allgather_base", "all_gather_single", "allgather_coalesced",
    "allgather_into_tensor_coalesced", "reduce_scatter", "_reduce_scatter_base", "reduce_scatter_single",
    "reduce_scatter_tensor_coalesced", "alltoall", "alltoall_base", "all_to_all_single", "broadcast", "reduce",
    "gather", "scatter", "send", "recv", "barrier",
)  # fmt: skip


class Recorder:
    """Which part each moment counts to. `device` is where the steps are computed."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self.open = ["other"]
        self.marks: list[tuple[str, Any]] = []
        self.ends: list[int] = []
        self.times_entered: Counter[str] = Counter()
        self._mark("other")

    def _mark(self, part: str) -> None:
        """From now on, time counts to `part`."""
        if self.stream is None:
            self.marks.append((part, time.perf_counter()))
        elif torch.cuda.current_stream(self.stream.device) == self.stream:
            # What runs on another stream takes no time of this one until it is waited for.
            event = torch.cuda.Event(enable_timing=True)
            event.record(self.stream)
            self.marks.append((part, event))

    @contextmanager
    def span(self, part: str) -> Iterator[None]:
        # A barrier within a checkpoint is no communication of a step.
        counted_to = self.open[-1] if self.open[-1] in ONCE else part
        with record_function(part):
            self.open.append(counted_to)
            self.times_entered[part] += 1
            self._mark(counted_to)
            try:
                yield
            finally:
                self.open.pop()
                self._mark(self.open[-1])

    def end_step(self) -> None:
        self._mark("other")
        self.ends.append(len(self.marks) - 1)

    def seconds(self, first: int, last: int) -> dict[str, float]:
        """Seconds by part between two marks."""
        if self.stream is not None:
            self.stream.synchronize()
        spent: dict[str, float] = dict.fromkeys((*PARTS, *ONCE), 0.0)
        for (part, begin), (_, end) in zip(self.marks[first:last], self.marks[first + 1 : last + 1], strict=True):
            spent[part] += end - begin if self.stream is None else begin.elapsed_time(end) / 1000
        return spent

    def steps(self) -> list[dict[str, float]]:
        """Seconds of each part of each step but the first, which has no beginning."""
        return [self.seconds(first, last) for first, last in zip(self.ends, self.ends[1:], strict=False)]


@contextmanager
def communication_in(recorder: Recorder) -> Iterator[None]:
    """Every collective, whoever calls it, is a span while this lasts: its start, and the wait for its end."""
    places = [*((dist.ProcessGroup, name) for name in COLLECTIVES), (dist.Work, "wait")]
    # As they lie in the class: `getattr` gives functions that no longer bind.
    originals = [(owner, name, vars(owner)[name]) for owner, name in places if name in vars(owner)]

    def spanned(call: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(call)
        def inner(*arguments: Any, **options: Any) -> Any:
            with recorder.span("communication"):
                return call(*arguments, **options)

        return inner

    try:
        for owner, name, _ in originals:
            setattr(owner, name, spanned(getattr(owner, name)))
        yield
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)


class ProfiledTrainer(Trainer):
    """Stops after `warm_up` + `measured` + 1 + `traced` steps; the one between wakes torch's profiler up."""

    def __init__(
        self,
        config: Config,
        model: EfficientCLIP,
        source: PairSource,
        validate: Validate,
        *,
        warm_up: int,
        measured: int,
        traced: int,
        trace: Path,
    ) -> None:
        super().__init__(config, model, source, validate)
        self.warm_up, self.measured = warm_up, measured
        self.last_step = warm_up + measured + 1 + traced
        if self.total_steps < self.last_step:
            raise UserError(
                f"profile: the run has {self.total_steps} steps, {self.last_step} are needed; raise"
                " training.pair_visits, or lower --warm-up, --steps or --traced"
            )
        self.recorder = Recorder(self.device)
        self.span = self.recorder.span
        # This rank's captions, their tokens, unpaired texts, their tokens, masked positions: a row for each step.
        self.counts: list[list[int]] = []
        self.peak_bytes, self.trace = 0, trace
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.device.type == "cuda" else [])]
        self.profiler = torch_profile(
            activities=activities,
            schedule=schedule(wait=0, warmup=1, active=traced, repeat=1),
            on_trace_ready=self._write_trace,
        )

    def _write_trace(self, profiler: Any) -> None:
        made = self.config.run.with_name("trace.json")
        with writing(made):
            profiler.export_chrome_trace(str(made))
        with (
            written_aside(self.trace) as aside,
            made.open("rb") as whole,
            aside.open("wb") as stream,
            # The name in its header is its mark.
            gzip.GzipFile(f"{MADE_BY} {__version__}", "wb", fileobj=stream) as packed,
        ):
            shutil.copyfileobj(whole, packed)

    def train_step(self, batch: Batch) -> None:
        captions = tokens = texts = 0
        for arguments in batch.inputs:
            if "segments" in arguments:
                lengths = arguments["segments"].cu_seqlens.diff()
                captions += len(arguments["texts"])
                tokens += int(lengths[arguments["texts"]].sum())
                texts += len(lengths) - len(arguments["texts"])
        self.counts.append([captions, tokens, texts, batch.tokens - tokens, batch.masked])
        super().train_step(batch)

    def anywhere(self) -> tuple[int, bool]:
        stop, ended = super().anywhere()
        self.recorder.end_step()
        if self.rank == 0 and self.step > self.warm_up + self.measured:
            self.profiler.step()
        elif self.step == self.warm_up + self.measured:
            # torch's profiler holds memory of its own.
            self.peak_bytes = _peak_bytes(self.device)
            if self.rank == 0:
                self.profiler.start()
        if self.step == self.last_step:
            if self.rank == 0:
                self.profiler.stop()
            with self.span("validation"):
                self.validate(self.engine.module)
            with self.span("end"):
                self.finish()
        return stop or int(self.step == self.last_step), ended


def profile(
    config: Config,
    path: Path,
    overrides: Sequence[str],
    *,
    output: Path | None = None,
    replace: bool = False,
    warm_up: int = 10,
    measured: int = 20,
    traced: int = 3,
) -> None:
    """Profile the run that `config` of file `path` describes; rank 0 writes `output` and the trace beside it.

    The run's folder is neither read nor written. UserError when the run is shorter than the profile, or is stopped.
    """
    if min(warm_up, measured, traced) < 1:
        raise UserError("profile: --warm-up, --steps and --traced must be 1 at least")
    output = output or Path(f"{config.run.name}-profile.json")
    if output.suffix != ".json" or not output.parent.is_dir():
        raise UserError(f"--output {output}: name a .json file in a folder that exists")
    output = claim_file(output, "profile", replace=replace)
    trace = claim_file(output.with_suffix(".trace.json.gz"), "trace", replace=replace)
    started = time.perf_counter()
    make = partial(ProfiledTrainer, warm_up=warm_up, measured=measured, traced=traced, trace=trace)
    # Steps that are thrown away are shown to nobody.
    unseen = config.training.model_copy(update={"report_to": []})
    join_process_group()
    with (
        _scratch(config.run) as folder,
        set_up(config.model_copy(update={"run": folder, "training": unseen}), make) as trainer,
    ):
        start_seconds = time.perf_counter() - started
        base = _peak_bytes(trainer.device) - _known_bytes(trainer)
        with communication_in(trainer.recorder):
            stopped_by = trainer.train()
        if trainer.step < trainer.last_step:
            stopping.leave_stopped(stopped_by)
        found = _gathered(trainer, base, start_seconds)
        if trainer.rank == 0:
            made = _profile(config, path, overrides, trainer, found, traced)
            write_atomically(output, made.model_dump_json(indent=1).encode())
            Console().print(*profile_tables(made))
            print(f"{output}\n{trainer.trace}: open it at ui.perfetto.dev")


@contextmanager
def _scratch(run: Path) -> Iterator[Path]:
    """A folder in the place of `run`, on its file system and the same for all ranks, that goes with the context."""
    parent = next(folder for folder in run.absolute().parents if folder.is_dir())
    named = [parent / f".{run.name}-profile-{secrets.token_hex(4)}"]
    dist.broadcast_object_list(named)
    with stopping.scratch(named[0]) as folder:
        if dist.get_rank() == 0:
            folder.mkdir()
        yield folder / run.name


def _known_bytes(trainer: Trainer) -> int:
    """What the set-up left that the plan counts by itself: weights and bank."""
    known = [*trainer.engine.module.parameters(), trainer.bank.features_QD]
    return sum(tensor.numel() * tensor.element_size() for tensor in known)


def _peak_bytes(device: torch.device) -> int:
    """The most so far that torch's allocator gave of a CUDA device; on CPUs, the greatest resident set."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _gathered(trainer: ProfiledTrainer, base: int, start_seconds: float) -> list[dict[str, Any]]:
    """What each rank measured."""
    recorder, chosen = trainer.recorder, slice(trainer.warm_up, trainer.warm_up + trainer.measured)
    # Step k lies between the ends of steps k - 1 and k: the first of the list is the second step.
    steps = recorder.steps()[trainer.warm_up - 1 : trainer.warm_up + trainer.measured - 1]
    whole = recorder.seconds(0, len(recorder.marks) - 1)
    cuda = trainer.device.type == "cuda"
    mine = {
        "steps": [{part: seconds[part] for part in PARTS} for seconds in steps],
        "once": {part: whole[part] / max(recorder.times_entered[part], 1) for part in ONCE} | {"start": start_seconds},
        "counts": np.sum(trainer.counts[chosen], axis=0).tolist(),
        "peak": trainer.peak_bytes,
        "base": 0 if cuda else base,
    }
    everywhere: list[Any] = [None] * trainer.world_size
    dist.all_gather_object(everywhere, mine)
    return everywhere


def _profile(
    config: Config,
    path: Path,
    overrides: Sequence[str],
    trainer: ProfiledTrainer,
    found: list[dict[str, Any]],
    traced: int,
) -> Profile:
    measured, W = trainer.measured, trainer.world_size
    captions, caption_tokens, texts, text_tokens, masked = np.sum([rank["counts"] for rank in found], axis=0) / measured
    # Ranks wait for each other: the mean over ranks is what a step takes.
    steps = [
        {part: float(np.mean([rank["steps"][number][part] for rank in found])) for part in PARTS}
        for number in range(measured)
    ]
    totals = [sum(step.values()) for step in steps]
    N = config.training.batch_size
    settings = Settings(
        pairs=len(trainer.source),
        images=len(trainer.source.table),
        caption_tokens=caption_tokens / max(captions, 1),
        text_tokens=text_tokens / max(texts, 1),
        machine=Machine(Device(device_name(), 0, 0, _device_memory(trainer.device), 0, 0, 0, 0), W),
    )
    image = config.training.tower == "image"
    work = picture_training_work(config) if image else measure_work(config, settings.caption_tokens)
    flop = operations(config, work, settings, N, caption_tokens, text_tokens, masked)
    compute = trainer.engine.module.compute
    parts = {part: float(np.mean([step[part] for step in steps])) for part in PARTS}
    computing = sum(parts[part] for part in COMPUTED)
    return Profile(
        format=Profile.FORMAT,
        config=str(path),
        overrides=list(overrides),
        settings=config,
        hardware=hardware(W),
        device=settings.device.name,
        world_size=W,
        autocast=None if compute is None else str(compute).removeprefix("torch."),
        steps_measured=measured,
        steps_warm_up=trainer.warm_up,
        steps_traced=traced,
        pairs=settings.pairs,
        images=settings.images,
        step_seconds=sum(parts.values()),
        step_seconds_median=float(np.median(totals)),
        step_seconds_range=(min(totals), max(totals)),
        parts=parts,
        once={name: float(np.max([rank["once"][name] for rank in found])) for name in found[0]["once"]},
        pairs_per_step=N,
        caption_tokens=settings.caption_tokens,
        text_tokens=settings.text_tokens,
        tokens_per_step=caption_tokens + text_tokens,
        masked_per_step=masked,
        flop_per_step=flop,
        flop_per_second=sum(flop.values()) / sum(parts.values()) / W,
        flop_per_second_computing=sum(flop.values()) / computing / W,
        peak_bytes=max(rank["peak"] for rank in found),
        base_bytes=max(rank["base"] for rank in found),
        memory_bytes=settings.device.memory,
    )


def _device_memory(device: torch.device) -> int:
    """Bytes of memory for one rank."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // ranks_here()
