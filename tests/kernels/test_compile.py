"""Every row of the kernels' tuning table compiles for its chip, without a GPU: no spills, and tensor cores in use."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from efficientclip.kernels.contract import ContrastiveGrads, ContrastiveKept, Options

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="an interpreted kernel does not compile"
)

# Of a block, in KB: what sm_86, sm_89 and sm_120 have, which use sm_80's rows; sm_90; sm_100.
SHARED_KB = {80: 99, 90: 227, 100: 227}
KERNELS = ["forward_kernel", "merge_kernel", "rescue_kernel", "gradient_kernel", "product_kernel"]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


class Variant(NamedTuple):
    """What of `contrastive_loss` is in use; `ids`, how many kinds."""

    bank: bool = False
    ids: int = 0
    excluded: bool = False
    smooth: bool = False
    positives: bool = False


def launches(
    monkeypatch: pytest.MonkeyPatch,
    architecture: int,
    dtype: torch.dtype,
    variant: Variant,
    D: int = 512,
    columns: torch.dtype | None = None,
) -> list[tuple[Any, dict[str, Any]]]:
    """The kernels and arguments that one loss and its gradients would launch; nothing runs.

    With columns of another dtype, images are frozen.
    """
    from efficientclip.kernels.triton import contrastive, tiles, tuning

    seen: list[tuple[Any, dict[str, Any]]] = []

    class Recorder:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: Any) -> Callable[..., None]:
            return lambda *given, **named: seen.append(
                (self.kernel, dict(zip(self.kernel.arg_names, given, strict=False)) | named)
            )

    M = 250
    text, some = torch.zeros(M, D, dtype=dtype), torch.arange(M)
    ids_KM = torch.zeros(variant.ids, M, dtype=torch.int64) if variant.ids else None
    options = Options(
        ids_KM,
        ids_KM,
        ids_KM[0] if variant.bank and ids_KM is not None else None,
        torch.stack([some, some.flip(0)]) if variant.excluded else None,
        0,
        variant.positives,
        variant.smooth,
    )
    capability = architecture // 10, architecture % 10
    with monkeypatch.context() as patch:
        patch.setattr(
            tuning, "tile_config", lambda text_MD, *given: tuning.config_for(capability, text_MD.dtype, *given)
        )
        for name in KERNELS:
            module = tiles if name == "product_kernel" else contrastive
            patch.setattr(module, name, Recorder(getattr(module, name)))
        image = text.to(columns or dtype)
        walk = contrastive.TritonContrastive(text, image, image if variant.bank else None, torch.ones(()), options)
        sums = walk.forward()
        grads = ContrastiveGrads(*sums[: len(ContrastiveGrads._fields)])
        walk.backward(ContrastiveKept(sums.row_lse_M, sums.col_lse_N), grads, True, columns is None)
    return seen


def usage(kernel: Any, arguments: dict[str, Any], architecture: int, folder: Path) -> dict[str, int]:
    from triton.compiler import ASTSource
    from triton.runtime.jit import mangle_type

    from tests.kernels.resources import compiled

    signature: dict[str, str] = {}
    constants: dict[tuple[int], Any] = {}
    attributes: dict[tuple[int], Any] = {}
    for at, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name], constants[at,] = "constexpr", value
            continue
        signature[parameter.name] = mangle_type(value)
        if isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[at,] = [["tt.divisibility", 16]]
    options = {name: arguments[name] for name in ("num_warps", "num_stages", "maxnreg") if name in arguments}
    return compiled(ASTSource(kernel, signature, constants, attributes), architecture, folder, **options)


# Those of all variants that take most registers in some row of the table, and the kernels they have of their own.
VARIANTS = {
    "plain": (Variant(bank=True), KERNELS),
    "excluded": (Variant(excluded=True), ["forward_kernel", "merge_kernel", "gradient_kernel"]),
    "positives": (Variant(ids=2, excluded=True, positives=True), ["forward_kernel", "gradient_kernel"]),
    "smoothing": (
        Variant(bank=True, ids=2, excluded=True, smooth=True),
        ["forward_kernel", "rescue_kernel", "gradient_kernel"],
    ),
    "both": (Variant(ids=2, excluded=True, smooth=True, positives=True), ["forward_kernel", "gradient_kernel"]),
    # A kernel takes the same of a GPU for fp16 as for bf16.
    "products": (Variant(), ["forward_kernel", "gradient_kernel", "product_kernel"]),
}
CASES = [(dtype, name) for dtype in DTYPES for name in VARIANTS if (dtype == torch.float16) == (name == "products")]


@pytest.mark.parametrize(("dtype", "name"), CASES, ids=str)
@pytest.mark.parametrize("architecture", SHARED_KB)
def test_no_spills_and_tensor_cores(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, architecture: int, dtype: torch.dtype, name: str
) -> None:
    variant, kernels = VARIANTS[name]
    found = launches(monkeypatch, architecture, dtype, variant)
    # Few texts beside many columns cut a product's sums.
    found += [(kernel, given | {"SPLIT": True}) for kernel, given in found[-1:] if name == "products"]
    for kernel, arguments in found:
        if kernel.__name__ not in kernels:
            continue
        used = usage(kernel, arguments, architecture, tmp_path)
        what = kernel.__name__, {name: value for name, value in arguments.items() if isinstance(value, bool | str)}
        print(*what, used)
        assert used["STACK"] == used["LOCAL"] == 0, (what, used)
        assert used["SHARED"] <= SHARED_KB[architecture] * 1024, (what, used)
        assert used["MATRIX"] or kernel.__name__ == "merge_kernel", (what, used)


@pytest.mark.parametrize("columns", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["plain", "positives", "smoothing", "both"])
@pytest.mark.parametrize("architecture", SHARED_KB)
def test_frozen_halves_beside_fp32_texts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, architecture: int, columns: torch.dtype, name: str
) -> None:
    """Texts in parts: no spills, and matrix instructions of 16 bits alone."""
    variant, kernels = VARIANTS[name]
    for kernel, arguments in launches(monkeypatch, architecture, torch.float32, variant, columns=columns):
        if kernel.__name__ not in kernels or kernel.__name__ == "merge_kernel":
            continue
        used = usage(kernel, arguments, architecture, tmp_path)
        what = kernel.__name__, arguments["PARTS"], arguments.get("BANK")
        print(architecture, *what, used)
        assert arguments["PARTS"] == (2 if columns == torch.float16 else 3)
        assert used["STACK"] == used["LOCAL"] == 0, (what, used)
        assert used["SHARED"] <= SHARED_KB[architecture] * 1024, (what, used)
        assert used["MATRIX"] and not used["TF32"], (what, used)


def test_forward_and_recompute_agree() -> None:
    """Masked cells are listed by the tiles of a narrow config, which divide all wide ones; p sums to 1."""
    from efficientclip.kernels.triton import tuning

    for capability in ((8, 0), (9, 0), (10, 0)):
        for dtypes in itertools.product(DTYPES, DTYPES):
            for burden in range(3):
                config, narrow = (tuning.config_for(capability, *dtypes, of) for of in (burden, tuning.MASKED))
                again = (config.forward, config.rescue, config.gradient)
                assert burden == 0 or len({(launch.rows, launch.columns) for launch in again}) == 1
                assert len({launch.depth for launch in again}) == 1
                assert config.panel % config.forward.columns == 0
                for launch in again:
                    assert config.forward.rows % launch.rows == config.forward.columns % launch.columns == 0
                    assert launch.rows % narrow.forward.rows == launch.columns % narrow.forward.columns == 0


@pytest.mark.parametrize("architecture", SHARED_KB)
def test_unflagged_tiles_keep_their_config(monkeypatch: pytest.MonkeyPatch, architecture: int) -> None:
    """An excluded list changes no launch of the tiles that it does not name, and adds narrow ones for the others."""
    names = ("BLOCK_M", "BLOCK_N", "BLOCK_D", "num_warps", "num_stages")
    for dtype in (torch.bfloat16, torch.float32):
        free, masked = (
            [
                (kernel.__name__, arguments.get("cells") is not None, *(arguments[name] for name in names))
                for kernel, arguments in launches(monkeypatch, architecture, dtype, Variant(bank=True, excluded=listed))
                if kernel.__name__ in ("forward_kernel", "gradient_kernel")
            ]
            for listed in (False, True)
        )
        assert [launch for launch in masked if not launch[1]] == free
        assert [launch[0] for launch in masked if launch[1]] == [launch[0] for launch in free]


CHIPS = [((8, 0), 108), ((9, 0), 132), ((10, 0), 148)]


@pytest.mark.parametrize(("capability", "processors"), CHIPS, ids=str)
def test_forward_grids_keep_programs_busy(capability: tuple[int, int], processors: int) -> None:
    """For each M and N from 4,096 to 262,144 in steps of 128, by all grids at once; the choice itself for some."""
    from efficientclip.kernels.triton import tuning

    config = tuning.config_for(capability, torch.bfloat16, torch.bfloat16, 0)
    R, C = torch.arange(32, 2049, dtype=torch.int32)[:, None], torch.arange(32, config.panel // 128 + 1)[None].int()
    best = torch.full((len(R), C.shape[1]), 1 << 30, dtype=torch.int32)
    for S in range(1, config.programs + 1):
        P = config.programs // S
        best = torch.minimum(
            best, (R + P - 1).div(P, rounding_mode="floor") * (C + S - 1).div(S, rounding_mode="floor")
        )
    busy = R * C / (config.programs * best)
    # Those below have few tiles, of a number that no grid divides.
    assert (busy > 0.9).float().mean() > 0.997 and busy.min() > 0.79 and busy[128:, 128:].min() > 0.9
    draw = torch.Generator().manual_seed(1)
    for _ in range(500):
        r, c = (int(torch.randint(0, size, (), generator=draw)) for size in best.shape)
        M, N = (32 + r) * 128, (32 + c) * 128
        P, S = tuning.programs(config, M, N)
        used = P * S
        assert used <= config.programs
        share = (32 + r) * (32 + c) / (config.programs * -(-(32 + r) // P) * -(-(32 + c) // S))
        assert share >= min(0.95, float(busy[r, c])) - 1e-6, (M, N)


@pytest.mark.parametrize("Q", [100_000, 1_000_000])
@pytest.mark.parametrize("M", [128, 200, 512])
@pytest.mark.parametrize(("capability", "processors"), CHIPS, ids=str)
def test_few_texts_fill_the_chip(capability: tuple[int, int], processors: int, M: int, Q: int) -> None:
    """Backward's chunks by area, and the products with them cut along their sums."""
    from efficientclip.kernels.triton import tuning

    for dtypes in ((torch.bfloat16, torch.bfloat16), (torch.float32, torch.float16), (torch.float32, torch.float32)):
        config = tuning.config_for(capability, *dtypes, 0)
        assert config.processors == processors
        high, wide = tuning.chunk_shape(config, M, Q)
        assert high == M and high * wide <= 1 << 24 and wide % config.gradient.columns in (0, Q % 128)
        assert -(-high // config.gradient.rows) * -(-wide // config.gradient.columns) >= processors
        splits = tuning.product_splits(config, M, 512, wide)
        tiles = -(-M // config.product.rows) * -(-512 // config.product.columns)
        assert tiles * splits >= processors and splits * M * 512 * 4 <= 40 << 20
