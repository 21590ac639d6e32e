"""Both towers trained from shards: CLIP's loss and WenLan's, micro-batches, ranks, resume, and use of the run."""

from __future__ import annotations

import copy
import io
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from efficientclip.config import Config, load_config
from efficientclip.data.image_pairs import ImagePairs
from efficientclip.data.tokenizer import load_tokenizer
from efficientclip.errors import UserError
from efficientclip.evaluation.evaluate import evaluate
from efficientclip.model.efficientclip import load_model
from tests import tiny
from tests.training.launch import metrics, run

COLOURS = {"红": (220, 30, 30), "蓝": (30, 30, 220), "绿": (30, 200, 30), "黄": (230, 220, 30)}
SHAPES = {"大": 14, "小": 6}
FRESH = {
    "size": 16,
    "mean": [0.5, 0.5, 0.5],
    "std": [0.25, 0.25, 0.25],
    "architecture": {
        "model_type": "clip_vision_model",
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "image_size": 16,
        "patch_size": 4,
    },
}
MOMENTUM = {"objective__momentum": 0.9, "objective__bank_size": 32}


def shard(path: Path, count: int, seed: int) -> Path:
    """Pictures of a large or small square in one of four colours; some have two captions, one is broken."""
    random = np.random.default_rng(seed)
    with tarfile.open(path, "w") as tar:
        for number in range(count):
            colour, shape = random.choice(list(COLOURS)), random.choice(list(SHAPES))
            pixels = random.integers(150, 256, (16, 16, 3), np.uint8)
            edge = SHAPES[shape]
            pixels[1 : 1 + edge, 1 : 1 + edge] = COLOURS[colour]
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "PNG")
            captions = [f"{shape}{colour}"] + [f"{colour}{shape}"] * (number % 3 == 0)
            image = b"no picture" if number == 5 else file.getvalue()
            for name, content in (
                (f"{number:04d}.png", image),
                (f"{number:04d}.json", json.dumps({"captions": [{"text": text} for text in captions]}).encode()),
            ):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("both")
    tiny.tokenizer(path)
    (path / "train").mkdir()
    for number in range(2):
        shard(path / "train" / f"{number}.tar", 60, number)
    shard(path / "held.tar", 24, 9)
    return path


def config(folder: Path, name: str, **changes: Any) -> Path:
    settings: dict[str, Any] = {
        "run": str(folder / name),
        "data__store": None,
        "data__shards": [str(folder / "train")],
        "data__tokenizer": str(folder / "vocab.txt"),
        "data__validation": {"held": str(folder / "held.tar")},
        "model__teacher": None,
        "model__image_tower": copy.deepcopy(FRESH),
        "objective__contrastive_weight": 1.0,
        "objective__bank_size": 0,
        "mlm__texts_per_batch": 0,
        "training__tower": "both",
        "training__batch_size": 16,
        "training__pair_visits": 320,
        "training__checkpoint_every": 5,
    }
    return tiny.config(folder, **(settings | changes))


def pairs(given: Config) -> ImagePairs:
    tower = given.model.image_tower
    assert tower is not None
    return ImagePairs(given.data.shards, tower, load_tokenizer(given.data.tokenizer))


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in metrics(folder)]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_model(folder).state_dict()


@pytest.mark.parametrize("objective", [{}, MOMENTUM], ids=["clip", "wenlan"])
def test_micro_batches_train_alike_and_the_run_can_be_used(folder: Path, objective: dict[str, Any]) -> None:
    name = "wenlan" if objective else "clip"
    run(1, str(config(folder, name, **objective)))
    run(1, str(config(folder, f"{name}-micro", training__micro_batch_size=4, **objective)))
    whole, split = weights(folder / name), weights(folder / f"{name}-micro")
    first = losses(folder / name)
    assert np.allclose(first, losses(folder / f"{name}-micro"), rtol=1e-3)
    assert np.mean(first[-4:]) < np.mean(first[:4])
    for side in ("text.projection.weight", "image.projection.weight"):
        assert F.cosine_similarity(whole[side].flatten(), split[side].flatten(), dim=0) > 0.9999
    report = evaluate(folder / name, folder / "held.tar")
    logged = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    validation = next(line for line in reversed(logged) if "validation" in line)["validation"]["held"]
    assert report["candidates"] == 23
    # The store that evaluation makes holds features in fp16.
    assert report["t2i"]["R@10"] == pytest.approx(validation["t2i"]["R@10"], abs=5)


def test_two_ranks_resume_as_if_never_stopped(folder: Path) -> None:
    whole = config(folder, "ranks", training__keep_checkpoints=9, **MOMENTUM)
    run(2, str(whole))
    expected = losses(folder / "ranks")
    shutil.rmtree(folder / "ranks/model")
    # In the middle of the second epoch.
    (folder / "ranks/checkpoints/latest").write_text("step-00000010")
    assert "resuming" in run(2, str(whole))
    assert losses(folder / "ranks") == expected


def test_every_sample_is_seen_once_an_epoch_by_two_ranks(folder: Path) -> None:
    given = load_config(config(folder, "order"))
    source = pairs(given)
    seen: list[str] = []
    for rank in range(2):
        loader = source.batches(given, rank, 2)
        while not loader.ended:
            batch = next(loader)
            assert len(batch.inputs[0]["pixels"]) == 8 and len(batch.keys) == 8
            seen += [f"{rank}/{key}" for key in batch.keys]
        loader.close()
    assert len(seen) == len(set(seen)) and len(seen) > 100


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective__bank_size": 8}, "objective.bank_size"),
        ({"confidence__selection": "schedule"}, "confidence.selection"),
        ({"objective__momentum": 0.9, "training__tower": "text"}, "objective.momentum"),
        ({"mlm__texts_per_batch": 4}, "mlm.texts_per_batch"),
    ],
)
def test_what_needs_frozen_rows_is_refused(folder: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(config(folder, "refused", **changes))


def test_too_few_pictures_name_the_batch_size(folder: Path) -> None:
    given = load_config(config(folder, "few", training__batch_size=512))
    with pytest.raises(UserError, match=r"training\.batch_size: 512"):
        next(pairs(given).batches(given, 0, 1))
