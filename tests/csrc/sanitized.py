"""C++ built with the sanitizers, and run where they find room."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]


def compile_sanitized(sanitizers: str, *arguments: Path | str) -> None:
    """g++ with -fsanitize=`sanitizers`, the core's headers and warnings as errors."""
    flags = ["-std=c++17", "-O1", "-g", "-pthread", f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all"]
    flags += ["-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests/csrc'}"]
    subprocess.run(["g++", *flags, *arguments], check=True)


def output(*command: str | Path) -> str:
    """What the command prints; AssertionError with its complaint if it fails."""
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if "unexpected memory mapping" in ran.stderr:
        # With some kernels' address randomisation the thread sanitizer finds no room for its shadow memory.
        ran = subprocess.run(["setarch", "-R", *command], capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout
