"""What a config leaves open: the size of the data and the machine, by its data sheet or as a profile measured it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ..config import Config
from ..data.store import Store, TextStore
from ..errors import UserError
from .measured import Profile

GIB = 2**30


@dataclass(frozen=True)
class Device:
    """Dense operations a second in bf16 or fp16, and in fp32; bytes of memory, and bytes a second: to it, to the other
    devices of a node, to those of other nodes, to the host."""

    name: str
    peak: float
    peak_fp32: float
    memory: float
    bandwidth: float
    link: float
    network: float
    host: float

    def peak_in(self, precision: str) -> float:
        """Operations a second by `training.precision`; torch does not round fp32 products to TF32 unless told to."""
        return self.peak_fp32 if precision == "fp32" else self.peak


# From the makers' data sheets: SXM modules with NVLink, a network card a device as in their own nodes, PCIe to the
# host; links count one direction. Cards without NVLink exchange over PCIe, and eight share a network card of 25 GB/s.
PCIE_4, SHARED_CARD = 32e9, 25e9 / 8
DEVICES = {
    device.name.lower(): device
    for device in (
        Device("A100", 312e12, 19.5e12, 80 * GIB, 2.04e12, 300e9, 25e9, PCIE_4),
        Device("H100", 989e12, 67e12, 80 * GIB, 3.35e12, 450e9, 50e9, 64e9),
        Device("H200", 989e12, 67e12, 141 * GIB, 4.8e12, 450e9, 50e9, 64e9),
        Device("B200", 2250e12, 75e12, 180 * GIB, 8.0e12, 900e9, 50e9, 64e9),
        Device("A800", 312e12, 19.5e12, 80 * GIB, 2.04e12, 200e9, 25e9, PCIE_4),
        Device("H800", 989e12, 67e12, 80 * GIB, 3.35e12, 200e9, 50e9, 64e9),
        Device("H20", 148e12, 44e12, 96 * GIB, 4.0e12, 450e9, 50e9, 64e9),
        # Its 16 bits, and T4's, are fp16.
        Device("V100", 125e12, 15.7e12, 32 * GIB, 0.9e12, 150e9, 12.5e9, 16e9),
        Device("T4", 65e12, 8.1e12, 16 * GIB, 0.32e12, 16e9, SHARED_CARD, 16e9),
        Device("L4", 121e12, 30.3e12, 24 * GIB, 0.3e12, PCIE_4, SHARED_CARD, PCIE_4),
        Device("A10", 125e12, 31.2e12, 24 * GIB, 0.6e12, PCIE_4, SHARED_CARD, PCIE_4),
        Device("L40S", 362e12, 91.6e12, 48 * GIB, 0.864e12, PCIE_4, SHARED_CARD, PCIE_4),
        Device("RTX3090", 71e12, 35.6e12, 24 * GIB, 0.936e12, PCIE_4, SHARED_CARD, PCIE_4),
        Device("RTX4090", 165e12, 82.6e12, 24 * GIB, 1.01e12, PCIE_4, SHARED_CARD, PCIE_4),
    )
}
BY_FIGURES = "NAME:TFLOPS16:TFLOPS32:GIB:GBPS"


class Machine(NamedTuple):
    """Devices of one kind: how many in all, on how many nodes."""

    device: Device
    world_size: int
    nodes: int = 1

    def __str__(self) -> str:
        nodes = f"{self.nodes} x " if self.nodes > 1 else ""
        return f"{nodes}{self.world_size // self.nodes} x {self.device.name}"


@dataclass(frozen=True)
class Settings:
    """What the config leaves open: the data's size and the machine, by its data sheet or as a profile measured it."""

    pairs: int
    images: int
    caption_tokens: float
    text_tokens: float
    machine: Machine
    profile: Profile | None = None

    @property
    def device(self) -> Device:
        return self.machine.device

    @property
    def world_size(self) -> int:
        return self.machine.world_size

    @property
    def link(self) -> float:
        """Bytes a second of an exchange over all devices; between nodes all cards of a node take part in it."""
        device, nodes = self.machine.device, self.machine.nodes
        return device.link if nodes == 1 else min(device.link, device.network * self.world_size / nodes)

    @property
    def on_cpu(self) -> bool:
        """Plans without a profile are for GPUs."""
        return self.profile is not None and self.profile.base_bytes > 0


