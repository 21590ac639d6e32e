"""`efficientclip plan`: what a run will cost before it is paid for: time, memory by part, and storage.

The cost model, on the operations and bytes that `work` counts:

- the image tower encodes every picture once, by a `prepare` on all devices, whose rank 0 puts the store together on
  one core; `cross-fit` judges the pairs on a core a device;
- activations are held for each token of a micro-batch, with their gradients for a layer at a time; where layers are
  recomputed, their inputs are held, and one layer's activations;
- a step reduces every gradient over the ranks in a ring, 2 (W - 1) / W of its bytes, and gathers the batch's features
  for the loss and for the bank, by the slowest link, not overlapped with compute; AdamW moves 16 bytes a parameter,
  ZeRO's copies of the weights 8 more; a checkpoint's bytes go to the host, and are written while training goes on.

A device yields a share of its dense peak in `training.precision`; 0.4 is what well-tuned training of towers this size
reaches, 0.1 what an untuned one does: all are shown. TERMS names the code that each term stands for.

Calibrated by a profile, the same operations take the time that they took there, every other part of a step, set-up,
validations and checkpoints the seconds that were measured, and the bytes that the profile held beyond its own count,
what allocators keep, are added.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ..config import Config
from ..hardware import COMPUTED_IN
from ..noise.cross_fit import read_rate
from ..prepare.writer import token_dtype
from .measured import Profile
from .settings import Settings, settings_of
from .work import measure_work, operations, positive

DAY = 86_400
PICTURES, FOLDS = "pictures through the frozen tower", "cross-fit's two towers"
MERGED, JUDGED = "parts of the store put together", "cross-fit's verdicts"
# Paid before the run itself.
BEFORE = (PICTURES, MERGED, FOLDS, JUDGED)
# Of a core, for each pair: benchmarks/results/prepare.csv and judge.csv.
MERGE_SECONDS, JUDGE_SECONDS = 5e-6, 2.3e-4
TERMS = {
    PICTURES: "model.frozen.FrozenImages.encode_pixels",
    MERGED: "prepare.merge.merge",
    JUDGED: "noise.docket.Docket.answers",
    FOLDS: "training.folds.cross_fit",
    "captions": "model.efficientclip.EfficientCLIP.forward",
    "captions and pictures": "model.efficientclip.EfficientCLIP.forward",
    "captions once more, to accumulate": "training.trainer.Trainer._cached_batch",
    "captions and pictures once more, to accumulate": "training.trainer.Trainer._cached_batch",
    "layers once more, to recompute": "model.efficientclip.EfficientCLIP.recompute_layers",
    "momentum copies": "training.momentum.MomentumCopies.keys",
    "unpaired texts": "objectives.losses.mlm_loss",
    "contrastive loss": "kernels.contrastive.contrastive_loss",
    "scoring copy": "training.trainer.Trainer._figures",
    "gradients between devices": "training.trainer.Trainer._backward",
    "features between devices": "kernels.ranks.Ranks.gather_rows",
    "communication": "training.ranks.all_rows",
    "optimiser": "training.optimizer.build_optimizer",
    "data wait": "data.pairs.PairLoader.__next__",
    "confidence": "noise.confidence.ConfidenceTable.observe",
    "other": "training.trainer.Trainer.train_step",
    "set-up and end": "training.runs.set_up",
    "validations": "model.encode.encode_store",
    "checkpoints": "training.checkpoint.Checkpoints.save",
    "weights": "model.towers.TextTower",
    "master weights": "training.optimizer.build_optimizer",
    "gradients": "training.trainer.Trainer._backward",
    "gradients under way": "training.deepspeed_json.deepspeed_config",
    "activations": "model.towers.TextTower.states",
    "gradients of activations": "training.trainer.Trainer._backward",
    "vocabulary logits": "model.towers.TextTower.vocabulary_logits",
    "features of the batch": "kernels.ranks.Ranks.gather_rows",
    "bank": "data.batches.Bank",
    "loss workspace": "kernels.contrastive.contrastive_loss",
    "store, mapped": "data.store.Store",
    "context": "training.distributed.process_group",
}
SHARES = (0.1, 0.2, 0.4)
# What CUDA's context and the allocator's rounding take of a device.
CONTEXT_BYTES = 1 << 30
# Elements that DeepSpeed reduces at once unless its JSON says otherwise.
BUCKET = 500_000_000


def code_of(term: str) -> str | None:
    """What of the package a term stands for, which may carry a number; None for what allocators keep."""
    return TERMS.get(term.partition(" (")[0])


@dataclass(frozen=True)
class Plan:
    """What `plan` answers: operations and bytes by part; seconds follow from a share of the device's peak."""

    settings: Settings
    precision: str
    visits: int
    steps: int
    flop: dict[str, float]
    seconds: dict[str, float]
    """Those that no rate of operations changes: memory and links, or as measured, over the whole run."""
    memory: dict[str, float]
    storage: dict[str, float]

    @property
    def rates(self) -> dict[str, float]:
        """Operations a second of one device, by what is assumed or was measured."""
        if self.settings.profile is not None:
            return {"as measured": self.settings.profile.flop_per_second_computing}
        return {f"at {share:.0%} of peak": share * self.settings.device.peak_in(self.precision) for share in SHARES}

    def parts(self, rate: float) -> dict[str, float]:
        """Seconds on the clock of each part at `rate` operations a second of each device."""
        W = self.settings.world_size
        return {name: flop / rate / W for name, flop in self.flop.items()} | self.seconds

    def days(self, rate: float, *, before: bool = True) -> float:
        """Days on the clock at `rate` operations a second of each device, with what comes `before` or not."""
        return sum(seconds for name, seconds in self.parts(rate).items() if before or name not in BEFORE) / DAY

    def device_days(self, rate: float) -> float:
        return self.settings.world_size * self.days(rate)


