"""Both towers trained from shards: CLIP's loss and WenLan's, micro-batches, ranks, resume, and use of the run."""

from __future__ import annotations

import copy
import io
import json
import math
import shutil
import tarfile
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from efficientclip.config import Config, load_config
from efficientclip.data.batches import Batch, BatchLoader
from efficientclip.data.image_pairs import ImagePairs
from efficientclip.data.shards import read_members
from efficientclip.data.sources import open_source
from efficientclip.data.tokenizer import load_tokenizer
from efficientclip.errors import UserError
from efficientclip.evaluation.evaluate import evaluate
from efficientclip.model.efficientclip import load_model
from efficientclip.objectives.losses import both_sides_loss
from tests import tiny
from tests.formats import chinese_clip, files
from tests.training.launch import back_to, metrics, run

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


def shard(path: Path, count: int, seed: int, broken: int | None = 5) -> Path:
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
            image = b"no picture" if number == broken else file.getvalue()
            for name, content in (
                (f"{seed}-{number:04d}.png", image),
                (f"{seed}-{number:04d}.json", json.dumps({"captions": [{"text": text} for text in captions]}).encode()),
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
    (path / "whole").mkdir()
    for number in range(2):
        shard(path / "train" / f"{number}.tar", 60, number)
        shard(path / "whole" / f"{number}.tar", 60, number, broken=None)
    shard(path / "held.tar", 24, 9)
    return path


def config(folder: Path, name: str, **changes: Any) -> Path:
    settings: dict[str, Any] = {
        "run": str(folder / name),
        "data__store": None,
        "data__sources": {"train": str(folder / "train")},
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
    sources = [open_source(source.path) for source in given.data.sources.values() if source.path]
    return ImagePairs(sources, tower, load_tokenizer(given.data.tokenizer))


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
    # In the middle of the second epoch.
    back_to(folder / "ranks", 10)
    assert "at step 10 " in run(2, str(whole))
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
            seen += batch.keys
        loader.close()
    assert len(seen) == len(set(seen)) and len(seen) > 100


def on_ranks(loaders: list[BatchLoader], work: Callable[[Any], Any]) -> Any:
    """What `work` makes of the first loader, done with all at once: what they gather meets as among processes."""
    meeting, words, here = threading.Barrier(len(loaders)), dict[int, Any](), threading.local()

    def gather(found: list[Any], word: Any) -> None:
        words[here.rank] = word
        meeting.wait(60)
        found[:] = [words[rank] for rank in range(len(loaders))]
        meeting.wait(60)

    def rank_of(rank: int) -> Any:
        here.rank = rank
        return work(loaders[rank])

    with patch.object(torch.distributed, "all_gather_object", gather), ThreadPoolExecutor(len(loaders)) as threads:
        made = list(threads.map(rank_of, range(len(loaders))))
    return made[0]


def two_epochs(given: Config, *worlds: int) -> list[tuple[int, list[str], torch.Tensor]]:
    """Epoch, keys and pixels of each global batch; behind every second one, the run goes on with other ranks."""
    found: list[tuple[int, list[str], torch.Tensor]] = []
    state = None
    for world in cycle(worlds):
        loaders = [pairs(given).batches(given, rank, world) for rank in range(world)]
        if state is not None:
            on_ranks(loaders, lambda loader: loader.restore(state))  # noqa: B023
        for _ in range(2):
            epoch, batches = loaders[0].epoch, [next(loader) for loader in loaders]
            if epoch == 2:
                for loader in loaders:
                    loader.close()
                return found
            keys = [key for batch in batches for key in batch.keys]
            found.append((epoch, keys, torch.cat([part["pixels"] for batch in batches for part in batch.inputs])))
            if any([loader.ended for loader in loaders]):
                for loader in loaders:
                    loader.next_epoch()
        state = on_ranks(loaders, lambda loader: loader.state())
        for loader in loaders:
            loader.close()
    return found


@pytest.mark.parametrize("worlds", [(1, 2), (2, 1), (2, 3, 4), (4, 1, 3)])
def test_batches_stay_when_ranks_change(folder: Path, worlds: tuple[int, ...]) -> None:
    changes = {"data__sources": {"whole": str(folder / "whole")}, "training__batch_size": 24}
    given = load_config(config(folder, "stay", **changes, training__augmentation={"flip": True, "colour": 0.5}))
    found, expected = two_epochs(given, *worlds), two_epochs(given, worlds[0])
    assert [epoch for epoch, _, _ in found] == [0] * 5 + [1] * 5
    for (_, keys, pixels), (_, other_keys, other_pixels) in zip(found, expected, strict=True):
        assert keys == other_keys
        assert torch.equal(pixels, other_pixels)
    assert sorted(key for _, keys, _ in found[:5] for key in keys) == sorted(key for _, k, _ in found[5:] for key in k)


@pytest.mark.parametrize("worlds", [(1, 2), (2, 1), (2, 3, 4), (4, 1, 3)])
def test_no_pair_comes_twice_when_ranks_change_beside_a_broken_picture(folder: Path, worlds: tuple[int, ...]) -> None:
    found = two_epochs(load_config(config(folder, "twice", training__batch_size=24)), *worlds)
    assert [epoch for epoch, _, _ in found] == [0] * 4 + [1] * 4
    for first in (0, 4):
        seen = [key for _, keys, _ in found[first : first + 4] for key in keys]
        assert len(seen) == len(set(seen)) == 96


@pytest.mark.parametrize("kind", ["base64", "files"])
def test_batches_of_other_sources_are_those_of_the_tar(folder: Path, tmp_path: Path, kind: str) -> None:
    tar = folder / "whole" / "0.tar"
    samples = {
        key: (members["png"][0], [caption["text"] for caption in json.loads(members["json"][0])["captions"]])
        for key, members in read_members(tar)
    }
    texts = [(key, text) for key, (_, captions) in samples.items() for text in captions]
    if kind == "base64":
        lines = [{"text_id": n, "text": text, "image_ids": [key]} for n, (key, text) in enumerate(texts)]
        source = chinese_clip(tmp_path, "t", {key: picture for key, (picture, _) in samples.items()}, lines)
    else:
        files(tmp_path, {key: picture for key, (picture, _) in samples.items()})
        source = tmp_path / "t.csv"
        source.write_text("image,caption\n" + "".join(f"{key},{text}\n" for key, text in texts))
    batches: list[list[Batch]] = []
    for path in (tar, source):
        given = load_config(config(folder, "other", data__sources={"x": str(path)}, training__batch_size=20))
        loader = pairs(given).batches(given, 0, 1)
        batches.append([next(loader) for _ in range(6) if not loader.ended or loader.next_epoch() is None])
        loader.close()
    for one, other in zip(*batches, strict=True):
        assert one.keys == other.keys and torch.equal(one.caption_ids_M, other.caption_ids_M)
        assert torch.equal(one.inputs[0]["pixels"], other.inputs[0]["pixels"])


def test_what_makes_no_batch_for_other_ranks_ends_the_epoch(folder: Path, tmp_path: Path) -> None:
    tar, epochs = shard(tmp_path / "17.tar", 17, 3), []
    for seed in range(16):
        given = load_config(config(folder, "odd", data__sources={"x": str(tar)}, training__batch_size=8, seed=seed))
        alone = pairs(given).batches(given, 0, 1)
        next(alone)
        assert not alone.ended
        state = alone.state()
        loaders = [pairs(given).batches(given, rank, 2) for rank in range(2)]
        on_ranks(loaders, lambda loader: loader.restore(state))  # noqa: B023
        first, second = (loader.epoch for loader in loaders)
        assert first == second and not any([loader.ended for loader in loaders])
        epochs.append(first)
        for loader in (alone, *loaders):
            loader.close()
    # Where the second rank's run of four holds the broken one.
    assert set(epochs) == {0, 1}


def epoch_of(given: Config, epoch: int = 0, world: int = 1) -> list[tuple[str, int]]:
    """Keys and ids of the captions of an epoch's pairs, rank after rank."""
    found: list[tuple[str, int]] = []
    for rank in range(world):
        loader = pairs(given).batches(given, rank, world)
        for _ in range(epoch):
            loader.next_epoch()
        while not loader.ended:
            batch = next(loader)
            assert batch.caption_ids_M is not None and len(batch.inputs[0]["pixels"]) == len(batch.keys)
            found += zip(batch.keys, batch.caption_ids_M.tolist(), strict=True)
        loader.close()
    return found


def weighing(folder: Path, *weights: float, captions: str = "random", batch: int = 1) -> Config:
    """Both whole shards as sources of their own: 60 pictures each, of which every third has two captions."""
    sources = {
        f"s{number}": {"path": str(folder / "whole" / f"{number}.tar"), "weight": weight, "captions": captions}
        for number, weight in enumerate(weights)
    }
    return load_config(config(folder, "weighing", data__sources=sources, training__batch_size=batch))


@pytest.mark.parametrize("weights", [(1, 1), (0.5, 1), (1, 2.5)], ids=str)
def test_sources_come_as_often_as_they_weigh_whatever_the_ranks(folder: Path, weights: tuple[float, ...]) -> None:
    given = weighing(folder, *weights)
    epochs = [Counter(key for key, _ in epoch_of(given, epoch)) for epoch in range(8)]
    for number, weight in enumerate(weights):
        times = np.array([[seen[f"{number}-{at:04d}"] for at in range(60)] for seen in epochs])
        assert {*times.flat} == {math.floor(weight), math.ceil(weight)}
        # Five deviations of the mean of 480 draws.
        assert times.mean() == pytest.approx(weight, abs=0 if weight == int(weight) else 5 * 0.5 / 480**0.5)
    assert len({tuple(sorted(seen.items())) for seen in epochs}) == (1 if set(weights) == {1} else 8)
    two = given.model_copy(update={"training": given.training.model_copy(update={"batch_size": 2})})
    of_ranks = Counter(key for key, _ in epoch_of(two, world=2))
    assert of_ranks == epochs[0] or (of_ranks - epochs[0] == Counter() and (epochs[0] - of_ranks).total() <= 1)


def test_each_visit_shows_another_caption_or_the_first_or_all(folder: Path) -> None:
    captions: dict[str, list[int]] = {}
    for key, caption in epoch_of(weighing(folder, 1, captions="all")):
        captions.setdefault(key, []).append(caption)
    assert [len(texts) for _, texts in sorted(captions.items())] == [2 if at % 3 == 0 else 1 for at in range(60)]
    first = [epoch_of(weighing(folder, 1, captions="first"), epoch) for epoch in range(2)]
    assert all(caption == captions[key][0] for seen in first for key, caption in seen)
    shown = [dict(epoch_of(weighing(folder, 1), epoch)) for epoch in range(2)]
    twice = epoch_of(weighing(folder, 2))
    for key, texts in captions.items():
        assert {seen[key] for seen in shown} == {caption for name, caption in twice if name == key} == {*texts}


def test_a_picture_that_comes_twice_is_no_negative_of_itself(folder: Path) -> None:
    given = weighing(folder, 1, captions="all", batch=80)
    loader = pairs(given).batches(given, 0, 1)
    batch = next(loader)
    assert loader.ended
    loader.close()
    ids = batch.image_ids_M
    assert ids is not None
    equal = np.array(batch.keys)[:, None] == np.array(batch.keys)
    assert ((ids[:, None] == ids).numpy() == equal).all() and equal.sum() == 40 * 1 + 20 * 4
    random = torch.Generator().manual_seed(0)
    text, image = (F.normalize(torch.randn(80, 8, generator=random), dim=1) for _ in range(2))
    captions = batch.caption_ids_M
    assert captions is not None
    masked = (torch.from_numpy(equal) | (captions[:, None] == captions)) & ~torch.eye(80, dtype=torch.bool)
    logits = (10 * text @ image.T).masked_fill(masked, -torch.inf)
    target = torch.arange(80)
    expected = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    with patch.object(torch.distributed, "get_world_size", lambda *_: 1):
        found = both_sides_loss(text, image, torch.tensor(10.0), batch, given.objective)
    assert float(found.contrastive) == pytest.approx(float(expected), rel=1e-5)
    # Where none comes twice, the loss is told nothing.
    once = weighing(folder, 1, 1, batch=8)
    loader = pairs(once).batches(once, 0, 1)
    assert next(loader).image_ids_M is None
    loader.close()


@pytest.mark.parametrize("worlds", [(1,), (1, 2), (2, 1), (2, 3, 4), (4, 1, 3)])
@pytest.mark.parametrize("captions", ["all", "random"])
def test_weighted_pairs_go_on_when_ranks_change(folder: Path, worlds: tuple[int, ...], captions: str) -> None:
    given = weighing(folder, 1.5, 2, captions=captions, batch=24)
    found = two_epochs(given, *worlds)
    expected = two_epochs(given, worlds[0])
    if captions == "random" or worlds in [(1,), (2, 1)]:
        for (_, keys, pixels), (_, other_keys, other_pixels) in zip(found, expected, strict=True):
            assert keys == other_keys and torch.equal(pixels, other_pixels)
    most = weighing(folder, 1.5, 2, captions=captions)
    for epoch in range(2):
        whole = Counter(key for key, _ in epoch_of(most, epoch))
        seen = Counter(key for when, keys, _ in found if when == epoch for key in keys)
        # None comes more often than in the epoch, which ends with the first order that makes no batch.
        assert seen - whole == Counter() and seen.total() >= 0.6 * whole.total()


def test_a_loader_goes_on_amid_the_captions_of_a_picture(folder: Path) -> None:
    given = weighing(folder, 1.5, 1, captions="all", batch=5)
    loader = pairs(given).batches(given, 0, 1)
    whole, states = [], []
    while not loader.ended:
        whole.append(next(loader))
        states.append(loader.state())
    loader.close()
    assert any(state["given"].any() for state in states)
    for at in range(0, len(whole) - 1, 4):
        again = pairs(given).batches(given, 0, 1)
        again.restore(states[at])
        for batch in whole[at + 1 : at + 3]:
            found = next(again)
            assert found.keys == batch.keys and torch.equal(found.caption_ids_M, batch.caption_ids_M)
            assert torch.equal(found.inputs[0]["pixels"], batch.inputs[0]["pixels"])
        again.close()


def test_a_run_on_weighted_sources_resumes_as_if_never_stopped(folder: Path) -> None:
    sources = {
        f"s{number}": {"path": str(folder / "train" / f"{number}.tar"), "weight": weight, "captions": captions}
        for number, (weight, captions) in enumerate([(0.5, "all"), (1.5, "random")])
    }
    whole = config(folder, "weighted", data__sources=sources, training__keep_checkpoints=9)
    run(2, str(whole))
    expected = losses(folder / "weighted")
    back_to(folder / "weighted", 10)
    assert "at step 10 " in run(2, str(whole))
    assert losses(folder / "weighted") == expected


def test_a_state_of_an_earlier_version_is_refused(folder: Path) -> None:
    given = load_config(config(folder, "earlier"))
    with pytest.raises(UserError, match="loader state: orders, shares missing, so another version wrote it"):
        pairs(given).batches(given, 0, 1).restore(dict.fromkeys(("epoch", "epoch_step", "step", "consumed"), 0))


@pytest.mark.parametrize(("ranks", "then", "objective"), [(1, 2, {}), (2, 1, MOMENTUM)], ids=["clip", "wenlan"])
def test_a_run_goes_on_with_other_ranks(folder: Path, ranks: int, then: int, objective: dict[str, Any]) -> None:
    def described(name: str, stage: int, **changes: Any) -> str:
        (folder / f"zero{stage}.json").write_text(json.dumps({"zero_optimization": {"stage": stage}}))
        settings = {"data__sources": {"whole": str(folder / "whole")}, "deepspeed": str(folder / f"zero{stage}.json")}
        settings |= {"training__keep_checkpoints": 9, "training__pair_visits": 16 * 25, **objective}
        return str(config(folder, name, **(settings | changes)).rename(folder / f"{name}.yaml"))

    name = f"from-{ranks}"
    run(ranks, described(name, 0))
    # In the middle of the first epoch of seven steps.
    shutil.copytree(folder / name, folder / f"{name}-again")
    shutil.rmtree(folder / f"{name}-again/model")
    for checkpoint in (folder / f"{name}-again/checkpoints").glob("step-*"):
        if checkpoint.name != "step-00000005":
            shutil.rmtree(checkpoint)
    micro = described(f"{name}-again", 1, training__micro_batch_size=4)
    assert "at step 5 " in run(then, micro)
    expected, found = losses(folder / name), losses(folder / f"{name}-again")
    assert len(expected) == 25
    assert found == pytest.approx(expected, rel=1e-4)


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
