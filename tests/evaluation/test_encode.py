"""Features go to files that other programs read, the same as the run and its export compute them, and whole."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from efficientclip.cli import main
from efficientclip.data.pictures import decode_square
from efficientclip.data.store import Store
from efficientclip.evaluation import encode as module
from efficientclip.evaluation.encode import encode
from efficientclip.evaluation.run import open_run
from efficientclip.export import export
from tests.evaluation.conftest import PICTURES, World
from tests.formats import files, picture
from tests.prepare.tars import write_tar

Features = npt.NDArray[np.float32]


def rows_of(file: Path, kind: str) -> tuple[list[str], list[str | None], Features]:
    table = pq.read_table(file)
    assert table.schema.types[2:] == [pa.string(), pa.list_(pa.float16(), 16)]
    table = table.filter(pa.compute.equal(table["kind"], kind))
    features = table["feature"].combine_chunks().flatten().to_numpy().reshape(-1, 16).astype(np.float32)
    return table["key"].to_pylist(), table["caption"].to_pylist(), features


def close(found: Features, expected: Features) -> None:
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=2e-3)
    np.testing.assert_allclose(found, expected, atol=2e-3)


def test_a_tar_its_store_and_the_export_give_the_same(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Less than the texts, so that groups are cut.
    monkeypatch.setattr(module, "ROWS", 10)
    monkeypatch.setattr(module, "TEXTS_AT_ONCE", 7)
    export(world.run, tmp_path / "exported")
    opened, store = open_run(world.run), Store(world.store)
    pairs = store.pairs().to_pylist()
    for number, (model, source) in enumerate(
        [(world.run, world.tar), (world.run, world.store), (tmp_path / "exported", world.tar)]
    ):
        file = tmp_path / "deep" / f"{number}.parquet"
        made = encode(model, source, file)
        assert made == {"image": PICTURES, "text": 2 * PICTURES, "left_out": {}}
        keys, captions, features = rows_of(file, "text")
        assert [*zip(keys, captions, strict=True)] == [(pair["key"], pair["caption"]) for pair in pairs]
        close(features, opened.encode_texts([pair["caption"] for pair in pairs]))
        keys, captions, features = rows_of(file, "image")
        firsts = {pair["image_id"]: pair for pair in reversed(pairs)}
        first_of = [firsts[image] for image in sorted(firsts)]
        assert [*zip(keys, captions, strict=True)] == [(pair["key"], pair["caption"]) for pair in first_of]
        close(features, store.features.astype(np.float32))
        opened_file = pq.ParquetFile(file)
        groups = [opened_file.metadata.row_group(at) for at in range(opened_file.num_row_groups)]
        kinds = [group.column(2).statistics for group in groups]
        assert len(groups) > 2 and all(kind.min == kind.max for kind in kinds)


def test_pictures_alone_and_bad_ones_counted(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    contents = {f"{number}.png": picture(number) for number in range(30)} | {"7.png": b"no picture"}
    files(tmp_path / "shop", contents)
    arguments = ["encode", str(world.run), str(tmp_path / "shop"), str(tmp_path / "out"), "--format", "npy"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "features of 29 images and 0 texts; left out: 1 × undecodable image" in printed
    assert {file.name for file in (tmp_path / "out").iterdir()} == {".efficientclip.json", "images.npy", "images.txt"}
    keys = (tmp_path / "out" / "images.txt").read_text().splitlines()
    features = np.load(tmp_path / "out" / "images.npy", mmap_mode="r")
    assert features.dtype == np.float16 and isinstance(features, np.memmap)
    squares = [decode_square(contents[key], 16) for key in keys]
    close(features.astype(np.float32), open_run(world.run).frozen.encode(squares))
    bad = {f"{number}.png": b"no picture" for number in range(8)}
    files(tmp_path / "shop", bad)
    assert main([*arguments[:3], str(tmp_path / "none.parquet")]) == 2
    assert "26.7% of 30 samples are bad" in capsys.readouterr().err
    assert not (tmp_path / "none.parquet").exists() and not list(tmp_path.glob(".none*"))


def test_lines_of_text_are_called_by_their_number(world: World, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("红猫\n\n  蓝\t狗 \u2028大\r\n", encoding="utf-8")
    assert encode(world.run, tmp_path / "texts.txt", tmp_path / "out", "npy")["text"] == 2
    assert (tmp_path / "out" / "texts.txt").read_bytes().decode() == "1\t红猫\n3\t蓝 狗 大\n"
    features = np.load(tmp_path / "out" / "texts.npy").astype(np.float32)
    close(features, open_run(world.run).encode_texts(["红猫", "蓝\t狗 \u2028大"]))


def test_only_its_own_is_replaced(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, table = tmp_path / "out", tmp_path / "t.parquet"
    (tmp_path / "texts.txt").write_text("猫\n", encoding="utf-8")
    command = ["encode", str(world.run), str(tmp_path / "texts.txt")]

    def refused(*arguments: str, says: str) -> None:
        assert main([*command, *arguments]) == 2
        assert says in capsys.readouterr().err

    pq.write_table(pa.table({"mine": [1]}), table)
    refused(str(table), says="efficientclip did not write it as a table")
    refused(str(tmp_path / "texts.txt"), "--replace", says="is the source, which stays as it is")
    assert main([*command, str(table), "--replace"]) == 0 == main([*command, str(table)])
    folder = [str(out), "--format", "npy"]
    files(out, {"thesis.txt": b"three years"})
    refused(*folder, "--replace", says="holds files without efficientclip's mark (thesis.txt)")
    (out / "thesis.txt").rename(tmp_path / "thesis.txt")
    assert main([*command, *folder]) == 0
    refused(*folder, says="there is one already; --replace puts the new one in its place")
    (out / "thesis.txt").touch()
    refused(*folder, "--replace", says="holds files that are no part of it (thesis.txt)")
    (out / "thesis.txt").unlink()
    (tmp_path / "texts.txt").write_text("猫\n狗\n", encoding="utf-8")
    assert main([*command, *folder, "--replace"]) == 0
    assert np.load(out / "texts.npy").shape == (2, 16) and not list(tmp_path.glob(".*"))


def test_mistakes_are_told(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.txt").write_text("\n \n")
    files(tmp_path / "bert", {"config.json": b'{"model_type": "bert"}'})
    export(world.run, tmp_path / "exported")
    write_tar(tmp_path / "none.tar", {})
    for model, source, options, says in [
        (world.run, "empty.txt", [], "empty, no text found"),
        (world.run, "none.tar", [], "empty, no sample found"),
        (world.run, "empty.txt", ["--caption-column", "x"], "is no table; leave it out"),
        (tmp_path / "bert", "empty.txt", [], "is a bert; give a run, a folder that `efficientclip export` wrote"),
        (tmp_path / "exported", str(world.store), [], "give the run as MODEL, or the pictures as SOURCE"),
        (tmp_path / "no", "empty.txt", [], "no config.yaml"),
    ]:
        assert main(["encode", str(model), str(tmp_path / source), str(tmp_path / "o.parquet"), *options]) == 2
        assert says in capsys.readouterr().err
    weights = tmp_path / "exported" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert main(["encode", str(tmp_path / "exported"), str(tmp_path / "empty.txt"), str(tmp_path / "o.parquet")]) == 2
    assert "is not what was written" in capsys.readouterr().err
    assert not (tmp_path / "o.parquet").exists()


class Flat:
    """What `faiss.IndexFlatIP` is called by."""

    def __init__(self, width: int) -> None:
        self.rows = np.empty((0, width), np.float32)

    def add(self, rows: Features) -> None:
        assert rows.dtype == np.float32
        self.rows = np.concatenate([self.rows, rows])


def test_an_index_of_faiss(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def write_index(index: Any, file: str) -> None:
        with Path(file).open("wb") as stream:
            np.save(stream, index.rows)

    arguments = ["encode", str(world.run), str(world.tar), str(tmp_path / "out"), "--format", "faiss"]
    monkeypatch.setitem(sys.modules, "faiss", None)
    assert main(arguments) == 2
    assert "--format faiss: the package faiss-cpu is not installed; pip install faiss-cpu" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "faiss", SimpleNamespace(IndexFlatIP=Flat, write_index=write_index))
    assert main(arguments) == 0
    store = Store(world.store)
    close(np.load(tmp_path / "out" / "images.faiss"), store.features.astype(np.float32))
    assert len(np.load(tmp_path / "out" / "texts.faiss")) == 2 * PICTURES
    lines = [line.split("\t") for line in (tmp_path / "out" / "texts.txt").read_text().splitlines()]
    assert lines == [[pair["key"], pair["caption"]] for pair in store.pairs().to_pylist()]
