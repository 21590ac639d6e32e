"""Only what bears this engine's mark is written over, and only where the user asks for it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from efficientclip.errors import UserError
from efficientclip.files.ownership import MADE_BY, MARK, claim, claim_file, kind_of, mark
from tests.formats import files

STORE = json.dumps({"format": 2, "kind": "pairs", "files": {}}).encode()


@pytest.mark.parametrize(
    ("held", "kind"),
    [
        ({}, None),
        ({"thesis.txt": b""}, None),
        ({"manifest.json": b"{}"}, None),
        ({"manifest.json": b"[1"}, None),
        ({"manifest.json": STORE}, "store"),
        ({MARK: b'{"kind": "stnre"}', "manifest.json": STORE}, "store"),
        ({MARK: b'{"kind": "st'}, None),
        ({"manifest.json": b'{"pictures": 1, "noise_share": 0, "sha256": {}}'}, "demo data"),
        ({"export.json": b'{"identity": 1, "shards": [], "next": 0}'}, "kept pairs"),
        ({"config.yaml": b"", "checkpoints/latest": b""}, "run"),
        ({"config.yaml": b""}, None),
        ({"fold-0/config.yaml": b""}, "cross-fit"),
        ({"cross_fit.parquet": b""}, "cross-fit"),
    ],
)
def test_folders_of_earlier_versions_are_known(tmp_path: Path, held: dict[str, bytes], kind: str | None) -> None:
    files(tmp_path / "folder", held)
    assert kind_of(tmp_path / "folder") == kind


def test_a_mark_makes_a_folder_ours(tmp_path: Path) -> None:
    mark(tmp_path / "new", "model")
    before = (tmp_path / "new" / MARK).read_bytes()
    mark(tmp_path / "new", "model")
    assert kind_of(tmp_path / "new") == "model" and (tmp_path / "new" / MARK).read_bytes() == before
    assert MADE_BY in "made by " + json.loads(before)["made_by"]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("foreign", {}, r"did not write \(a, b, c and 1 more\) and stays as it is; name a folder that is empty"),
        ("foreign", {"existing": "replace"}, "did not write"),
        ("foreign", {"beside": ("a", "b")}, r"did not write \(c, d\)"),
        ("file", {}, "is a file; name a folder"),
        ("file/deep/store", {}, "file is a file, where a folder is wanted"),
        ("run", {"existing": "replace"}, "is a run, and stays as it is"),
        ("store", {"existing": "refuse"}, "there is one already; --replace"),
        ("store", {"existing": "replace", "files": ["manifest.json"]}, r"no part of it \(deep/notes, linked\)"),
        ("source", {}, "is or holds the source .*source,"),
        (".", {}, "is or holds the source"),
        ("to-source", {}, "is or holds the source"),
    ],
)
def test_what_is_not_ours_to_write_over_is_refused(
    tmp_path: Path, name: str, options: dict[str, Any], message: str
) -> None:
    files(tmp_path / "foreign", dict.fromkeys("abcd", b""))
    files(tmp_path, {"file": b"", "store/manifest.json": STORE, "store/deep/notes": b"", "source/0.tar": b""})
    (tmp_path / "store" / "linked").symlink_to(tmp_path / "foreign")
    (tmp_path / "to-source").symlink_to(tmp_path / "source")
    mark(tmp_path / "run", "run")
    with pytest.raises(UserError, match=message):
        claim(tmp_path / name, "store", sources=[tmp_path / "source"], **options)


def test_what_is_absent_empty_or_ours_may_be_written(tmp_path: Path) -> None:
    files(tmp_path, {"store/manifest.json": STORE, "logs/1.log": b""})
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("store")
    (tmp_path / "dangling").symlink_to("absent")
    for name in ("absent", "empty", "store", "deep/er"):
        assert claim(tmp_path / name, "store", sources=[tmp_path / "other"]) == tmp_path / name
    assert claim(tmp_path / "link", "store") == tmp_path / "store"
    assert claim(tmp_path / "dangling", "store") == tmp_path / "absent"
    assert claim(tmp_path / "logs", "run", beside=("*.log",)) == tmp_path / "logs"
    assert claim(tmp_path / "store", "store", existing="replace", files=["manifest.json"]) == tmp_path / "store"


def test_what_a_killed_replacement_left_is_put_right(tmp_path: Path) -> None:
    files(tmp_path, {".store.replaced/manifest.json": STORE, ".foreign.replaced/thesis.txt": b"mine"})
    claim(tmp_path / "store", "store")
    assert kind_of(tmp_path / "store") == "store" and not (tmp_path / ".store.replaced").exists()
    files(tmp_path, {".store.replaced/manifest.json": STORE, "foreign/manifest.json": STORE})
    claim(tmp_path / "store", "store")
    with pytest.raises(UserError, match=r"\.foreign\.replaced stands where .*move it away"):
        claim(tmp_path / "foreign", "store")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".foreign.replaced", "foreign", "store"]


@pytest.mark.parametrize("existing", ["replace", "refuse"])
def test_a_mount_point_cannot_be_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existing: Any) -> None:
    monkeypatch.setattr(Path, "is_mount", lambda path: path == tmp_path)
    with pytest.raises(UserError, match="is a mount point"):
        claim(tmp_path, "store", existing=existing)
    assert claim(tmp_path, "store") == tmp_path


def write_table(file: Path, by: str) -> None:
    # Longer than what is read of a file's ends.
    schema = pa.schema([("a", pa.binary())], metadata={"made_by": by})
    pq.write_table(pa.table({"a": [os.urandom(1 << 18)]}, schema=schema), file)


def test_a_file_is_ours_by_what_it_holds(tmp_path: Path) -> None:
    write_table(tmp_path / "ours.parquet", f"{MADE_BY} 0.1.0")
    write_table(tmp_path / "foreign.parquet", "someone")
    (tmp_path / "ours.json").write_text(json.dumps({"made_by": f"{MADE_BY} 0.1.0", "a": 1}, indent=1))
    (tmp_path / "profile.json").write_text(json.dumps({"format": "efficientclip-profile-1"}, indent=1))
    (tmp_path / "foreign.json").write_text("{}")
    (tmp_path / "linked.json").symlink_to("ours.json")
    for name in ("ours.parquet", "ours.json", "profile.json", "absent.json"):
        assert claim_file(tmp_path / name) == tmp_path / name
    assert claim_file(tmp_path / "linked.json") == tmp_path / "ours.json"
    for name in ("foreign.parquet", "foreign.json"):
        with pytest.raises(UserError, match=f"{name}: exists, and efficientclip did not write it; --replace"):
            claim_file(tmp_path / name)
        assert claim_file(tmp_path / name, replace=True) == tmp_path / name
    with pytest.raises(UserError, match="is no file, but a folder"):
        claim_file(tmp_path, replace=True)
    with pytest.raises(UserError, match="is no file, but a device"):
        claim_file(Path("/dev/null"), replace=True)


def test_a_runs_own_files_are_not_written_over_by_results(tmp_path: Path) -> None:
    files(tmp_path, {"config.yaml": b"", "checkpoints/latest": b"", "report.html": b"of an earlier version"})
    assert claim_file(tmp_path / "report.html") == tmp_path / "report.html"
    with pytest.raises(UserError, match=r"config\.yaml: exists, and"):
        claim_file(tmp_path / "config.yaml")


def test_a_folder_that_cannot_be_written_is_told_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(UserError, match=f"{tmp_path} cannot be written; name a page elsewhere by --output"):
        claim_file(tmp_path / "deep" / "report.html", instead="name a page elsewhere by --output")
