"""What a config leaves open: the size of the data and the machine, by its data sheet or as a profile measured it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..errors import UserError
from .measured import Profile

GIB = 2**30


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
class Settings:
    """What the config leaves open: the data's size and the machine, by its data sheet or as a profile measured it."""

    pairs: int
    images: int
    caption_tokens: float
    text_tokens: float
    device: Device
    world_size: int
    profile: Profile | None = None

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
