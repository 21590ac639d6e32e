"""`efficientclip plan`: what a run will cost before it is paid for: time, memory by part, storage, and what limits it.

The cost model. Work is counted on the towers themselves, built without memory on the meta device:

- a trained token costs three forwards (backward is two of them); forward is counted operator by operator on a packed
  row of texts of the mean length, so attention is in it;
- a masked position adds the vocabulary head; a pair adds its projection and the loss, 6 D (N + Q) operations for a
  batch of N and a bank of Q: three products, of which one is the recompute, since images are frozen;
- where both towers train, a pair adds its picture, three forwards too, and the loss a fourth product for the N;
  momentum copies add a forward of each side, and tell each side from a queue of its own;
- activations are the bytes that autograd keeps of that row, without parameters, for each token of a micro-batch, with
  their gradients for a layer at a time;
- a step reduces every gradient over the ranks in a ring, 2 (W - 1) / W of its bytes, not overlapped with compute;
  AdamW moves 16 bytes a parameter, master weights 12 more;
- the image tower encodes every picture once.

A device yields `share` of its dense bf16 peak; 0.4 is what well-tuned training of towers this size reaches, 0.1 what an
untuned one does: all are shown.

Calibrated by a profile, the same operations take the time that they took there, every other part of a step, set-up,
validations and checkpoints the seconds that were measured, and the bytes that the profile held beyond its own count,
what allocators keep, are added.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, ValidationError
from rich.table import Table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, PreTrainedConfig

from ..config import Config, Section, Tower, differing_keys
from ..data.batches import Segments
from ..data.store import read_manifest
from ..errors import UserError
from ..model.towers import ImageTower, TextTower, architecture
from ..noise.rate import read_rate

GIB, DAY = 2**30, 86_400
PICTURES = "pictures through the frozen tower"
SHARES = (0.1, 0.2, 0.4)
# What CUDA's context and the allocator's rounding take of a device.
CONTEXT_BYTES = 1 << 30
# Elements that DeepSpeed reduces at once unless its JSON says otherwise.
BUCKET = 500_000_000
# The parts of a step: those that do the counted operations, and all; and what happens once or now and then.
COMPUTED = ("forward", "loss", "backward")
PARTS = ("data wait", *COMPUTED, "communication", "optimiser", "confidence", "other")
ONCE = ("validation", "checkpoint", "end")


@dataclass(frozen=True)
class Device:
    """Dense bf16 operations a second, bytes of memory, its bytes a second, and those to the other devices of a node."""

    name: str
    peak: float
    memory: float
    bandwidth: float
    link: float


# From the makers' data sheets, SXM modules with NVLink; the link counts one direction.
DEVICES = {
    device.name.lower(): device
    for device in (
        Device("A100", 312e12, 80 * GIB, 2.04e12, 300e9),
        Device("H100", 989e12, 80 * GIB, 3.35e12, 450e9),
        Device("H200", 989e12, 141 * GIB, 4.8e12, 450e9),
        Device("B200", 2250e12, 180 * GIB, 8.0e12, 900e9),
    )
}


@dataclass(frozen=True)
class Work:
    """What the towers ask for: operations, bytes and parameters."""

    token: float
    """Operations of one text token, forward."""
    masked: float
    """Those of one masked position in the vocabulary head, forward."""
    pair: float
    """Those of a caption's projection, and of its picture where both towers train, forward."""
    picture: float
    """Those of one picture through the frozen tower; 0 without one."""
    kept_by_token: float
    """Bytes of activations a token leaves for backward, of the dtype that the forward runs in."""
    kept_by_pair: float
    """Those of a picture, where both towers train."""
    kept_once: float
    """Those left once a forward, whatever its size: under autocast, narrow copies of the weights."""
    parameters: int
    vocabulary: int
    layers: int


