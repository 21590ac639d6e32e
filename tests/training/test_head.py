"""A head in closed form: its space is the teacher's, turned; its folder is that of a finished image run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from efficientclip.config import Config, load_config
from efficientclip.data.sources import open_source
from efficientclip.errors import UserError
from efficientclip.model.efficientclip import load_model
from efficientclip.model.frozen import FrozenImages, image_tower_name
from efficientclip.model.lite import EfficientNetLiteConfig, EfficientNetLiteForImageClassification
from efficientclip.training.head import HARDLY, principal_head, with_classes
from efficientclip.verify import broken, verify
from tests import formats, tiny
from tests.model import hub
from tests.prepare.tars import write_tar
from tests.training.launch import run

LAYERS = [0, -1]


def normalised(rows_ND: Any) -> Any:
    return rows_ND / np.linalg.norm(rows_ND, axis=1, keepdims=True)


def test_a_head_finds_the_turn_to_the_teacher() -> None:
    random = np.random.default_rng()
    pooled_NF = (random.standard_normal((300, 24)) * np.geomspace(1, 0.01, 24) + 3).astype(np.float32)
    weight_DF, bias_D = principal_head(pooled_NF, None, 8)
    plain_ND = pooled_NF @ weight_DF.T + bias_D
    # Centred, apart in uncorrelated directions, each divided by the root of its singular value.
    offset = pooled_NF.astype(np.float64) - pooled_NF.mean(0, dtype=np.float64)
    singular = np.linalg.svd(offset, compute_uv=False)[:8]
    np.testing.assert_allclose(
        plain_ND.T @ plain_ND, np.diag(singular * singular[0]), atol=1e-5 * singular[0] ** 2, rtol=1e-4
    )
    turn, _ = np.linalg.qr(random.standard_normal((8, 8)))
    targets_ND = normalised(plain_ND) @ turn
    weight_DF, bias_D = principal_head(pooled_NF, targets_ND.astype(np.float32), 8)
    np.testing.assert_allclose(normalised(pooled_NF @ weight_DF.T + bias_D), targets_ND, atol=1e-5)


def test_too_few_directions_are_refused() -> None:
    pooled_NF = np.random.default_rng().standard_normal((50, 4)).astype(np.float32)
    for rows, width in ((pooled_NF, 5), (pooled_NF[:, :1] * np.ones(6, np.float32), 3)):
        with pytest.raises(UserError, match=rf"model\.width: {width}, but the tower tells pictures apart in"):
            principal_head(rows, None, width)
    with pytest.raises(UserError, match=r"model\.width: 4, but the teacher's features are 3 wide"):
        principal_head(pooled_NF, pooled_NF[:, :3], 4)


def test_names_of_classes_are_told_where_the_pictures_hardly_vary() -> None:
    random = np.random.default_rng()
    noise_NF = random.standard_normal((400, 20)) * np.repeat([1, 0.01, 1], [6, 6, 8])
    # Pooled output and the mean of a layer, each normalised.
    pooled_NF = np.concatenate([normalised(noise_NF[:, :12] + 2), normalised(noise_NF[:, 12:])], 1).astype(np.float32)
    weight_DF, _ = principal_head(pooled_NF, None, 8)
    rows_CP = random.standard_normal((30, 12)).astype(np.float32)
    named_CD = normalised(random.standard_normal((30, 8))).astype(np.float32)
    named_DF, named_D = with_classes(pooled_NF, weight_DF, rows_CP, named_CD, 0.2)
    offset_NF = pooled_NF.astype(np.float64) - pooled_NF.mean(0, dtype=np.float64)
    np.testing.assert_allclose(named_DF @ pooled_NF.mean(0, dtype=np.float64), -named_D, atol=1e-9)
    added_DP = named_DF[:, :12] - weight_DF[:, :12]
    assert (named_DF[:, 12:] == weight_DF[:, 12:]).all()
    lengths = [
        np.linalg.norm(rows, axis=1).mean() for rows in (offset_NF @ weight_DF.T, offset_NF[:, :12] @ added_DP.T)
    ]
    np.testing.assert_allclose(lengths[1], 0.2 * lengths[0], rtol=1e-6)
    # The ridge as a least squares of the pictures, which shall say nothing, and of the classes' directions.
    ridge = HARDLY * (offset_NF[:, :12] ** 2).sum() / len(offset_NF) / 12
    told_PD = (rows_CP - rows_CP.mean(0)).T.astype(np.float64) @ (named_CD - named_CD.mean(0))
    asked = np.concatenate([offset_NF[:, :12] / len(offset_NF) ** 0.5, ridge**0.5 * np.eye(12)])
    wanted = np.concatenate([np.zeros((len(offset_NF), 8)), ridge**0.5 * told_PD])
    expected_DP = np.linalg.lstsq(asked, wanted, rcond=None)[0].T
    expected_DP *= np.linalg.norm(added_DP) / np.linalg.norm(expected_DP)
    np.testing.assert_allclose(added_DP, expected_DP, rtol=1e-4, atol=1e-5 * np.abs(expected_DP).max())
    # It says most of a picture that differs as none of these does.
    quiet, loud = (np.linalg.norm(added_DP[:, part], axis=0).mean() for part in (slice(6, 12), slice(6)))
    assert quiet > 3 * loud
    with pytest.raises(UserError, match=r"head\.classes: the tower's classifier reads 11 features, which are not its"):
        with_classes(pooled_NF, weight_DF, rows_CP[:, :11], named_CD, 0.2)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """The config of a head for a CLIP's tower, of 40 pictures of which 30 have English names."""
    hub.clip_vision(tmp_path / "tower")
    hub.clip(tmp_path / "teacher")
    hub.clip_tokenizer(tmp_path / "teacher")
    members = {}
    for number in range(40):
        named = {"captions_en": [f"thing {chr(97 + number % 26)}", "animal"]} if number % 4 else {}
        members[f"{number:02}.png"] = formats.picture(number, hub.PIXELS)
        members[f"{number:02}.json"] = json.dumps({"caption": "猫", **named}).encode()
    write_tar(tmp_path / "pictures.tar", members)
    return tiny.config(
        tmp_path,
        run=str(tmp_path / "head"),
        data={
            "sources": {"web": str(tmp_path / "pictures.tar")},
            "validation": {"same": str(tmp_path / "pictures.tar")},
        },
        model={
            "width": tiny.WIDTH,
            "image_tower": {"pretrained": str(tmp_path / "tower"), "size": hub.PIXELS},
            "teacher": {"pretrained": str(tmp_path / "teacher")},
        },
        head={"layers": LAYERS},
        mlm={"texts_per_batch": 0},
        confidence={},
        training={"tower": "image", "pair_visits": 1000, "batch_size": 8},
    )


