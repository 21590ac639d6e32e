"""How each chip walks tiles: their sizes, warps and load stages, and why.

The bits of a result depend on every figure but stages and registers; so they are constants, never tuned at run time.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..contract import Options


class Tile(NamedTuple):
    """Geometry of a square tile, so that a diagonal can hold a positive each."""

    BLOCK: int
    BLOCK_K: int
    num_warps: int
    num_stages: int


# Of `sigmoid` and `similarity`, by bytes a feature: the largest that spill no register on sm_80, sm_90 and sm_100.
TILES = {2: Tile(128, 64, 8, 3), 4: Tile(64, 32, 4, 3)}

# `sigmoid`: columns of tiles a forward program walks, so that the same bits come out on every chip.
STRIP_TILES = 32
# `sigmoid`: rows and columns of slopes in memory at a time; a multiple of every tile.
CHUNK = 4096

# `paired_similarity`: pairs a program, and features at a time.
PAIRED_ROWS, PAIRED_K = 16, 128
# `positive_ranks`: queries a launch, which bounds the list of tiles: 12 MB (fp32: 48 MB) at a million bank rows.
SLAB_ROWS = 1 << 14
# `positive_ranks`: programs a launch aims at, by cutting the bank into strips.
PROGRAMS = 512


def warps(tile: Tile, kinds_of_ids: int) -> int:
    """Warps of a kernel that compares ids: twice as many where the registers of two kinds would spill."""
    return 2 * tile.num_warps if kinds_of_ids > 1 else tile.num_warps


# Of `contrastive`


@dataclass(frozen=True)
class Launch:
    """A tile's rows and columns, the depth of one step of its product, warps and load stages."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Config:
    """How one architecture walks the tiles. The bits of a result depend on all but stages and registers."""

    forward: Launch
    rescue: Launch
    gradient: Launch
    """Steps as deep as forward's: then both have the same products, and p sums to 1."""
    product: Launch
    """Its columns are those of d text and d image, their width D."""
    descriptors: bool
    """Whether blocks are moved by TMA, else by each thread's pointers."""
    kept: int
    """Rows of the column sums that a forward strip keeps in registers."""
    programs: int
    """Forward programs, as many as the full chip holds: a constant, so that its cut versions give equal bits."""
    chunk: tuple[int, int]
    """Rows and columns of logit gradients in memory at a time; as many in a chunk of fewer rows."""
    processors: int
    """SMs of the full chip, likewise a constant: how products of few rows are cut."""
    products: Literal["triton", "library"] = "triton"
    """Whether logit gradients and features are multiplied by `product_kernel` or by cuBLAS."""
    registers: int | None = None
    """Of a forward thread at most; None leaves them to ptxas. Given where ptxas would spill to make room on an SM for
    more programs than a forward grid has: all that one program alone can use."""
    panel: int = 32768
    """Columns whose sums are in memory at a time, a multiple of a forward tile's."""


def _config(
    forward: tuple[int, ...],
    product: tuple[int, ...],
    *,
    descriptors: bool,
    kept: int,
    programs: int,
    chunk: tuple[int, int],
    recompute: tuple[int, ...] | None = None,
    registers: int | None = None,
) -> Config:
    again = Launch(*(recompute or forward))
    processors = programs if forward[3] == 8 else programs // 2
    return Config(
        Launch(*forward), again, again, Launch(*product), descriptors, kept, programs, chunk, processors,
        registers=registers,
    )  # fmt: skip


