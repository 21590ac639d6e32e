"""Both towers trained from shards: CLIP's loss and WenLan's, micro-batches, ranks, resume, and use of the run."""

from __future__ import annotations

import copy
import io
import json
import shutil
import tarfile
import threading
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
from tests import tiny
from tests.formats import chinese_clip, files
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
    sources = [open_source(path) for path in given.data.shards]
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
    changes = {"data__shards": [str(folder / "whole")], "training__batch_size": 24}
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
        given = load_config(config(folder, "other", data__shards=[str(path)], training__batch_size=20))
        loader = pairs(given).batches(given, 0, 1)
        batches.append([next(loader) for _ in range(6) if not loader.ended or loader.next_epoch() is None])
        loader.close()
    for one, other in zip(*batches, strict=True):
        assert one.keys == other.keys and torch.equal(one.caption_ids_M, other.caption_ids_M)
        assert torch.equal(one.inputs[0]["pixels"], other.inputs[0]["pixels"])


def test_what_makes_no_batch_for_other_ranks_ends_the_epoch(folder: Path, tmp_path: Path) -> None:
    tar, epochs = shard(tmp_path / "17.tar", 17, 3), []
    for seed in range(16):
        given = load_config(config(folder, "odd", data__shards=[str(tar)], training__batch_size=8, seed=seed))
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


def test_a_state_of_an_earlier_version_is_refused(folder: Path) -> None:
    given = load_config(config(folder, "earlier"))
    with pytest.raises(UserError, match="loader state: orders, shares missing, so another version wrote it"):
        pairs(given).batches(given, 0, 1).restore(dict.fromkeys(("epoch", "epoch_step", "step", "consumed"), 0))


@pytest.mark.parametrize(("ranks", "then", "objective"), [(1, 2, {}), (2, 1, MOMENTUM)], ids=["clip", "wenlan"])
def test_a_run_goes_on_with_other_ranks(folder: Path, ranks: int, then: int, objective: dict[str, Any]) -> None:
    def described(name: str, stage: int, **changes: Any) -> str:
        (folder / f"zero{stage}.json").write_text(json.dumps({"zero_optimization": {"stage": stage}}))
        settings = {"data__shards": [str(folder / "whole")], "deepspeed": str(folder / f"zero{stage}.json")}
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
