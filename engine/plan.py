"""`efficientclip plan`: what a run will cost before it is paid for: time, memory by part, storage, and what limits it.

The cost model. Work is counted on the towers themselves, built without memory on the meta device:

- a trained token costs three forwards (backward is two of them); forward is counted operator by operator on a packed
  row of texts of the mean length, so attention is in it;
- a masked position adds the vocabulary head; a pair adds its projection and the loss, 6 D (N + Q) operations for a
  batch of N and a bank of Q: three products, of which one is the recompute, since images are frozen;
- activations are the bytes that autograd keeps of that row, without parameters, for each token of a micro-batch;
- a step reduces every gradient over the ranks in a ring, 2 (W - 1) / W of its bytes, not overlapped with compute;
  AdamW moves 16 bytes a parameter, master weights 12 more;
- the image tower encodes every picture once.

A device yields `share` of its dense bf16 peak; 0.4 is what well-tuned training of towers this size reaches, 0.1 what an
untuned one does: all are shown.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, PreTrainedConfig

from .config import Config, Tower
from .data.batches import Segments
from .data.store import read_manifest
from .errors import UserError
from .model.towers import ImageTower, TextTower, architecture

GIB, DAY = 2**30, 86_400
SHARES = (0.1, 0.2, 0.4)
# What CUDA's context and the allocator's rounding take of a device.
CONTEXT_BYTES = 1 << 30


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
    """Those of a caption's projection, forward."""
    picture: float
    """Those of one picture through the frozen tower; 0 without one."""
    kept_by_token: float
    """Bytes of activations a token leaves for backward, of the dtype that the forward runs in."""
    parameters: int
    vocabulary: int


@dataclass(frozen=True)
class Settings:
    """What the config leaves open: the data's size and the machine."""

    pairs: int
    images: int
    caption_tokens: float
    text_tokens: float
    device: Device
    world_size: int


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


def measure_work(config: Config, caption_tokens: float, dtype: torch.dtype) -> Work:
    """Count the towers' work on the meta device: nothing is downloaded but their configs, no weight is held."""
    if config.model.text_tower is None:
        raise UserError("model.text_tower: not set; a plan is made for a run that trains a text tower")
    described = _described("model.text_tower", config.model.text_tower)
    if config.data.store is not None and (config.data.store / "manifest.json").is_file():
        described.vocab_size = max(described.vocab_size, read_manifest(config.data.store)["vocabulary"])
    with torch.device("meta"):
        text = TextTower(described, config.model.width, "cls").to(dtype)
    length, texts = max(3, round(caption_tokens)), 16
    row = torch.zeros(texts * length, dtype=torch.int64, device="meta")
    segments = Segments.of(np.arange(0, texts * length + 1, length, dtype=np.int32))
    forward, kept = _counted(text, lambda: text.states(row, row, segments))
    hidden, vocabulary = described.hidden_size, described.vocab_size
    return Work(
        token=forward / len(row),
        masked=2.0 * hidden * (hidden + vocabulary),
        pair=2.0 * hidden * config.model.width,
        picture=_picture_work(config),
        kept_by_token=kept / len(row),
        parameters=sum(p.numel() for p in text.parameters()),
        vocabulary=vocabulary,
    )


def _picture_work(config: Config) -> float:
    tower = config.model.image_tower
    if tower is None:
        return 0.0
    described = _described("model.image_tower", tower)
    with torch.device("meta"):
        image = ImageTower(described, config.model.width)
        pixels = torch.zeros(1, 3, tower.size, tower.size)
    return _counted(image, lambda: image(pixels))[0]


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


def _counted(module: torch.nn.Module, run: Any) -> tuple[float, float]:
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
    """Those that no share of the peak changes: memory and links, over the whole run."""
    memory: dict[str, float]
    storage: dict[str, float]

    def days(self, share: float) -> float:
        """Wall-clock days on all devices together."""
        rate = share * self.settings.device.peak * self.settings.world_size
        return (sum(self.flop.values()) / rate + sum(self.seconds.values())) / DAY


