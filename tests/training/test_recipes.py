"""Every recipe of configs/ starts, saves, is killed, goes on, validates and ends, on tiny towers and tiny data.

A recipe runs from its own file, in a folder where whatever it names by a path or a hub id is a tiny one; what another
recipe makes is made by that one. Overrides change its sizes, and what needs a GPU or a package of the demo.
"""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Callable
from contextlib import chdir
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from efficientclip.config import HUB_OR_PATH, Config, load_config
from efficientclip.data.store import Store
from efficientclip.model.efficientclip import load_model
from efficientclip.noise.cross_fit import read_cross_fit, write_cross_fit
from efficientclip.prepare.build import prepare
from tests import formats, tiny
from tests.model import hub
from tests.prepare.tars import write_tar
from tests.training.launch import metrics, run

ROOT = Path(__file__).parents[2]
RECIPES = {file.stem: file.relative_to(ROOT) for file in sorted(ROOT.glob("configs/*.yaml"))}
WORKER = Path(__file__).with_name("killed.py")
# All others run on one.
RANKS = {"clip": 2}
# Two epochs of four steps; a run is killed in its second one.
PICTURES, STEPS, BATCH, KILLED_BEFORE = 64, 8, 16, 7
# As many as any text may have tokens.
POSITIONS = 128
# What a recipe says of these is made smaller; a 0 stays.
SIZES: dict[str, Any] = {
    "model.width": tiny.WIDTH,
    "model.image_tower.size": hub.PIXELS,
    "objective.bank_size": 24,
    "mlm.texts_per_batch": 7,
    "confidence.cross_fit_batch_size": 4,
    "training.pair_visits": STEPS * BATCH,
    "training.batch_size": BATCH,
    "training.micro_batch_size": 4,
    "training.tokens_per_micro_batch": 40,
    "training.checkpoint_every": 3,
}
ARCHITECTURE: dict[str, Any] = {
    **hub.SIZES,
    "image_size": hub.PIXELS,
    "patch_size": 8,
    "embedding_size": 8,
    "hidden_sizes": [8, 16],
    "depths": [1, 1],
}
# Whether a recipe speaks of them or not.
ADDED = {
    "training.checkpoint_every": 3,
    "training.keep_checkpoints": STEPS,
    "training.log_every": 1,
    "training.threads": 1,
}
NO_GPU = {"deepspeed-fused-adam": "adamw"}


def leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys and values."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def said(file: Path) -> dict[str, Any]:
    return leaves(yaml.safe_load(file.read_text(encoding="utf-8")))


RUNS = {said(ROOT / file)["run"]: name for name, file in RECIPES.items()}
# These train nothing.
HEADS = {name for name, file in RECIPES.items() if "head.layers" in said(ROOT / file)}


def changed(recipe: dict[str, Any]) -> dict[str, Any]:
    """The overrides of a recipe."""
    changes = dict(ADDED)
    for key, value in recipe.items():
        parent, _, name = key.rpartition(".")
        smaller = ARCHITECTURE if parent.endswith("_tower.architecture") else {}
        if value and (key in SIZES or name in smaller):
            changes[key] = smaller.get(name, SIZES.get(key))
    if recipe.get("optimizer.name") in NO_GPU:
        changes["optimizer.name"] = NO_GPU[recipe["optimizer.name"]]
    if "model.text_tower.clip_layers" in recipe:
        # The new layers are as wide as CLIP's.
        changes |= {f"model.text_tower.architecture.{name}": size for name, size in hub.SIZES.items()}
    if recipe.get("model.teacher.kind") == "usem3":
        changes |= {"model.teacher.kind": "clip", "model.teacher.pretrained": "teacher"}
    if "head.layers" in recipe:
        changes["head.layers"] = [0, -1]
    if not any(key.startswith("data.validation.") for key in recipe):
        changes["data.validation.held"] = recipe.get("data.store", "held.tar")
    return changes


def towers(recipe: dict[str, Any], finished: Callable[[str], Path]) -> None:
    """Put weights and tokenizers where `recipe` looks for them, from the working directory on."""
    for key in ("model.start_from", "model.image_tower.pretrained", "model.text_tower.pretrained"):
        if (place := recipe.get(key)) in RUNS:
            Path(place).parent.mkdir(parents=True, exist_ok=True)
            Path(place).symlink_to(finished(RUNS[place]) / place)
    torch.manual_seed(0)
    for key in ("model.image_tower.pretrained", "model.text_tower.clip_layers", "model.teacher.pretrained"):
        if (place := recipe.get(key)) is not None and not Path(place).exists():
            hub.clip(Path(place), POSITIONS)
            hub.clip_tokenizer(Path(place))
    if (place := recipe.get("model.text_tower.pretrained")) is not None and not Path(place).exists():
        hub.masked_bert(Path(place), POSITIONS)
    if (place := recipe.get("data.tokenizer")) is not None:
        bare = Path(place).suffix == ".txt"
        tokens = tiny.tokenizer(Path(place).parent if bare else Path("vocabulary"))
        if not bare:
            tokens.save_pretrained(place)
    if (place := recipe.get("model.teacher.mean")) is not None:
        Path(place).parent.mkdir(parents=True, exist_ok=True)
        np.save(place, np.full(tiny.WIDTH, 0.01, np.float32))


def caption(random: np.random.Generator, most: int) -> str:
    return "".join(random.choice(list(tiny.CHARACTERS), random.integers(1, most)))


