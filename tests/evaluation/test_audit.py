"""The history of a real tiny run, the table and page made of it, and the shards of what it kept."""

from __future__ import annotations

import csv
import io
import json
import os
import pickle
import shutil
import tarfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from efficientclip.cli import main
from efficientclip.config import Confidence, MaskedLanguageModelling, Objective, load_config, save_config
from efficientclip.data.images import ImageLoader
from efficientclip.data.shards import read_members, read_picture
from efficientclip.data.store import Store
from efficientclip.evaluation import kept as module
from efficientclip.evaluation import subset
from efficientclip.evaluation.charts import sparkline
from efficientclip.evaluation.verdicts import caption_centroid_scores
from efficientclip.files import digests, lock
from efficientclip.files.ownership import MARK
from efficientclip.noise.cross_fit import CrossFit, SourceRate, write_cross_fit
from efficientclip.prepare.build import prepare
from tests import formats, tiny
from tests.evaluation.conftest import HOSTILE, World
from tests.evaluation.test_report import Resources
from tests.training.launch import run

PICTURES = 40


@dataclass(frozen=True)
class Audited:
    """A finished run with ECL on, its config file, and what ECL observed: (epoch, rows, cosines, counted)."""

    run: Path
    config: Path
    store: Path
    shards: Path
    observed: list[tuple[int, Any, Any, Any]]


