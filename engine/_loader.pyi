"""The C++ loader (csrc/): batches from the store's flat, possibly memory-mapped arrays.

Arrays are taken as they are, never copied or converted. Errors name the argument: TypeError for a wrong
dtype, shape or layout, IndexError for an id outside the store, ValueError for arrays that contradict each
other.
"""

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

_Item = TypeVar("_Item", bound=np.generic)

def pack_tokens(
    tokens: NDArray[np.uint16] | NDArray[np.int32],
    offsets: NDArray[np.int64],
    ids: NDArray[np.int64],
    max_length: int,
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int32]]:
    """The texts `ids` [m] in one row without padding: (input_ids [T], position_ids [T], cu_seqlens [m + 1]).

    Text i is tokens[offsets[i] : offsets[i + 1]]; `offsets` is [texts + 1]. A text longer than `max_length`
    is cut to it but keeps its last token ([SEP]). Positions count from 0 in each text; text k of the batch
    lies at cu_seqlens[k] : cu_seqlens[k + 1].
    """

def gather_rows(table: NDArray[_Item], rows: NDArray[np.int64], threads: int = 1) -> NDArray[_Item]:
    """table[rows] as a new array [m, D], of a C-contiguous `table` [N, D] and `rows` [m] from 0 to N - 1.

    `threads` is an upper bound: small copies are not split.
    """

def linked_pairs(
    indptr: NDArray[np.int64],
    indices: NDArray[np.int32],
    left_ids: NDArray[np.int64],
    columns: NDArray[np.int64],
    diagonal: int,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where a batch's similarity matrix [m, n] has edges of the store: (rows [k], cols [k]), sorted.

    The graph is CSR: node i has edges to indices[indptr[i] : indptr[i + 1]], ascending. Place (i, j) is
    returned, once, if there is an edge left_ids[i] -> columns[j] and j != i + diagonal. `left_ids` [m] and
    `columns` [n] may repeat ids; a column below 0 has no edges. A row that is not ascending is a
    ValueError if it is no longer than `columns`; longer ones are searched, not read through.
    """
