"""A few seeded faults of every kind; `python -m tests.faults.soak` draws thousands."""

from __future__ import annotations

import pytest

from tests.faults.cases import Bench
from tests.faults.kinds import IN_NAMESPACES
from tests.faults.namespace import permitted
from tests.faults.soak import run_case, story


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("faults"), undisturbed=1)


@pytest.mark.parametrize(
    ("only", "seed"),
    [
        ("prepare/killed", 1),
        ("prepare/disk full", 2),
        ("train/killed", 3),
        ("train/SIGTERM", 4),
        ("train/disk full", 5),
        ("train/flip", 6),
        ("train/second process", 7),
        ("train/foreign folder", 8),
        ("train-2/another store", 9),
    ],
)
def test_nothing_is_lost_and_nothing_broken_is_used(bench: Bench, only: str, seed: int) -> None:
    if only.partition("/")[2] in IN_NAMESPACES and not permitted():
        pytest.skip("no mount namespaces for this user: `unshare --mount` is refused")
    outcome = run_case(bench, seed, 0, only)
    assert not outcome.problems, story(outcome, only)