def write_shards(folder: Path) -> None:
    """Two shards whose keys begin anew; captions as lists of objects, as lists of texts, and as .txt."""
    random = np.random.default_rng(0)
    folder.mkdir()
    for shard in range(2):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for number in range(PICTURES):
                shared = tiny.CHARACTERS[number % 5]
                own = HOSTILE if number == 0 else "".join(random.choice(list(tiny.CHARACTERS), 4))
                objects = [{"text": shared, "noise": False}, {"text": own, "noise": number % 3 == 0, "by": "hand"}]
                members = {
                    0: {"json": {"captions": objects, "source": "a<b", "caption": own, "year": 2020}, "txt": own},
                    1: {"json": {"captions": [shared, own], "source": "plain"}},
                    2: {"json": {"caption": "not read beside a txt", "source": "txt"}, "txt": own},
                    3: {"txt": own},
                }[number % 4]
                contents = {"png": formats.picture(100 * shard + number)}
                contents |= {name: _encoded(content) for name, content in members.items()}
                for suffix, content in contents.items():
                    member = tarfile.TarInfo(f"{number:02d}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


def _encoded(content: Any) -> bytes:
    return content.encode() if isinstance(content, str) else json.dumps(content, ensure_ascii=False).encode()


@pytest.fixture(scope="module")
def audited(built: World, tmp_path_factory: pytest.TempPathFactory) -> Audited:
    folder = tmp_path_factory.mktemp("audit")
    write_shards(folder / "shards")
    config = tiny.config(
        folder,
        data__validation={},
        data__tokenizer=str(built.run.parent / "vocab.txt"),
        model__image_tower={"pretrained": str(built.run.parent / "image-run"), "size": 16},
        mlm__texts_per_batch=0,
        confidence={"selection": "schedule", "drop_share": 0.25, "drops": 2, "reaudition_share": 0.2},
        training__batch_size=16,
        training__pair_visits=1000,
    )
    prepare(folder / "shards", folder / "store", load_config(config))
    run(1, str(config), script=Path(__file__).with_name("observed.py"), OBSERVED=str(folder / "observed.pickle"))
    observed = []
    with (folder / "observed.pickle").open("rb") as file:
        while file.peek(1):
            observed.append(pickle.load(file))
    return Audited(folder / "run", config, folder / "store", folder / "shards", observed)


def history_of(run: Path) -> list[Any]:
    return [np.load(file) for file in sorted((run / "history").iterdir())]


def test_history_is_what_was_observed(audited: Audited) -> None:
    history = history_of(audited.run)
    pairs = len(Store(audited.store))
    of_epoch = defaultdict(lambda: defaultdict(list))
    for epoch, rows, cosine, counted in audited.observed:
        trained = [c for c, weighs in zip(cosine, counted, strict=True) if weighs]
        for row, c in zip(rows.tolist(), cosine, strict=True):
            of_epoch[epoch][row].append((c - np.mean(trained)) / np.std(trained))
    assert [file.name for file in sorted((audited.run / "history").iterdir())] == [
        f"epoch-{epoch:05d}.npy" for epoch in sorted(of_epoch)
    ]
    assert len(history) > 5
    assert np.isnan(history[0]["score"]).all(), "warm-up"
    for epoch in range(1, len(history)):
        expected = [np.mean(of_epoch[epoch].get(row, [np.nan])) for row in range(pairs)]
        np.testing.assert_allclose(history[epoch]["score"], expected, rtol=2e-3, atol=1e-4)
    for epoch, rows, _, counted in audited.observed:
        before = history[epoch - 1]["kept"] if epoch else np.ones(pairs, bool)
        np.testing.assert_array_equal(before[rows], counted)
    sizes = [int(records["kept"].sum()) for records in history]
    assert sizes[0] == pairs and sizes[1] == round(0.75 * pairs) and sizes[2] == sizes[-1] == round(0.75 * sizes[1])


def test_a_finished_run_called_again_keeps_its_history(audited: Audited, tmp_path: Path) -> None:
    before = {file.name: file.read_bytes() for file in (audited.run / "history").iterdir()}
    run(1, str(audited.config))
    assert {file.name: file.read_bytes() for file in (audited.run / "history").iterdir()} == before


def test_table_tells_every_pair(audited: Audited, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("efficientclip.data.parquet.ROWS", 50)
    assert main(["audit", str(audited.run), str(tmp_path / "out")]) == 0
    table = pq.read_table(tmp_path / "out" / "audit.parquet").to_pylist()
    assert pq.read_metadata(tmp_path / "out" / "audit.parquet").num_row_groups > 1
    store, history = Store(audited.store), history_of(audited.run)
    pairs, scores = store.pairs().to_pylist(), pq.read_table(audited.run / "confidence.parquet").to_pylist()
    assert len(table) == len(pairs) > 50
    baseline = caption_centroid_scores(store)
    for row, (told, pair, score) in enumerate(zip(table, pairs, scores, strict=True)):
        assert told["row"] == row
        for name in ("key", "caption", "source", "shard", "image_id", "noise"):
            assert told[name] == pair[name]
        for name in ("times_seen", "kept", "dropped_epoch"):
            assert told[name] == score[name]
        np.testing.assert_equal(told["score"], score["score"])
        np.testing.assert_equal(told["epoch_score"], [float(records["score"][row]) for records in history])
        assert told["epoch_kept"] == [bool(records["kept"][row]) for records in history]
        np.testing.assert_equal(told["centroid_score"], float(baseline[row]))
        assert told["epoch_kept"][-1] == told["kept"] == (told["dropped_epoch"] == -1)
        if not told["kept"]:
            assert told["epoch_kept"][told["dropped_epoch"] - 1] and not told["epoch_kept"][told["dropped_epoch"]]


def test_suspects_stand_in_the_order_of_the_evidence(audited: Audited, tmp_path: Path) -> None:
    run, store = tmp_path / "run", Store(audited.store)
    shutil.copytree(audited.run, run)
    assert main(["audit", str(run), str(tmp_path / "own")]) == 0
    scores = {pair["row"]: pair["score"] for pair in pq.read_table(run / "confidence.parquet").to_pylist()}
    own = suspects(tmp_path / "own")
    assert [int(line["row"]) for line in own] == sorted(
        (row for row, score in scores.items() if np.isfinite(score)), key=lambda row: scores[row]
    )
    assert {line["wrong_probability"] for line in own} == {""}
    # A cross-fit that is sure of some pairs.
    odds = np.random.default_rng(0).standard_normal(len(store))
    odds[[7, 3]] = -30, -20
    p = np.full(len(store), 0.25)
    (tmp_path / "judged").mkdir()
    write_cross_fit(tmp_path / "judged", store, CrossFit(0.1, 7, np.zeros(len(store), np.int8), p, p, p, odds))
    settings = ["confidence.selection=calibrated", f"confidence.cross_fit={tmp_path / 'judged'}"]
    save_config(load_config(run / "config.yaml", settings), run / "config.yaml")
    digests.write_digests(run, digests.described(run, digests.read_digests(run)))
    assert main(["audit", str(run), str(tmp_path / "both")]) == 0
    both, table = suspects(tmp_path / "both"), pq.read_table(tmp_path / "both" / "audit.parquet")
    assert [int(line["row"]) for line in both[:2]] == [7, 3] and len(both) == len(store)
    pair = store.pairs([7]).to_pylist()[0]
    assert [both[0][name] for name in ("key", "caption", "source")] == [pair["key"], pair["caption"], pair["source"]]
    assert both[0]["wrong_probability"] == "1.000" and both[0]["verdict"] in ("kept", "dropped")
    assert both[0]["reason"] == "25.0% of its source's other captions fit the picture as well"
    assert np.argsort(table["evidence"].to_numpy(), kind="stable")[:2].tolist() == [7, 3]
    np.testing.assert_allclose(table["wrong_probability"].to_numpy(), 1 / (1 + np.exp(odds)), rtol=1e-5)
    page = (tmp_path / "both" / "audit.html").read_text(encoding="utf-8")
    assert "cross-fit's verdicts together" in page and "likely wrong: 100%" in page
    # A caption that fits, and comes alone, is told to be near.
    company = np.where(np.arange(len(store)) == 7, -2.0, 0.5)
    fits = np.where(np.arange(len(store)) == 7, 0.01, p)
    found = CrossFit(0.1, 7, np.zeros(len(store), np.int8), p, fits, p, odds, company=company)
    write_cross_fit(tmp_path / "judged", store, found)
    assert main(["audit", str(run), str(tmp_path / "alone")]) == 0
    alone = {int(line["row"]): line["reason"] for line in suspects(tmp_path / "alone")}
    assert alone[7].endswith("seldom or nowhere else: a near miss, or a rare name") and "nowhere else" not in alone[3]
    # Where the rate is not known, neither is a pair's chance; the towers that did not train on it tell the order.
    open_rate = SourceRate("tiny", len(store), 0.4, 0.1, 0.8)
    p[[4, 5]], cosine = 0.9, np.full(len(store), 0.25)
    cosine[[4, 6]] = -0.1, 0.1
    found = CrossFit(0.1, 7, np.zeros(len(store), np.int8), cosine, p, p, odds, (open_rate,))
    write_cross_fit(tmp_path / "judged", store, found)
    assert main(["audit", str(run), str(tmp_path / "open")]) == 0
    untold = suspects(tmp_path / "open")
    assert {line["wrong_probability"] for line in untold} == {""}
    assert int(untold[0]["row"]) == 4 and {int(line["row"]) for line in untold[1:3]} == {5, 6}
    assert pq.read_table(tmp_path / "open" / "audit.parquet")["wrong_probability"].null_count == len(store)
    # It is ours, and another program's is not replaced.
    assert main(["audit", str(run), str(tmp_path / "both")]) == 0
    (tmp_path / "both" / "suspects.csv").write_text("row,key\n1,mine\n")
    assert main(["audit", str(run), str(tmp_path / "both")]) == 2


def test_what_a_person_judged_is_not_asked_for_again(
    audited: Audited, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, file = tmp_path / "run", tmp_path / "verdicts.csv"
    shutil.copytree(audited.run, run)
    assert main(["audit", str(run), str(tmp_path / "first")]) == 0
    first = suspects(tmp_path / "first")
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["key", "caption", "verdict"])
        writer.writerows([line["key"], line["caption"], "wrong"] for line in first[:3])
    judged = {(line["key"], line["caption"]) for line in first[:3]}
    save_config(load_config(run / "config.yaml", [f"data.verdicts={file}"]), run / "config.yaml")
    digests.write_digests(run, digests.described(run, digests.read_digests(run)))
    assert main(["audit", str(run), str(tmp_path / "second")]) == 0
    left = [line["row"] for line in first if (line["key"], line["caption"]) not in judged]
    assert [line["row"] for line in suspects(tmp_path / "second")] == left and len(left) <= len(first) - 3
    page = (tmp_path / "second" / "audit.html").read_text(encoding="utf-8")
    told = json.loads(page.split('<script type="application/json" id="marking">')[1].split("</script>")[0])
    assert {(key, caption) for _, key, caption, _ in told["earlier"]} == judged
    assert not {(key, caption) for key, caption in told["pairs"].values()} & judged
    capsys.readouterr()
    file.unlink()
    assert main(["audit", str(run), str(tmp_path / "third")]) == 0
    assert f"notice: data.verdicts: {file}: no such file; the page asks again" in capsys.readouterr().err
    assert suspects(tmp_path / "third") == first


def suspects(folder: Path) -> list[dict[str, str]]:
    with (folder / "suspects.csv").open(encoding="utf-8-sig", newline="") as stream:
        return list(csv.DictReader(stream))


def test_page_shows_the_surest_and_the_border(audited: Audited, tmp_path: Path) -> None:
    assert main(["audit", str(audited.run), str(tmp_path), "--top", "7"]) == 0
    page = (tmp_path / "audit.html").read_text(encoding="utf-8")
    parser = Resources()
    parser.feed(page)
    parser.close()
    assert parser.open == [] and all(value.startswith(("data:", "#")) for value in parser.fetched)
    assert "<script src" not in page and "a<b" not in page and "a&lt;b" in page
    table = pq.read_table(tmp_path / "audit.parquet").to_pylist()
    scored = sorted((pair for pair in table if pair["times_seen"]), key=lambda pair: pair["score"])
    sections = page.split("<h2>")
    shown = {
        title: next(part for part in sections if part.startswith(title)) for title in ("Surest n", "Bord", "Surest c")
    }
    for title, expected in (
        ("Surest n", [pair for pair in scored if not pair["kept"]][:7]),
        ("Surest c", [pair for pair in reversed(scored) if pair["kept"]][:7]),
    ):
        notes = [f"{pair['score']:+.2f}" for pair in expected]
        found = [part.split("<small>")[1][:5] for part in shown[title].split('<li class="card')[1:]]
        assert found == notes
    for part in shown.values():
        assert part.count("data:image/webp") == part.count('<svg class="spark"') == 7
    dropped = sum(not pair["kept"] for pair in scored)
    border = np.quantile([pair["score"] for pair in scored], dropped / len(scored))
    expected = [
        pair["score"]
        for verdict, share in ((False, 4), (True, 3))
        for pair in sorted(
            (pair for pair in scored if pair["kept"] == verdict), key=lambda pair: abs(pair["score"] - border)
        )[:share]
    ]
    found = [part.split("<small>")[1][:5] for part in shown["Bord"].split('<li class="card')[1:]]
    assert found == [f"{score:+.2f}" for score in sorted(expected, key=lambda score: abs(score - border))]
    assert shown["Bord"].count("· dropped</small>") == 4 and shown["Bord"].count("· kept</small>") == 3
    assert "without training" in page and "came back" in page


def test_sparkline_tells_scores_and_states() -> None:
    drawn = sparkline(np.array([np.nan, 1.0, -9.0]), np.array([True, False, True]))
    assert "epoch 0: no score, kept; epoch 1: +1.00, dropped; epoch 2: -9.00, kept" in drawn
    assert 'points="50.0,11.0 97.0,27.0"' in drawn
    assert drawn.count('class="kept"') == 2 and drawn.count('class="dropped"') == 1


def test_export_holds_what_was_kept_and_prepares_again(audited: Audited, tmp_path: Path) -> None:
    out = tmp_path / "kept"
    assert main(["audit", str(audited.run), str(tmp_path), "--export", str(out), "--shard-samples", "9"]) == 0
    table = pq.read_table(tmp_path / "audit.parquet").to_pylist()
    pairs = Store(audited.store).pairs().to_pylist()
    expected = defaultdict(set)
    for told, pair in zip(table, pairs, strict=True):
        if told["kept"]:
            expected[read_picture(Path(pair["shard"]), pair["offset"], pair["length"])].add(pair["caption"])
    assert len(expected) < 2 * PICTURES, "no picture went away"
    found = {}
    with ImageLoader(out, batch_size=8, size=16, train=False, keep_encoded=True) as loader:
        for batch in loader:
            for encoded, captions in zip(batch.encoded, batch.captions, strict=True):
                assert encoded not in found
                found[encoded] = set(captions)
        assert not loader.bad_samples
    assert found == expected
    config = load_config(audited.config)
    prepare(out, tmp_path / "again", config)
    again, store = Store(tmp_path / "again"), Store(audited.store)
    kept = {(told["caption"], told["noise"], told["source"]) for told in table if told["kept"]}
    assert {(pair["caption"], pair["noise"], pair["source"]) for pair in again.pairs().to_pylist()} == kept
    assert len(again) == sum(told["kept"] for told in table) < len(store)
    for shard in sorted(out.glob("*.tar")):
        samples = list(read_members(shard))
        assert len(samples) == len({key for key, _ in samples}) <= 9


def test_export_leaves_what_it_does_not_filter(audited: Audited, tmp_path: Path) -> None:
    assert main(["audit", str(audited.run), str(tmp_path), "--export", str(tmp_path / "kept")]) == 0
    table = pq.read_table(tmp_path / "audit.parquet").to_pylist()
    kept = defaultdict(set)
    for told in table:
        if told["kept"]:
            kept[Path(told["shard"]).name, told["key"]].add(told["caption"])
    originals = {
        (shard.name, key): members for shard in audited.shards.iterdir() for key, members in read_members(shard)
    }
    by_picture = {members["png"][0]: name for name, members in originals.items()}
    checked = 0
    for shard in sorted((tmp_path / "kept").glob("*.tar")):
        for key, members in read_members(shard):
            name = by_picture[members["png"][0]]
            before, captions = originals[name], kept[name]
            assert key == name[1] and members.keys() == before.keys()
            record = json.loads(members["json"][0]) if "json" in members else {}
            told = json.loads(before["json"][0]) if "json" in before else {}
            if "captions" not in told:
                assert {suffix: content for suffix, (content, _) in members.items()} == {
                    suffix: content for suffix, (content, _) in before.items()
                }
                continue
            texts = [entry["text"] if isinstance(entry, dict) else entry for entry in told["captions"]]
            assert record.pop("captions") == [
                entry for entry, text in zip(told.pop("captions"), texts, strict=True) if text in captions
            ]
            if "caption" in told:
                one = told.pop("caption")
                only = one if one in captions else texts[0]
                assert record.pop("caption") == only and members["txt"][0].decode() == only
                checked += one not in captions
            assert record == told
    assert checked, "no lone caption was replaced"


def test_an_interrupted_export_goes_on(audited: Audited, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["audit", str(audited.run), str(tmp_path), "--shard-gb", "1e-5", "--export"]
    assert main([*arguments, str(tmp_path / "whole")]) == 0
    whole = {file.name: file.read_bytes() for file in (tmp_path / "whole").iterdir()}
    assert len(whole) > 6
    assert all(len(content) < 1e4 + 2 * tarfile.RECORDSIZE for name, content in whole.items() if name.endswith(".tar"))
    real, calls = module._without_dropped, 0

    def failing(*given: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls % 45 == 0:
            raise KeyboardInterrupt
        return real(*given)

    monkeypatch.setattr(subset, "cores_of_rank", lambda: 1)
    monkeypatch.setattr(module, "_without_dropped", failing)
    interrupted = 0
    while True:
        try:
            assert main([*arguments, str(tmp_path / "parts")]) == 0
            break
        except KeyboardInterrupt:
            interrupted += 1
    assert interrupted == 1
    assert {file.name: file.read_bytes() for file in (tmp_path / "parts").iterdir()} == whole
    calls = 0
    assert main([*arguments, str(tmp_path / "parts")]) == 0
    assert calls == 0, "a finished export is made again"


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main(["audit", *map(str, arguments)]) == 2
    return capsys.readouterr().err


def test_mistakes_end_in_one_message(
    audited: Audited, tmp_path: Path, capsys: pytest.CaptureFixture[str], built: World
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(audited.run, copy, ignore=shutil.ignore_patterns("checkpoints", "model", "tensorboard"))
    assert "no config.yaml" in refused(capsys, tmp_path)
    assert "has no history/" in refused(capsys, built.run)
    assert "--top 0" in refused(capsys, copy, "--top", 0)
    (copy / "history" / "epoch-00002.npy").rename(tmp_path / "aside.npy")
    assert "epoch-00002.npy: is missing" in refused(capsys, copy)
    (tmp_path / "aside.npy").rename(copy / "history" / "epoch-00002.npy")
    # As an earlier version made it: without digests, so that its config may be changed.
    for name in ("digests.json", "identity.json", MARK):
        (copy / name).unlink()
    config = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(config.replace(str(audited.store), str(tmp_path / "gone")))
    assert f"{tmp_path}/gone, which is not there now; put it back" in refused(capsys, copy)
    (copy / "config.yaml").write_text(config.replace(str(audited.store), str(built.store)))
    assert "confidence.parquet tells of " in refused(capsys, copy)
    alone = {"mlm": MaskedLanguageModelling(), "objective": Objective(bank_size=0), "confidence": Confidence()}
    for tower, trained in (("both", "both towers from shards"), ("image", "an image tower on pictures alone")):
        (copy / "config.yaml").write_text(config)
        changed = load_config(copy / "config.yaml").model_copy(update=alone)
        training = changed.training.model_copy(update={"tower": tower})
        save_config(changed.model_copy(update={"training": training}), copy / "config.yaml")
        assert f"trained {trained};" in refused(capsys, copy)
    (copy / "config.yaml").write_text(config)
    (copy / "confidence.parquet").unlink()
    assert "not finished" in refused(capsys, copy)


def test_lost_shards_are_named(
    audited: Audited, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    aside = audited.shards / "1.aside"
    (audited.shards / "1.tar").rename(aside)
    try:
        told = refused(capsys, audited.run, tmp_path, "--export", tmp_path / "kept")
        assert f"shard {audited.shards}/1.tar: No such file" in told and "put it back" in told
        assert (tmp_path / "audit.parquet").is_file()
        monkeypatch.setattr(
            "efficientclip.evaluation.gallery.square_picture", lambda pair, size: np.zeros((9, 9, 3), "u1")
        )
        told = refused(capsys, audited.run, tmp_path, "--export", tmp_path / "kept")
        assert f"shard {audited.shards}/1.tar: no such file (1 of the 2 shards" in told
        assert not (tmp_path / "kept").exists()
        with tarfile.open(audited.shards / "1.tar", "w") as tar:
            tar.add(audited.config, "00.yaml")
        assert "the shard changed" in refused(capsys, audited.run, tmp_path, "--export", tmp_path / "kept")
    finally:
        aside.rename(audited.shards / "1.tar")


def test_an_export_is_not_mixed_with_another(
    audited: Audited, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(audited.shards, tmp_path / "tars")
    with monkeypatch.context() as patched:
        patched.setattr("efficientclip.evaluation.audit.Store", None)
        told = refused(capsys, audited.run, tmp_path, "--export", tmp_path / "tars")
        assert "without efficientclip's mark (0.tar, 1.tar)" in told
        assert "is or holds the source" in refused(capsys, audited.run, tmp_path, "--export", audited.store)
    assert not (tmp_path / "audit.html").exists()
    assert main(["audit", str(audited.run), str(tmp_path), "--export", str(tmp_path / "kept")]) == 0
    arguments = [audited.run, tmp_path, "--export", tmp_path / "kept"]
    assert "(samples differ)" in refused(capsys, *arguments, "--shard-samples", 5)
    with lock.held(tmp_path / "kept", "exporting"):
        assert f"process {os.getpid()} on " in refused(capsys, *arguments)
    tar = tmp_path / "kept" / "00000.tar"
    content = bytearray(tar.read_bytes())
    content[1000] ^= 1
    tar.write_bytes(content)
    told = refused(capsys, *arguments)
    assert "00000.tar: is not what was written (its digest differs); remove" in told and "and export anew" in told
    tar.unlink()
    assert "00000.tar: is missing; remove" in refused(capsys, *arguments)
    assert not (tmp_path / "kept" / lock.NAME).exists()


def test_only_its_own_table_and_page_are_written_over(
    audited: Audited, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("audit.html", "audit.parquet"):
        (tmp_path / name).write_text("mine")
        with monkeypatch.context() as patched:
            patched.setattr("efficientclip.evaluation.audit.Store", None)
            assert f"{name}: exists, and" in refused(capsys, audited.run, tmp_path)
    assert {file.read_text() for file in tmp_path.iterdir()} == {"mine"}
    assert main(["audit", str(audited.run), str(tmp_path), "--replace"]) == 0
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != audited.run)
    assert f"{audited.run} cannot be written (Permission denied); name another folder: efficientclip audit" in refused(
        capsys, audited.run
    )
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("efficientclip.evaluation.audit._add_sources", interrupt)
        # By now they are ours.
        main(["audit", str(audited.run), str(tmp_path)])
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def test_a_store_of_text_has_captions_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.pair_store(tmp_path / "store")
    config = tiny.config(
        tmp_path, data__validation={}, mlm__texts_per_batch=0, training__pair_visits=640, confidence__selection="none"
    )
    run(1, str(config))
    assert main(["audit", str(tmp_path / "run")]) == 0
    page = (tmp_path / "run" / "audit.html").read_text(encoding="utf-8")
    assert "data:image" not in page and page.count('class="card') >= 48
    assert "Nothing was dropped: the lowest scores of all" in page and "<h2>Borderline" not in page
    table = pq.read_table(tmp_path / "run" / "audit.parquet").to_pylist()
    lowest = min((pair for pair in table if pair["times_seen"]), key=lambda pair: pair["score"])
    assert f"{lowest['score']:+.2f}" in page.split("<h2>Surest noise")[1].split("</small>")[0]
    assert "holds only text" in refused(capsys, tmp_path / "run", "--export", tmp_path / "kept")
