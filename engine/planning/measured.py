"""What `efficientclip profile` measured, as its JSON file holds it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, ValidationError

from ..config import Config, Section
from ..errors import UserError

# The parts of a step: those that do the counted operations, and all; and what happens once or now and then.
COMPUTED = ("forward", "loss", "backward")
PARTS = ("data wait", *COMPUTED, "communication", "optimiser", "confidence", "other")
ONCE = ("validation", "checkpoint", "end")


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
    autocast: Literal["bfloat16", "float16"] | None = Field(description="what it ran in, whatever the config asks for")
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
