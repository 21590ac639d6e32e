from __future__ import annotations

from pathlib import Path

import pytest

from tests.data.tars import SEED, jpegs, write_tar


@pytest.fixture(autouse=True)
def seed() -> None:
    print(f"seed {SEED}")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five shards of 150 samples in all."""
    folder = tmp_path_factory.mktemp("shards")
    for shard, (first, end) in enumerate([(0, 20), (20, 60), (60, 65), (65, 125), (125, 150)]):
        write_tar(folder / f"{shard}.tar", jpegs(end - first, first=first))
    return folder
