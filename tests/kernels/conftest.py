"""What the kernels' tests share: fresh random inputs, and memory that shows what was never written."""

from __future__ import annotations

import secrets
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Every `torch.empty` is full of NaN; one thread, as tiles this small gain nothing from more."""
    before = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.set_num_threads(1)
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.set_num_threads(before[1])


@pytest.fixture
def rng() -> torch.Generator:
    seed = secrets.randbelow(1 << 31)
    print(f"seed {seed}")
    return torch.Generator().manual_seed(seed)
