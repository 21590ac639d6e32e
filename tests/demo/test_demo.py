"""Demo data: splits that do not leak, counted noise, shards of the same bytes, parsers, clear errors."""

from __future__ import annotations

import io
import json
import multiprocessing
import shutil
import tarfile
import time
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from efficientclip.demo import build, packages
from efficientclip.demo.concepts import Concept, Picture, assign_noise, bucket, divide, split_of
from efficientclip.demo.photographs import PHOTOGRAPHS, credits, write_photographs
from efficientclip.demo.pictures import slug, square, write_shard
from efficientclip.demo.texts import dictionary_pairs, manual_paragraphs
from efficientclip.errors import UserError
from efficientclip.files import atomic, lock
from efficientclip.files.ownership import kind_of
from tests.formats import files

MANIFEST = b'{"pictures": {"train": 1}, "noise_share": 0.3, "noise_seed": 0, "sha256": {}}'


def concept(number: int, english: str | None = None) -> Concept:
    # 动物 is a keyword of every concept: a caption that noise may never hand back to any of them.
    names = english or f"thing {number}", "animal"
    return Concept(f"{number:04x}", (f"名{number}", f"词{number}", "动物"), names, "animal-mammal")


def training_pictures(count: int = 40) -> list[Picture]:
    return [
        Picture(one, style, b"png", [{"text": text, "noise": False} for text in one.chinese])
        for one in map(concept, range(count))
        for style in ("google", "twitter")
    ]


def test_split_ignores_gender_and_is_fixed() -> None:
    names = ("man running", "woman running", "person running")
    assert len({split_of(concept(number, name)) for number, name in enumerate(names)}) == 1
    # printf running | sha1sum; another bucket would move pictures across the split of every trained run.
    assert bucket("running") == int("3c49d9cc3c0c83421a1cfb921cdd4aa35dc1ba5c", 16) % 100 == 64
    assert split_of(concept(0, "woman running")) == "train"
    assert split_of(concept(0, "woman dancing")) == "val"


def test_splits_keep_held_out_concepts_and_style_out_of_train() -> None:
    concepts = [concept(number) for number in range(300)]
    pngs = {style: {one.key: b"png" for one in concepts} for style in ("google", "twitter", "openmoji", "fluent")}
    splits = divide(concepts, pngs)
    trained = {picture.concept.key for picture in splits["train"]}
    held_out = {"val_concept", "val_both", "test_concept", "test_concept_google", "test_both"}
    for name in held_out:
        assert splits[name] and not trained & {picture.concept.key for picture in splits[name]}
    assert {picture.style for picture in splits["train"]} == {"google", "twitter", "openmoji"}
    assert {picture.style for picture in splits["test_concept_google"]} == {"google"}
    seen = {picture.concept.key for picture in splits["val_seen"]}
    assert seen and seen <= trained
    assert not seen & {picture.concept.key for picture in splits["train"] if picture.style == "openmoji"}
    for name, pictures in splits.items():
        for picture in pictures:
            texts = [entry["text"] for entry in picture.captions]
            assert texts == list(picture.concept.chinese if name == "train" else picture.concept.chinese[:1])
            assert not any(entry["noise"] for entry in picture.captions)
    counted = sum(len(pictures) for name, pictures in splits.items() if name != "test_concept_google")
    assert counted == 4 * len(concepts)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.99])
def test_noise_is_exact_and_never_true(share: float) -> None:
    pictures = training_pictures()
    pairs = sum(len(picture.captions) for picture in pictures)
    noised = assign_noise(pictures, share, seed=3)
    assert sum(entry["noise"] for picture in noised for entry in picture.captions) == round(share * pairs)
    training = {text for picture in pictures for text in picture.concept.chinese}
    for picture in noised:
        texts = [entry["text"] for entry in picture.captions]
        assert len(set(texts)) == len(texts)
        assert tuple(entry.get("original", entry["text"]) for entry in picture.captions) == picture.concept.chinese
        for entry in picture.captions:
            assert ("original" in entry) == entry["noise"]
            assert (entry["text"] in picture.concept.chinese) != entry["noise"]
            assert entry["text"] in training


def test_noise_follows_its_seed_and_leaves_its_input() -> None:
    pictures = training_pictures()
    once = assign_noise(pictures, 0.3, seed=0)
    assert once == assign_noise(training_pictures(), 0.3, seed=0)
    assert once != assign_noise(pictures, 0.3, seed=1)
    assert pictures == training_pictures()


def test_shards_have_the_same_bytes(tmp_path: Path) -> None:
    pictures = training_pictures(3)
    for name in ("one.tar", "two.tar"):
        write_shard(tmp_path / name, "train", pictures)
    assert (tmp_path / "one.tar").read_bytes() == (tmp_path / "two.tar").read_bytes()
    with tarfile.open(tmp_path / "one.tar") as tar:
        members = tar.getmembers()
        assert [member.name for member in members[:2]] == ["google-0000.png", "google-0000.json"]
        assert {(member.mtime, member.uid, member.gid) for member in members} == {(0, 0, 0)}
        stream = tar.extractfile("google-0000.json")
        assert stream is not None
        record = json.load(stream)
    assert record["captions"][0] == {"text": "名0", "noise": False}
    assert record["captions_en"] == ["thing 0", "animal"]
    assert (record["source"], record["concept"], record["split"]) == ("google", "0000", "train")
    assert record["subgroup"] == "animal-mammal"
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["one.tar", "two.tar"]


