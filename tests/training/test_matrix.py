"""Every precision with every ZeRO stage and every kind of copy: start, checkpoint, kill -9, resume, validate, end.

| precision        | ZeRO    | copies                     |                              |
|------------------|---------|----------------------------|------------------------------|
| fp32, bf16, fp16 | 0 to 3  | none, snapshot, momentum   | trains                       |
| DeepSpeed's own bf16, fp16, torch_autocast, amp      | refused before a step, by name |
"""

from __future__ import annotations

import json
import math
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from efficientclip.config import load_config
from efficientclip.errors import UserError
from efficientclip.hardware import compute_dtype
from efficientclip.model.efficientclip import load_model
from efficientclip.training.deepspeed_json import deepspeed_config
from efficientclip.training.loss_scale import LEAST, PATIENCE, START, LossScale
from tests import tiny
from tests.training import test_both_towers
from tests.training.launch import metrics, run

WORKER = Path(__file__).with_name("killed.py")
PRECISIONS = ("fp32", "bf16", "fp16")
COPIES: dict[str, dict[str, Any]] = {
    "none": {},
    "snapshot": {"confidence__score": "snapshot"},
    "momentum": test_both_towers.MOMENTUM,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("matrix")
    tiny.pair_store(path / "store", pairs=96, images=40)
    tiny.text_store(path / "texts")
    (path / "train").mkdir()
    test_both_towers.shard(path / "train" / "0.tar", 60, 0)
    test_both_towers.shard(path / "held.tar", 24, 9)
    return path


def described(folder: Path, name: str, stage: int, copies: str, **changes: Any) -> Path:
    """Six steps in two epochs, a checkpoint after each."""
    zero = {"stage": stage} | ({"stage3_param_persistence_threshold": 0} if stage == 3 else {})
    (folder / f"{name}.json").write_text(json.dumps({"zero_optimization": zero}))
    settings = {
        "deepspeed": str(folder / f"{name}.json"),
        "training__checkpoint_every": 3,
        "training__batch_size": 30,
        "training__final": "last",
    }
    settings |= {"training__pair_visits": 180, "training__validate_every": 1, **COPIES[copies], **changes}
    if copies == "momentum":
        return test_both_towers.config(folder, name, **settings)
    return tiny.config(folder, run=str(folder / name), **settings)


@pytest.mark.parametrize("copies", COPIES)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_cell_trains_is_killed_goes_on_and_ends(folder: Path, precision: str, stage: int, copies: str) -> None:
    name = f"{precision}-{stage}-{copies}"
    # Stages share among ranks; what they share is in test_parity.
    ranks = 2 if stage == 3 and copies == "none" else 1
    config = str(described(folder, name, stage, copies, training__precision=precision).rename(folder / f"{name}.yaml"))
    run(ranks, config, script=WORKER, code=-signal.SIGKILL, KILLED_BEFORE="5")
    before = metrics(folder / name)
    assert "resuming" in run(ranks, config)
    after = metrics(folder / name)
    # A step's line is written when the next one is under way, or at the end of its epoch.
    assert [line["step"] for line in after] == [1, 2, 3, 4, 5, 6] and len(before) in (4, 5)
    # The fourth step was made twice, the second time from a checkpoint.
    assert before[3]["loss"] == pytest.approx(after[3]["loss"], abs=0 if ranks == 1 else 1e-6)
    assert all(math.isfinite(line["loss"]) and math.isfinite(line["grad_norm"]) for line in after)
    assert ("loss_scale" in after[0]) == (precision == "fp16")
    validated = [line for line in map(json.loads, (folder / name / "metrics.jsonl").open()) if "validation" in line]
    assert validated[-1]["step"] == 6
    weights = load_model(folder / name).state_dict()
    assert all(value.dtype == torch.float32 for value in weights.values() if value.is_floating_point())
    first = load_model(folder / name / "checkpoints" / "step-00000003").state_dict()
    assert not torch.equal(weights["text.projection.weight"], first["text.projection.weight"])
    if precision != "fp32" and compute_dtype(precision) is not None:
        # Masters of 16 bits would move in steps of a hundredth.
        rounded = weights["text.projection.weight"].to(compute_dtype(precision)).float()
        assert not torch.equal(rounded, weights["text.projection.weight"])


@pytest.mark.parametrize("key", ["bf16", "fp16", "torch_autocast", "amp"])
def test_deepspeeds_own_precisions_are_refused(folder: Path, key: str) -> None:
    file = described(folder, "refused", 1, "none")
    (folder / "refused.json").write_text(json.dumps({key: {"enabled": True}}))
    with pytest.raises(UserError, match=rf"refused.json sets {key}, which training\.precision of the YAML owns"):
        deepspeed_config(load_config(file), 1)


class Engine:
    """What the loss scale asks of DeepSpeed's engine."""

    def __init__(self, stage: int) -> None:
        self.stage, self.optimizer, self.told = stage, self, 0.0

    def zero_optimization_stage(self) -> int:
        return self.stage

    def override_loss_scale(self, value: float) -> None:
        self.told = value


@pytest.mark.parametrize("stage", [0, 2])
def test_the_loss_scale_halves_doubles_and_gives_up(stage: int) -> None:
    engine = Engine(stage)
    scale = LossScale(engine)
    loss = torch.tensor(3.0)
    assert scale.scaled(loss) == (loss if stage else loss * START)
    scale.update(overflowed=True)
    for _ in range(PATIENCE - 1):
        scale.update(overflowed=False)
    assert scale.value == START / 2
    restored = LossScale(engine)
    restored.restore({name: np.asarray(value) for name, value in scale.state().items()})
    restored.update(overflowed=False)
    assert restored.value == START and engine.told == (START if stage else 0)
    with pytest.raises(UserError, match=r"training\.precision=fp16: gradients overflow even at"):
        for _ in range(100):
            restored.update(overflowed=True)
    assert restored.value == LEAST / 2


def test_the_logit_scale_comes_back_from_above_its_maximum() -> None:
    from efficientclip.model.efficientclip import Capped

    for value, slope, expected in ((5.0, 1.0, 1.0), (5.0, -1.0, 0.0), (4.0, -1.0, -1.0), (4.0, 1.0, 1.0)):
        given = torch.tensor([value], requires_grad=True)
        capped = Capped.apply(given, 4.5)
        assert capped.item() == min(value, 4.5)
        (slope * capped).sum().backward()
        assert given.grad is not None and given.grad.item() == expected