def opened(file: Path) -> Config:
    config = load_config(file)
    tower = {"pretrained": str(config.run), "size": hub.PIXELS}
    return load_config(file, [f"model.image_tower={json.dumps(tower)}", f"run={config.run.parent / 'other'}"])


def test_the_folder_is_a_frozen_tower(file: Path, tmp_path: Path) -> None:
    told = run(1, str(file), module="efficientclip.fit_head")
    assert "a head of 16 dimensions; same t2i R@10" in told
    assert broken(verify(tmp_path / "head")) is None
    frozen = FrozenImages(opened(file))
    assert image_tower_name(frozen.tower).startswith("head@")
    with frozen.loader(open_source(tmp_path / "pictures.tar")) as loader:
        (batch,) = loader
    features_MD = frozen.encode_pixels(batch.images)
    # What the head reads: the pooled output, and the means of the embeddings and of the last states.
    tower = hub.CLIPVisionModelWithProjection.from_pretrained(tmp_path / "tower").eval().vision_model
    with torch.no_grad():
        output = tower(batch.images, output_hidden_states=True)
    parts = [output.pooler_output, *(output.hidden_states[layer].mean(1) for layer in LAYERS)]
    pooled_MF = np.concatenate([normalised(part.double().numpy()) for part in parts], 1)
    projection: Any = load_model(tmp_path / "head").image.projection  # type: ignore[union-attr]
    expected = normalised(
        pooled_MF @ projection.weight.detach().double().numpy().T + projection.bias.detach().double().numpy()
    )
    np.testing.assert_allclose(features_MD, expected, atol=2e-4)
    # The same once more changes nothing; other layers are another head.
    before = (tmp_path / "head" / "model" / "model.safetensors").read_bytes()
    assert "stands already" in run(1, str(file), module="efficientclip.fit_head")
    assert (tmp_path / "head" / "model" / "model.safetensors").read_bytes() == before
    assert "head.layers differ" in run(1, str(file), "head.layers=[1]", module="efficientclip.fit_head", code=2)