def plan(config: Config, settings: Settings) -> Plan:
    """Cost of `config` on the machine of `settings`."""
    training, device, W = config.training, settings.device, settings.world_size
    zero, narrow, offloaded = _precision(config)
    work = measure_work(config, settings.caption_tokens, torch.bfloat16 if narrow else torch.float32)
    N, Q, D = training.batch_size, config.objective.bank_size, config.model.width
    visits, steps = training.pair_visits, -(-training.pair_visits // training.batch_size)
    texts = config.mlm.texts_per_batch / N
    masked = texts * settings.text_tokens * config.mlm.mask_share
    scoring = visits * settings.caption_tokens * work.token if config.confidence.score == "snapshot" else 0.0
    flop = {
        "pictures through the frozen tower": settings.images * work.picture,
        "captions": 3 * visits * (settings.caption_tokens * work.token + work.pair),
        "unpaired texts": 3 * visits * (texts * settings.text_tokens * work.token + masked * work.masked),
        "contrastive loss": visits * 6.0 * D * (N + Q),
        "scoring copy": scoring,
    }
    P, width = work.parameters, 2 if narrow else 4
    reduced = 2 * (W - 1) / W * P * width / device.link
    updated = P * (16 + 12 * narrow) / (W if zero else 1) / device.bandwidth
    seconds = {"gradients between devices": steps * reduced, "optimiser": steps * updated}
    M = N / W
    together = min(training.micro_batch_size or M, M)
    tokens = together * settings.caption_tokens + M * texts * settings.text_tokens
    sharded = {stage: W if zero >= stage else 1 for stage in (1, 2, 3)}
    memory = {
        "weights": P * width / sharded[3],
        "master weights": 4 * P * narrow / sharded[1] * (not offloaded),
        "gradients": P * width / sharded[2],
        "optimiser": 8 * P / sharded[1] * (not offloaded),
        "activations": tokens * work.kept_by_token,
        "vocabulary logits": M * masked * work.vocabulary * 10,
        "features of the batch": (N + 2 * M) * D * 4,
        "bank": Q * D * 4,
        "loss workspace": M * D * 4 + 100 * 2**20,
        "context": CONTEXT_BYTES,
    }
    captions = settings.pairs * settings.caption_tokens * (2 if work.vocabulary <= 1 << 16 else 4)
    storage = {"features": settings.images * D * 2, "tokens and offsets": captions + settings.pairs * 8}
    return Plan(settings, visits, steps, _positive(flop), _positive(seconds), _positive(memory), storage)


def _positive(parts: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in parts.items() if value}


def _precision(config: Config) -> tuple[int, bool, bool]:
    """ZeRO's stage, whether weights are 16 bits wide, and whether the optimiser lives on the host."""
    given = json.loads(config.deepspeed.read_text()) if config.deepspeed is not None else {}
    zero = given.get("zero_optimization", {})
    narrow = any(given.get(kind, {}).get("enabled", False) for kind in ("bf16", "fp16"))
    return zero.get("stage", 0), narrow, "offload_optimizer" in zero


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
    rate = SHARES[-1] * device.peak * made.settings.world_size
    parts = {name: value / rate for name, value in made.flop.items()} | made.seconds
    slowest = max(parts, key=lambda name: parts[name])
    notes.append(f"most time at {SHARES[-1]:.0%} of peak: {slowest}, {parts[slowest] / sum(parts.values()):.0%}")
    if slowest == "gradients between devices":
        notes.append("a larger training.batch_size exchanges gradients less often")
    training = sum(value for name, value in parts.items() if not name.startswith("pictures"))
    notes.append(f"the loader must give {made.visits / training:,.0f} pairs a second, over all devices")
    pictures = parts.get("pictures through the frozen tower", 0.0)
    if pictures:
        notes.append(f"the tower takes {made.settings.images / pictures:,.0f} pictures a second, over all devices")
    if config.model.start_from is not None:
        notes.append(f"the start, {config.model.start_from}, is a run of its own: plan it too")
    return notes


def plan_tables(made: Plan) -> list[Table]:
    """Time, memory and storage as tables."""
    W, device = made.settings.world_size, made.settings.device
    time = Table(
        "", "operations", *(f"at {share:.0%} of peak" for share in SHARES), title=f"time on {W} x {device.name}"
    )
    for name, flop in made.flop.items():
        time.add_row(name, f"{flop:.2e}", *(_span(flop / (share * device.peak * W)) for share in SHARES))
    for name, seconds in made.seconds.items():
        time.add_row(name, "", *(_span(seconds) for _ in SHARES))
    days = [made.days(share) for share in SHARES]
    time.add_row("in all", f"{sum(made.flop.values()):.2e}", *(_span(day * DAY) for day in days), style="bold")
    time.add_row("GPU-days", "", *(f"{day * W:.2f}" for day in days), style="bold")
    memory = Table("", "GiB", title="memory of each device")
    for name, size in made.memory.items():
        memory.add_row(name, f"{size / GIB:.2f}")
    memory.add_row("in all", f"{sum(made.memory.values()) / GIB:.2f}", style="bold")
    storage = Table("", "GiB", title="store")
    for name, size in made.storage.items():
        storage.add_row(name, f"{size / GIB:.1f}")
    return [time, memory, storage]


def _span(seconds: float) -> str:
    for size, unit in ((DAY, "days"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def assumptions(settings: Settings) -> Sequence[str]:
    """What the figures rest on."""
    device = settings.device
    return (
        f"{settings.pairs:,} pairs on {settings.images:,} pictures; captions of {settings.caption_tokens:.1f} tokens,"
        f" unpaired texts of {settings.text_tokens:.1f}, no padding computed",
        f"{device.name}: {device.peak / 1e12:.0f} TFLOP/s dense bf16, {device.memory / GIB:.0f} GiB,"
        f" {device.bandwidth / 1e12:.2f} TB/s, {device.link / 1e9:.0f} GB/s to its neighbours, by the data sheet",
        "gradients are exchanged without overlap; data, validation and checkpoints cost no time",
    )
