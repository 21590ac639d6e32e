"""The commands under test on tiny data, and what they make where nothing disturbs them."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image
from transformers import ResNetConfig

from efficientclip.model.efficientclip import EfficientCLIP, EfficientCLIPConfig
from tests import tiny
from tests.faults.processes import Tree
from tests.training.launch import launcher

PIXELS = 16
# Figures of time differ between any two runs.
TIMES = ("seconds", "per_s", "wait_share")
# What a run holds beside its results.
BESIDE = ("*/tensorboard/*", "*/hardware.json", "*/checkpoints/*", "*/digests.json", "*/.efficientclip.json", "*/.lock")
# What a killed call may leave, and the next one must clear away.
HALF = ("*.partial", "*.partial/*", "*.replaced", "*.replaced/*", "*.tmp", "*/.probe-*", "*/.lock")
FOREIGN = ("thesis.txt", "data/thesis.txt", "notes/thesis.txt", "notes/chapter/thesis.txt")


@dataclass(frozen=True)
class Command:
    """One command line, run in a copy of the base `base`; it writes the folders `made`."""

    name: str
    base: str
    arguments: tuple[str, ...]
    made: tuple[str, ...]
    # The key or the argument that names `made`, for pointing it at a wrong folder.
    target: str
    ranks: int = 1
    launched: bool = False
    # What it says of its results when they are there already.
    made_once: str | None = None

    def pointed_at(self, folder: str) -> tuple[str, ...]:
        """The arguments with another folder to write to."""
        if "=" in self.target:
            return (*self.arguments, f"{self.target}{folder}")
        return tuple(folder if argument == self.target else argument for argument in self.arguments)

    @property
    def module(self) -> str:
        """Which `main` a rank enters."""
        return f"efficientclip.{self.arguments[0].replace('-', '_')}" if self.ranks > 1 else "efficientclip.cli"

    def run(self, tree: Tree, arguments: tuple[str, ...] | None = None, *, program: bool = False, **where: Any) -> None:
        """Start it. `program`: with its own imports, not forked; `namespace` or `namespaces`: where."""
        arguments = arguments or self.arguments
        if self.launched and program:
            command = launcher(self.ranks, *arguments[1:], script=None, module=self.module)
            tree.start(command, where.get("namespace"))
        elif program:
            tree.start([str(Path(sys.executable).with_name("efficientclip")), *arguments], where.get("namespace"))
        elif self.ranks > 1:
            spaces = where.get("namespaces") or [where.get("namespace")] * self.ranks
            tree.fork_ranks(self.module, arguments[1:], spaces)
        else:
            tree.fork(self.module, arguments, where.get("namespace"))


RUN, TARGET = ("runs/run",), "run="
COMMANDS = [
    Command("prepare", "pictures", ("prepare", "SHARDS", "stores/made", "--config", "config.yaml"), ("stores/made",),
            "stores/made"),
    Command("prepare-texts", "pictures", ("prepare", "TEXTS", "stores/made", "--config", "config.yaml"),
            ("stores/made",), "stores/made"),
    Command("train", "stores", ("train", "schedule.yaml"), RUN, TARGET),
    Command("train-snapshot", "stores", ("train", "snapshot.yaml"), RUN, TARGET),
    Command("train-calibrated", "judged", ("train", "calibrated.yaml"), RUN, TARGET),
    Command("cross-fit", "stores", ("cross-fit", "calibrated.yaml"), ("judged",), "confidence.cross_fit="),
    Command("export", "trained", ("export", "runs/run", "exported"), ("exported",), "exported",
            made_once="there is one already"),
    Command("train-2", "stores", ("train", "schedule.yaml"), RUN, TARGET, ranks=2),
    Command("cross-fit-2", "stores", ("cross-fit", "calibrated.yaml"), ("judged",), "confidence.cross_fit=", ranks=2),
    Command("train-launched", "stores", ("train", "schedule.yaml"), RUN, TARGET, ranks=2, launched=True),
    Command("cross-fit-launched", "stores", ("cross-fit", "calibrated.yaml"), ("judged",), "confidence.cross_fit=",
            ranks=2, launched=True),
]  # fmt: skip


@dataclass
class Reference:
    """What a command makes undisturbed."""

    results: dict[str, str]
    figures: dict[str, list[dict[str, Any]]]
    seconds: float
    # Bytes that it adds to its folder.
    growth: int
    # Paths that come, and may go again, while it runs.
    seen: list[str]
    # Results that differ from one undisturbed run to the next.
    unsteady: list[str] = field(default_factory=list)


class Bench:
    """Bases and references, made on the spot under `root` when they are first wanted."""

    def __init__(self, root: Path, undisturbed: int = 2) -> None:
        """`undisturbed` runs of each command tell what is the same in every run."""
        self.root, self.undisturbed = root.resolve(), undisturbed
        self.bases: dict[str, Path] = {}
        self.references: dict[str, Reference] = {}
        self.lock = threading.RLock()
        self.startup: float | None = None
        self._count = 0

    def base(self, name: str) -> Path:
        with self.lock:
            if name not in self.bases:
                folder = self.root / "bases" / name
                folder.mkdir(parents=True)
                BASES[name](self, folder)
                for foreign in FOREIGN:
                    (folder / foreign).parent.mkdir(parents=True, exist_ok=True)
                    (folder / foreign).write_text(f"Chapter 1, {foreign}\n" * 50)
                self.bases[name] = folder
            return self.bases[name]

    def place(self) -> Path:
        """A fresh folder for one case."""
        with self.lock:
            self._count += 1
            place = self.root / "cases" / f"{self._count:06d}"
        place.mkdir(parents=True)
        return place

    def lay_out(self, command: Command, folder: Path) -> None:
        """A copy of the command's base at `folder`, which exists."""
        # One link or shared block, and a flipped bit would be flipped in the base.
        source = f"{self.base(command.base)}/."
        subprocess.run(["cp", "-a", "--reflink=never", source, str(folder)], check=True)

    def arguments(self, command: Command, arguments: tuple[str, ...] | None = None) -> tuple[str, ...]:
        shared = self.root / "bases" / "pictures-shards"
        places = {"SHARDS": str(shared), "TEXTS": str(shared / "texts.txt")}
        return tuple(places.get(argument, argument) for argument in arguments or command.arguments)

    def reference(self, command: Command) -> Reference:
        with self.lock:
            if command.launched:
                return self.reference(
                    next(one for one in COMMANDS if one.name == command.name.replace("launched", "2"))
                )
            if command.name not in self.references:
                self.references[command.name] = self._undisturbed(command)
            return self.references[command.name]

    def startup_seconds(self) -> float:
        """What a program's imports take."""
        with self.lock:
            if self.startup is None:
                command = next(one for one in COMMANDS if one.name == "train")
                self.startup = max(0.0, self._run(command, program=True)[3] - self.reference(command).seconds)
            return self.startup

    def _undisturbed(self, command: Command) -> Reference:
        runs = [self._run(command) for _ in range(self.undisturbed)]
        made = [results_in(folder, command) for folder, *_ in runs]
        names = {name for results in made for name in results}
        unsteady = sorted(name for name in names if len({results.get(name) for results in made}) > 1)
        if command.ranks == 1 and unsteady:
            print(f"{command.name}: undisturbed runs differ in {', '.join(unsteady)}: not compared", flush=True)
        folder, growth, seen, _ = runs[0]
        return Reference(
            {name: digest for name, digest in made[0].items() if name not in unsteady},
            figures_in(folder, command),
            min(seconds for *_, seconds in runs),
            growth,
            [path for path in seen if all(path in paths for _, _, paths, _ in runs)],
            unsteady,
        )

    def _run(self, command: Command, program: bool = False) -> tuple[Path, int, list[str], float]:
        """One run to its end: folder, growth in bytes, paths seen, seconds."""
        place = self.place()
        folder = place / "here"
        folder.mkdir()
        self.lay_out(command, folder)
        before, tree = {str(path) for path in folder.rglob("*")}, Tree(folder, place)
        size, started, seen = _size(folder), time.monotonic(), dict[str, None]()
        command.run(tree, self.arguments(command), program=program)
        while tree.lives():
            for above, folders, files in os.walk(folder):
                for name in (*folders, *files):
                    seen.setdefault(os.path.join(above, name))
            time.sleep(0.001)
        seconds, ended = time.monotonic() - started, tree.wait()
        if any(ended.codes) or ended.survivors:
            raise RuntimeError(f"undisturbed, {command.name} ends with {ended.codes}:\n{ended.output[-4000:]}")
        paths = [str(Path(path).relative_to(folder)) for path in seen if path not in before]
        return folder, _size(folder) - size, paths, seconds


