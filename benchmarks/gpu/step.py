"""One training step by part, as DeepSpeed runs it: BERT-base on packed captions, the loss with a bank, the update."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.lab import Lab
from efficientclip.kernels import contrastive_loss

NEEDED = ("deepspeed", "omegaconf", "transformers")
PAIRS, BANK, TOKENS, VOCABULARY = 4096, 100_000, 20, 21_128
WARM_UP, STEPS = 2, 5
FROZEN = torch.float16


def captions(lab: Lab, pairs: int) -> dict[str, Any]:
    """Packed captions of 20 tokens on average."""
    from efficientclip.data.batches import Segments

    random = np.random.default_rng(0)
    lengths = np.sort(np.clip(random.poisson(TOKENS, pairs), 3, 77))
    bounds = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    device = torch.device(lab.device.type)
    return {
        "input_ids": torch.from_numpy(random.integers(5, VOCABULARY, bounds[-1])).to(device),
        "position_ids": torch.from_numpy(np.concatenate([np.arange(n) for n in lengths])).to(device),
        "segments": Segments.of(bounds).to(device),
        "texts": torch.arange(pairs, device=device),
    }


def engine(lab: Lab) -> Any:
    if find_spec("efficientclip._loader") is None:
        # The tower's modules name the C++ loader, and call nothing of it.
        sys.modules["efficientclip._loader"] = ModuleType("efficientclip._loader")
    import deepspeed

    from efficientclip.config import Model, TextTower
    from efficientclip.model.efficientclip import build_model
    from efficientclip.training.distributed import join_process_group

    join_process_group()
    architecture = {"model_type": "bert", **lab.device.tower}
    tower = TextTower.model_validate({"architecture": architecture})
    model: Any = build_model(
        Model(width=lab.device.width, text_tower=tower), seed=0, vocabulary=VOCABULARY, sides=("text",)
    )
    torch.nn.Module.to(model, torch.device(lab.device.type))
    model.compute = torch.bfloat16
    settings = {
        "train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 1}, "zero_allow_untested_optimizer": True,
        "gradient_clipping": 1.0,
    }  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]


def run(lab: Lab) -> None:
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        lab.note("training step", verdict="skipped", note=f"{missing[0]} is not here")
        return
    pairs = lab.device.size(PAIRS)
    trained, inputs = engine(lab), captions(lab, pairs)
    image, bank = lab.device.unit(pairs, FROZEN), lab.device.unit(lab.device.size(BANK), FROZEN, seed=1)
    rows = torch.arange(0, pairs, 10, device=image.device)
    excluded = rows, (7 * rows + 3) % (pairs + len(bank))
    spent: dict[str, list[float]] = {}

    def part(name: str, call: Callable[[], Any]) -> Any:
        lab.device.wait()
        begin = time.perf_counter()
        found = call()
        lab.device.wait()
        spent.setdefault(name, []).append(time.perf_counter() - begin)
        return found

    def one_step() -> None:
        output = part("tower forward", lambda: trained(**inputs))
        text = output["features"].float()
        leaf, scale = text.detach().requires_grad_(), output["logit_scale"].detach().requires_grad_()
        loss = part(
            "loss forward",
            lambda: contrastive_loss(leaf, image, bank, logit_scale=scale, excluded=excluded).loss,
        )
        part("loss backward", loss.backward)
        surrogate = (text * leaf.grad).sum() + (output["logit_scale"] * scale.grad).sum()
        part("tower backward", lambda: trained.backward(surrogate))
        part("update", trained.step)

    for _ in range(WARM_UP + STEPS):
        one_step()
    whole = 0.0
    for name, seconds in spent.items():
        median = float(np.median(seconds[WARM_UP:]))
        whole += median
        lab.note(f"training step: {name}", median)
    lab.note("training step: whole", whole, figure=f"{pairs / whole:.0f}", unit="pairs/s")
    torch.distributed.destroy_process_group()
