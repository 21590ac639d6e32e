"""The image loader's core under the sanitizers: its own tests, vectorised against portable code, mutated inputs."""

from __future__ import annotations

import subprocess
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from .sanitized import ROOT, compile_sanitized, output
from .seeds import write_seeds

PARTS = ["file", "tar", "listing", "captions", "picture", "resize", "transform", "samples", "image_loader"]
LIBRARIES = ["libjpeg", "libpng", "libwebp", "libwebpdemux"]
# Each with another of the resampling's three codes, which must give the same bits.
SANITIZERS = {
    "address,undefined": ["-DEFFICIENTCLIP_VECTORS=2"],
    "undefined": ["-DEFFICIENTCLIP_VECTORS=1"],
    "thread": ["-DEFFICIENTCLIP_VECTORS=0"],
}


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory):
    """Builds a test's binary for a sanitizer; the core's objects are made once for each."""

    @cache
    def core(sanitizers: str) -> list[Path]:
        folder = tmp_path_factory.mktemp("core")
        objects = [folder / f"{part}.o" for part in PARTS]
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda o: compiled(sanitizers, ROOT / f"csrc/{o.stem}.cpp", "-c", "-o", o), objects))
        return objects

    def compiled(sanitizers: str, *arguments: Path | str) -> None:
        compile_sanitized(sanitizers, *SANITIZERS[sanitizers], *arguments)

    @cache
    def binary(test: str, sanitizers: str, *flags: str) -> Path:
        libraries = subprocess.run(["pkg-config", "--libs", *LIBRARIES], check=True, capture_output=True, text=True)
        path = tmp_path_factory.mktemp("binary") / test
        source = ROOT / f"tests/csrc/{test}.cpp"
        compiled(sanitizers, *flags, source, *core(sanitizers), "-o", path, *libraries.stdout.split())
        return path

    return binary


@pytest.mark.parametrize("sanitizers", SANITIZERS)
@pytest.mark.parametrize("test", ["image_test", "pass_test"])
def test_the_core_runs_clean_under_the_sanitizers(build, test: str, sanitizers: str, tmp_path: Path) -> None:
    assert output(build(test, sanitizers), tmp_path) == "all passed\n"


def test_vectorised_and_portable_code_give_the_same_bits(build) -> None:
    digests = {output(build("image_test", sanitizers)) for sanitizers in SANITIZERS}
    assert len(digests) == 1


def test_mutated_inputs_are_errors_or_pictures(build, tmp_path: Path) -> None:
    seed = int(np.random.default_rng().integers(2**31))
    print(f"seed {seed}")
    files = write_seeds(tmp_path)
    said = output(build("image_fuzz", "address,undefined", "-DMUTATIONS"), str(seed), "60", *files)
    decoded, refused = (int(word) for word in said.replace(",", "").split()[1::2])
    # Both ways were gone.
    assert min(decoded, refused) > len(files)
