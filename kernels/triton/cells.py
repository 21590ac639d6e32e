"""Ids and excluded cells as kernels read them; nothing here waits for the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

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


class Masked(NamedTuple):
    """Cells of a matrix, and which of its wide tiles hold any."""

    flags: Tensor
    """int32: for each block of columns, `words` words of a bit for each block of rows."""
    words: int
    cells: Tensor
    """int64 [E], ascending: each narrow tile's number times its size, and the place in it."""


def masked(
    row_E: Tensor, col_E: Tensor, chosen_E: Tensor, shape: tuple[int, int], wide: tuple[int, int],
    narrow: tuple[int, int],
) -> Masked:  # fmt: skip
    """Those that are chosen, once each; the others come last in the list, as numbers of no tile."""
    words = -(-shape[0] // (32 * wide[0]))
    size = -(-shape[1] // wide[1]) * words
    block_E = row_E // wide[0]
    bit_E = (col_E // wide[1] * words + block_E // 32) * 32 + block_E % 32
    bit_E = torch.where(chosen_E, bit_E, size * 32).sort().values
    # A tile's first cell sets its bit; a word's last tile knows the sum of all.
    first_E = torch.ones_like(chosen_E)
    first_E[1:] = bit_E[1:] != bit_E[:-1]
    word_E, value_E = bit_E // 32, torch.where(first_E, 1 << (bit_E % 32), 0)
    total_E = value_E.cumsum(0)
    start_E = torch.searchsorted(word_E, word_E)
    sum_E = total_E - (total_E - value_E)[start_E]
    last_E = torch.ones_like(chosen_E)
    last_E[:-1] = word_E[1:] != word_E[:-1]
    flags = torch.zeros(size + 1, dtype=torch.int32, device=row_E.device)
    # Bit 31 is the sign.
    flags[torch.where(last_E, word_E, size)] = torch.where(sum_E >= 1 << 31, sum_E - (1 << 32), sum_E).int()
    across = -(-shape[1] // narrow[1])
    tile_E = row_E // narrow[0] * across + col_E // narrow[1]
    cell_E = tile_E * (narrow[0] * narrow[1]) + row_E % narrow[0] * narrow[1] + col_E % narrow[1]
    return Masked(flags, words, torch.where(chosen_E, cell_E, 1 << 62).sort().values)
