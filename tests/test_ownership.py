"""Only what bears this engine's mark is written over, and only where the user asks for it."""

from __future__ import annotations

import gzip
import io
import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from efficientclip.errors import UserError
from efficientclip.files.ownership import MADE_BY, MARK, Made, claim, claim_file, kind_of, mark
from tests.formats import files

STORE = json.dumps({"format": 2, "kind": "pairs", "files": {"tokens.bin": {}, "offsets.bin": {}}}).encode()
RUN = {"config.yaml": b"", "checkpoints/step-00000010/state.npz": b""}


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
        ({"manifest.json": b'{"pictures": {"train": 1}, "noise_share": 0, "noise_seed": 0}'}, "demo data"),
        (
            {"export.json": b'{"identity": {"pairs": 1, "kept": 1, "samples": 1}, "shards": [], "next": 0}'},
            "kept pairs",
        ),
        (RUN, "run"),
        ({f"fold-0/{name}": content for name, content in RUN.items()}, "cross-fit"),
        # What other programs' folders look like.
        ({"config.yaml": b"", "checkpoints/latest": b"", "model/model.safetensors": b""}, None),
        ({"config.yaml": b"", "checkpoints/step-00000010/model.pt": b"", "checkpoints/step-10/state.npz": b""}, None),
        ({"fold-0/config.yaml": b"", "fold-0/checkpoints/last.ckpt": b""}, None),
        ({"cross_fit.parquet": b""}, None),
        ({"manifest.json": b'{"format": 1, "kind": "pairs", "files": ["a", "b"]}'}, None),
        ({"manifest.json": b'{"pictures": 1, "noise_share": 0, "noise_seed": 0}'}, None),
        ({"export.json": b'{"identity": 1, "shards": [], "next": 0}'}, None),
        ({"manifest.json": b"[" * 100_000}, None),
    ],
)
def test_folders_of_earlier_versions_are_known(tmp_path: Path, held: dict[str, bytes], kind: str | None) -> None:
    files(tmp_path / "folder", held)
    assert kind_of(tmp_path / "folder") == kind


def test_a_table_of_a_cross_fit_is_known_by_what_it_tells(tmp_path: Path) -> None:
    for told, kind in (
        ({"rate": "0.1", "visits": "2"}, None),
        ({"rate": "0", "visits": "2", "pairs": "x"}, "cross-fit"),
    ):
        table = pa.table({"row": [0]}).replace_schema_metadata(told)
        pq.write_table(table, tmp_path / "cross_fit.parquet")
        assert kind_of(tmp_path) == kind


def test_a_mark_makes_a_folder_ours(tmp_path: Path) -> None:
    mark(tmp_path / "new", "model")
    before = (tmp_path / "new" / MARK).read_bytes()
    mark(tmp_path / "new", "model")
    assert kind_of(tmp_path / "new") == "model" and (tmp_path / "new" / MARK).read_bytes() == before
    assert MADE_BY in "made by " + json.loads(before)["made_by"]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("foreign", {}, r"without efficientclip's mark \(a, b, c and 1 more\) and stays as it is; name a folder that"),
        ("foreign", {"existing": "replace"}, "holds files without efficientclip's mark"),
        ("foreign", {"beside": ("a", "b")}, r"mark \(c, d\)"),
        ("file", {}, "is a file; name a folder"),
        ("file/deep/store", {}, "file is a file, where a folder is wanted"),
        ("run", {"existing": "replace"}, "is a run, and stays as it is"),
        ("store", {"existing": "refuse"}, "there is one already; --replace"),
        ("store", {"existing": "replace", "files": ["manifest.json"]}, r"no part of it \(deep/notes, linked\)"),
        ("source", {}, "is or holds the source .*source,"),
        (".", {}, "is or holds the source"),
        ("to-source", {}, "is or holds the source"),
        ("loop", {}, "the link .*/loop leads nowhere; mend or remove it"),
        ("unmounted", {}, "the link .*/unmounted leads nowhere"),
        ("unmounted/store", {}, "the link .*/unmounted leads nowhere"),
        ("/", {"sources": []}, "is the root of all folders"),
    ],
)
def test_what_is_not_ours_to_write_over_is_refused(
    tmp_path: Path, name: str, options: dict[str, Any], message: str
) -> None:
    files(tmp_path / "foreign", dict.fromkeys("abcd", b""))
    files(tmp_path, {"file": b"", "store/manifest.json": STORE, "store/deep/notes": b"", "source/0.tar": b""})
    (tmp_path / "store" / "linked").symlink_to(tmp_path / "foreign")
    (tmp_path / "to-source").symlink_to(tmp_path / "source")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "unmounted").symlink_to(tmp_path / "disk" / "store")
    mark(tmp_path / "run", "run")
    with pytest.raises(UserError, match=message):
        claim(tmp_path / name, "store", **{"sources": [tmp_path / "source"], **options})
    assert not (tmp_path / "disk").exists()


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


def table_bytes(by: str, cell: bytes = b"") -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"a": [cell]}, schema=pa.schema([("a", pa.binary())], metadata={"made_by": by})), sink)
    return bytes(sink.getvalue())


