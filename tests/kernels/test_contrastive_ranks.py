"""Two ranks equal one: the loss, and the gradients that data parallelism averages."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.kernels.contrastive_ranks import SIZES
from tests.training.launch import run

WORKER = Path(__file__).with_name("contrastive_ranks.py")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    seed = secrets.randbelow(1 << 31)
    path = tmp_path_factory.mktemp("ranks") / "results.pt"
    run(2, str(path), str(seed), script=WORKER, OMP_NUM_THREADS="1")
    return {"seed": seed, **torch.load(path)}


@pytest.mark.parametrize("dtype", ["torch.float64", "torch.float32", "torch.bfloat16"])
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trainable"])
@pytest.mark.parametrize("given", [None, "all"], ids=["plain", "all options"])
@pytest.mark.parametrize("positives", ["pair", "ids"])
@pytest.mark.parametrize("kind", SIZES)
def test_two_ranks_equal_one(
    results: dict[Any, Any], kind: str, positives: str, given: str | None, frozen: bool, dtype: str
) -> None:
    print(f"seed {results['seed']}")
    ranks, whole, exchanges = results[kind, positives, given, frozen, dtype]
    # bf16: gradients are rounded to it, and a last place may fall the other way.
    tolerance = {"torch.float64": 1e-12, "torch.float32": 1e-6, "torch.bfloat16": 1e-3}[dtype]
    assert len(set(ranks["loss"])) == 1
    assert ranks["loss"][0] == pytest.approx(float(whole["loss"]), rel=min(tolerance, 1e-6))
    assert ("d_image_map" in ranks) == ("d_image_map" in whole) == (not frozen)
    for name, value in whole.items():
        if name != "loss":
            other = ranks[name]
            assert float((other - value).norm()) <= tolerance * max(float(value.norm()), 1e-3), name
    assert not ranks["d_bias"].any()
    assert exchanges["_reduce_scatter"] == (0 if frozen else 1)


def test_ranks_that_disagree_are_told(results: dict[Any, Any]) -> None:
    assert (
        results["disagreement"]
        == "the number Q of bank rows differs between ranks: [5.0, 6.0] in rank order, expected one value"
    )
