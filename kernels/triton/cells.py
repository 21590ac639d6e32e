"""Ids and excluded cells as kernels read them; nothing here waits for the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]


def codes_of(ids: Sequence[Pair]) -> Pair:
    """Ranks of the columns' ids, in int32: a register less than an id; -1 for a row whose id no column has."""
    rows, columns = [], []
    for ids_M, ids_N in ids:
        known = ids_N.contiguous().sort().values
        code_M = torch.searchsorted(known, ids_M.contiguous()).clamp(max=len(known) - 1)
        rows.append(torch.where(known[code_M] == ids_M, code_M, -1))
        columns.append(torch.searchsorted(known, ids_N.contiguous()))
    return torch.stack(rows).int(), torch.stack(columns).int()


def count_same(code_KM: Tensor, code_KN: Tensor) -> Pair:
    """Columns [M] that share a code of any kind with each row, and rows [N] with each column; in fp64."""
    rows, columns = [*code_KM.long()], [*code_KN.long()]
    signs = [1] * len(rows)
    if len(rows) == 2:
        # Those equal in both kinds were counted twice.
        both = (rows[0] < 0) | (rows[1] < 0)
        size = code_KN.shape[1]
        rows.append(torch.where(both, -1, rows[0] * size + rows[1]))
        columns.append(columns[0] * size + columns[1])
        signs.append(-1)

    def count(of: list[Tensor], among: list[Tensor]) -> Tensor:
        total = torch.zeros(of[0].shape, dtype=torch.float64, device=of[0].device)
        for sign, one, other in zip(signs, of, among, strict=True):
            known = other.sort().values
            total += sign * (torch.searchsorted(known, one, right=True) - torch.searchsorted(known, one))
        return total

    return count(rows, columns), count(columns, rows)


def histogram(values: Tensor, chosen: Tensor, size: int) -> Tensor:
    # bincount is refused on CUDA where deterministic algorithms are asked for.
    ordered = torch.where(chosen, values, size).sort().values
    return torch.searchsorted(ordered, torch.arange(size + 1, device=values.device)).diff().double()


def by_tile(
    row_E: Tensor, col_E: Tensor, shape: tuple[int, int], block: tuple[int, int], chosen_E: Tensor | None = None
) -> Pair:
    """A matrix's (chosen) cells [E, 2] ordered by tile, and the tiles' bounds, in int32; the others come last."""
    across = -(-shape[1] // block[1])
    tiles = -(-shape[0] // block[0]) * across
    tile_E = row_E // block[0] * across + col_E // block[1]
    if chosen_E is not None:
        tile_E = torch.where(chosen_E, tile_E, tiles)
    tile_E, order_E = tile_E.sort(stable=True)
    bounds = torch.searchsorted(tile_E, torch.arange(tiles + 1, device=row_E.device))
    return torch.stack([row_E[order_E], col_E[order_E]], 1).int(), bounds.int()