def plan(config: Config, settings: Settings) -> Plan:
    """Cost of `config` on the machine of `settings`."""
    made = _counted_plan(config, settings)
    if settings.profile is not None:
        profile = settings.profile
        surplus = max(0.0, profile.peak_bytes - counted_for(profile))
        made.memory.update(positive({"beyond the count, as measured": surplus}))
    return made


def counted_for(profile: Profile) -> float:
    """Bytes that the model counts of what `profile` measured the peak of."""
    # torch's allocator does not see CUDA's context.
    beyond = 0 if profile.base_bytes else CONTEXT_BYTES
    return sum(_counted_plan(profile.settings, settings_of(profile)).memory.values()) - beyond


def _counted_plan(config: Config, settings: Settings) -> Plan:
    """The plan by counting alone."""
    training, device, W = config.training, settings.device, settings.world_size
    sharing = _sharing(config)
    zero = sharing.zero
    compute = COMPUTED_IN[training.precision]
    if settings.profile is not None:
        compute = getattr(torch, settings.profile.autocast) if settings.profile.autocast else None
    work = measure_work(config, settings.caption_tokens, autocast=compute, on_cpu=settings.on_cpu)
    N, Q, D = training.batch_size, config.objective.bank_size, config.model.width
    visits, steps = training.pair_visits, -(-training.pair_visits // training.batch_size)
    texts = config.mlm.texts_per_batch / N
    masked = texts * settings.text_tokens * config.mlm.mask_share
    captions, unpaired = visits * settings.caption_tokens, visits * texts * settings.text_tokens
    counted = operations(config, work, settings, visits, captions, unpaired, visits * masked)
    folds = config.confidence.cross_fit_share if config.confidence.selection == "calibrated" else 0
    judged = visits * folds
    both = training.tower == "both"
    flop = {
        PICTURES: settings.images * work.picture,
        FOLDS: sum(operations(config, work, settings, judged, judged * settings.caption_tokens, 0, 0).values()),
        **counted,
    }
    P, width = work.parameters, 4
    if settings.profile is None:
        # Frozen images go round twice, for the loss and for the bank; trained ones bring their gradients back.
        row = 4 * (1 + both) if both else 2 * (1 + (Q > 0))
        exchanged = 2 * (W - 1) / W * P * width, (W - 1) / W * N * D * row
        updated = P * (16 + 8 * bool(zero)) / (W if zero else 1) / device.bandwidth
        checkpoints = pauses(config, settings.pairs, steps)[1]
        seconds = {
            "gradients between devices": steps * exchanged[0] / settings.link,
            "features between devices": steps * exchanged[1] / settings.link,
            "optimiser": steps * updated,
            f"checkpoints ({checkpoints:,})": checkpoints * P * (4 + 8 / W) / device.host,
        }
    else:
        seconds = _measured_seconds(config, settings, settings.profile, steps, P * width, zero)
    if not both:
        seconds[MERGED] = settings.pairs * MERGE_SECONDS
    if folds:
        seconds[JUDGED] = settings.pairs * JUDGE_SECONDS / W
    M = N / W
    together = min(training.micro_batch_size or M, M)
    tokens = min(together * settings.caption_tokens, training.tokens_per_micro_batch or np.inf)
    tokens += M * texts * settings.text_tokens
    sharded = {stage: W if zero >= stage else 1 for stage in (1, 2, 3)}
    # Where both towers train, pictures and captions are read from their tars.
    storage = {}
    if training.tower == "text":
        token_bytes = token_dtype(work.vocabulary).itemsize
        storage = {
            "features": settings.images * D * 2,
            "tokens and offsets": settings.pairs * (settings.caption_tokens * token_bytes + 8),
        }
    whole = kept = tokens * work.kept_by_token + together * work.kept_by_pair
    if training.recompute:
        kept = tokens * work.hidden * work.layers * 4 + whole / work.layers
    momentum = config.objective.momentum > 0
    memory = {
        "weights": P * width / sharded[3],
        "master weights": 4 * P * bool(zero) / sharded[1] * (not sharing.offloaded),
        "gradients": P * width / sharded[2],
        "gradients under way": min(P, sharing.bucket) * width * (W > 1),
        "optimiser": 8 * P / sharded[1] * (not sharing.offloaded),
        "activations": kept + work.kept_once,
        # Backward holds them for a layer at a time.
        "gradients of activations": whole / work.layers,
        "vocabulary logits": M * masked * work.vocabulary * 10,
        "features of the batch": (N + 2 * M) * D * 4,
        "scoring copy": P * width * (config.confidence.score == "snapshot"),
        "momentum copies": P * width * momentum,
        # Frozen rows in fp16, which batches see as they lie; copies of the momentum copies' two queues, in fp32.
        "bank": (4 * Q * 4 if momentum else min(Q, settings.images) * 2) * D,
        "loss workspace": M * D * 4 + 100 * 2**20,
        # Mapped files count to a process's resident set; a device never sees them.
        "store, mapped": sum(storage.values()) * settings.on_cpu,
        "context": settings.profile.base_bytes if settings.profile and settings.on_cpu else CONTEXT_BYTES,
    }
    parts = positive(flop), positive(seconds), positive(memory)
    return Plan(settings, training.precision, visits, steps, *parts, storage)


def _measured_seconds(
    config: Config, settings: Settings, profile: Profile, steps: int, gradient_bytes: float, zero: int
) -> dict[str, float]:
    """Seconds by part over the run: of `steps` steps, and of what happens once or now and then."""
    W, measured_on, parts = settings.world_size, profile.world_size, profile.parts
    # What each pair costs in the loader, for ECL and in Python grows with the batch.
    batches = config.training.pair_visits / profile.pairs_per_step
    validations, checkpoints = pauses(config, settings.pairs, steps)
    if measured_on > 1:
        communication = parts["communication"] * ((W - 1) / W) / ((measured_on - 1) / measured_on)
    else:
        communication = 2 * (W - 1) / W * gradient_bytes / settings.link if W > 1 else parts["communication"]
    return {
        "communication": steps * communication,
        "optimiser": steps * parts["optimiser"] * (measured_on / W if zero else 1),
        "data wait": batches * parts["data wait"],
        "confidence": batches * parts["confidence"],
        "other": batches * parts["other"],
        "set-up and end": profile.once["start"] + profile.once["end"],
        f"validations ({validations:,})": validations * profile.once["validation"],
        f"checkpoints ({checkpoints:,})": checkpoints * profile.once["checkpoint"],
    }


def pauses(config: Config, pairs: int, steps: int) -> tuple[int, int]:
    """Validations of a run of `steps` steps, and checkpoints, if every validation is the best so far."""
    training, ecl, N = config.training, config.confidence, config.training.batch_size
    kept, epoch, drops, step = round(pairs * (1 - judged_wrong(config))), 0, 0, 0
    every = training.validate_every_steps
    validated = {steps} | (set(range(every, steps, every)) if every is not None else set())
    while True:
        auditions = min(round(N * ecl.reaudition_share), pairs - kept)
        length = kept // (N - auditions)
        if length == 0 or step + length >= steps:
            break
        step += length
        if training.validates(step, epoch + 1):
            validated.add(step)
        # How much a mixture drops, the scores alone tell.
        drop = ecl.selection == "published" or (ecl.selection == "schedule" and drops < ecl.drops)
        if drop and epoch >= ecl.warmup_epochs:
            kept, drops = round(kept * (1 - ecl.drop_share)), drops + 1
        epoch += 1
    saved = validated if config.data.validation else {steps}
    saved = saved | set(range(training.checkpoint_every, steps + 1, training.checkpoint_every))
    return len(validated) * bool(config.data.validation), len(saved)


def judged_wrong(config: Config) -> float:
    """The share that a calibrated run drops from its start; 0 before `efficientclip cross-fit` has told."""
    folder = config.confidence.cross_fit
    if config.confidence.selection != "calibrated" or folder is None:
        return 0.0
    return read_rate(folder) or 0.0


@dataclass(frozen=True)
class _Sharing:
    """What the DeepSpeed JSON says of memory: what ranks share, the optimiser on the host."""

    zero: int
    offloaded: bool
    bucket: float
    """Elements of gradients in copies under way between devices."""


def _sharing(config: Config) -> _Sharing:
    if config.deepspeed is None:
        return _Sharing(zero=0, offloaded=False, bucket=BUCKET)
    # DeepSpeed takes ten seconds to import.
    from ..training.deepspeed_json import zero_settings

    zero = zero_settings(config)
    offload = zero.offload_optimizer
    return _Sharing(
        zero=int(zero.stage),
        offloaded=offload is not None and offload.device != "none",
        bucket=float(zero.reduce_bucket_size) * (2 if zero.stage and zero.overlap_comm else 1),
    )