def test_a_classifier_tells_what_its_classes_are_called(file: Path, tmp_path: Path) -> None:
    described = EfficientNetLiteConfig(
        stages=[[1, 3, 2, 6, 8]],
        stem_channels=8,
        hidden_size=24,
        id2label=dict(enumerate(["cat", "dog", "saw", "pear"])),
    )
    torch.manual_seed(0)
    EfficientNetLiteForImageClassification(described).save_pretrained(tmp_path / "lite")
    tower = [f"model.image_tower.pretrained={tmp_path / 'lite'}", "head.layers=[-1]"]
    run(1, str(file), *tower, module="efficientclip.fit_head")
    plain = load_model(tmp_path / "head").image
    named = [*tower, f"run={tmp_path / 'named'}", "head.classes=0.5"]
    assert "a head of 16 dimensions; same t2i R@10" in run(1, str(file), *named, module="efficientclip.fit_head")
    told = load_model(tmp_path / "named").image
    pixels = torch.randn(3, 3, hub.PIXELS, hub.PIXELS)
    with torch.no_grad():
        pooled_MF = plain.pooled(pixels)  # type: ignore[union-attr]
        assert torch.equal(pooled_MF, told.pooled(pixels))  # type: ignore[union-attr]
        before, after = (image.projection(pooled_MF) for image in (plain, told))  # type: ignore[union-attr]
    assert 0 < (after - before).norm() < before.norm()
    message = run(1, str(file), *named, "model.teacher=null", module="efficientclip.fit_head", code=2)
    assert "head.classes: needs model.teacher, which reads what the tower's classes are called" in message


def test_what_was_cut_short_is_made_again(file: Path, tmp_path: Path) -> None:
    run(1, str(file), module="efficientclip.fit_head")
    head = tmp_path / "head"
    before = (head / "model" / "model.safetensors").read_bytes()
    (head / "metrics.jsonl").unlink()
    (head / "model" / "model.safetensors").unlink()
    kept = json.loads((head / "digests.json").read_text())
    kept.pop("metrics.jsonl")
    (head / "digests.json").write_text(json.dumps(kept))
    (head / "checkpoints").mkdir()
    assert "holds a run that was trained" in run(1, str(file), module="efficientclip.fit_head", code=2)
    (head / "checkpoints").rmdir()
    run(1, str(file), module="efficientclip.fit_head")
    assert (head / "model" / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "model.width=32",
            r"30 pictures with `captions_en`, which model\.teacher reads, in .*; a head of model\.width=32",
        ),
        ("training.tower=text", r"fit-head: needs training\.tower=image and model\.image_tower\.pretrained"),
        ("head.classes=0.1", r"model\.image_tower\.pretrained: \S+tower was saved without a classifier, whose names"),
        ("head.layers=[0,3]", r"head\.layers: 3, but this tower tells 3 hidden states, 0 the first"),
        ("head.layer=[1]", r"head\.layer.*did you mean `layers`"),
    ],
)
def test_mistakes_are_told(file: Path, change: str, message: str) -> None:
    told = run(1, str(file), change, module="efficientclip.fit_head", code=2)
    assert re.search(message, told)
