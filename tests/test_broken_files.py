"""Whatever happens to a file that a command reads: one message that names it, or the very same result."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from efficientclip.cli import main
from efficientclip.data.store import Store
from efficientclip.errors import UserError
from efficientclip.evaluation.run import read_metrics
from efficientclip.evaluation.verdicts import read_verdicts
from efficientclip.files import digests
from efficientclip.noise.cross_fit import CrossFit, read_cross_fit, read_rate, write_cross_fit
from efficientclip.training.history import RECORD, open_epoch
from tests import tiny
from tests.training.launch import run

# What reads it, by file; in the order of the commands.
READERS = {
    "run/config.yaml": ("evaluate", "audit"),
    "run/identity.json": ("evaluate", "audit"),
    "run/digests.json": ("evaluate", "audit"),
    "run/tokenizer/tokenizer.json": ("evaluate",),
    "run/tokenizer/tokenizer_config.json": ("evaluate",),
    "run/model/config.json": ("evaluate",),
    "run/model/model.safetensors": ("evaluate",),
    "run/model/digests.json": ("evaluate",),
    "run/confidence.parquet": ("audit",),
    "run/history/epoch-00001.npy": ("audit",),
    "run/metrics.jsonl": ("report",),
    "run/hardware.json": ("audit",),
    "run/checkpoints/best": ("evaluate",),
    "run/checkpoints/latest": ("evaluate",),
    **{
        f"store/{name}": ("evaluate", "audit")
        for name in (
            "manifest.json",
            "features.bin",
            "tokens.bin",
            "offsets.bin",
            "pairs.parquet",
            "image_ids.bin",
            "caption_ids.bin",
            "edges.offsets.bin",
            "edges.images.bin",
            "tokenizer/tokenizer.json",
        )
    },
}
DAMAGES = ("cut", "emptied", "flipped", "garbage", "removed")


def finished(folder: Path) -> Path:
    """A store, and a run that was trained on it to its end, with ECL on."""
    tiny.pair_store(folder / "store")
    confidence = {"selection": "schedule", "drop_share": 0.25, "drops": 1}
    run(1, str(tiny.config(folder, confidence=confidence, mlm__texts_per_batch=0)))
    return folder


@dataclass(frozen=True)
class Undamaged:
    folder: Path
    results: dict[str, list[bytes]]


@pytest.fixture(scope="module")
def undamaged(tmp_path_factory: pytest.TempPathFactory) -> Undamaged:
    folder = finished(tmp_path_factory.mktemp("finished"))
    for command in ("evaluate", "audit", "report"):
        assert called(folder, command) == 0
    return Undamaged(folder, {command: results(folder, command) for command in ("evaluate", "audit", "report")})


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


def called(folder: Path, command: str) -> int:
    out = folder / "results" / command
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    arguments = {
        "evaluate": [str(folder / "store"), "--json", str(out / "result.json")],
        "audit": [str(out)],
        "report": ["--output", str(out / "report.html")],
    }
    return main([command, str(folder / "run"), *arguments[command]])


def results(folder: Path, command: str) -> list[bytes]:
    """What the command wrote, but pages: these tell the time."""
    files = sorted((folder / "results" / command).iterdir())
    return [file.read_bytes() for file in files if file.suffix != ".html"]


@contextmanager
def damaged(file: Path, damage: str, random: np.random.Generator) -> Iterator[None]:
    content = file.read_bytes()
    if damage == "removed":
        file.unlink()
    else:
        flipped = bytearray(content)
        flipped[random.integers(len(content))] ^= 1 << int(random.integers(8))
        broken = {
            "cut": content[: len(content) // 2],
            "emptied": b"",
            "flipped": bytes(flipped),
            "garbage": random.bytes(len(content)),
        }
        file.write_bytes(broken[damage])
    try:
        yield
    finally:
        file.write_bytes(content)


@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_is_named_or_does_not_matter(
    undamaged: Undamaged, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    seed = int(np.random.default_rng().integers(1 << 30))
    print(f"seed {seed}")
    random = np.random.default_rng(seed)
    for damage in DAMAGES:
        for command in READERS[name]:
            with damaged(undamaged.folder / name, damage, random):
                capsys.readouterr()
                code = called(undamaged.folder, command)
                told = capsys.readouterr().err
            print(damage, command, code, told.splitlines()[-1:])
            if code == 0:
                assert results(undamaged.folder, command) == undamaged.results[command], (damage, command)
                # These alone may be missed.
                assert Path(name).name in ("digests.json", "best", "latest"), (damage, command)
            else:
                assert code == 2 and told.count("error:") == 1 and "Traceback" not in told, (damage, command, told)
                # Where a digest is flipped, either of the two may be the broken one.
                named = Path(name).name in told.rpartition("error:")[2] or Path(name).name == "digests.json"
                assert named, (damage, command, told)


@pytest.fixture
def judged(tmp_path: Path) -> tuple[Path, Store]:
    store = Store(tiny.pair_store(tmp_path / "store"))
    random = np.random.default_rng(0)
    columns = [random.random(len(store)) for _ in range(4)]
    fold = random.integers(0, 2, len(store)).astype(np.int8)
    write_cross_fit(tmp_path, store, CrossFit(0.25, 640, fold, *columns))
    return tmp_path / "cross_fit.parquet", store


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cross_fit_is_named(judged: tuple[Path, Store], damage: str) -> None:
    seed = int(np.random.default_rng().integers(1 << 30))
    print(f"seed {seed}")
    random = np.random.default_rng(seed)
    file, store = judged
    whole, rate = read_cross_fit(file.parent, store), read_rate(file.parent)
    assert rate == 0.25
    for _ in range(20 if damage == "flipped" else 1):
        with damaged(file, damage, random):
            with suppress_named(file):
                found = read_cross_fit(file.parent, store)
                # A bit in the file's statistics or its padding.
                assert damage == "flipped"
                assert all(np.array_equal(getattr(found, name), getattr(whole, name)) for name in vars(whole))
            with suppress_named(file):
                assert read_rate(file.parent) in ((None,) if damage == "removed" else (rate,))


@contextmanager
def suppress_named(file: Path) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        assert str(file) in str(error)


@pytest.mark.parametrize("change", ["other columns", "shorter", "NaN", "rate", "no metadata"])
def test_a_cross_fit_of_an_earlier_version_is_looked_at_too(judged: tuple[Path, Store], change: str) -> None:
    file, store = judged
    table = pq.read_table(file)
    told = {key: value for key, value in table.schema.metadata.items() if key in (b"rate", b"visits", b"pairs")}
    pq.write_table(table.replace_schema_metadata(told), file)
    assert read_cross_fit(file.parent, store).rate == 0.25
    score = np.where(np.arange(len(table)) == 3, np.nan, table["score"].to_numpy())
    changed = {
        "other columns": table.drop_columns(["p"]),
        "shorter": table.slice(0, len(table) - 1),
        "NaN": table.set_column(table.schema.get_field_index("score"), "score", pa.array(score)),
        "rate": table.replace_schema_metadata(told | {b"rate": b"nan"}),
        "no metadata": table.replace_schema_metadata(None),
    }[change]
    metadata = changed.schema.metadata and {k: v for k, v in changed.schema.metadata.items() if k in told}
    pq.write_table(changed.replace_schema_metadata(metadata), file)
    with pytest.raises(UserError, match=r"confidence\.cross_fit: .*cross_fit\.parquet"):
        read_cross_fit(file.parent, store)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"step": 1, "visits": 32}\n\xff\xfe\n{"step": 2, "visits": 64}\n', r"metrics .*metrics\.jsonl: broken"),
        (b'{"step": 1, "visits": 32}\n7\n', "line 2 is not one of a step"),
    ],
)
def test_metrics_of_an_unfinished_run_are_looked_at_too(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_metrics(tmp_path / "metrics.jsonl")


@pytest.mark.parametrize("records", [np.zeros(5), np.zeros((5, 2), RECORD)])
def test_a_history_of_other_records_is_refused(tmp_path: Path, records: np.ndarray) -> None:
    np.save(tmp_path / "epoch-00000.npy", records)
    with pytest.raises(UserError, match=r"history .*epoch-00000\.npy: broken \(.* instead of"):
        open_epoch(tmp_path / "epoch-00000.npy")


def test_lost_verdicts_of_a_finished_run_are_no_unfinished_run(tmp_path: Path) -> None:
    store = Store(tiny.pair_store(tmp_path / "store"))
    (tmp_path / "confidence.parquet").write_bytes(b"1")
    digests.write_digests(tmp_path)
    (tmp_path / "confidence.parquet").unlink()
    with pytest.raises(UserError, match=r"confidence\.parquet: is missing"):
        read_verdicts(tmp_path, store)


def test_verdicts_on_other_pairs_are_refused(tmp_path: Path) -> None:
    store = Store(tiny.pair_store(tmp_path / "store"))
    for rows, message in ((np.arange(5), "tells of 5 pairs"), (np.ones(len(store), int), "broken")):
        table = {"row": rows, "score": np.zeros(len(rows)), "kept": np.ones(len(rows), bool)}
        pq.write_table(pa.table(table), tmp_path / "confidence.parquet")
        with pytest.raises(UserError, match=rf"confidence\.parquet.*{message}"):
            read_verdicts(tmp_path, store)


def test_what_was_read_once_is_read_anew_when_it_was_touched(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"a" * 10)
    (tmp_path / "b").write_bytes(b"b" * 10)
    digests.write_digests(tmp_path)
    for name in "ab":
        digests.check_written(tmp_path, name, remedy="")
    stood = (tmp_path / "a").stat()
    (tmp_path / "a").write_bytes(b"c" * 10)
    os.utime(tmp_path / "a", ns=(stood.st_atime_ns, stood.st_mtime_ns))
    digests.check_written(tmp_path, "b", remedy="")
    with pytest.raises(UserError, match="is not what was written"):
        digests.check_written(tmp_path, "a", remedy="")
    with suppress(UserError):
        digests.check(tmp_path, digests.read_digests(tmp_path), "", anew=True)
    with pytest.raises(UserError, match="is not what was written"):
        digests.check_written(tmp_path, "a", remedy="")
