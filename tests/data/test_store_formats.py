"""Stores of the format before, whose digests were SHA-256: they open, once proved, and are of today's format then."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from pathlib import Path

import pytest

from efficientclip.data.store import ANEW, Store, TextStore, manifest_digest, read_manifest
from efficientclip.errors import UserError
from efficientclip.files import digests, lock
from efficientclip.verify import verify
from tests import tiny


def of_format_2(path: Path, *, first: bool = False) -> bytes:
    """Give the store at `path` the manifest that it had then, or by the `first` versions of that format, which told
    neither of the tokenizer's files nor of the manifest; returns that of today."""
    file = path / "manifest.json"
    today = file.read_bytes()
    manifest = json.loads(today)
    names = [name for name in manifest["files"] if not (first and name.startswith("tokenizer/"))]
    held = {name: (path / name).read_bytes() for name in names}
    files = {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()} for name, content in held.items()
    }
    manifest |= {"format": 2, "files": files}
    del manifest["sha256"]
    if not first:
        manifest["sha256"] = manifest_digest(manifest)
    file.write_text(json.dumps(manifest, ensure_ascii=False, indent=1))
    return today


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in os.listdir(folder) if (folder / name).is_file()}


@pytest.mark.parametrize("kind", ["pairs", "texts"])
def test_a_store_of_format_2_becomes_one_of_today(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    path = (tiny.pair_store if kind == "pairs" else tiny.text_store)(tmp_path / "store")
    today, before = of_format_2(path), contents(path)
    monkeypatch.setattr(digests, "LONG", 1)
    store = (Store if kind == "pairs" else TextStore)(path)
    assert "checking store: 100%" in capsys.readouterr().err
    assert contents(path) == before | {"manifest.json": today}
    # What was read already is known.
    with monkeypatch.context() as patched:
        patched.setattr(digests, "digest_of", None)
        store.prove()
    assert {part.verdict for part in verify(path) if part.name != ".efficientclip.json"} == {"whole"}


def test_a_store_of_the_first_versions_of_format_2_opens(tmp_path: Path) -> None:
    path = tiny.pair_store(tmp_path / "store")
    today = json.loads(of_format_2(path, first=True))
    Store(path).prove()
    now = read_manifest(path)
    assert {*today["files"]} - {*now["files"]} == {name for name in today["files"] if name.startswith("tokenizer/")}
    assert now == today | {"files": {name: today["files"][name] for name in now["files"]}, "sha256": now["sha256"]}


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone", "manifest"])
def test_a_damaged_store_of_format_2_is_named_and_stays(tmp_path: Path, damage: str) -> None:
    path = tiny.pair_store(tmp_path / "store")
    of_format_2(path)
    file = path / ("manifest.json" if damage == "manifest" else "features.bin")
    content = file.read_bytes()
    if damage == "gone":
        file.unlink()
    elif damage == "manifest":
        file.write_bytes(content.replace(b'"width": 16', b'"width": 32'))
    else:
        file.write_bytes(content[:-2] if damage == "cut" else bytes([content[0] ^ 1]) + content[1:])
    before = contents(path)
    told = {"flipped": "is not what was written", "cut": "has .* bytes, not", "gone": "is missing"}
    with pytest.raises(UserError, match=f"{file}: {told.get(damage, 'is not what was written')}.*; {ANEW}"):
        Store(path)
    assert contents(path) == before


def test_a_store_of_format_2_that_cannot_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny.pair_store(tmp_path / "store")
    of_format_2(path)
    before = contents(path)
    # As a folder on a read-only disk answers.
    monkeypatch.setattr("os.access", lambda place, mode: Path(place) != path)
    with pytest.raises(UserError, match=f"format 2 to 3.*: {path} cannot be written .*; give .* or copy the store"):
        Store(path)
    assert contents(path) == before


def test_ranks_that_open_a_store_of_format_2_at_once_read_it_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny.pair_store(tmp_path / "store")
    today, described, read, opened = of_format_2(path), digests.described_anew, [], []
    here = threading.Barrier(4)

    def counted(*given: object) -> digests.Described:
        read.append(given)
        return described(*given)  # type: ignore[arg-type]

    def held(file: Path, doing: str, in_turn: object = lock.in_turn) -> object:
        # All have read the manifest of format 2 by now.
        here.wait(20)
        return in_turn(file, doing)  # type: ignore[operator]

    monkeypatch.setattr(digests, "described_anew", counted)
    monkeypatch.setattr(lock, "in_turn", held)
    ranks = [threading.Thread(target=lambda: opened.append(Store(path).identity)) for _ in range(4)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(20)
    assert opened == [Store(path).identity] * 4 and len(read) == 1
    assert (path / "manifest.json").read_bytes() == today
