from __future__ import annotations

import io
import json
import shutil
import statistics
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from efficientclip import __version__
from efficientclip.cli import main
from efficientclip.data.store import Store, edges
from efficientclip.errors import UserError
from efficientclip.evaluation.evaluate import MEASURES, evaluate
from efficientclip.evaluation.run import open_run
from efficientclip.evaluation.search import square_picture
from efficientclip.objectives.retrieval import best_ranks, retrieval_report, summary
from tests import tiny
from tests.evaluation.conftest import World
from tests.evaluation.planted import picture_features, plant
from tests.formats import chinese_clip, files, picture

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
    recalls = [100 * sum(rank <= k for rank in expected) / queries for k in (1, 5, 10)]
    figures = [*recalls, sum(recalls) / 3, statistics.mean(expected), statistics.median(expected)]
    measured = [summary(ranks)[measure] for measure in MEASURES]
    np.testing.assert_allclose(measured, figures, atol=0.005001)


def recall_by_lists(score_QK: Scores, answers: dict[int, list[int]], k: int, *, last: bool = False) -> float:
    """The field's scripts: a query is a hit if an answer is among its k best, equal ones in the order of the file.

    `last` puts the answers behind all that equal them instead.
    """
    hits = 0
    for query, right in answers.items():
        order = sorted(range(score_QK.shape[1]), key=lambda item: (-score_QK[query, item], last and item in right))
        hits += any(item in order[:k] for item in right)
    return 100 * hits / len(answers)


@pytest.mark.parametrize("tied", [False, True])
def test_recalls_are_those_of_the_fields_scripts(tied: bool) -> None:
    seed = int(np.random.default_rng().integers(1 << 30))
    print(f"seed {seed}")
    random = np.random.default_rng(seed)
    text_ND, image_KD = (random.standard_normal((n, 4 if tied else 16)).astype(np.float32) for n in (120, 60))
    if tied:
        text_ND, image_KD = np.sign(text_ND), np.sign(image_KD)
    # Each text has one to three images; the last ten images have no text, and can only be mistaken for others.
    of_text = {text: random.choice(50, random.integers(1, 4), False).tolist() for text in range(120)}
    of_text |= {image: [image] for image in range(50)}
    of_image = {image: [text for text, images in of_text.items() if image in images] for image in range(50)}
    left, right = np.array([(text, image) for text, images in of_text.items() for image in images]).T
    report = retrieval_report(text_ND, image_KD, edges(left, right, 120), edges(right, left, 60))
    assert (report["t2i"]["queries"], report["i2t"]["queries"], report["candidates"]) == (120, 50, 60)
    score_NK = text_ND @ image_KD.T
    for direction, scores, answers in (("t2i", score_NK, of_text), ("i2t", score_NK.T, of_image)):
        for k in (1, 5, 10):
            ours = report[direction][f"R@{k}"]
            if tied:
                best = recall_by_lists(scores - 1e-3 * ~_right(scores, answers), answers, k)
                assert recall_by_lists(scores, answers, k, last=True) <= ours + 0.01 and ours - 0.01 <= best
            else:
                assert ours == pytest.approx(recall_by_lists(scores, answers, k), abs=0.005001)


def _right(score_QK: Scores, answers: dict[int, list[int]]) -> npt.NDArray[np.bool_]:
    right = np.zeros(score_QK.shape, np.bool_)
    for query, items in answers.items():
        right[query, items] = True
    return right


def test_queries_come_in_blocks_and_may_be_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    text_ND, image_KD = (random.standard_normal((n, 8)).astype(np.float32) for n in (120, 60))
    # The last five of each side have no answer.
    left, right = random.integers(115, size=300), random.integers(55, size=300)
    graphs = edges(left, right, 120), edges(right, left, 60)
    whole = retrieval_report(text_ND, image_KD, *graphs)
    ranks = best_ranks(text_ND, image_KD, graphs[0], np.unique(left))
    monkeypatch.setattr("efficientclip.objectives.retrieval.QUERIES_AT_ONCE", 7)
    assert retrieval_report(text_ND, image_KD, *graphs) == whole
    asked = np.unique(left)[[80, 3, 44, 45, 46, 47, 48, 49, 50]]
    np.testing.assert_array_equal(
        best_ranks(text_ND, image_KD, graphs[0], asked), ranks[[80, 3, 44, 45, 46, 47, 48, 49, 50]]
    )
    drawn = retrieval_report(text_ND, image_KD, *graphs, queries=40)
    assert (drawn["t2i"]["queries"], drawn["i2t"]["queries"], drawn["candidates"]) == (40, 40, 60)
    assert retrieval_report(text_ND, image_KD, *graphs, queries=40, seed=1) != drawn
    assert retrieval_report(text_ND, image_KD, *graphs, queries=115) == whole
    text_ND[50, 3] = np.nan
    with pytest.raises(UserError, match="query 50 holds NaN or infinity"):
        best_ranks(text_ND, image_KD, graphs[0], np.unique(left))


