"""Every row of the kernels' tuning table compiles for its chip, without a GPU: no spills, and tensor cores in use."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from efficientclip.kernels import contrastive

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="an interpreted kernel does not compile"
)

# Of a block, in KB: what sm_86, sm_89 and sm_120 have, which use sm_80's rows; sm_90; sm_100.
SHARED_KB = {80: 99, 90: 227, 100: 227}
MATRIX_INSTRUCTION = {80: "mma.sync", 90: "wgmma", 100: "tcgen05.mma"}
KERNELS = ["forward_kernel", "merge_kernel", "rescue_kernel", "gradient_kernel", "product_kernel"]


def launches(
    monkeypatch: pytest.MonkeyPatch, architecture: int, dtype: torch.dtype, bank: bool, **options: Any
) -> list[tuple[Any, dict[str, Any]]]:
    """The kernels and arguments that one loss and its gradients would launch; nothing runs."""
    from efficientclip.kernels import fused

    seen: list[tuple[Any, dict[str, Any]]] = []

    class Recorder:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: Any) -> Callable[..., None]:
            return lambda *given, **named: seen.append(
                (self.kernel, dict(zip(self.kernel.arg_names, given, strict=False)) | named)
            )

    M, D = 250, 512
    text = torch.zeros(M, D, dtype=dtype)
    ranks = contrastive._Ranks(None, M, {}, text.device)
    ids = [torch.zeros(M, dtype=torch.int64)] * options.get("ids", 0)
    excluded = (torch.arange(M), torch.arange(M).flip(0)) if options.get("excluded") else None
    smooth = options.get("smooth", False)
    config = fused.config_for((architecture // 10, 0), dtype, bool(options))
    cells = fused.FusedCells(
        ranks, M, ids, ids, ids[0] if ids else None, excluded, options.get("positives", False), config, text.device
    )
    tiles = fused.FusedTiles(text, text, text if bank else None, torch.ones(()), cells, smooth)
    tiles.upcast, tiles.precision = False, "tf32x3" if dtype == torch.float32 else "ieee"
    for name in KERNELS:
        monkeypatch.setattr(fused, name, Recorder(getattr(fused, name)))
    sums = tiles.forward()
    tiles.backward(sums, contrastive._Gradients(*sums[: len(contrastive._Gradients._fields)]), True, True)
    return seen


def compiled(kernel: Any, arguments: dict[str, Any], architecture: int) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.jit import mangle_type

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
    options = {name: arguments[name] for name in ("num_warps", "num_stages") if name in arguments}
    target = GPUTarget("cuda", architecture, 32)
    return triton.compile(ASTSource(kernel, signature, constants, attributes), target=target, options=options)


def check(kernel: Any, arguments: dict[str, Any], architecture: int, folder: Path) -> None:
    from triton import knobs

    built = compiled(kernel, arguments, architecture)
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(built.asm["cubin"])
    usage = subprocess.run(
        [knobs.nvidia.cuobjdump.path, "-res-usage", str(cubin)], capture_output=True, text=True, check=True
    ).stdout
    found = {name: int(size) for name, size in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    constants = {name: value for name, value in arguments.items() if isinstance(value, bool | str)}
    print(kernel.__name__, constants, found, f"{built.metadata.shared / 1024:.0f} KB")
    assert (found["STACK"], found["LOCAL"]) == (0, 0), kernel.__name__
    assert built.metadata.shared <= SHARED_KB[architecture] * 1024, kernel.__name__
    if kernel.__name__ != "merge_kernel":
        assert MATRIX_INSTRUCTION[architecture] in built.asm["ptx"], kernel.__name__


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("architecture", SHARED_KB)
def test_plain(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, architecture: int, dtype: torch.dtype) -> None:
    for kernel, arguments in launches(monkeypatch, architecture, dtype, bank=False):
        check(kernel, arguments, architecture, tmp_path)


@pytest.mark.parametrize("architecture", SHARED_KB)
def test_fp16_and_bank(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, architecture: int) -> None:
    for kernel, arguments in launches(monkeypatch, architecture, torch.float16, bank=True):
        if arguments.get("BANK"):
            check(kernel, arguments, architecture, tmp_path)


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.bfloat16, {"smooth": True}),
        (torch.float32, {"smooth": True}),
        (torch.bfloat16, {"positives": True}),
    ],
    ids=["bf16, masks", "fp32, masks", "bf16, positives"],
)
@pytest.mark.parametrize("architecture", SHARED_KB)
def test_options(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, architecture: int, dtype: torch.dtype, options: dict[str, bool]
) -> None:
    """Two kinds of ids and excluded cells, with smoothing or as positives."""
    walked = ["forward_kernel", "gradient_kernel"] + ["rescue_kernel"] * ("smooth" in options)
    for kernel, arguments in launches(monkeypatch, architecture, dtype, False, ids=2, excluded=True, **options):
        if kernel.__name__ in walked:
            check(kernel, arguments, architecture, tmp_path)


def test_masked_cells_have_one_tile() -> None:
    """They are ordered by the tiles of forward, and the recomputes look them up by theirs."""
    from efficientclip.kernels import fused

    for architecture in SHARED_KB:
        for dtype in (torch.bfloat16, torch.float32):
            config = fused.config_for((architecture // 10, 0), dtype, True)
            shapes = {(launch.rows, launch.columns) for launch in (config.forward, config.rescue, config.gradient)}
            assert len(shapes) == 1
            assert config.panel % config.forward.columns == 0