class Profile(Section):
    """What `efficientclip profile` measured: seconds, bytes, and operations as `operations` counts them.

    A step is one of all ranks together; `parts` add up to `step_seconds`.
    """

    FORMAT: ClassVar[Literal["efficientclip-profile-1"]] = "efficientclip-profile-1"

    format: Literal["efficientclip-profile-1"]
    config: str
    overrides: list[str]
    settings: Config = Field(description="the config with its overrides")
    hardware: dict[str, Any]
    device: str
    memory_bytes: float = Field(gt=0, description="of a device, or of the machine divided by its ranks")
    world_size: int = Field(ge=1)
    autocast: Literal["bfloat16", "float16"] | None = Field(description="what it ran in, whatever the JSON asks for")
    steps_warm_up: int
    steps_measured: int
    steps_traced: int
    pairs: int = Field(ge=1, description="in the store")
    images: int
    step_seconds: float = Field(gt=0, description="mean of the measured steps")
    step_seconds_median: float
    step_seconds_range: tuple[float, float]
    parts: dict[str, float]
    once: dict[str, float] = Field(description="seconds of set-up, one validation, one checkpoint and the run's end")
    pairs_per_step: int = Field(ge=1)
    tokens_per_step: float
    caption_tokens: float = Field(description="mean length")
    text_tokens: float = Field(description="mean length of unpaired texts")
    masked_per_step: float
    flop_per_step: dict[str, float]
    flop_per_second: float = Field(gt=0, description="of one device, over the whole step")
    flop_per_second_computing: float = Field(gt=0, description="the same over forward, loss and backward alone")
    peak_bytes: float = Field(description="CUDA: torch's allocator; CPUs: resident set; of the rank with most")
    base_bytes: float = Field(description="CPUs: resident set after set-up, less weights and bank")