def test_the_command_draws_queries(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["evaluate", str(world.run), str(world.store), "--queries"]
    assert main([*arguments, "5", "--json", str(tmp_path / "drawn.json")]) == 0
    report = json.loads((tmp_path / "drawn.json").read_text())
    assert report["t2i"]["queries"] == report["i2t"]["queries"] == 5 and report["candidates"] == 12
    for wrong in (["0"], ["5", "--classes", "names.txt"]):
        assert main([*arguments, *wrong]) == 2
        assert "--queries" in capsys.readouterr().err


def test_random_features_find_by_chance() -> None:
    random = np.random.default_rng()
    text_ND, image_KD = (random.standard_normal((2000, 8)).astype(np.float32) for _ in range(2))
    one_each = edges(np.arange(2000), np.arange(2000), 2000)
    report = retrieval_report(text_ND, image_KD, one_each, one_each)
    for direction in ("t2i", "i2t"):
        # Ten hits are expected, of a Poisson law; the mean rank's deviation is 2000 / sqrt(12 * 2000).
        assert report[direction]["R@10"] * 20 < 10 + 6 * 10**0.5
        assert abs(report[direction]["mean_rank"] - 1000.5) < 6 * 2000 / (12 * 2000) ** 0.5


def write_split(folder: Path) -> tuple[Path, list[dict[str, Any]]]:
    """Five pictures, the last without text; two texts say the same of different pictures, one belongs to two."""
    texts = [
        {"text_id": 30, "text": "猫", "image_ids": [3]},
        {"text_id": 31, "text": "狗", "image_ids": [1, 2]},
        {"text_id": 32, "text": "猫", "image_ids": [0]},
        {"text_id": 33, "text": "红鸟", "image_ids": [0]},
    ]
    return chinese_clip(folder, "valid", {number: picture(number) for number in range(5)}, texts), texts


def test_chinese_clips_files_give_the_recall_of_their_ids(world: World, tmp_path: Path) -> None:
    images, texts = write_split(tmp_path)
    report = evaluate(world.run, images)
    text_ND = open_run(world.run).encode_texts([text["text"] for text in texts])
    score_NK = text_ND @ picture_features(world.run, [picture(number) for number in range(5)]).T
    pairs = {(row, image) for row, text in enumerate(texts) for image in text["image_ids"]}
    assert report["t2i"] == summary(np.array(naive_ranks(score_NK, pairs)))
    # Image 4 has no text: it is no query.
    assert report["i2t"] == summary(np.array(naive_ranks(score_NK.T[:4], {(image, text) for text, image in pairs})))
    assert (report["candidates"], report["texts"]) == (5, 4)


def test_planted_answers_are_found_in_every_format(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, _ = write_split(tmp_path)
    pictures = [picture(number) for number in range(5)]
    features, ends = picture_features(world.run, pictures), "红猫狗鸟花"
    files(tmp_path, {f"{number}.png": content for number, content in enumerate(pictures)})
    (tmp_path / "challenger.json").write_text(
        json.dumps(
            [
                {"image_id": f"{number}.png", "caption": [f"大{ends[number]}", f"小{ends[number]}"]}
                for number in range(5)
            ]
        )
    )
    rows = [f"{number}.png,{prefix}{ends[number]}\n" for number in range(5) for prefix in "大小"]
    (tmp_path / "table.csv").write_text("image,caption\n" + "".join(rows))
    plant(monkeypatch, lambda text: features[ends.index(text[-1])])
    for name in ("challenger.json", "table.csv"):
        report = evaluate(world.run, tmp_path / name)
        assert (report["candidates"], report["texts"], report["t2i"]["queries"]) == (5, 10, 10)
        for direction in ("t2i", "i2t"):
            assert (report[direction]["R@1"], report[direction]["mean_recall"]) == (100, 100)
            assert report[direction]["mean_rank"] == report[direction]["median_rank"] == 1
    plant(monkeypatch, lambda text: features[{"猫": 3, "狗": 2, "红鸟": 0}[text]])
    report = evaluate(world.run, images)
    # The cat of picture 0 finds picture 3 first; pictures 0 and 2 find their texts, 3's cat ties with a wrong one.
    assert report["t2i"]["R@1"] == 75 and report["t2i"]["queries"] == 4


def test_equal_captions_of_a_table_are_one_text_of_all_their_pictures(world: World, tmp_path: Path) -> None:
    files(tmp_path, {f"{number}.png": picture(number) for number in range(3)})
    (tmp_path / "t.csv").write_text("image,caption\n0.png,猫\n1.png,猫\n2.png,狗\n")
    report = evaluate(world.run, tmp_path / "t.csv")
    assert (report["texts"], report["t2i"]["queries"], report["i2t"]["queries"]) == (2, 2, 3)


def test_bad_samples_are_left_out_and_told_by_one_rule(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    contents = {number: picture(number) if number else b"no picture" for number in range(30)}
    captions = {number: f"{tiny.CHARACTERS[number]}" for number in contents}
    files(tmp_path, {f"{number}.png": content for number, content in contents.items()})
    (tmp_path / "t.csv").write_text("image,caption\n" + "".join(f"{n}.png,{captions[n]}\n" for n in contents))
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        for number, content in contents.items():
            for name, held in ((f"{number}.png", content), (f"{number}.txt", captions[number].encode())):
                member = tarfile.TarInfo(name)
                member.size = len(held)
                tar.addfile(member, io.BytesIO(held))
    reports = [evaluate(world.run, tmp_path / name) for name in ("t.csv", "t.tar")]
    for report in reports:
        assert (report["candidates"], report["left_out"]) == (29, {"undecodable image": 1})
    assert reports[0]["t2i"]["mean_rank"] == pytest.approx(reports[1]["t2i"]["mean_rank"], abs=1)
    assert main(["evaluate", str(world.run), str(tmp_path / "t.csv")]) == 0
    assert "left out: 1 × undecodable image" in capsys.readouterr().out
    (tmp_path / "1.png").write_bytes(b"")
    with pytest.raises(
        UserError, match=r"t\.csv: 6\.7% of 30 samples are bad \(2 × undecodable .*max_bad_share is 5\.0%"
    ):
        evaluate(world.run, tmp_path / "t.csv")
    (tmp_path / "t.csv").write_text("image,caption\nnone.png,猫\n")
    with pytest.raises(UserError, match=r"100\.0% of 1 samples .*picture file: No such file.*none\.png in t\.csv"):
        evaluate(world.run, tmp_path / "t.csv")


def test_a_picture_of_several_keys_is_one_candidate(world: World, tmp_path: Path) -> None:
    files(tmp_path, {f"{number}.png": picture(number) for number in range(2)})
    rows = "image,caption,key\n0.png,猫,a\n0.png,狗,b\n1.png,鸟,c\n"
    (tmp_path / "t.csv").write_text(rows, encoding="utf-8")
    report = evaluate(world.run, tmp_path / "t.csv")
    assert (report["candidates"], report["texts"]) == (2, 3)


def test_pictures_without_any_caption_are_refused(world: World, tmp_path: Path) -> None:
    files(tmp_path, {"0.png": picture(0)})
    (tmp_path / "t.json").write_text('{"images": [{"id": 1, "file_name": "0.png"}], "annotations": []}')
    with pytest.raises(UserError, match=r"t\.json: 100\.0% of 1 samples are bad \(1 × image without caption"):
        evaluate(world.run, tmp_path / "t.json")


def test_report_of_a_store_has_the_documented_layout_and_figures(world: World) -> None:
    report = evaluate(world.run, world.store)
    assert list(report) == ["t2i", "i2t", "candidates", "texts", "left_out"]
    for direction in ("t2i", "i2t"):
        assert list(report[direction]) == [*MEASURES, "queries"]
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
    assert json.loads(file.read_text()) == {"made_by": f"made by efficientclip {__version__}", **expected}


def test_only_its_own_json_is_written_over(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "result.json"
    file.write_text('{"mine": 1}')
    assert main(["evaluate", str(tmp_path / "none"), str(world.store), "--json", str(file)]) == 2
    assert "result.json: exists, and efficientclip did not write it" in capsys.readouterr().err
    assert file.read_text() == '{"mine": 1}'
    file.with_name("audit.parquet").write_bytes(b"PAR1")
    for name, message in (
        ("audit.parquet", "exists, and efficientclip did not write it as a result"),
        ("result.json/x.json", "result.json is a file, where a folder is wanted"),
        ("none/x.json", "none does not exist"),
        ("/", "is no file, but a folder"),
    ):
        assert main(["evaluate", str(world.run), str(world.store), "--json", str(tmp_path / name)]) == 2
        assert message in capsys.readouterr().err
    for option in (["--replace"], []):
        assert main(["evaluate", str(world.run), str(world.store), "--json", str(file), *option]) == 0
    assert "t2i" in json.loads(file.read_text())


@pytest.mark.parametrize(("data", "message"), [("store", "holds its pictures itself"), ("tar", "holds its pictures"),
                                               ("x.csv", "no such folder; give the one where")])  # fmt: skip
def test_a_folder_of_pictures_that_is_of_no_use_is_refused(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], data: str, message: str
) -> None:
    (tmp_path / "x.csv").write_text("image,text\n0.png,猫\n")
    given = getattr(world, data, tmp_path / data)
    assert main(["evaluate", str(world.run), str(given), "--images", str(tmp_path / "nope")]) == 2
    assert f"--images {tmp_path / 'nope'}" in (told := capsys.readouterr().err) and message in told


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
    del manifest["sha256"]
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
    with pytest.raises(UserError, match=r"features\.bin: is not what was written"):
        evaluate(world.run, store)