def _size(folder: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*"))


def results_in(folder: Path, command: Command, named: Path | None = None) -> dict[str, str]:
    """Digests of a command's results by path, of metrics without what tells of time, and of all files without the
    folder's name, which is `named` to the command."""
    found = {}
    for made in command.made:
        for file in sorted((folder / made).rglob("*")):
            path = str(file.relative_to(folder))
            if file.is_file() and not any(fnmatch(path, beside) for beside in BESIDE):
                found[path] = _digest(file, named or folder)
        for pointer in sorted((folder / made).rglob("checkpoints/best")):
            found[str(pointer.relative_to(folder))] = pointer.read_text().strip()
    return found


def _digest(file: Path, named: Path) -> str:
    content = file.read_bytes().replace(str(named).encode(), b"HERE")
    if file.name == "metrics.jsonl":
        content = repr([timeless(line) for line in content.splitlines()]).encode()
    return hashlib.sha256(content).hexdigest()


def timeless(line: bytes) -> dict[str, Any]:
    """A line of metrics.jsonl without what tells of time; one that cannot be read, as it stands."""
    try:
        return {name: value for name, value in json.loads(line).items() if not name.endswith(TIMES)}
    except (ValueError, AttributeError):
        return {"unreadable": line}


def figures_in(folder: Path, command: Command) -> dict[str, list[dict[str, Any]]]:
    """The lines of each metrics.jsonl."""
    return {
        str(file.relative_to(folder)): [timeless(line) for line in file.read_bytes().splitlines()]
        for made in command.made
        for file in sorted((folder / made).rglob("metrics.jsonl"))
    }


def differences(reference: Reference, folder: Path, command: Command, named: Path) -> list[str]:
    """What in `folder` is not as it is undisturbed: the same bits on one rank, losses within 1e-5 on several."""
    found = results_in(folder, command, named)
    names = set(found) ^ (set(reference.results) | (set(reference.unsteady)))
    wrong = [f"{name} is {'missing' if name not in found else 'too many'}" for name in sorted(names)]
    if command.ranks == 1:
        same = reference.results.keys() & found.keys()
        return wrong + [f"{name} differs" for name in sorted(same) if found[name] != reference.results[name]]
    figures = figures_in(folder, command)
    for name, lines in reference.figures.items():
        other = figures.get(name, [])
        if [line.get("step") for line in lines] != [line.get("step") for line in other]:
            wrong.append(f"{name} has other steps")
            continue
        for line, theirs in zip(lines, other, strict=True):
            if "loss" in line and not np.isclose(line["loss"], theirs["loss"], rtol=1e-5, atol=0):
                wrong.append(f"{name}, step {line['step']}: loss {theirs['loss']}, not {line['loss']}")
                break
    return wrong


def half_written(folder: Path, command: Command) -> list[str]:
    """What only an interrupted call may leave."""
    above = {(folder / made).parent for made in command.made}
    paths = {str(path.relative_to(folder)) for one in above for path in one.rglob("*")}
    return sorted(path for path in paths if any(fnmatch(path, half) for half in HALF))


def digests_of(folder: Path, except_for: tuple[str, ...]) -> dict[str, str]:
    """Of all files in `folder` but those under `except_for` and beside it (staging)."""
    own = tuple(pattern for made in except_for for pattern in _beside(made))
    files = {str(file.relative_to(folder)): file for file in sorted(folder.rglob("*")) if file.is_file()}
    return {
        path: hashlib.sha256(file.read_bytes()).hexdigest()
        for path, file in files.items()
        if not any(fnmatch(path, pattern) for pattern in own)
    }


def _beside(made: str) -> tuple[str, ...]:
    above, _, name = made.rpartition("/")
    prefix = f"{above}/" if above else ""
    return made, f"{made}/*", f"{made}.partial*", f"{prefix}.{name}*"


def _pictures(bench: Bench, folder: Path) -> None:
    """Tars of pictures and texts, beside the base so that all cases read them at one path; a tower."""
    shards = folder.with_name("pictures-shards")
    shards.mkdir()
    random = np.random.default_rng(5)
    characters = list(tiny.CHARACTERS)
    for number in range(4):
        with tarfile.open(shards / f"{number}.tar", "w") as tar:
            for sample in range(12 * number, 12 * number + 12):
                picture = io.BytesIO()
                pixels = random.integers(0, 256, (18, 20, 3), np.uint8)
                Image.fromarray(pixels).save(picture, "PNG")
                caption = "".join(random.choice(characters, random.integers(1, 9)))
                for name, content in ((f"{sample}.png", picture.getvalue()), (f"{sample}.txt", caption.encode())):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    (shards / "thesis.txt").write_text("Chapter 2\n" * 50)
    resnet = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    image = EfficientCLIP(EfficientCLIPConfig(image={**resnet.to_dict(), "image_size": PIXELS}, width=tiny.WIDTH))
    image.save_pretrained(folder / "image-run" / "model")
    tiny.tokenizer(folder)
    lines = ["".join(random.choice(characters, random.integers(1, 60))) for _ in range(400)]
    (shards / "texts.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    _config(folder, "config", **PICTURES)


PICTURES: dict[str, Any] = {
    "data__tokenizer": "vocab.txt",
    "data__max_bad_share": 0.9,
    "model__image_tower": {"pretrained": "image-run", "size": PIXELS},
}


def _config(folder: Path, name: str, **changes: Any) -> None:
    """A config whose paths start in the folder that the command runs in."""
    settings = {
        "run": "runs/run",
        "data__store": "data/store",
        "data__validation": {"held": "data/store"},
        "mlm__texts": "data/texts",
        "training__checkpoint_every": 6,
        "training__pair_visits": 1280,
        **changes,
    }
    tiny.config(folder, **settings).rename(folder / f"{name}.yaml")


def _stores(bench: Bench, folder: Path) -> None:
    tiny.pair_store(folder / "data" / "store")
    tiny.pair_store(folder / "data" / "other", seed=7)
    tiny.text_store(folder / "data" / "texts")
    _config(folder, "schedule", confidence__selection="schedule", confidence__reaudition_share=0.1)
    _config(
        folder,
        "snapshot",
        confidence__selection="published",
        confidence__score="snapshot",
        confidence__warmup_epochs=0,
        mlm__texts_per_batch=0,
    )
    _config(
        folder,
        "calibrated",
        confidence__selection="calibrated",
        confidence__cross_fit="judged",
        confidence__cross_fit_share=1.5,
        training__batch_size=8,
        training__pair_visits=320,
        confidence__cross_fit_lr=8e-4,
    )


def _judged(bench: Bench, folder: Path) -> None:
    command = next(one for one in COMMANDS if one.name == "cross-fit")
    bench.reference(command)
    shutil.rmtree(folder)
    shutil.copytree(bench._run(command)[0], folder)


def _trained(bench: Bench, folder: Path) -> None:
    """A finished run on the pictures."""
    prepare = next(one for one in COMMANDS if one.name == "prepare")
    shutil.rmtree(folder)
    shutil.copytree(bench._run(prepare)[0], folder)
    _config(
        folder,
        "pictures",
        **PICTURES,
        data__store="stores/made",
        data__validation={"held": "stores/made"},
        mlm__texts_per_batch=0,
        training__batch_size=16,
        training__pair_visits=160,
        objective__bank_size=8,
    )
    tree = Tree(folder, bench.place())
    tree.fork("efficientclip.cli", ("train", "pictures.yaml"))
    ended = tree.wait()
    if any(ended.codes):
        raise RuntimeError(ended.output[-4000:])


BASES: Mapping[str, Callable[[Bench, Path], None]] = {
    "pictures": _pictures,
    "stores": _stores,
    "judged": _judged,
    "trained": _trained,
}


def changed_config(file: Path, random: np.random.Generator) -> str:
    """The YAML with another value somewhere that matters."""
    tree = yaml.safe_load(file.read_text(encoding="utf-8"))
    section, key, value = [("", "seed", 1), ("optimizer", "weight_decay", 0.1), ("objective", "bank_size", 32)][
        int(random.integers(3))
    ]
    (tree[section] if section else tree)[key] = value
    file.write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8")
    return f"{section}.{key}={value}"
