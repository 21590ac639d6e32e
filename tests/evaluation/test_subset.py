"""Kept pairs of pictures that lie in no tar become shards, too."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from efficientclip.config import load_config
from efficientclip.data.images import ImageLoader
from efficientclip.data.store import Store
from efficientclip.errors import UserError
from efficientclip.evaluation import kept as module
from efficientclip.evaluation import subset
from efficientclip.evaluation.audit import Audit
from efficientclip.evaluation.subset import export_kept
from efficientclip.evaluation.suspects import Evidence
from efficientclip.evaluation.verdicts import Verdicts
from efficientclip.files.ownership import MARK
from efficientclip.prepare.build import prepare
from tests.evaluation.conftest import World
from tests.formats import chinese_clip, files, picture

COUNT = 7


def write(folder: Path, kind: str) -> Path:
    """Seven pictures of two captions each."""
    pictures = {number: picture(number) for number in range(COUNT)}
    captions = [[f"猫{number}", f"狗{number}"] for number in range(COUNT)]
    if kind == "csv":
        files(folder, {f"a.b/{number}.png": content for number, content in pictures.items()})
        rows = [f"a.b/{number}.png,{caption},shop\n" for number in range(COUNT) for caption in captions[number]]
        (folder / "t.csv").write_text("image,caption,source\n" + "".join(rows), encoding="utf-8")
        return folder / "t.csv"
    if kind == "parquet":
        table = pa.table({"image": list(pictures.values()), "caption": captions, "source": ["shop"] * COUNT})
        pq.write_table(table, folder / "t.parquet", row_group_size=3)
        return folder / "t.parquet"
    texts = [
        {"text_id": f"{number}-{at}", "text": caption, "image_ids": [number]}
        for number in range(COUNT)
        for at, caption in enumerate(captions[number])
    ]
    return chinese_clip(folder, "t", pictures, texts)


def audited(world: World, folder: Path, kind: str, dropped: list[int]) -> Audit:
    """Of a store of these pictures, without the pairs `dropped`."""
    config = load_config(world.run / "config.yaml")
    prepare(write(folder, kind), folder / "store", config)
    store = Store(folder / "store")
    kept = np.ones(len(store), bool)
    kept[dropped] = False
    zero = np.zeros(len(store))
    return Audit(world.run, config, store, Verdicts(zero, kept, None), [], zero, Evidence(zero))


@pytest.mark.parametrize("kind", ["csv", "parquet", "base64"])
def test_kept_pairs_of_any_source_are_exported(
    world: World, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    audit = audited(world, tmp_path, kind, dropped=[0, 4, 5])
    out = tmp_path / "kept"
    real, asked = module.read_picture, []

    def failing(shard: Path, offset: int, length: int) -> bytes:
        asked.append(offset)
        if len(asked) == 5:
            raise KeyboardInterrupt
        return real(shard, offset, length)

    monkeypatch.setattr(subset, "cores_of_rank", lambda: 1)
    monkeypatch.setattr(module, "read_picture", failing)
    with pytest.raises(KeyboardInterrupt):
        export_kept(audit, out, samples=2, size=1 << 20)
    assert {file.name for file in out.iterdir()} == {MARK, "00000.tar", "00001.tar", "export.json"}
    assert export_kept(audit, out, samples=2, size=1 << 20) == (3, 2 * COUNT - 3)
    found = {}
    with ImageLoader(out, batch_size=8, size=16, train=False, keep_encoded=True) as loader:
        for batch in loader:
            assert set(batch.sources) == {"" if kind == "base64" else "shop"}
            found |= dict(zip(batch.encoded, batch.captions, strict=True))
        assert not loader.bad_samples
    expected = {picture(n): sorted([f"猫{n}", f"狗{n}"]) for n in range(COUNT) if n != 2} | {picture(0): ["狗0"]}
    assert found == expected
    made = prepare(out, tmp_path / "again", audit.config)
    assert (made["pairs"], made["images"]) == (2 * COUNT - 3, COUNT - 1)


@pytest.mark.parametrize("kind", ["csv", "base64"])
def test_processes_and_parts_of_the_table_change_nothing(
    world: World, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    audit = audited(world, tmp_path, kind, dropped=[0, 4, 5])
    made = {}
    for name, cores, rows in (("one", 1, 1 << 16), ("three", 3, 1 << 16), ("parts", 1, 3)):
        monkeypatch.setattr(subset, "cores_of_rank", lambda cores=cores: cores)
        monkeypatch.setattr("efficientclip.data.parquet.ROWS", rows)
        assert export_kept(audit, tmp_path / name, samples=2, size=1 << 20) == (3, 2 * COUNT - 3)
        files_of = (file for file in (tmp_path / name).iterdir() if file.name != MARK)
        made[name] = {file.name: file.read_bytes() for file in files_of}
    assert made["one"] == made["three"] == made["parts"] and len(made["one"]) == 4
    # What a share holds is bounded by bytes, too.
    assert export_kept(audit, tmp_path / "small", samples=100, size=1)[0] == COUNT - 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (-1, r"3\.png: it ends early; the store points to it, put it back"),
        (0, r"3\.png: no picture at byte 0 .*it changed, put back what the store was"),
    ],
)
def test_a_picture_that_changed_ends_the_export(world: World, tmp_path: Path, more: int, message: str) -> None:
    audit = audited(world, tmp_path, "csv", dropped=[])
    changed = tmp_path / "a.b" / "3.png"
    changed.write_bytes(b"x" * (changed.stat().st_size + more))
    with pytest.raises(UserError, match=message):
        export_kept(audit, tmp_path / "out", samples=9, size=1 << 20)
