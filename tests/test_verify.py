"""`efficientclip verify` reads every byte anew and lists all that is broken."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from efficientclip.cli import main
from efficientclip.data.store import FORMAT, Store
from efficientclip.errors import UserError
from efficientclip.files import digests
from efficientclip.files.ownership import MARK, mark
from efficientclip.noise.cross_fit import CrossFit, write_cross_fit
from efficientclip.verify import Part, verify
from tests.test_broken_files import cache, finished

__all__ = ["cache"]
MODEL = "model/model.safetensors"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished(tmp_path_factory.mktemp("finished"))


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    for name in ("store", "run"):
        shutil.copytree(made / name, tmp_path / name)
    return tmp_path


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def broken(parts: list[Part]) -> list[str]:
    return [part.name for part in parts if part.error is not None]


@pytest.mark.parametrize("name", ["store", "run", "run/model", "run/checkpoints/step-00000020"])
def test_what_is_whole_is_found_so(folder: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert main(["verify", str(folder / name)]) == 0
    told = capsys.readouterr()
    assert "whole" in told.out and told.err == ""
    parts = verify(folder / name)
    assert broken(parts) == []
    # TensorBoard's log grows with any later run.
    uncovered = [part.name for part in parts if part.verdict == "not covered"]
    assert uncovered in ([], ["tensorboard"])
    pointers = {"checkpoints/latest", "checkpoints/best"}
    listed = sum(part.files for part in parts if "weights" not in part.name)
    assert listed == len({*digests.files_in(folder / name)} - pointers)


def test_all_that_is_broken_is_listed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, step = folder / "run", "checkpoints/step-00000015"
    flip(run / "confidence.parquet")
    flip(run / MODEL)
    (run / step / "state.npz").unlink()
    (run / "checkpoints" / "best").write_text("step-00000099")
    (run / "notes.txt").write_text("mine")
    assert main(["verify", str(run)]) == 2
    told = capsys.readouterr()
    assert told.err.count("error:") == 1 and "confidence.parquet: is not what was written" in told.err
    assert "best: names no checkpoint that is there" in told.err
    for name in ("confidence.parquet", MODEL, f"{step}/state.npz"):
        assert name in broken(verify(run)) and name in told.err
    assert {part.name: part.verdict for part in verify(run)}["notes.txt"] == "not covered"


def test_bytes_are_read_whatever_the_cache_says(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(folder / "store")
    store.prove()
    monkeypatch.setattr(digests, "signature", lambda file: (0, 0, 0, 0, hash(file.name)))
    store.prove()
    flip(folder / "store" / "features.bin")
    assert broken(verify(folder / "store")) == ["features.bin"]


@pytest.mark.parametrize(("file", "row"), [("tokens.bin", 60000), ("caption_ids.bin", -1), ("features.bin", np.nan)])
def test_what_no_store_may_hold_is_found_behind_right_digests(folder: Path, file: str, row: float) -> None:
    store, dtype = folder / "store", {"tokens.bin": np.uint16, "features.bin": np.float16}.get(file, np.int32)
    values = np.fromfile(store / file, dtype)
    values[7] = row
    values.tofile(store / file)
    manifest = json.loads((store / "manifest.json").read_text())
    del manifest["sha256"]
    manifest["files"] |= digests.described(store, [file])
    (store / "manifest.json").write_text(json.dumps(manifest))
    (part,) = (part for part in verify(store) if part.error)
    assert f"{file}: row" in str(part.error)


@pytest.mark.parametrize("content", ["", "{", json.dumps({"format": FORMAT})])
def test_a_broken_manifest_is_one_message(folder: Path, capsys: pytest.CaptureFixture[str], content: str) -> None:
    (folder / "store" / "manifest.json").write_text(content)
    assert main(["verify", str(folder / "store")]) == 2
    assert "manifest.json: broken" in capsys.readouterr().err


def test_weights_that_are_not_finite_are_found_behind_right_digests(folder: Path) -> None:
    weights = load_file(folder / "run" / MODEL)
    weights["text.projection.weight"][0, 0] = torch.inf
    save_file(weights, folder / "run" / MODEL, {"format": "pt"})
    digests.write_digests(folder / "run" / "model")
    (part,) = (part for part in verify(folder / "run") if part.error)
    assert "the weight text.projection.weight is not finite" in str(part.error)


def test_a_run_in_its_course_is_looked_at(folder: Path) -> None:
    run = folder / "run"
    own = ("config.yaml", "identity.json")
    digests.write_digests(run, {name: entry for name, entry in digests.read_digests(run).items() if name in own})
    shutil.rmtree(run / "model")
    assert broken(verify(run)) == []
    (run / "identity.json").write_bytes(b"")
    assert broken(verify(run)) == ["identity.json"]


def test_a_run_of_an_earlier_version_is_looked_at(folder: Path) -> None:
    run = folder / "run"
    for name in (digests.NAME, "identity.json", MARK):
        (run / name).unlink()
    shutil.rmtree(run / "model")
    assert broken(verify(run)) == []
    (run / "metrics.jsonl").write_bytes(b"\0\n\0\n")
    assert broken(verify(run)) == ["metrics.jsonl"]


@pytest.mark.parametrize("part", ["", "model", "checkpoints/step-00000015"])
def test_digests_that_are_gone_are_missed(folder: Path, part: str) -> None:
    place = folder / "run" / part
    (place / digests.NAME).unlink()
    for path, shown in ((folder / "run", Path(part, digests.NAME)), (place, Path(digests.NAME))):
        assert broken(verify(path)) == [str(shown)]


def test_a_cross_fit_is_looked_at(folder: Path) -> None:
    store, judged = Store(folder / "store"), folder / "judged"
    mark(judged, "cross-fit")
    columns = np.random.default_rng(0).random((4, len(store)))
    write_cross_fit(judged, store, CrossFit(0.2, 640, np.zeros(len(store), np.int8), *columns))
    shutil.copytree(folder / "run", judged / "fold-0")
    shutil.copytree(folder / "run" / "model", judged / "model")
    assert broken(verify(judged)) == []
    flip(judged / "cross_fit.parquet")
    flip(judged / "fold-0" / MODEL)
    flip(judged / MODEL)
    assert {"cross_fit.parquet", f"fold-0/{MODEL}", MODEL} <= {*broken(verify(judged))}


@pytest.mark.parametrize(
    ("name", "message"),
    [("nowhere", "no such folder"), ("empty", "is nothing that"), ("store/tokens.bin", "is a file")],
)
def test_what_is_nothing_of_ours_is_refused(folder: Path, name: str, message: str) -> None:
    (folder / "empty").mkdir()
    with pytest.raises(UserError, match=rf"{name}: {message}.*; give a store, a run, a model folder or a cross-fit"):
        verify(folder / name)


def test_exported_pairs_are_looked_at(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "kept"
    mark(out, "kept pairs")
    shards = [{"name": f"{number:05d}.tar", "samples": 2, "pairs": 3} for number in range(3)]
    for number, shard in enumerate(shards):
        (out / str(shard["name"])).write_bytes(bytes([number]) * 1000)
        shard |= {"bytes": 1000, "xxh3": digests.digest_of(out / str(shard["name"]))}
    # Earlier versions noted sizes alone.
    del shards[2]["xxh3"]
    record = {"identity": {}, "shards": shards, "next": {}, "finished": True}
    (out / "export.json").write_text(json.dumps(record))
    assert {part.name: part.verdict for part in verify(out)} == {
        str(out): "whole",
        "00002.tar": "not covered",
        "export.json": "not covered",
    }
    flip(out / "00000.tar")
    (out / "00001.tar").unlink()
    (out / "00002.tar").write_bytes(b"short")
    assert main(["verify", str(out)]) == 2
    told = capsys.readouterr().err
    assert "00000.tar: is not what was written" in told and "00001.tar" in told and "00002.tar" in told
    (out / "export.json").write_text(json.dumps(record | {"shards": [{"name": "../mine.tar", "bytes": 1}]}))
    assert broken(verify(out)) == ["export.json"]
