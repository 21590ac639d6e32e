"""Packages and the C++ loader; everything else about the distribution stands in pyproject.toml."""

import os
import shutil
import subprocess
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension
from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def packages_under(folder: str, imported_as: str) -> list[str]:
    return [imported_as, *(f"{imported_as}.{name}" for name in find_packages(str(ROOT / folder)))]


def sources(pattern: str) -> list[str]:
    return sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").glob(pattern))


# By pkg-config's names, with the Debian packages that bring them.
LIBRARIES = {
    "libjpeg": "libjpeg62-turbo-dev",
    "libpng": "libpng-dev",
    "libwebp": "libwebp-dev",
    "libwebpdemux": "libwebp-dev",
}


def library_flags(kind: str) -> list[str]:
    """What the compiler (--cflags) or the linker (--libs) must be told."""
    if shutil.which("pkg-config") is None:
        raise SystemExit("error: pkg-config is missing; Debian: apt-get install pkg-config")
    absent = {package for name, package in LIBRARIES.items() if subprocess.run(["pkg-config", name]).returncode != 0}
    if absent:
        raise SystemExit(f"error: libraries are missing; Debian: apt-get install {' '.join(sorted(absent))}")
    return subprocess.run(["pkg-config", kind, *LIBRARIES], check=True, capture_output=True, text=True).stdout.split()


loader = Pybind11Extension(
    "efficientclip._loader",
    sources("*.cpp"),
    depends=sources("*.hpp"),
    cxx_std=17,
    extra_compile_args=[
        *library_flags("--cflags"),
        *("-O3", "-Wall", "-Wextra"),
        *(["-Werror"] if os.environ.get("CI") else []),
    ],
    extra_link_args=["-pthread", *library_flags("--libs")],
)

setup(
    packages=[
        *packages_under("engine", "efficientclip"),
        *packages_under("kernels", "efficientclip.kernels"),
        "efficientclip.configs",
    ],
    # A top-level `kernels` would shadow the package of that name which transformers imports.
    package_dir={
        "efficientclip": "engine",
        "efficientclip.kernels": "kernels",
        "efficientclip.configs": "configs",
    },
    package_data={"": ["*.html", "*.pyi", "py.typed"], "efficientclip.configs": ["*.yaml", "*/*.json"]},
    ext_modules=[loader],
)