def pictures(path: Path) -> Path:
    """A tar of pictures with a Chinese and an English caption each, or a folder of two."""
    if path.suffix != ".tar":
        path.mkdir(parents=True)
        for number in range(2):
            pictures(path / f"{number}.tar")
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    seed = int(path.stem) if path.stem.isdigit() else 9
    random = np.random.default_rng(seed)
    members = {}
    for number in range(seed * PICTURES, seed * PICTURES + PICTURES // 2):
        texts = {
            "captions": [{"text": caption(random, 9)}],
            "captions_en": [f"thing {chr(97 + number % 26)}", "animal"],
        }
        members |= {
            f"{number:04d}.png": formats.picture(number, hub.PIXELS),
            f"{number:04d}.json": json.dumps(texts).encode(),
        }
    return write_tar(path, members)


def data(config: Config) -> None:
    """Make the shards, stores and texts that `config` names."""
    random = np.random.default_rng(0)
    for source in config.data.sources.values():
        assert source.path is not None
        pictures(source.path)
    held = {*config.data.validation.values()}
    for path in held:
        if path.suffix == ".tar":
            pictures(path)
    if config.data.store is not None:
        if config.model.image_tower is not None:
            source = pictures(Path("source"))
        else:
            source = Path("parallel.tsv")
            lines = [f"{caption(random, 9)}\tthing {chr(97 + n % 26)} {n * 'x'}\n" for n in range(PICTURES)]
            source.write_text("".join(lines), encoding="utf-8")
        for store in {config.data.store, *(path for path in held if path.suffix != ".tar")}:
            prepare(source, store, config)
    if config.mlm.texts is not None:
        Path("texts.txt").write_text("\n".join(caption(random, 90) for _ in range(60)), encoding="utf-8")
        prepare(Path("texts.txt"), config.mlm.texts, config)


def judged(config: Config, arguments: list[str]) -> None:
    """The verdicts on the pairs, with a rate of 0.2, since that of so few pairs may be anything."""
    folder, store = config.confidence.cross_fit, config.data.store
    if config.confidence.selection == "calibrated" and folder is not None and store is not None:
        run(1, *arguments, module="efficientclip.cross_fit")
        write_cross_fit(folder, Store(store), replace(read_cross_fit(folder), rate=0.2))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """By its name, the folder in which a recipe has been killed and has gone on to its end."""

    @cache
    def made(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name).resolve()
        recipe = said(ROOT / RECIPES[name])
        changes = changed(recipe)
        with chdir(folder):
            Path("configs").symlink_to(ROOT / "configs")
            towers(recipe | changes, made)
            arguments = [str(RECIPES[name]), *(f"{key}={json.dumps(value)}" for key, value in changes.items())]
            config = load_config(RECIPES[name], arguments[1:])
            named = leaves(config.model_dump(mode="json"))
            hubs = {key: value for key, value in named.items() if value and key.rpartition(".")[2] in HUB_OR_PATH}
            assert all(value.startswith(str(folder)) for value in hubs.values()), f"from the hub itself: {hubs}"
            data(config)
            if name in HEADS:
                run(1, *arguments, module="efficientclip.fit_head")
                return folder
            judged(config, arguments)
            ranks = RANKS.get(name, 1)
            run(ranks, *arguments, script=WORKER, code=-signal.SIGKILL, KILLED_BEFORE=str(KILLED_BEFORE))
            *_, killed = metrics(config.run)
            assert f"resuming {config.run} at step " in run(ranks, *arguments)
            (again,) = (line for line in metrics(config.run) if line["step"] == killed["step"])
            assert again["loss"] == pytest.approx(killed["loss"], abs=0 if ranks == 1 else 1e-6)
        return folder

    return made


@pytest.mark.parametrize("name", sorted(HEADS))
def test_a_head_is_fitted(finished: Callable[[str], Path], name: str) -> None:
    made = load_model(finished(name) / said(ROOT / RECIPES[name])["run"])
    assert made.text is None and made.image is not None and made.image.fitted == [0, -1]


@pytest.mark.parametrize("name", sorted(RECIPES.keys() - HEADS))
def test_a_recipe_starts_is_killed_goes_on_and_ends(finished: Callable[[str], Path], name: str) -> None:
    recipe = said(ROOT / RECIPES[name])
    folder = finished(name)
    made = folder / recipe["run"]
    ran = said(made / "config.yaml")

    def as_run(value: Any) -> Any:
        """What the run's own config, where paths and folders are absolute, calls `value`."""
        if isinstance(value, list):
            return [as_run(item) for item in value]
        return str(folder / value) if isinstance(value, str) and (folder / value).exists() else value

    changes = changed(recipe)
    for key, value in (recipe | changes).items():
        # A recipe may say of a source its path alone.
        spelt = f"{key}.path" if key.startswith("data.sources.") and key not in ran else key
        assert ran[spelt] == as_run(value), key
    steps = metrics(made)
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    assert all(math.isfinite(line["loss"]) and math.isfinite(line["grad_norm"]) for line in steps)
    assert ("loss_scale" in steps[0]) == (ran["training.precision"] == "fp16")
    # What is dropped, is so from the second epoch on.
    assert (steps[-1]["kept_share"] < 1) == (ran["confidence.selection"] != "none")
    validated = [line for line in map(json.loads, (made / "metrics.jsonl").open()) if "validation" in line]
    assert validated[-1]["step"] == STEPS
    assert {f"data.validation.{one}" for one in validated[-1]["validation"]} <= ran.keys()
    trained = {"both": {"text", "image"}}.get(ran["training.tower"], {ran["training.tower"]})
    assert {side for side in ("text", "image") if getattr(load_model(made), side) is not None} == trained
    # RUN/model may be any of them, the best.
    first, *_, last = (load_model(saved).state_dict() for saved in sorted((made / "checkpoints").glob("step-*")))
    for side in trained:
        assert not torch.equal(first[f"{side}.projection.weight"], last[f"{side}.projection.weight"])