def read_profile(file: Path) -> Profile:
    """The profile in `file`; UserError when there is none, or it is none of ours."""
    remedy = "make it with `efficientclip profile CONFIG`"
    try:
        found = Profile.model_validate_json(file.read_bytes())
    except FileNotFoundError as error:
        raise UserError(f"--calibrated-by {file}: no such file; {remedy}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"--calibrated-by {file}: no profile: {where or 'file'}: {first['msg']}; {remedy}") from error
    missing = {*PARTS} - found.parts.keys() | {*ONCE, "start"} - found.once.keys()
    if missing:
        raise UserError(f"--calibrated-by {file}: no profile: {', '.join(sorted(missing))} missing; {remedy}")
    return found


@dataclass(frozen=True)
class Settings:
    """What the config leaves open: the data's size and the machine, by its data sheet or as a profile measured it."""

    pairs: int
    images: int
    caption_tokens: float
    text_tokens: float
    device: Device
    world_size: int
    profile: Profile | None = None


def settings_of(
    profile: Profile | None,
    *,
    pairs: int | None = None,
    images: int | None = None,
    caption_tokens: float | None = None,
    text_tokens: float | None = None,
    machine: tuple[Device, int] | None = None,
) -> Settings:
    """What is given, and else what the profile found."""
    if profile is None:
        if pairs is None or machine is None:
            missing = "--pairs" if pairs is None else "--gpus"
            raise UserError(f"{missing}: needed unless --calibrated-by names a profile")
        return Settings(pairs, images or pairs, caption_tokens or 20, text_tokens or 32, *machine)
    if machine is None:
        rate = profile.flop_per_second_computing
        machine = Device(profile.device, rate, profile.memory_bytes, 0, 0), profile.world_size
    elif machine[0].name.lower() not in profile.device.lower():
        raise UserError(
            f"--gpus {machine[1]}x{machine[0].name}: the profile was made on {profile.device}; profile on the machine"
            " to plan for, or leave --gpus out"
        )
    return Settings(
        pairs=pairs or profile.pairs,
        images=images or pairs or profile.images,
        caption_tokens=caption_tokens or profile.caption_tokens,
        text_tokens=text_tokens or profile.text_tokens,
        device=machine[0],
        world_size=machine[1],
        profile=profile,
    )


def parse_count(text: str) -> int:
    """100M, 2.5B, 30k or a plain number."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([kMB]?)", text)
    if not found:
        raise UserError(f"--pairs {text!r}: write a number, or 30k, 100M or 2.5B")
    return int(float(found[1]) * {"": 1, "k": 10**3, "M": 10**6, "B": 10**9}[found[2]])


def parse_devices(text: str) -> tuple[Device, int]:
    """8xH100: the device and how many."""
    found = re.fullmatch(r"(\d+)x(\w+)", text)
    device = DEVICES.get(found[2].lower()) if found else None
    if not found or device is None or int(found[1]) < 1:
        known = ", ".join(device.name for device in DEVICES.values())
        raise UserError(f"--gpus {text!r}: write it as 8xH100; known devices: {known}")
    return device, int(found[1])


def measure_work(
    config: Config,
    caption_tokens: float,
    dtype: torch.dtype = torch.float32,
    autocast: torch.dtype | None = None,
) -> Work:
    """Count the towers' work: nothing is downloaded but their configs, no weight is held.

    `dtype` is that of the weights, `autocast` what products are computed in where it is another.
    """
    if config.model.text_tower is None:
        raise UserError("model.text_tower: not set; a plan is made for a run that trains a text tower")
    described = _described("model.text_tower", config.model.text_tower)
    described_fully = "vocab_size" in (config.model.text_tower.architecture or {"vocab_size": None})
    if config.data.store is not None and (config.data.store / "manifest.json").is_file() and not described_fully:
        described.vocab_size = read_manifest(config.data.store)["vocabulary"]
    length = max(3, round(caption_tokens))
    with torch.device("meta"):
        text = TextTower(described, config.model.width, "cls").to(dtype)
    forward, few = _counted(text, lambda: _states(text, 16, length))
    _, many = _counted(text, lambda: _states(text, 32, length))
    if autocast is not None:
        # Meta tensors know no autocast, fake ones not all operations of attention.
        with FakeTensorMode(), torch.autocast("cpu", dtype=autocast):
            fake = TextTower(described, config.model.width, "cls")
            _, few = _counted(fake, lambda: _states(fake, 16, length))
            _, many = _counted(fake, lambda: _states(fake, 32, length))
    hidden, vocabulary = described.hidden_size, described.vocab_size
    both = config.training.tower == "both"
    picture = _picture_work(config, dtype, training=both)
    return Work(
        token=forward / (16 * length),
        masked=2.0 * hidden * (hidden + vocabulary),
        pair=2.0 * hidden * config.model.width + both * picture.forward,
        picture=(not both) * picture.forward,
        kept_by_token=(many - few) / (16 * length),
        kept_by_pair=both * picture.kept,
        kept_once=2 * few - many,
        parameters=sum(p.numel() for p in text.parameters()) + both * picture.parameters,
        vocabulary=vocabulary,
        layers=getattr(described, "num_hidden_layers", 1),
    )


def _states(tower: TextTower, texts: int, length: int) -> torch.Tensor:
    """Forward of a packed row of equally long texts."""
    row = torch.zeros(texts * length, dtype=torch.int64, device=next(tower.parameters()).device)
    return tower.states(row, row, Segments.of(np.arange(0, texts * length + 1, length, dtype=np.int32)))


def picture_training_work(config: Config) -> Work:
    """The work of an image start, whose trained side are pictures; UserError without an image tower."""
    tower = config.model.image_tower
    if tower is None:
        raise UserError("model.image_tower: not set; training.tower=image trains it")
    pair = _picture_work(config).forward
    return Work(
        token=0, masked=0, pair=pair, picture=0, kept_by_token=0, kept_by_pair=0, kept_once=0, parameters=0,
        vocabulary=0, layers=1,
    )  # fmt: skip


def operations(
    config: Config,
    work: Work,
    settings: Settings,
    pairs: float,
    caption_tokens: float,
    text_tokens: float,
    masked: float,
) -> dict[str, float]:
    """Operations by part of training on `pairs` with this many tokens of captions, unpaired texts, masked positions."""
    training, D = config.training, config.model.width
    forward = caption_tokens * work.token + pairs * work.pair
    local = training.batch_size // settings.world_size
    again = training.tokens_per_micro_batch is not None or (training.micro_batch_size or local) < local
    both, objective = training.tower == "both", config.objective
    if objective.momentum:
        # Each side apart, against rows that are given.
        products = 2 * 3 * (training.batch_size + objective.bank_size)
    else:
        products = (3 + both) * training.batch_size + 3 * min(objective.bank_size, settings.images)
    trained = "captions and pictures" if both else "captions"
    flop = {
        trained: 3 * forward,
        f"{trained} once more, to accumulate": forward * again,
        "momentum copies": forward * bool(objective.momentum),
        "unpaired texts": 3 * (text_tokens * work.token + masked * work.masked),
        "contrastive loss": pairs * 2.0 * D * products * (objective.contrastive_weight > 0),
        "scoring copy": caption_tokens * work.token * (config.confidence.score == "snapshot"),
    }
    return _positive(flop)


@dataclass(frozen=True)
class _PictureWork:
    """Operations of a picture forward, the bytes it leaves for backward, and the tower's parameters."""

    forward: float = 0
    kept: float = 0
    parameters: int = 0


def _picture_work(config: Config, dtype: torch.dtype = torch.float32, *, training: bool = False) -> _PictureWork:
    tower = config.model.image_tower
    if tower is None:
        return _PictureWork()
    described = _described("model.image_tower", tower)
    with torch.device("meta"):
        image = ImageTower(described, config.model.width).train(training).to(dtype)
        pixels = torch.zeros(2, 3, tower.size, tower.size, dtype=dtype)
    forward, kept = _counted(image, lambda: image(pixels))
    return _PictureWork(forward / 2, kept / 2, sum(p.numel() for p in image.parameters()))


def _described(field: str, tower: Tower) -> PreTrainedConfig:
    if tower.architecture is not None:
        return architecture(tower.architecture)
    name = str(tower.pretrained)
    own = Path(name) / "model" / "config.json"
    if own.is_file():
        side = "text" if field.endswith("text_tower") else "image"
        return architecture(json.loads(own.read_text())[side])
    try:
        described: PreTrainedConfig = AutoConfig.from_pretrained(name, revision=tower.revision)
    except (OSError, ValueError) as error:
        raise UserError(f"{field}.pretrained: no config of {name!r} in reach ({error}); give a folder") from error
    return described


def _counted(module: torch.nn.Module, run: Callable[[], Any]) -> tuple[float, float]:
    """Operations of `run`, and the bytes it keeps for backward beside the module's parameters."""
    owned = {tensor.untyped_storage()._cdata for tensor in (*module.parameters(), *module.buffers())}
    # The tensors are held, so that no storage's address is given twice.
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage()._cdata not in owned:
            kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with FlopCounterMode(display=False) as counter, saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    return counter.get_total_flops(), sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@dataclass(frozen=True)
class Plan:
    """What `plan` answers: operations and bytes by part; seconds follow from a share of the device's peak."""

    settings: Settings
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
        return {f"at {share:.0%} of peak": share * self.settings.device.peak for share in SHARES}

    def days(self, rate: float, *, preparing: bool = True) -> float:
        """Wall-clock days at `rate` operations a second of each device, with `preparing` the store or without."""
        flop = sum(value for name, value in self.flop.items() if preparing or name != PICTURES)
        return (flop / rate / self.settings.world_size + sum(self.seconds.values())) / DAY


def plan(config: Config, settings: Settings) -> Plan:
    """Cost of `config` on the machine of `settings`."""
    made = _counted_plan(config, settings)
    if settings.profile is not None:
        profile = settings.profile
        surplus = max(0.0, profile.peak_bytes - _counted_for(profile))
        made.memory.update(_positive({"beyond the count, as measured": surplus}))
    return made


def _counted_for(profile: Profile) -> float:
    """Bytes that the model counts of what `profile` measured the peak of."""
    # torch's allocator does not see CUDA's context.
    beyond = 0 if profile.base_bytes else CONTEXT_BYTES
    return sum(_counted_plan(profile.settings, settings_of(profile)).memory.values()) - beyond


def _counted_plan(config: Config, settings: Settings) -> Plan:
    """The plan by counting alone."""
    training, device, W = config.training, settings.device, settings.world_size
    precision = _precision(config)
    zero, narrow = precision.zero, precision.narrow
    autocast = precision.autocast
    if settings.profile is not None:
        autocast = getattr(torch, settings.profile.autocast) if settings.profile.autocast else None
    work = measure_work(config, settings.caption_tokens, torch.bfloat16 if narrow else torch.float32, autocast)
    N, Q, D = training.batch_size, config.objective.bank_size, config.model.width
    visits, steps = training.pair_visits, -(-training.pair_visits // training.batch_size)
    texts = config.mlm.texts_per_batch / N
    masked = texts * settings.text_tokens * config.mlm.mask_share
    captions, unpaired = visits * settings.caption_tokens, visits * texts * settings.text_tokens
    counted = operations(config, work, settings, visits, captions, unpaired, visits * masked)
    flop = {PICTURES: settings.images * work.picture, **counted}
    P, width = work.parameters, 2 if narrow else 4
    if settings.profile is None:
        reduced = 2 * (W - 1) / W * P * width / device.link
        updated = P * (16 + 12 * narrow) / (W if zero else 1) / device.bandwidth
        seconds = {"gradients between devices": steps * reduced, "optimiser": steps * updated}
    else:
        seconds = _measured_seconds(config, settings, settings.profile, steps, P * width, zero)
    M = N / W
    together = min(training.micro_batch_size or M, M)
    tokens = min(together * settings.caption_tokens, training.tokens_per_micro_batch or np.inf)
    tokens += M * texts * settings.text_tokens
    sharded = {stage: W if zero >= stage else 1 for stage in (1, 2, 3)}
    on_cpu = settings.profile is not None and settings.profile.base_bytes > 0
    # Where both towers train, pictures and captions are read from their tars.
    storage = {}
    if training.tower == "text":
        token_bytes = 2 if work.vocabulary <= 1 << 16 else 4
        storage = {
            "features": settings.images * D * 2,
            "tokens and offsets": settings.pairs * (settings.caption_tokens * token_bytes + 8),
        }
    kept = tokens * work.kept_by_token + together * work.kept_by_pair
    momentum = config.objective.momentum > 0
    memory = {
        "weights": P * width / sharded[3],
        "master weights": 4 * P * narrow / sharded[1] * (not precision.offloaded),
        "gradients": P * width / sharded[2],
        "gradients under way": min(P, precision.bucket) * width * (W > 1),
        "optimiser": 8 * P / sharded[1] * (not precision.offloaded),
        "activations": kept + work.kept_once,
        # Backward holds them for a layer at a time.
        "gradients of activations": kept / work.layers,
        "vocabulary logits": M * masked * work.vocabulary * 10,
        "features of the batch": (N + 2 * M) * D * 4,
        "scoring copy": P * width * (config.confidence.score == "snapshot"),
        "momentum copies": P * width * momentum,
        # The rows that a batch may see are a copy; so are the momentum copies' two queues.
        "bank": 2 * (2 * Q if momentum else min(Q, settings.images)) * D * 4,
        "loss workspace": M * D * 4 + 100 * 2**20,
        # Mapped files count to a process's resident set; a device never sees them.
        "store, mapped": sum(storage.values()) * on_cpu,
        "context": settings.profile.base_bytes if settings.profile is not None and on_cpu else CONTEXT_BYTES,
    }
    return Plan(settings, visits, steps, _positive(flop), _positive(seconds), _positive(memory), storage)


def _measured_seconds(
    config: Config, settings: Settings, profile: Profile, steps: int, gradient_bytes: float, zero: int
) -> dict[str, float]:
    """Seconds by part over the run: of `steps` steps, and of what happens once or now and then."""
    W, measured_on, parts = settings.world_size, profile.world_size, profile.parts
    # What each pair costs in the loader, for ECL and in Python grows with the batch.
    batches = config.training.pair_visits / profile.pairs_per_step
    validations, checkpoints = _pauses(config, settings.pairs, steps)
    if measured_on > 1:
        communication = parts["communication"] * ((W - 1) / W) / ((measured_on - 1) / measured_on)
    else:
        communication = 2 * (W - 1) / W * gradient_bytes / settings.device.link if W > 1 else parts["communication"]
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


def _pauses(config: Config, pairs: int, steps: int) -> tuple[int, int]:
    """Validations of a run of `steps` steps, and checkpoints, if every validation is the best so far."""
    training, ecl, N = config.training, config.confidence, config.training.batch_size
    kept, epoch, drops, step = round(pairs * (1 - _judged_wrong(config))), 0, 0, 0
    validated = {steps}
    while True:
        auditions = min(round(N * ecl.reaudition_share), pairs - kept)
        length = kept // (N - auditions)
        if length == 0 or step + length >= steps:
            break
        step += length
        if (epoch + 1) % training.validate_every == 0:
            validated.add(step)
        # How much a mixture drops, the scores alone tell.
        drop = ecl.selection == "published" or (ecl.selection == "schedule" and drops < ecl.drops)
        if drop and epoch >= ecl.warmup_epochs:
            kept, drops = round(kept * (1 - ecl.drop_share)), drops + 1
        epoch += 1
    saved = validated if config.data.validation else {steps}
    saved = saved | set(range(training.checkpoint_every, steps + 1, training.checkpoint_every))
    return len(validated) * bool(config.data.validation), len(saved)


def _judged_wrong(config: Config) -> float:
    """The share that a calibrated run drops from its start; 0 before `efficientclip cross-fit` has told."""
    folder = config.confidence.cross_fit
    if config.confidence.selection != "calibrated" or folder is None:
        return 0.0
    return read_rate(folder) or 0.0


def _positive(parts: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in parts.items() if value}


@dataclass(frozen=True)
class _Precision:
    """What the DeepSpeed JSON says of memory: weights of 16 bits, autocast, the optimiser on the host."""

    zero: int
    narrow: bool
    autocast: torch.dtype | None
    offloaded: bool
    bucket: float
    """Elements of gradients in copies under way between devices."""


def _precision(config: Config) -> _Precision:
    given = json.loads(config.deepspeed.read_text()) if config.deepspeed is not None else {}
    zero, cast = given.get("zero_optimization", {}), given.get("torch_autocast", {})
    stage = zero.get("stage", 0)
    bucket = zero.get("reduce_bucket_size", BUCKET)
    return _Precision(
        zero=stage,
        narrow=any(given.get(kind, {}).get("enabled", False) for kind in ("bf16", "fp16")),
        autocast=getattr(torch, cast.get("dtype", "bfloat16")) if cast.get("enabled", False) else None,
        offloaded="offload_optimizer" in zero,
        bucket=float(bucket) * (2 if stage and zero.get("overlap_comm", False) else 1),
    )


def advice(made: Plan, config: Config) -> list[str]:
    """Does it fit, what is the bottleneck, what to change."""
    device, need = made.settings.device, sum(made.memory.values())
    notes = []
    if need > device.memory:
        largest = max(made.memory, key=lambda name: made.memory[name])
        remedy = {
            "activations": "lower training.micro_batch_size (the numbers stay the same)",
            "bank": "lower objective.bank_size",
            "features of the batch": "set objective.exchange: ring, or lower training.batch_size",
            "vocabulary logits": "lower mlm.texts_per_batch",
        }.get(largest, "raise ZeRO's stage in the DeepSpeed JSON, or offload the optimiser")
        notes.append(f"does not fit: {need / GIB:.1f} of {device.memory / GIB:.0f} GiB; most is {largest}: {remedy}")
    else:
        notes.append(f"fits: {need / GIB:.1f} of {device.memory / GIB:.0f} GiB on each device")
    label, rate = list(made.rates.items())[-1]
    parts = {name: value / rate / made.settings.world_size for name, value in made.flop.items()} | made.seconds
    slowest = max(parts, key=lambda name: parts[name])
    notes.append(f"most time {label}: {slowest}, {parts[slowest] / sum(parts.values()):.0%}")
    if slowest in ("gradients between devices", "communication"):
        notes.append("a larger training.batch_size exchanges gradients less often")
    training = sum(value for name, value in parts.items() if name != PICTURES)
    notes.append(f"the loader must give {made.visits / training:,.0f} pairs a second, over all devices")
    if PICTURES in parts:
        pictures = made.settings.images / parts[PICTURES]
        notes.append(f"the tower takes {pictures:,.0f} pictures a second, over all devices")
    if made.settings.profile is not None:
        notes += _profiled(made, config, made.settings.profile)
    if config.confidence.selection == "calibrated":
        share = config.confidence.cross_fit_share
        notes.append(f"cross-fit comes before: two towers, {share:.0%} of the visits in all, of captions alone")
    if config.model.start_from is not None:
        notes.append(f"the start, {config.model.start_from}, is a run of its own: plan it too")
    return notes


def _profiled(made: Plan, config: Config, profile: Profile) -> list[str]:
    """What the profile measured, and how far it is from the plan."""
    whole = profile.step_seconds
    notes = [
        f"measured: {profile.parts['data wait'] / whole:.1%} of a step waits for data,"
        f" {profile.parts['communication'] / whole:.1%} for other ranks",
        f"measured: {short(profile.flop_per_second)}FLOP/s of each device,"
        f" {short(profile.flop_per_second_computing)}FLOP/s while it computes",
    ]
    peak, counted = profile.peak_bytes / GIB, _counted_for(profile) / GIB
    notes.append(
        f"measured: {peak:.2f} GiB at most in the profile, {counted:.2f} counted for it; what it held beyond is added"
    )
    free = ("run", "training.pair_visits", "training.validate_every", "training.checkpoint_every", "data.store")
    changed = [key for key in differing_keys(profile.settings, config) if key not in free]
    if changed:
        notes.append(f"the profile was of another config: {', '.join(changed[:5])} differ; its rates may not hold")
    return notes


def plan_tables(made: Plan) -> list[Table]:
    """Time, memory and storage as tables."""
    W, device = made.settings.world_size, made.settings.device
    rates = made.rates
    time = Table("", "operations", *rates, title=f"time on {W} x {device.name}")
    for name, flop in made.flop.items():
        time.add_row(name, f"{flop:.2e}", *(_span(flop / rate / W) for rate in rates.values()))
    for name, seconds in made.seconds.items():
        time.add_row(name, "", *(_span(seconds) for _ in rates))
    if PICTURES in made.flop:
        alone = [made.days(rate, preparing=False) for rate in rates.values()]
        time.add_row("training", "", *(_span(days * DAY) for days in alone), style="bold")
    days = [made.days(rate) for rate in rates.values()]
    time.add_row("in all", f"{sum(made.flop.values()):.2e}", *(_span(day * DAY) for day in days), style="bold")
    time.add_row(
        "device-days" if made.settings.profile else "GPU-days", "", *(f"{day * W:.2f}" for day in days), style="bold"
    )
    memory = Table("", "GiB", title="memory of each device")
    for name, size in made.memory.items():
        memory.add_row(name, f"{size / GIB:.2f}")
    memory.add_row("in all", f"{sum(made.memory.values()) / GIB:.2f}", style="bold")
    storage = Table("", "GiB", title="store")
    for name, size in made.storage.items():
        storage.add_row(name, f"{size / GIB:.1f}")
    return [time, memory, *([storage] if made.storage else [])]


def _span(seconds: float) -> str:
    for size, unit in ((DAY, "days"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"


def short(value: float) -> str:
    """A large number with the sign of its power: 1.23 T."""
    for size, sign in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= size:
            return f"{value / size:.3g} {sign}"
    return f"{value:.3g} "


def assumptions(settings: Settings, config: Config) -> Sequence[str]:
    """What the figures rest on."""
    device, profile = settings.device, settings.profile
    data = (
        f"{settings.pairs:,} pairs on {settings.images:,} pictures; captions of {settings.caption_tokens:.1f} tokens,"
        f" unpaired texts of {settings.text_tokens:.1f}, no padding computed"
    )
    if profile is None:
        return (
            data,
            f"{device.name}: {device.peak / 1e12:.0f} TFLOP/s dense bf16, {device.memory / GIB:.0f} GiB,"
            f" {device.bandwidth / 1e12:.2f} TB/s, {device.link / 1e9:.0f} GB/s to its neighbours, by the data sheet",
            "gradients are exchanged without overlap; data, validation and checkpoints cost no time",
        )
    resident = ("malloc gives nothing back between steps: the resident set grows a little after those of the profile",)
    unknown = ("as if no pair were dropped: what the selection drops is not known before",)
    judged = config.confidence.selection == "calibrated" and _judged_wrong(config) == 0
    return (
        data,
        f"rates and seconds as on {profile.world_size} rank(s) of {profile.hardware.get('machine', profile.device)},"
        f" {profile.steps_measured} steps of {profile.config}",
        "every validation is the best so far, and so saves a checkpoint; pictures run at the text tower's rate",
        *(resident if profile.base_bytes else ()),
        *(unknown if judged or config.confidence.selection == "mixture" else ()),
    )