def drawn(by: str, **more: str) -> bytes:
    told, encoded = PngInfo(), io.BytesIO()
    for name, text in {**more, "Software": by}.items():
        told.add_text(name, text)
    Image.new("RGB", (2, 2)).save(encoded, "PNG", pnginfo=told)
    return encoded.getvalue()


def packed(name: str, content: bytes = b"") -> bytes:
    stream = io.BytesIO()
    with gzip.GzipFile(name, "wb", fileobj=stream) as file:
        file.write(content)
    return stream.getvalue()


PAGE = b'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
OURS: dict[Made, bytes] = {
    "page": PAGE + f'<meta name="generator" content="{MADE_BY} 0.1.0">\n<title>x</title>'.encode(),
    "picture": drawn(f"{MADE_BY} 0.1.0"),
    "table": table_bytes(f"{MADE_BY} 0.1.0"),
    "result": json.dumps({"made_by": f"{MADE_BY} 0.1.0", "a": 1}, indent=1).encode(),
    "profile": json.dumps({"format": "efficientclip-profile-1"}, indent=1).encode(),
    "trace": packed(f"{MADE_BY} 0.1.0"),
}
FOREIGN: dict[Made, list[bytes]] = {
    "page": [
        PAGE + f'<title>A note on <meta name="generator" content="{MADE_BY} 0.1.0"></title>'.encode(),
        PAGE + f"<title>Pages {MADE_BY} 0.1.0</title>".encode(),
    ],
    "picture": [drawn("Gimp"), drawn("Gimp", comment=f"{MADE_BY} 0.1.0"), b"\x89PNG\r\n\x1a\n", b""],
    "table": [table_bytes("someone"), table_bytes("someone", cell=f"{MADE_BY} 0.1.0".encode()), b"PAR1"],
    "result": [b"{}", json.dumps({"note": "x", "made_by": f"{MADE_BY} 0.1.0"}).encode(), f"{MADE_BY} 0.1".encode()],
    "profile": [b"{}", json.dumps({"about": "efficientclip-profile-1"}).encode()],
    "trace": [packed("trace.json"), packed("trace.json", f"{MADE_BY} 0.1.0".encode()), b""],
}


@pytest.mark.parametrize("made", OURS)
def test_a_file_is_ours_by_what_says_so_in_files_of_its_kind(tmp_path: Path, made: Made) -> None:
    file = tmp_path / "file"
    assert claim_file(file, made) == file
    file.write_bytes(OURS[made])
    (tmp_path / "linked").symlink_to("file")
    assert claim_file(file, made) == claim_file(tmp_path / "linked", made) == file
    others = [content for kind, content in OURS.items() if kind != made]
    for content in (*FOREIGN[made], *others, f"A note on files {MADE_BY} 0.1.0".encode()):
        file.write_bytes(content)
        with pytest.raises(UserError, match=f"file: exists, and efficientclip did not write it as a {made}; --replace"):
            claim_file(file, made)
        assert claim_file(file, made, replace=True) == file


def test_what_is_no_file_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    for file, message in (
        (tmp_path, "is no file, but a folder"),
        (Path("/dev/null"), "is no file, but a device"),
        (Path("/"), "is no file, but a folder"),
        (tmp_path / "loop", "leads nowhere"),
    ):
        with pytest.raises(UserError, match=message):
            claim_file(file, "result", replace=True)


def test_a_runs_own_files_are_not_written_over_by_results(tmp_path: Path) -> None:
    files(tmp_path, {**RUN, "report.html": b"of an earlier version"})
    assert claim_file(tmp_path / "report.html", "page") == tmp_path / "report.html"
    with pytest.raises(UserError, match=r"config\.yaml: exists, and"):
        claim_file(tmp_path / "config.yaml", "result")
    # This version marks what it writes, so this is the user's.
    mark(tmp_path, "run")
    with pytest.raises(UserError, match=r"report\.html: exists, and"):
        claim_file(tmp_path / "report.html", "page")


def test_a_folder_that_cannot_be_written_is_told_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files(tmp_path, {"run/a": b"", "store/manifest.json": STORE})
    mark(tmp_path / "run", "run")
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) not in (tmp_path, tmp_path / "run"))
    with pytest.raises(
        UserError, match=f"{tmp_path} cannot be written \\(Permission denied\\); name a page elsewhere by --output"
    ):
        claim_file(tmp_path / "deep" / "report.html", "page", instead="name a page elsewhere by --output")
    for name, kind, existing, above in (
        ("deep/store", "store", "go on", tmp_path),
        ("store", "store", "replace", tmp_path),
        ("run", "run", "go on", tmp_path / "run"),
    ):
        with pytest.raises(
            UserError,
            match=f"{above} cannot be written \\(Permission denied\\); give this user the right .* name another",
        ):
            claim(tmp_path / name, kind, existing=existing, files=["manifest.json"])  # type: ignore[arg-type]
    # It may be the wanted one, which is then only read.
    assert claim(tmp_path / "store", "store") == tmp_path / "store"
