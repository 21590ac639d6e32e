"""Several ranks equal one, by either exchange: the loss, and the gradients that data parallelism averages."""

from __future__ import annotations

import functools
import secrets
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.kernels.contrastive_ranks import EXCHANGES, GIVEN, SIZES
from tests.training.launch import run

WORKER = Path(__file__).with_name("contrastive_ranks.py")
ROOT = WORKER.parents[2]


@functools.cache
def results(world: int) -> dict[Any, Any]:
    seed = secrets.randbelow(1 << 31)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "results.pt"
        run(world, str(path), str(seed), script=WORKER, OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
        return {"seed": seed, **torch.load(path)}


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trainable"])
@pytest.mark.parametrize("positives", ["pair", "ids"])
@pytest.mark.parametrize(
    ("world", "kind", "given", "dtype"),
    [(world, kind, *case) for world in SIZES for kind in SIZES[world] for case in GIVEN[world]],
    ids=str,
)
def test_ranks_equal_one(
    world: int, kind: str, given: str | None, positives: str, frozen: bool, dtype: torch.dtype, exchange: str
) -> None:
    print(f"seed {results(world)['seed']}")
    ranks, whole, truth, exchanges = results(world)[kind, positives, given, frozen, dtype, exchange]
    # bf16: gradients are rounded to it, and a last place may fall the other way.
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-3}[dtype]
    assert len(set(ranks["loss"])) == 1
    ranks = ranks | {"loss": torch.tensor(ranks["loss"][0], dtype=torch.float64)}
    assert ranks.keys() == whole.keys()
    assert ("d_image_map" in ranks) == (not frozen)
    for name, value in whole.items():
        size, error = float(truth[name].norm()), float((ranks[name] - truth[name]).norm())
        assert float((ranks[name] - value).norm()) <= min(tolerance, 1e-6 if name == "loss" else 1) * max(size, 1e-3)
        if dtype == torch.float32:
            unit = torch.finfo(torch.float32).eps * max(size, 1e-3)
            assert error <= 2 * float((value - truth[name]).norm()) + unit, name
    assert not ranks["d_bias"].any()
    ring = exchange == "ring"
    assert exchanges["_reduce_scatter"] == (0 if frozen or ring else 1)
    assert exchanges["pass_on"] == (2 * (world - 1) + (0 if frozen else world) if ring else 0)


@pytest.mark.parametrize("world", SIZES)
def test_ring_never_holds_all_images(world: int) -> None:
    ring, gather = (results(world)["largest", exchange] for exchange in ("ring", "gather"))
    assert ring["seen"] <= ring["own"]
    assert gather["seen"] >= gather["all"]


def test_ranks_that_disagree_are_told() -> None:
    assert (
        results(2)["disagreement"]
        == "the number Q of bank rows differs between ranks: [5.0, 6.0] in rank order, expected one value"
    )
