"""Ranks, ZeRO stages and micro-batches change nothing: the same gradients, the same losses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests import tiny
from tests.training.launch import metrics, run

WORKER = Path(__file__).with_name("gradients.py")


def train(
    folder: Path, name: str, ranks: int, stage: int, **changes: Any
) -> tuple[dict[str, torch.Tensor], list[float]]:
    settings = folder / f"{name}.json"
    zero = {"stage": stage} | ({"stage3_param_persistence_threshold": 0} if stage == 3 else {})
    settings.write_text(json.dumps({"zero_optimization": zero}))
    config = tiny.config(folder, run=str(folder / name), deepspeed=str(settings), **changes)
    # One of them by the launcher itself.
    gradients = str(folder / f"{name}.pt")
    run(ranks, str(config), script=WORKER, by_deepspeed=name == "zero2", GRADIENTS=gradients)
    return torch.load(gradients), [line["loss"] for line in metrics(folder / name)]


def worst_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Largest relative norm of the difference by tensor; key biases, whose true gradient is zero, apart."""
    assert one.keys() == other.keys()
    names = [name for name in one if not name.endswith("key.bias")]
    assert len(names) > 20
    return max(float((one[n] - other[n]).norm() / one[n].norm()) for n in names)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("parity")
    tiny.pair_store(path / "store")
    tiny.text_store(path / "texts")
    return path


@pytest.fixture(scope="module")
def alone(folder: Path) -> tuple[dict[str, torch.Tensor], list[float]]:
    return train(folder, "alone", 1, 0)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_ranks_equal_one(folder: Path, alone: Any, stage: int) -> None:
    gradients, losses = train(folder, f"zero{stage}", 2, stage)
    assert worst_difference(alone[0], gradients) <= 1e-5
    assert len(losses) == len(alone[1]) == 20
    assert max(abs(a - b) / abs(a) for a, b in zip(alone[1], losses, strict=True)) <= 1e-4
    for epoch in range(3):
        one, two = (np.load(folder / name / "history" / f"epoch-{epoch:05d}.npy") for name in ("alone", f"zero{stage}"))
        np.testing.assert_allclose(one["score"], two["score"], atol=1e-2)
        np.testing.assert_array_equal(one["kept"], two["kept"])


def test_log_probabilities_are_scores_of_their_own_on_any_number_of_ranks(folder: Path, alone: Any) -> None:
    kind = {"confidence__score": "log-probability", "confidence__selection": "none"}
    for ranks in (1, 2):
        train(folder, f"log{ranks}", ranks, 0, **kind)
    first = "history/epoch-00001.npy"
    online, one, two = (np.load(folder / name / first)["score"] for name in ("alone", "log1", "log2"))
    np.testing.assert_allclose(one, two, atol=1e-2)
    seen = np.isfinite(online) & np.isfinite(one)
    assert np.corrcoef(online[seen], one[seen])[0, 1] > 0.3 and np.abs(online - one)[seen].max() > 1e-3


def test_micro_batches_equal_the_whole_batch(folder: Path, alone: Any) -> None:
    gradients, losses = train(folder, "accumulated", 1, 0, training__micro_batch_size=8)
    assert worst_difference(alone[0], gradients) <= 1e-5
    assert max(abs(a - b) / abs(a) for a, b in zip(alone[1], losses, strict=True)) <= 1e-4


@pytest.mark.parametrize("stage", [2, 3])
def test_a_token_budget_only_splits_the_batch(folder: Path, alone: Any, stage: int) -> None:
    # No text of the tiny stores is longer, so nothing is cut; a rank's share is about 170 tokens.
    budget = {
        "training__tokens_per_micro_batch": 134,
        "training__max_caption_tokens": 10,
        "data__max_text_tokens": 31,
    }
    gradients, losses = train(folder, f"budget{stage}", 2, stage, **budget)
    assert worst_difference(alone[0], gradients) <= 1e-5
    assert max(abs(a - b) / abs(a) for a, b in zip(alone[1], losses, strict=True)) <= 1e-4