# By architecture, in how many parts of 16 bits the texts are taken (0: they and the columns are fp32), and what else a
# tile looks at: 0 nothing, 1 ids or all logits, 2 masked cells, or positives by ids beside all logits. Codes and masks
# take the registers of half a tile, and so does each further sum on wide tiles. Under Triton 3.9 and 3.6 no row spills.
# The latter takes more registers: it decides kept = 8 on sm_90 and the narrow recompute of fp32 there, tiles of 32 and
# 16 columns on sm_100, and its `registers`.
_TABLE: dict[tuple[int, int, int], Config] = {
    # mma.sync from 8 warps; shared memory stays under the 99 KB of sm_86, sm_89 and sm_120.
    (80, 1, 0): _config(
        (128, 128, 64, 8, 3), (128, 128, 32, 8, 4), descriptors=False, kept=32, programs=108, chunk=(4096, 4096)
    ),
    (80, 1, 1): _config(
        (128, 64, 64, 8, 3), (128, 128, 32, 8, 4), descriptors=False, kept=32, programs=108, chunk=(4096, 4096)
    ),
    (80, 1, 2): _config(
        (128, 32, 64, 8, 3), (128, 128, 32, 8, 4), descriptors=False, kept=32, programs=108, chunk=(4096, 4096),
        recompute=(128, 32, 64, 4, 3),
    ),
    # tf32x3 holds each operand in two parts: half the tile, a quarter of the depth.
    (80, 0, 0): _config(
        (128, 64, 16, 8, 4), (128, 128, 32, 8, 3), descriptors=False, kept=32, programs=108, chunk=(4096, 2048)
    ),
    (80, 0, 1): _config(
        (64, 32, 32, 8, 3), (128, 128, 32, 8, 3), descriptors=False, kept=32, programs=108, chunk=(4096, 2048)
    ),
    # 4 warps forward: two programs an SM, and the exponentials of one hide under the products of the other.
    (90, 1, 0): _config(
        (128, 128, 64, 4, 3), (128, 128, 64, 8, 4), descriptors=True, kept=32, programs=264, chunk=(4096, 4096),
        recompute=(128, 128, 64, 8, 3),
    ),
    (90, 1, 1): _config(
        (128, 64, 64, 8, 3), (128, 128, 64, 8, 4), descriptors=True, kept=32, programs=132, chunk=(4096, 4096)
    ),
    (90, 1, 2): _config(
        (128, 32, 64, 8, 3), (128, 128, 64, 8, 4), descriptors=True, kept=32, programs=132, chunk=(4096, 4096)
    ),
    # The second program's registers go to the parts of tf32x3.
    (90, 0, 0): _config(
        (128, 128, 32, 8, 3), (128, 128, 32, 8, 3), descriptors=True, kept=64, programs=132, chunk=(4096, 2048),
        recompute=(128, 64, 32, 8, 3),
    ),
    (90, 0, 1): _config(
        (128, 64, 16, 8, 4), (128, 128, 32, 8, 3), descriptors=True, kept=1, programs=132, chunk=(4096, 2048)
    ),
    (90, 0, 2): _config(
        (128, 32, 16, 8, 4), (128, 128, 32, 8, 3), descriptors=True, kept=1, programs=132, chunk=(4096, 2048)
    ),
    # A thread reads rows from tensor memory: no part of a column is a thread's own, hence kept = 1; and it holds the
    # address of each column's code, of all in the tile with 4 warps, of half with 8.
    (100, 1, 0): _config(
        (128, 128, 64, 8, 3), (128, 128, 64, 8, 4), descriptors=True, kept=1, programs=148, chunk=(4096, 4096),
        recompute=(128, 64, 64, 8, 4),
    ),
    (100, 1, 1): _config(
        (128, 32, 64, 8, 3), (128, 128, 64, 8, 4), descriptors=True, kept=1, programs=148, chunk=(4096, 4096)
    ),
    (100, 1, 2): _config(
        (128, 16, 64, 8, 3), (128, 128, 64, 8, 4), descriptors=True, kept=1, programs=148, chunk=(4096, 4096),
        registers=255,
    ),
    (100, 0, 0): _config(
        (128, 64, 16, 8, 4), (128, 128, 32, 8, 3), descriptors=True, kept=1, programs=148, chunk=(4096, 2048)
    ),
    (100, 0, 1): _config(
        (128, 32, 16, 8, 4), (128, 128, 32, 8, 3), descriptors=True, kept=1, programs=148, chunk=(4096, 2048),
        recompute=(128, 32, 16, 4, 4), registers=255,
    ),
    (100, 0, 2): _config(
        (128, 16, 16, 8, 4), (128, 128, 32, 8, 3), descriptors=True, kept=1, programs=148, chunk=(4096, 2048),
        recompute=(128, 16, 16, 4, 4), registers=255,
    ),
    # Texts in two parts of fp16, or three of bf16: two or three blocks of them beside one of the columns.
    (80, 2, 0): _config(
        (128, 64, 32, 8, 3), (128, 128, 32, 8, 3), descriptors=False, kept=32, programs=108, chunk=(4096, 2048)
    ),
    (80, 2, 1): _config(
        (128, 32, 32, 8, 3), (128, 128, 32, 8, 3), descriptors=False, kept=32, programs=108, chunk=(4096, 2048),
        recompute=(128, 32, 32, 4, 3),
    ),
    (80, 3, 0): _config(
        (128, 64, 32, 8, 3), (128, 128, 32, 8, 3), descriptors=False, kept=32, programs=108, chunk=(4096, 2048)
    ),
    (80, 3, 1): _config(
        (128, 32, 32, 8, 2), (128, 128, 32, 8, 3), descriptors=False, kept=32, programs=108, chunk=(4096, 2048)
    ),
    (90, 2, 0): _config(
        (128, 128, 64, 8, 3), (128, 128, 64, 8, 3), descriptors=True, kept=32, programs=132, chunk=(4096, 2048)
    ),
    (90, 2, 1): _config(
        (128, 64, 64, 8, 3), (128, 128, 64, 8, 3), descriptors=True, kept=8, programs=132, chunk=(4096, 2048)
    ),
    (90, 2, 2): _config(
        (128, 32, 64, 8, 3), (128, 128, 64, 8, 3), descriptors=True, kept=32, programs=132, chunk=(4096, 2048)
    ),
    (90, 3, 0): _config(
        (128, 128, 64, 8, 2), (128, 128, 64, 8, 3), descriptors=True, kept=32, programs=132, chunk=(4096, 2048)
    ),
    (90, 3, 1): _config(
        (128, 64, 64, 8, 2), (128, 128, 64, 8, 3), descriptors=True, kept=8, programs=132, chunk=(4096, 2048)
    ),
    (90, 3, 2): _config(
        (128, 32, 64, 8, 2), (128, 128, 64, 8, 3), descriptors=True, kept=32, programs=132, chunk=(4096, 2048)
    ),
    (100, 2, 0): _config(
        (128, 64, 64, 8, 3), (128, 128, 64, 8, 3), descriptors=True, kept=1, programs=148, chunk=(4096, 2048)
    ),
    (100, 2, 1): _config(
        (128, 32, 64, 8, 3), (128, 128, 64, 8, 3), descriptors=True, kept=1, programs=148, chunk=(4096, 2048)
    ),
    (100, 2, 2): _config(
        (128, 16, 64, 8, 2), (128, 128, 64, 8, 3), descriptors=True, kept=1, programs=148, chunk=(4096, 2048),
        registers=255,
    ),
    (100, 3, 0): _config(
        (128, 64, 64, 8, 2), (128, 128, 64, 8, 3), descriptors=True, kept=1, programs=148, chunk=(4096, 2048),
        registers=255,
    ),
    (100, 3, 1): _config(
        (128, 32, 32, 8, 2), (128, 128, 64, 8, 3), descriptors=True, kept=1, programs=148, chunk=(4096, 2048)
    ),
    (100, 3, 2): _config(
        (128, 16, 32, 8, 2), (128, 128, 64, 8, 3), descriptors=True, kept=1, programs=148, chunk=(4096, 2048),
        registers=255,
    ),
}  # fmt: skip