def settings_of(
    profile: Profile | None,
    *,
    pairs: int | None = None,
    images: int | None = None,
    caption_tokens: float | None = None,
    text_tokens: float | None = None,
    machine: Machine | None = None,
) -> Settings:
    """What is given, and else what the profile found."""
    if profile is None:
        if pairs is None or machine is None:
            missing = "--pairs" if pairs is None else "--gpus"
            known = ", or the config a store that is there" if pairs is None else ""
            raise UserError(f"{missing}: needed unless --calibrated-by names a profile{known}")
        return Settings(pairs, images or pairs, caption_tokens or 20, text_tokens or 32, machine)
    if machine is None:
        rate = profile.flop_per_second_computing
        machine = Machine(Device(profile.device, rate, rate, profile.memory_bytes, 0, 0, 0, 0), profile.world_size)
    elif machine.device.name.lower() not in profile.device.lower():
        raise UserError(
            f"--gpus {machine.world_size}x{machine.device.name}: the profile was made on {profile.device}; profile on"
            " the machine to plan for, or leave --gpus out"
        )
    return Settings(
        pairs=pairs or profile.pairs,
        images=images or pairs or profile.images,
        caption_tokens=caption_tokens or profile.caption_tokens,
        text_tokens=text_tokens or profile.text_tokens,
        machine=machine,
        profile=profile,
    )


def stored(config: Config) -> dict[str, Any]:
    """What the stores that `config` names tell, for `settings_of`; nothing of those that are not made yet."""
    found: dict[str, Any] = {}
    if config.data.store is not None and (config.data.store / "manifest.json").is_file():
        store = Store(config.data.store)
        tokens = np.minimum(np.diff(store.offsets), config.training.max_caption_tokens)
        found |= {"pairs": len(store), "images": len(store.features), "caption_tokens": float(tokens.mean())}
    if config.mlm.texts is not None and (config.mlm.texts / "manifest.json").is_file():
        lengths = np.diff(TextStore(config.mlm.texts).offsets)
        found["text_tokens"] = float(np.minimum(lengths, config.data.max_text_tokens).mean())
    return found


def parse_count(text: str) -> int:
    """100M, 2.5B, 30k or a plain number."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([kMB]?)", text)
    if not found:
        raise UserError(f"--pairs {text!r}: write a number, or 30k, 100M or 2.5B")
    return int(float(found[1]) * {"": 1, "k": 10**3, "M": 10**6, "B": 10**9}[found[2]])


def parse_devices(text: str) -> Machine:
    """8xH100: how many of which device; 4x8xH100: on how many nodes; 2xP40:12:12:24:346: BY_FIGURES."""
    figures = r":(\d+(?:\.\d+)?)" * BY_FIGURES.count(":")
    found = re.fullmatch(rf"(?:([1-9]\d*)x)?([1-9]\d*)x([\w-]+)(?:{figures})?", text)
    device = DEVICES.get(found[3].lower()) if found else None
    if found and found[4]:
        half, single, memory, bandwidth = map(float, found.groups()[3:])
        links = PCIE_4, SHARED_CARD, PCIE_4
        device = Device(found[3], half * 1e12, single * 1e12, memory * GIB, bandwidth * 1e9, *links)
    if not found or device is None or not min(device.peak, device.peak_fp32, device.memory, device.bandwidth):
        known = ", ".join(device.name for device in DEVICES.values())
        raise UserError(
            f"--gpus {text!r}: write it as 8xH100, or 4x8xH100 for four nodes; known devices: {known}; another by its"
            f" data sheet, {BY_FIGURES}: dense TFLOP/s in 16 bits and fp32, memory, GB/s to it: 2xP40:12:12:24:346"
        )
    nodes = int(found[1] or 1)
    return Machine(device, nodes * int(found[2]), nodes)
