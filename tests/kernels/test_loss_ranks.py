"""Several ranks equal one, by either exchange: both losses, and the gradients that data parallelism averages."""

from __future__ import annotations

import functools
import secrets
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.kernels.loss_ranks import EXCHANGES, LOSSES, SIZES, Case, cases, error
from tests.training.launch import run

SCALARS = ("loss", "d_scale", "d_bias")
WORKER = Path(__file__).with_name("loss_ranks.py")


@functools.cache
def results(world: int) -> dict[Any, Any]:
    seed = secrets.randbelow(1 << 31)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "results.pt"
        printed = run(world, str(path), str(seed), script=WORKER)
        return {"seed": seed, "printed": printed, **torch.load(path)}


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize(("world", "case"), [(world, case) for world in SIZES for case in cases(world)], ids=str)
def test_ranks_equal_one(world: int, case: Case, exchange: str) -> None:
    print(f"seed {results(world)['seed']}")
    ranks, whole, truth, exchanges = results(world)[*case, exchange]
    assert ranks[0].keys() == whole[0].keys()
    assert ("d_image" in ranks[0]) == (not case.frozen)
    assert all(one["loss"] > 1 for one in truth)
    for name in truth[0]:
        if case.loss == "contrastive" and name == "d_bias":
            assert not any(one[name].any() for one in ranks)
            continue
        found = error(name, ranks, truth)
        # Gradients of half-precision features are rounded to it.
        rounded = case.dtype == torch.bfloat16 and name in ("d_text", "d_image")
        assert rounded or found <= (1e-12 if case.dtype == torch.float64 else 1e-6), name
        if rounded or case.dtype == torch.float32:
            # Of a scalar, one rank may by luck be nearer than fp32 can say: half a unit in its last place is as good.
            last_place = 2**-24 if name in SCALARS else 0
            assert found <= max(2 * error(name, whole, truth), last_place), name
    assert all(len(set(one["loss"].tolist())) == 1 for one in ranks)
    ring = exchange == "ring"
    for count in exchanges:
        assert count["reduce_scatter"] == (0 if case.frozen or ring else 1)
        assert count["pass_on"] == (2 * (world - 1) + (0 if case.frozen else world) if ring else 0)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("world", SIZES)
def test_ring_never_holds_all_images(world: int, loss: str) -> None:
    ring, gather = (results(world)["largest", loss, exchange] for exchange in ("ring", "gather"))
    assert ring["seen"] <= ring["own"]
    assert gather["seen"] >= gather["all"]


@pytest.mark.parametrize("loss", LOSSES)
def test_ranks_that_disagree_are_told(loss: str) -> None:
    assert (
        results(2)["disagreement", loss]
        == "the number Q of bank rows differs between ranks: [5.0, 6.0] in rank order, expected one value"
    )
