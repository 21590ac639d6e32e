"""The user's DeepSpeed JSON: which keys it may hold, and what of ZeRO checkpoints can hold."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from pydantic import ValidationError

from ..config import Config
from ..errors import UserError

# What the YAML decides; DeepSpeed's JSON owns ZeRO, communication and offload.
OWNED = {
    "train_batch_size": "training.batch_size",
    "train_micro_batch_size_per_gpu": "training.micro_batch_size",
    "gradient_accumulation_steps": "training.micro_batch_size",
    "gradient_clipping": "optimizer.clip",
    "optimizer": "optimizer",
    "scheduler": "optimizer",
    "steps_per_print": "training.log_every",
    # Autocast over fp32 weights: DeepSpeed's engine modes round the weights themselves, or have no fp32 averages.
    **dict.fromkeys(("bf16", "fp16", "torch_autocast", "amp", "bfloat16"), "training.precision"),
}


def deepspeed_digest(config: Config) -> str:
    """Equal for configs whose DeepSpeed JSON says the same."""
    return hashlib.sha256(json.dumps(_users_json(config), sort_keys=True).encode()).hexdigest()


def _users_json(config: Config) -> dict[str, Any]:
    if config.deepspeed is None:
        return {}
    if not config.deepspeed.is_file():
        raise UserError(
            f"deepspeed: {config.deepspeed} is missing; `efficientclip recipes deepspeed/zero2.json FILE` writes one"
        )
    try:
        user = json.loads(config.deepspeed.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"deepspeed: {config.deepspeed} is not JSON: {error}") from error
    if not isinstance(user, dict):
        raise UserError(f"deepspeed: {config.deepspeed} holds a {type(user).__name__}, not an object of keys")
    return user


def zero_settings(config: Config) -> DeepSpeedZeroConfig:
    """`zero_optimization` by DeepSpeed's own model; UserError naming a key that it does not take."""
    given = _users_json(config).get("zero_optimization", {})
    if not isinstance(given, dict):
        raise UserError(
            f"deepspeed: {config.deepspeed}: zero_optimization is {json.dumps(given)}; give an object, or remove it"
        )
    try:
        return DeepSpeedZeroConfig(**given)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in ("zero_optimization", *first["loc"]))
        raise UserError(f"deepspeed: {config.deepspeed}: {key}: {first['msg']}; change or remove it there") from error


def _check_checkpoints(config: Config, zero: DeepSpeedZeroConfig) -> None:
    """UserError at what checkpoints cannot hold, or would keep an overflow from being seen."""
    offload = zero.offload_optimizer
    refused = {
        "round_robin_gradients": (zero.round_robin_gradients, "moments would lie in another order"),
        "compute_grad_norm": (not zero.compute_grad_norm, "steps that are not finite would pass"),
        "offload_optimizer.device": (offload and offload.device == "nvme", "moments on NVMe are in no checkpoint"),
        "offload_optimizer.ratio": (offload and offload.ratio != 1.0, "a part of the moments is in no checkpoint"),
    }
    for key, (given, why) in refused.items():
        if given:
            raise UserError(f"deepspeed: {config.deepspeed} sets zero_optimization.{key}: {why}; remove it there")


def deepspeed_config(config: Config, world_size: int) -> dict[str, Any]:
    """The user's DeepSpeed JSON with the keys that the YAML owns."""
    user, zero = _users_json(config), zero_settings(config)
    for key in user.keys() & OWNED.keys():
        raise UserError(
            f"deepspeed: {config.deepspeed} sets {key}, which {OWNED[key]} of the YAML owns; remove it there"
        )
    _check_checkpoints(config, zero)
    if config.training.batch_size % world_size:
        fitting = config.training.batch_size // world_size * world_size
        raise UserError(
            f"training.batch_size: {config.training.batch_size} pairs cannot be divided by {world_size} ranks;"
            f" choose a multiple, for instance {max(fitting, world_size)}"
        )
    local = config.training.batch_size // world_size
    micro = config.training.micro_batch_size or local
    if local % micro:
        raise UserError(f"training.micro_batch_size: {micro} does not divide the {local} pairs of a rank")
    return {
        **user,
        "train_micro_batch_size_per_gpu": micro,
        # With a token budget the number differs from step to step: the trainer marks the last micro-batch. DeepSpeed
        # must know only that gradients accumulate.
        "gradient_accumulation_steps": 2 if config.training.tokens_per_micro_batch else local // micro,
        # Without ZeRO the trainer clips, by the norm that it takes anyway.
        "gradient_clipping": config.optimizer.clip if zero.stage else 0.0,
        "steps_per_print": 2**31,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
