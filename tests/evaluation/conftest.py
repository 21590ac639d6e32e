"""A tiny world: an image tower, twelve pictures in a tar, their store, and a text run trained on it (by nobody)."""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from transformers import ResNetConfig

from efficientclip.config import load_config, save_config
from efficientclip.data.store import Store
from efficientclip.model.efficientclip import EfficientCLIP, EfficientCLIPConfig, build_model
from efficientclip.prepare.build import prepare
from tests import tiny

HOSTILE = '<script src="//x">猫&狗</script>'
PICTURES = 12


@dataclass(frozen=True)
class World:
    run: Path
    store: Path
    tar: Path


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    tokens = tiny.tokenizer(folder)
    torch.manual_seed(0)
    resnet = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    image_tower = EfficientCLIPConfig(image={**resnet.to_dict(), "image_size": 16}, width=tiny.WIDTH)
    EfficientCLIP(image_tower).save_pretrained(folder / "image-run" / "model")
    tar = folder / "pictures.tar"
    write_pictures(tar)
    config = load_config(
        tiny.config(
            folder,
            data__validation={"held": str(folder / "store")},
            data__tokenizer=str(folder / "vocab.txt"),
            model__image_tower={"pretrained": str(folder / "image-run"), "size": 16},
        )
    )
    prepare(tar, folder / "store", config)
    model = build_model(config.model, seed=0, vocabulary=len(tokens), sides=("text",))
    model.save_pretrained(folder / "run" / "model")
    save_config(config, folder / "run" / "config.yaml")
    write_traces(folder / "run", len(Store(folder / "store")))
    return World(folder / "run", folder / "store", tar)


@pytest.fixture
def world(built: World, tmp_path: Path) -> World:
    """The tiny world with a run folder that the test may change."""
    run = tmp_path / "run"
    run.mkdir()
    for name in ("config.yaml", "metrics.jsonl", "confidence.parquet", "model"):
        (run / name).symlink_to(built.run / name)
    return World(run, built.store, built.tar)


def write_pictures(file: Path) -> None:
    """Pictures with two captions each: one of four shared ones, one of its own; every third own one is noise."""
    random = np.random.default_rng(0)
    with tarfile.open(file, "w") as tar:
        for number in range(PICTURES):
            encoded = io.BytesIO()
            Image.fromarray(random.integers(0, 256, (16, 16, 3), np.uint8)).save(encoded, format="png")
            own = HOSTILE if number == 0 else "".join(random.choice(list(tiny.CHARACTERS), 3))
            captions = [
                {"text": tiny.CHARACTERS[number % 4], "noise": False},
                {"text": own, "noise": number % 3 == 0},
            ]
            for name, content in (
                (f"{number:02d}.png", encoded.getvalue()),
                (f"{number:02d}.json", json.dumps({"captions": captions}).encode()),
            ):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def write_traces(run: Path, pairs: int) -> None:
    """metrics.jsonl and confidence.parquet as the trainer leaves them; the last line is cut short."""
    report = {
        "t2i": {"R@1": 1.0, "R@5": 5.0, "R@10": 10.0, "mean_rank": 3.0, "queries": 4},
        "i2t": {"R@1": 2.0, "R@5": 6.0, "R@10": 11.0, "mean_rank": 2.0, "queries": 4},
        "candidates": 4,
        "texts": 4,
    }
    lines = [
        {
            "step": step,
            "visits": 32 * step,
            "epoch": 0,
            "contrastive": 3.0 / step,
            "mlm": 2.0 / step,
            "lr": 1e-3 / step,
            "kept_share": 1 - step / 20,
            "pairs_per_s": 100.0,
        }
        for step in (1, 2, 3)
    ]
    lines.append({"step": 3, "visits": 96, "epoch": 0, "validation": {"held": report}})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "vis')
    score = np.linspace(-1, 1, pairs)
    score[-1] = np.nan
    kept = score > -0.5
    kept[-1] = True
    table = {
        "row": np.arange(pairs),
        "score": score,
        "times_seen": np.isfinite(score).astype(np.int32),
        "kept": kept,
        "dropped_epoch": np.where(kept, -1, 0).astype(np.int32),
    }
    pq.write_table(pa.table(table), run / "confidence.parquet")