def test_photographs_are_as_their_packages_have_them(tmp_path: Path) -> None:
    """With a query and a credit each; a package that lacks one is named."""
    cache, given = tmp_path / "cache", {"lomiri-wallpapers-16.04": Path("lomiri.deb")}
    content = {f"{one.folder}/{one.file}": one.file.encode() for one in PHOTOGRAPHS}
    for package in ("scikit-image", "scikit-learn"):
        given[package] = tmp_path / f"{package}.whl"
        with zipfile.ZipFile(given[package], "w") as wheel:
            for name, picture in content.items():
                wheel.writestr(name, picture)
    files(cache / "unpacked" / "lomiri", content)
    write_photographs(tmp_path / "photographs.tar", cache, given)
    with tarfile.open(tmp_path / "photographs.tar") as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    assert len(members) == 2 * len(PHOTOGRAPHS)
    assert members["chelsea.png"] == b"chelsea.png"
    assert json.loads(members["chelsea.json"])["captions"] == ["一只盯着看的小花猫"]
    assert len({one.query for one in PHOTOGRAPHS}) == len(PHOTOGRAPHS)
    lines = credits()
    assert all(sum(one.file in line and one.credit in line for line in lines) == 1 for one in PHOTOGRAPHS)
    (cache / "unpacked" / "lomiri" / PHOTOGRAPHS[-1].folder / PHOTOGRAPHS[-1].file).unlink()
    with pytest.raises(UserError, match=r"lomiri\.deb has no whole usr/share/.*sunset.*delete the file"):
        write_photographs(tmp_path / "photographs.tar", cache, given)


def test_train_is_replaced_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "SHARD_SAMPLES", 2)
    build._write_train(tmp_path, training_pictures(3))
    assert [path.name for path in sorted((tmp_path / "train").iterdir())] == [
        "00000.tar",
        "00001.tar",
        "00002.tar",
    ]
    build._write_train(tmp_path, training_pictures(1))
    assert [path.name for path in (tmp_path / "train").iterdir()] == ["00000.tar"]
    assert not (tmp_path / "train.partial").exists()


def test_train_cut_short_in_its_replacement_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build._write_train(tmp_path, training_pictures(3))
    before = [path.read_bytes() for path in (tmp_path / "train").iterdir()]
    real, calls = atomic.os.replace, []

    def dying(source: Path, target: Path) -> None:
        calls.append(source)
        if source.name == "train.partial":
            raise KeyboardInterrupt
        real(source, target)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(atomic.os, "replace", dying)
        build._write_train(tmp_path, training_pictures(1))
    assert not (tmp_path / "train").exists()
    atomic.recover(tmp_path / "train")
    assert [path.read_bytes() for path in (tmp_path / "train").iterdir()] == before
    build._write_train(tmp_path, training_pictures(1))
    assert [path.name for path in tmp_path.iterdir()] == ["train"]


@pytest.mark.parametrize(
    ("held", "message"),
    [
        ({}, "reached"),
        ({".cache/openmoji-17.0.0.tgz": b""}, "reached"),
        ({"manifest.json": MANIFEST, "train/00000.tar": b""}, "reached"),
        ({"manifest.json": MANIFEST, "train/00000.tar": b"", "train/my.tar": b"mine"}, r"no part of it \(my\.tar\)"),
        ({"manifest.json": MANIFEST, "train/deep/00000.tar": b""}, r"no part of it \(deep/00000\.tar\)"),
        ({"train/thesis.txt": b"three years"}, r"without efficientclip's mark \(train\) and stays as it is"),
        ({"config.yaml": b"", "checkpoints/step-00000010/state.npz": b""}, "is a run"),
    ],
)
def test_only_demo_data_is_written_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: dict[str, bytes], message: str
) -> None:
    def reached(cache: Path, *only: str) -> None:
        raise UserError("reached")

    monkeypatch.setattr(build, "check_tools", lambda: None)
    monkeypatch.setattr(build, "download", reached)
    files(tmp_path / "demo", held)
    with pytest.raises(UserError, match=message):
        build.build_demo_data(tmp_path / "demo")
    ours = message == "reached" or "no part" in message
    assert (kind_of(tmp_path / "demo") == "demo data") == ours and not (tmp_path / "demo" / lock.NAME).exists()
    assert {name: (tmp_path / "demo" / name).read_bytes() for name in held} == held


def test_a_link_is_not_replaced(tmp_path: Path) -> None:
    files(tmp_path, {"disk/00000.tar": b"mine"})
    (tmp_path / "train").symlink_to("disk")
    with pytest.raises(UserError, match="train: is a link"):
        build._write_train(tmp_path, training_pictures(1))
    assert (tmp_path / "train" / "00000.tar").read_bytes() == b"mine"


