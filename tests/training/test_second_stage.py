"""The second stage (arXiv 2211.01335): a finished text run and the frozen tower it learned from train on together."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CLIPVisionModel

from efficientclip.config import Config, load_config
from efficientclip.errors import UserError
from efficientclip.evaluation.evaluate import evaluate
from efficientclip.model.efficientclip import EfficientCLIP, build_model, load_model
from efficientclip.model.frozen import FrozenImages
from efficientclip.prepare import pictures
from efficientclip.prepare.build import prepare
from efficientclip.training.run_folder import describe
from efficientclip.training.runs import Inputs, both_towers
from tests import tiny
from tests.model import hub
from tests.training import test_both_towers
from tests.training.launch import metrics, run

STEPS = 40


def tower(folder: Path, name: str = "tower") -> dict[str, Any]:
    return {"size": 16, "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25], "pretrained": str(folder / name)}


def text_config(folder: Path, name: str, **changes: Any) -> Path:
    settings: dict[str, Any] = {
        "run": str(folder / name),
        "data__store": str(folder / "store"),
        "data__tokenizer": str(folder / "vocab.txt"),
        "data__validation": {},
        "model__teacher": None,
        "model__image_tower": tower(folder),
        "objective__contrastive_weight": 1.0,
        "mlm__texts_per_batch": 0,
        "optimizer__lr": 3e-3,
        "training__pair_visits": 32 * STEPS,
    }
    return tiny.config(folder, **(settings | changes))


def second_stage(folder: Path, name: str, **changes: Any) -> Path:
    settings = {
        "model__image_tower": tower(folder),
        "model__start_from": str(folder / "text"),
        "optimizer__lr": 1e-4,
        "training__pair_visits": 16 * STEPS,
        "training__final": "last",
    }
    return test_both_towers.config(folder, name, **(settings | changes))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text run against a frozen tower of random weights, which tells the pictures' colours and sizes apart."""
    path = tmp_path_factory.mktemp("stages")
    tiny.tokenizer(path)
    (path / "train").mkdir()
    for number in range(2):
        test_both_towers.shard(path / "train" / f"{number}.tar", 60, number)
    test_both_towers.shard(path / "held.tar", 48, 9)
    torch.manual_seed(0)
    for name in ("tower", "other"):
        hub.clip_vision(path / name)
    CLIPVisionModel(hub.clip_config().vision_config).save_pretrained(path / "bare")
    given = text_config(path, "text")
    prepare(path / "train", path / "store", load_config(given))
    run(1, str(given))
    return path


@pytest.fixture(scope="module")
def before(folder: Path) -> dict[str, Any]:
    """Recall of the text run, on pictures that it did not see."""
    return evaluate(folder / "text", folder / "held.tar")


def recall(report: dict[str, Any]) -> float:
    """Mean of recall@1, 5 and 10 both ways, in per cent."""
    return float(report["t2i"]["mean_recall"] + report["i2t"]["mean_recall"]) / 2


def built(given: Config) -> tuple[Inputs, EfficientCLIP]:
    inputs = both_towers(given)
    return inputs, build_model(given.model, seed=given.seed, vocabulary=inputs.vocabulary, sides=("text", "image"))


def test_it_begins_where_the_text_run_ended(folder: Path, before: dict[str, Any]) -> None:
    inputs, model = built(load_config(second_stage(folder, "begins")))
    report = inputs.validate(model)["held"]
    for direction in ("t2i", "i2t"):
        assert report[direction]["queries"] == before[direction]["queries"]
        # The store's features are fp16.
        assert report[direction] == pytest.approx(before[direction], abs=0.05)
    assert torch.equal(model.logit_scale, load_model(folder / "text").logit_scale)


def test_both_towers_train_and_recall_does_not_fall(folder: Path, before: dict[str, Any]) -> None:
    _, start = built(load_config(second_stage(folder, "two")))
    run(1, str(second_stage(folder, "two")))
    losses = [line["loss"] for line in metrics(folder / "two")]
    assert sum(losses[-5:]) < sum(losses[:5])
    ended = load_model(folder / "two").state_dict()
    for name in ("text.projection.weight", "image.projection.weight", "logit_scale"):
        assert not torch.equal(ended[name], start.state_dict()[name])
    assert recall(evaluate(folder / "two", folder / "held.tar")) >= recall(before)
    # At an absurd rate it does.
    run(1, str(second_stage(folder, "fast", optimizer__lr=0.1)))
    assert recall(evaluate(folder / "fast", folder / "held.tar")) < recall(before) - 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__image_tower__pretrained": "other"}, r"text: learned from tower@.*other weights; give that of"),
        ({"model__image_tower__mean": [0.4, 0.5, 0.5]}, r"another size, mean or std of pictures; give that of"),
        ({"model__image_tower": test_both_towers.FRESH}, r"model\.image_tower is fresh: other weights; give that"),
        ({"model__text_tower__pooling": "mean"}, r"model\.text_tower\.pooling: mean, but .*with cls; set it to that"),
        ({"model__width": 8}, r"model\.image_tower: its projection is 16 wide; set model\.width to 16"),
        ({"data__tokenizer": "shorter/vocab.txt"}, r"data\.tokenizer: not that of .*text; give .*text/tokenizer"),
    ],
)
def test_another_pair_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(folder)
    Path("shorter").mkdir(exist_ok=True)
    Path("shorter/vocab.txt").write_text("".join(Path("vocab.txt").read_text().splitlines(keepends=True)[:-3]))
    with pytest.raises(UserError, match=message):
        built(load_config(second_stage(folder, "refused", **changes)))


@pytest.mark.parametrize(
    ("trained", "message"),
    [
        ({"model__image_tower": None, "model__teacher": {"kind": "usem3"}}, "learned from a teacher's texts"),
        ({"training__tower": "image"}, r"holds no text tower; give it as model\.image_tower\.pretrained"),
        (None, "is of an earlier version"),
    ],
)
def test_a_run_that_holds_no_pair_is_refused(folder: Path, trained: dict[str, Any] | None, message: str) -> None:
    start = folder / "start"
    shutil.rmtree(start, ignore_errors=True)
    given = load_config(text_config(folder, "start", **(trained or {})))
    start.mkdir()
    describe(given, {"store": None, "tower": "usem3", "tokenizer": None}, None)
    if trained is None:
        for name in ("identity.json", "digests.json"):
            (start / name).unlink()
    with pytest.raises(UserError, match=message):
        both_towers(load_config(second_stage(folder, "refused", model__start_from=str(start))))


def test_a_frozen_tower_whose_projection_was_drawn_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = {"model__image_tower": tower(folder, "bare")}
    given = text_config(folder, "bare-text", data__store=str(folder / "bare-store"), training__pair_visits=32, **bare)
    with pytest.raises(UserError, match=r"bare has no projection, .* make it one by `efficientclip fit-head`"):
        prepare(folder / "train", folder / "bare-store", load_config(given))
    # Earlier versions made such a store.
    monkeypatch.setattr(pictures, "_encoder", FrozenImages)
    prepare(folder / "train", folder / "bare-store", load_config(given))
    run(1, str(given))
    with pytest.raises(UserError, match=r"bare has no projection, .*start from a text run against a tower"):
        built(load_config(second_stage(folder, "drawn", model__start_from=str(folder / "bare-text"), **bare)))
