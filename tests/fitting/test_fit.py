"""The whole road: a table of products and their photographs in, a model and what is wrong with the table out."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import BertConfig, BertModel, CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModelWithProjection

from efficientclip.data.store import Store
from tests import tiny

COLOURS = "红蓝绿黄"
PAIRS = 48


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """photos/, products.csv, and two tiny towers as they are saved."""
    folder = tmp_path_factory.mktemp("shop")
    (folder / "photos").mkdir()
    random, names = np.random.default_rng(0), COLOURS
    with (folder / "products.csv").open("w", encoding="utf-8", newline="") as stream:
        table = csv.writer(stream)
        table.writerow(("图片", "标题", "sku", "价格"))
        for number in range(PAIRS):
            # No two pictures are alike, though a tower that was never trained tells little apart.
            pixels = random.integers(0, 256, (4, 4, 3)).repeat(8, 0).repeat(8, 1)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / "photos" / f"{number}.png")
            title = f"{names[number % 4]}花{'大小上下天地'[number % 6]}"
            table.writerow((f"{number}.png", title, f"A{number}", "3, 4"))
    described = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=16,
        projection_dim=tiny.WIDTH,
    )  # fmt: skip
    CLIPVisionModelWithProjection(described).save_pretrained(folder / "image")
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(
        folder / "image"
    )
    tokens = tiny.tokenizer(folder / "vocabulary")
    tokens.save_pretrained(folder / "text")
    BertModel(
        BertConfig(
            vocab_size=len(tokens), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
            max_position_embeddings=80,
        )
    ).save_pretrained(folder / "text")  # fmt: skip
    return folder


def fit(shop: Path, *words: str) -> subprocess.CompletedProcess[str]:
    given = ["products.csv", "--images", "photos", "--out", "made", "--image-tower", "image", "--text-tower", "text"]
    command = [sys.executable, "-m", "efficientclip", "fit", *given, *words]
    return subprocess.run(
        command, cwd=shop, capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"}, check=False
    )


def test_a_table_becomes_a_model_by_one_command(shop: Path) -> None:
    asked = "training.precision=fp32", "--epochs", "40", "--held-out", "0.25"
    made = fit(shop, *asked)
    assert made.returncode == 0, made.stderr
    assert "图片 is the picture, 标题 is the caption, sku is the key; 价格 not used" in made.stderr
    out = shop / "made"
    for name in ("model/config.json", "report.html", "audit.html", "suspects.csv", "config.yaml"):
        assert (out / name).is_file(), name
    with (out / "cleaned.csv").open(encoding="utf-8-sig", newline="") as stream:
        rows = list(csv.DictReader(stream))
    with (shop / "products.csv").open(encoding="utf-8", newline="") as stream:
        given = list(csv.DictReader(stream))
    assert [{key: row[key] for key in given[0]} for row in rows] == given
    held = [row for row in rows if row["why"].startswith("held out")]
    assert 2 <= len(held) <= 12 and all(row["kept"] == "yes" and not row["wrong_probability"] for row in held)
    (work,) = (path for path in (out / "work").iterdir())
    assert len(Store(work / "train")) == PAIRS - len(held)
    # Finished, it is told again at once: nothing but the source is looked at.
    before = (work / "stages.json").stat().st_mtime_ns
    again = fit(shop, *asked)
    assert again.returncode == 0, again.stderr
    assert (work / "stages.json").stat().st_mtime_ns == before
    assert {*json.loads((work / "stages.json").read_text())} == {"cross-fit", "train", "report", "audit", "export"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--image-tower", "text"], r"--image-tower text: a bert without projection"),
        (["--text-tower", "nowhere"], r"--text-tower nowhere: no model folder, run or reachable hub id"),
        (["--verdicts", "marked.csv"], r"--verdicts marked.csv: no such file"),
        (["--budget", "soon"], r"--budget 'soon': write it as 15m"),
        (["--held-out", "0.7"], r"--held-out 0.7: give 0 to 0.5"),
        (["--images", "text"], r"none of the pictures looked for is there"),
        (["training.batchsize=4"], r"training.batchsize: unknown key; did you mean `batch_size`"),
        (["--out", "photos"], r"fit photos: holds files without efficientclip's mark"),
        (["--out", "."], r"is or holds the source"),
    ],
)
def test_what_cannot_be_is_told_before_any_work(shop: Path, words: list[str], said: str) -> None:
    import re

    made = fit(shop, "--out", "other", *words)
    assert made.returncode == 2 and re.search(said, " ".join(made.stderr.split())), made.stderr
    assert not (shop / "other" / "store").exists()
