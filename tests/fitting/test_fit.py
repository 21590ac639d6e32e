"""The whole road: a table of products and their photographs in, a model and what is wrong with the table out."""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import (
    BertConfig,
    BertModel,
    BitImageProcessorPil,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from efficientclip.cli import main
from efficientclip.config import load_config
from efficientclip.data.store import Store
from efficientclip.errors import UserError
from tests import tiny
from tests.model import hub

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
    shutil.copytree(folder / "image", folder / "wider")
    CLIPVisionModelWithProjection(described).save_pretrained(folder / "wider")
    tokens = tiny.tokenizer(folder / "vocabulary")
    tokens.save_pretrained(folder / "text")
    BertModel(
        BertConfig(
            vocab_size=len(tokens), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
            max_position_embeddings=80,
        )
    ).save_pretrained(folder / "text")  # fmt: skip
    return folder


@pytest.fixture
def fit(
    shop: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """`efficientclip fit products.csv WORD …` in the shop: its exit code, and what it says on stderr."""
    monkeypatch.chdir(shop)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    given = ["fit", "products.csv", "--images", "photos", "--out", "made", "--image-tower", "image"]

    def called(*words: str) -> tuple[int, str]:
        code = main([*given, "--text-tower", "text", *words])
        return code, " ".join(capsys.readouterr().err.split())

    return called


def test_a_table_becomes_a_model_by_one_command(shop: Path, fit: Callable[..., tuple[int, str]]) -> None:
    asked = "training.precision=fp32", "--epochs", "40", "--held-out", "0.25", "--ranks", "1"
    code, said = fit(*asked)
    assert code == 0, said
    assert "图片 is the picture, 标题 is the caption, sku is the key; 价格 not used" in said
    out = shop / "made"
    for name in ("model/config.json", "report.html", "audit.html", "suspects.csv", "config.yaml", "run/model"):
        assert (out / name).exists(), name
    with (out / "cleaned.csv").open(encoding="utf-8-sig", newline="") as stream:
        rows = list(csv.DictReader(stream))
    with (shop / "products.csv").open(encoding="utf-8", newline="") as stream:
        given = list(csv.DictReader(stream))
    assert [{key: row[key] for key in given[0]} for row in rows] == given
    held = [row for row in rows if row["why"].startswith("held out")]
    assert 2 <= len(held) <= 12 and all(row["kept"] == "yes" and not row["wrong_probability"] for row in held)
    (work,) = (path for path in (out / "work").iterdir())
    assert len(Store(work / "train")) == PAIRS - len(held)
    # Finished, it is told again at once: nothing but the source is looked at, and what a person wrote stays.
    before = (work / "stages.json").stat().st_mtime_ns
    (out / "cleaned.csv").write_text("mine", encoding="utf-8")
    assert fit(*asked)[0] == 0
    assert (work / "stages.json").stat().st_mtime_ns == before and (out / "cleaned.csv").read_text() == "mine"
    stages = {"cross-fit", "train", "report", "audit", "export", "cleaned"}
    assert {*json.loads((work / "stages.json").read_text())} == stages
    code, said = fit(*asked, "--image-tower", "wider")
    assert code == 2 and "--out made: its pictures went through image@" in said


def test_a_tower_without_a_space_gets_one_that_stays(
    shop: Path, fit: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.dinov2(shop / "dinov2")
    square = {"height": hub.PIXELS, "width": hub.PIXELS}
    BitImageProcessorPil(size={"shortest_edge": hub.PIXELS}, crop_size=square).save_pretrained(shop / "dinov2")
    rows, out = (shop / "products.csv").read_text(encoding="utf-8").splitlines(keepends=True), shop / "far"
    asked = "--out", "far", "--image-tower", "dinov2", "training.precision=fp32", "--ranks", "1"

    def split(*_: object) -> None:
        raise UserError("the store stands")

    monkeypatch.setattr("efficientclip.fitting.fit._parts", split)
    try:
        (shop / "products.csv").write_text("".join(rows[:33]), encoding="utf-8")
        code, said = fit(*asked)
    finally:
        (shop / "products.csv").write_text("".join(rows), encoding="utf-8")
    assert (code, said.endswith("error: the store stands")) == (2, True), said
    # In the table of what it will take, and done.
    assert re.search(r"head │ \d+ s │ │ prepare", said) and re.search(
        r" head: \d+ s; \S+: a head of 16 dimensions", said
    )
    assert Store(out / "store").width == 16 and len(Store(out / "store")) == 32
    model = load_config(out / "draft.yaml").model
    assert model.width == 16 and model.image_tower is not None and model.image_tower.pretrained == str(out / "head")
    before = (out / "head" / "model" / "model.safetensors").stat().st_mtime_ns
    code, said = fit(*asked)
    assert "head: of 16 dimensions, made of the pictures that there were first, where there are enough for 24" in said
    assert len(Store(out / "store")) == PAIRS
    assert (out / "head" / "model" / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--image-tower", "text"], r"--image-tower text: is a bert, no image tower"),
        (["--text-tower", "nowhere"], r"--text-tower nowhere: no model folder, run or reachable hub id"),
        (["--verdicts", "marked.csv"], r"--verdicts marked.csv: no such file"),
        (["--budget", "soon"], r"--budget 'soon': write it as 15m"),
        (["--held-out", "0.7"], r"--held-out 0.7: give 0 to 0.5"),
        (["--images", "text"], r"none of the pictures looked for is there"),
        (["training.batchsize=4"], r"training.batchsize: unknown key; did you mean `batch_size`"),
        (["--out", "photos"], r"is or holds the source photos"),
        (["--out", "."], r"is or holds the source"),
    ],
)
def test_what_cannot_be_is_told_before_any_work(
    shop: Path, fit: Callable[..., tuple[int, str]], words: list[str], said: str
) -> None:
    code, told = fit("--out", "other", *words)
    assert code == 2 and re.search(said, told), told
    assert not (shop / "other" / "store").exists()
