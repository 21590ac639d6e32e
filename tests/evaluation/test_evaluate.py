from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from efficientclip.cli import main
from efficientclip.data.store import Store, edges
from efficientclip.errors import UserError
from efficientclip.evaluation.evaluate import evaluate
from efficientclip.evaluation.run import open_run
from efficientclip.evaluation.search import square_picture
from efficientclip.objectives.retrieval import best_ranks, summary
from tests.evaluation.conftest import World

Scores = npt.NDArray[np.float32]


def naive_ranks(score_QK: Scores, positives: set[tuple[int, int]]) -> list[float]:
    ranks = []
    for query, scores in enumerate(score_QK):
        right = [k for k in range(len(scores)) if (query, k) in positives]
        others = [scores[k] for k in range(len(scores)) if k not in right]
        best = max(scores[k] for k in right)
        ranks.append(1 + sum(s > best for s in others) + sum(s == best for s in others) / 2)
    return ranks


@pytest.mark.parametrize("queries", [1, 7, 600])
def test_ranks_equal_a_naive_loop_with_ties_and_several_positives(queries: int) -> None:
    random = np.random.default_rng(queries)
    # Small whole numbers: many ties, and exact in any order of summation.
    query_QD = random.integers(-1, 2, (queries, 4)).astype(np.float32)
    image_KD = random.integers(-1, 2, (23, 4)).astype(np.float32)
    pairs = [(query, int(k)) for query in range(queries) for k in random.choice(23, random.integers(1, 4), False)]
    left, right = np.array(pairs).T
    ranks = best_ranks(query_QD, image_KD, edges(left, right, queries))
    expected = naive_ranks(query_QD @ image_KD.T, set(pairs))
    np.testing.assert_array_equal(ranks, expected)
    assert summary(ranks)["R@5"] == round(100 * sum(rank <= 5 for rank in expected) / queries, 2)


def test_report_of_a_store_has_the_documented_layout_and_figures(world: World) -> None:
    report = evaluate(world.run, world.store)
    assert list(report) == ["t2i", "i2t", "candidates", "texts"]
    for direction in ("t2i", "i2t"):
        assert list(report[direction]) == ["R@1", "R@5", "R@10", "mean_rank", "queries"]
    store = Store(world.store)
    score_QK = open_run(world.run).encode_store(store) @ store.features.astype(np.float32).T
    pairs = set(zip(store.caption_ids.tolist(), store.image_ids.tolist(), strict=True))
    assert report["t2i"] == summary(np.array(naive_ranks(score_QK, pairs)))
    assert report["i2t"] == summary(np.array(naive_ranks(score_QK.T, {(image, text) for text, image in pairs})))
    assert (report["candidates"], report["texts"]) == (12, 16)


def test_texts_encode_alike_from_strings_and_from_a_store(world: World) -> None:
    run, store = open_run(world.run), Store(world.store)
    captions = dict(zip(store.caption_ids.tolist(), store.pairs()["caption"].to_pylist(), strict=True))
    features = run.encode_texts([captions[number] for number in range(len(captions))])
    np.testing.assert_allclose(features, run.encode_store(store), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, atol=1e-5)


def test_the_frozen_tower_gives_the_features_of_the_store(world: World) -> None:
    store = Store(world.store)
    pairs = {pair["image_id"]: pair for pair in store.pairs().to_pylist()}
    features = open_run(world.run).frozen.encode([square_picture(pairs[image], 16) for image in range(len(pairs))])
    np.testing.assert_allclose(features, store.features, atol=1e-3)


def test_tar_folder_and_store_agree_and_json_holds_the_result(world: World, tmp_path: Path) -> None:
    expected = evaluate(world.run, world.store)
    folder = tmp_path / "shards"
    folder.mkdir()
    shutil.copy(world.tar, folder)
    assert evaluate(world.run, folder) == expected
    file = tmp_path / "result.json"
    assert main(["evaluate", str(world.run), str(world.tar), "--json", str(file)]) == 0
    assert json.loads(file.read_text()) == expected


@pytest.mark.parametrize("pointers", [("best", "latest"), ("latest",)])
def test_an_unfinished_run_is_opened_at_its_best_or_latest_checkpoint(world: World, pointers: tuple[str, ...]) -> None:
    expected = evaluate(world.run, world.store)
    checkpoint = world.run / "checkpoints" / f"step-of-{pointers[0]}"
    checkpoint.mkdir(parents=True)
    (world.run / "model").rename(checkpoint / "model")
    for pointer in pointers:
        (world.run / "checkpoints" / pointer).write_text(f"step-of-{pointer}")
    assert evaluate(world.run, world.store) == expected


def test_a_run_without_any_model_says_so(world: World) -> None:
    (world.run / "model").unlink()
    with pytest.raises(UserError, match="neither a model nor a checkpoint"):
        evaluate(world.run, world.store)


@pytest.mark.parametrize(
    ("key", "message"), [("tower", "features of other, but .* needs image-run@"), ("tokenizer", "another tokenizer")]
)
def test_a_store_of_another_tower_or_tokenizer_is_refused(world: World, tmp_path: Path, key: str, message: str) -> None:
    store = tmp_path / "other"
    shutil.copytree(world.store, store)
    manifest = json.loads((store / "manifest.json").read_text())
    (store / "manifest.json").write_text(json.dumps(manifest | {key: "other"}))
    with pytest.raises(UserError, match=message):
        evaluate(world.run, store)


def test_pictures_are_refused_when_the_image_tower_changed(world: World, tmp_path: Path) -> None:
    config = world.run / "config.yaml"
    text = config.read_text()
    tower = next(line.split()[-1] for line in text.splitlines() if "image-run" in line)
    other = tmp_path / "image-run"
    shutil.copytree(tower, other)
    with (other / "model" / "model.safetensors").open("ab") as weights:
        weights.write(b"\0")
    config.unlink()
    config.write_text(text.replace(tower, str(other)))
    with pytest.raises(UserError, match=r"its image tower is image-run@.* now"):
        evaluate(world.run, world.tar)


def test_features_that_are_not_finite_are_an_error(world: World, tmp_path: Path) -> None:
    store = tmp_path / "broken"
    shutil.copytree(world.store, store)
    features = np.fromfile(store / "features.bin", np.float16)
    features[5] = np.nan
    features.tofile(store / "features.bin")
    with pytest.raises(UserError, match="NaN or infinity"):
        evaluate(world.run, store)
