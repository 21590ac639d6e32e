"""Two ranks equal one: the sigmoid loss, and the gradients that data parallelism averages."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.kernels.sigmoid_ranks import SIZES
from tests.training.launch import run

WORKER = Path(__file__).with_name("sigmoid_ranks.py")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    seed = secrets.randbelow(1 << 31)
    path = tmp_path_factory.mktemp("ranks") / "results.pt"
    run(2, str(path), str(seed), script=WORKER, OMP_NUM_THREADS="1", PYTHONPATH=str(WORKER.parents[2]))
    return {"seed": seed, **torch.load(path)}


@pytest.mark.parametrize("dtype", ["torch.float64", "torch.float32"])
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trainable"])
@pytest.mark.parametrize("positives", ["pair", "ids"])
@pytest.mark.parametrize("kind", SIZES)
def test_two_ranks_equal_one(results: dict[Any, Any], kind: str, positives: str, frozen: bool, dtype: str) -> None:
    print(f"seed {results['seed']}")
    ranks, whole = results[kind, positives, frozen, dtype]
    tolerance = {"torch.float64": 1e-12, "torch.float32": 1e-6}[dtype]
    assert len(set(ranks["loss"])) == 1
    assert ranks["loss"][0] == pytest.approx(float(whole["loss"]), rel=tolerance)
    assert ("d_image_map" in ranks) == ("d_image_map" in whole) == (not frozen)
    for name, value in whole.items():
        if name != "loss":
            assert float((ranks[name] - value).norm()) <= tolerance * max(float(value.norm()), 1e-3), name


def test_ranks_that_disagree_are_told(results: dict[Any, Any]) -> None:
    message = "the number Q of bank rows differs between ranks: [5.0, 6.0] in rank order, expected one value"
    assert results["disagreement"] == message
