"""What a Triton kernel takes of a GPU that need not be there: compiled for a target, read by cuobjdump."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
MATRIX_INSTRUCTION = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}


def compiled(source: ASTSource, capability: int, folder: Path, **options: int) -> dict[str, int]:
    """Registers, stack and local bytes of a thread, shared bytes of a program, matrix instructions, TF32 words."""
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(built.asm["cubin"])
    printed = subprocess.run([CUOBJDUMP, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    found = {name: int(size) for name, size in re.findall(r"(REG|STACK|LOCAL):(\d+)", printed)}
    matrix = built.asm["ptx"].count(MATRIX_INSTRUCTION[capability])
    return found | {"SHARED": built.metadata.shared, "MATRIX": matrix, "TF32": built.asm["ptx"].count("tf32")}


def resources(
    kernel: Any,
    types: dict[str, str],
    constants: dict[str, Any],
    capability: int,
    folder: Path,
    aligned: bool = True,
    **options: int,
) -> dict[str, int]:
    """`compiled` for arguments of these types, others None.

    Pointers are multiples of 16, and so are the width D and the strides if they are `aligned`.
    """
    names = kernel.arg_names
    signature = {name: types.get(name, "constexpr") for name in names}
    constants = {name: None for name in names if name not in types} | constants
    wide = [name for name in types if name == "D" or name.endswith("_stride")] if aligned else []
    multiples = [name for name, kind in types.items() if kind.startswith("*")] + wide
    source = ASTSource(
        kernel,
        signature,
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in multiples},
    )
    return compiled(source, capability, folder, **options)