def parts(text: torch.dtype, columns: torch.dtype) -> int:
    """In how many parts of the columns' dtype a text has no more error than fp32."""
    wide = {
        (torch.float32, torch.float16): 2,
        (torch.float32, torch.bfloat16): 3,
        (torch.float16, torch.bfloat16): 2,
    }
    return wide.get((text, columns), 1)


def config_for(capability: tuple[int, int], text: torch.dtype, columns: torch.dtype, burden: int) -> Config:
    """The table's row for a CUDA compute capability, the features' dtypes (fp16, bf16, fp32), and what a tile looks at.

    D needs no row: it is walked in steps of a depth.
    """
    # Consumer Blackwell (12.x) has sm_80's matrix instructions and shared memory.
    architecture = {9: 90, 10: 100, 11: 100}.get(capability[0], 80)
    taken = 0 if columns == torch.float32 else parts(text, columns)
    # Some of sm_80's tiles have room for burden 2.
    return _TABLE.get((architecture, taken, burden)) or _TABLE[architecture, taken, 1]


# The burden of tiles that hold masked cells.
MASKED = 2


def burden(options: Options) -> int:
    """What a tile needs beside products: 0 nothing, 1 ids or all logits, 2 positives by ids beside all logits.

    Tiles that hold masked cells bear `MASKED`.
    """
    if options.ids_KM is not None and options.as_positives and options.smooth:
        return 2
    return int(options.ids_KM is not None or options.smooth)


def tile_config(text_MD: Tensor, columns: torch.dtype, burden: int) -> Config:
    """`config_for` the device that the texts are on."""
    return config_for(torch.cuda.get_device_capability(text_MD.device), text_MD.dtype, columns, burden)


@functools.cache
def programs(config: Config, rows: int, columns: int) -> tuple[int, int]:
    """Forward's grid (P, S) over blocks of rows and of columns: of S, which takes memory, the least that does well.

    That is a share of 95 % of all programs' time, or else the best there is. Two shapes in a thousand come below
    90 %: they have few tiles, of a number that no grid divides.
    """
    R, C = -(-rows // config.forward.rows), -(-columns // config.forward.columns)
    best, found = math.inf, (1, 1)
    for S in range(1, config.programs + 1):
        P = config.programs // S
        steps = -(-R // P) * -(-C // S)
        if steps < best:
            best, found = steps, (min(P, R), min(S, C))
        if config.programs * best * 0.95 <= R * C:
            break
    return found


def chunk_shape(config: Config, rows: int, columns: int) -> tuple[int, int]:
    """Rows and columns of a chunk of logit gradients: few rows leave room for more columns, in whole tiles."""
    launch = config.gradient
    high = min(config.chunk[0], rows)
    unit = math.lcm(launch.columns, 16)
    wide = config.chunk[0] * config.chunk[1] // (-(-high // launch.rows) * launch.rows)
    return high, min(max(wide // unit, 1) * unit, -(-columns // 16) * 16)


def product_splits(config: Config, rows: int, width: int, depth: int) -> int:
    """Into how many parts a product's sums are cut, so that few rows occupy the chip: four rounds of programs."""
    tiles = -(-rows // config.product.rows) * -(-width // config.product.columns)
    if 2 * tiles > config.processors:
        return 1
    return max(1, min(4 * config.processors // tiles, depth // (8 * config.product.depth)))