def test_two_calls_do_not_build_the_same_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "check_tools", lambda: None)
    monkeypatch.setattr(build, "download", lambda cache, *only: build.build_demo_data(tmp_path / "demo"))
    files(tmp_path / "demo", {"manifest.json": MANIFEST, "train.partial/00000.tar": b"of the first call"})
    with pytest.raises(UserError, match=r"process \d+ on .* \(demo-data\)"):
        build.build_demo_data(tmp_path / "demo")
    assert (tmp_path / "demo" / "train.partial" / "00000.tar").read_bytes() == b"of the first call"


def broken(file: Path) -> None:
    raise UserError(f"demo-data: {file} is broken")


def endless(file: Path) -> None:
    file.touch()
    time.sleep(600)


def test_what_works_beside_ends_with_the_block_or_fails_it(tmp_path: Path) -> None:
    with build._beside(shutil.copy, __file__, tmp_path / "copy"):
        pass
    assert (tmp_path / "copy").is_file()
    with pytest.raises(UserError, match="package is broken"), build._beside(broken, tmp_path / "package"):
        pass
    with pytest.raises(UserError, match="no network"), build._beside(endless, tmp_path / "begun"):
        while not (tmp_path / "begun").exists():
            time.sleep(0.05)
        raise UserError("no network")
    assert not multiprocessing.active_children()


def test_picture_is_square_rgb_over_white() -> None:
    buffer = io.BytesIO()
    Image.new("RGBA", (10, 20), (0, 0, 0, 0)).save(buffer, "PNG")
    with Image.open(io.BytesIO(square(buffer.getvalue(), 16))) as picture:
        assert (picture.size, picture.mode) == ((16, 16), "RGB")
        assert picture.getextrema() == ((255, 255),) * 3


def test_slug_of_an_english_name() -> None:
    assert slug("woman’s hat") == "womans-hat"
    assert slug("piñata") == "pinata"


def test_dictionary_gives_the_first_plain_gloss() -> None:
    entries = [
        ["主角", "主角", "zhu3 jue2", ["leading role; lead", "protagonist"], [], []],
        ["張", "张", "Zhang1", ["surname Zhang", "sheet (of paper)"], [], []],
        ["囲", "囲", "wei2", "Japanese variant of 圍|围[wei2]", [], []],
        ["齪", "龊", "chuo4", ["used in 齷齪|龌龊[wo4 chuo4]"], [], []],
        ["宊", "宊", "tu2", [], [863], []],
        ["大克魯縣", "大克鲁县", "Da4 ke4 lu3 xian4", ["Grand Kru"], [], []],
        ["主角", "主角", "zhu3 jue2", ["main character"], [], []],
    ]
    assert list(dictionary_pairs(entries)) == [("主角", "leading role"), ("张", "sheet")]


def test_manual_page_without_its_markup() -> None:
    page = ".TH LS 1\n.PP\n列出\\fB目录\\fP内容。\n第二行\n.SH 选项\n不要忽略\n"
    assert list(manual_paragraphs(page)) == ["列出目录内容。第二行", "不要忽略"]


def test_classes_are_called_what_wordnet_calls_them_in_imagenets_order(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "timm.whl", "w") as wheel:
        wheel.writestr("timm/data/_info/imagenet_synsets.txt", "n2\nn1\nn3\n")
        lemmas = "n1\tdog, hound\nn2\ttench, Tinca tinca\nn3\tcrane\nn4\tcrane\n"
        wheel.writestr("timm/data/_info/imagenet_synset_to_lemma.txt", lemmas)
    assert build.imagenet_classes(tmp_path / "timm.whl") == ["tench, Tinca tinca", "dog, hound", "crane"]


def test_missing_command_is_named_before_any_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda command: None if command == "npm" else f"/bin/{command}")
    with pytest.raises(UserError, match=r"npm is missing.*apt-get install npm"):
        build.build_demo_data(tmp_path / "demo")
    assert not (tmp_path / "demo").exists()


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda command: f"/bin/{command}")
    monkeypatch.setattr(packages, "find_spec", lambda module: None)
    with pytest.raises(UserError, match=r"resvg_py is missing; pip install 'efficientclip\[demo\]'"):
        packages.check_tools()


def test_failed_download_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"`false` failed"):
        packages._run(["false"], tmp_path, "thing")
    assert not [path for path in tmp_path.iterdir() if path.is_file()]
    with pytest.raises(UserError, match=r"no-such-command is missing, needed for thing"):
        packages._run(["no-such-command"], tmp_path, "thing")


def test_changed_download_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "openmoji-17.0.0.tgz"
    file.write_bytes(b"other bytes")
    with pytest.raises(UserError, match=r"openmoji-17\.0\.0\.tgz has not the pinned sha256; delete it"):
        packages.check_digest("openmoji", file)
    assert len(packages.check_digest("manpages-zh", file)) == 64


def test_damaged_package_is_named(tmp_path: Path) -> None:
    file = tmp_path / "openmoji.tgz"
    file.write_bytes(b"not a tar")
    with pytest.raises(UserError, match=r"openmoji\.tgz has no whole package/x"):
        packages.member(file, "package/x")
