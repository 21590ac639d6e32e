from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from efficientclip import __version__
from efficientclip.cli import main
from efficientclip.errors import UserError
from efficientclip.evaluation.zero_shot import TEMPLATES, classify, read_classes
from tests.evaluation.conftest import World
from tests.evaluation.planted import Features, picture_features, plant
from tests.formats import files, picture

NAMES = ["猫", "狗", "鸟"]


@pytest.fixture
def pictures(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder a class, one picture each; a text means the picture of the class that it names, and is a little off."""
    contents = {f"set/{number:02d}/a.png": picture(number) for number in range(len(NAMES))}
    files(tmp_path, contents)
    features_KD = picture_features(world.run, list(contents.values()))
    random = np.random.default_rng(0)

    def feature_of(text: str) -> Features:
        noise = 1e-3 * random.standard_normal(features_KD.shape[1])
        return features_KD[next(k for k, name in enumerate(NAMES) if name in text)] + noise

    plant(monkeypatch, feature_of)
    return tmp_path / "set"


def write(file: Path, lines: list[str]) -> Path:
    file.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return file


@pytest.mark.parametrize("lines", [NAMES, [f"{number:02d}\t{name}" for number, name in enumerate(NAMES)][::-1]])
def test_planted_classes_are_all_found(world: World, pictures: Path, tmp_path: Path, lines: list[str]) -> None:
    report = classify(world.run, pictures, write(tmp_path / "classes.txt", lines))
    assert (report["top1"], report["top5"], report["mean_per_class"], report["images"]) == (100, 100, 100, 3)
    assert report["classes"] == {name: {"top1": 100.0, "images": 1} for name in NAMES}
    assert report["templates"] == list(TEMPLATES) and all(template.count("{}") == 1 for template in TEMPLATES)


def test_exchanged_names_are_all_wrong_and_classes_weigh_alike(world: World, pictures: Path, tmp_path: Path) -> None:
    files(pictures, {"02/b.png": picture(2), "02/c.png": picture(2)})
    report = classify(world.run, pictures, write(tmp_path / "classes.txt", ["狗", "猫", "鸟"]))
    assert (report["top1"], report["mean_per_class"], report["images"]) == (60.0, 33.33, 5)
    assert {name: result["top1"] for name, result in report["classes"].items()} == {"猫": 0, "狗": 0, "鸟": 100}


def test_top5_counts_the_four_classes_before(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files(tmp_path, {"a.png": picture(0)})
    feature_D = picture_features(world.run, [picture(0)])[0]
    apart_D = np.random.default_rng(0).standard_normal(len(feature_D))
    names = list("甲乙丙丁戊己")
    plant(monkeypatch, lambda text: feature_D + apart_D * next(k for k, name in enumerate(names) if name in text))
    for number, (top1, top5) in enumerate([(100, 100), (0, 100), (0, 100), (0, 100), (0, 100), (0, 0)]):
        table = write(tmp_path / "t.csv", ["image,label", f"a.png,{names[number]}"])
        report = classify(world.run, table, write(tmp_path / "classes.txt", names))
        assert (report["top1"], report["top5"]) == (top1, top5)


def test_equal_classes_are_no_hits(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files(tmp_path, {"猫/a.png": picture(0), "狗/a.png": picture(1)})
    plant(monkeypatch, lambda text: np.ones(16, np.float32))
    (tmp_path / "classes").write_text("猫\n狗\n")
    assert classify(world.run, tmp_path, tmp_path / "classes")["top1"] == 0


def test_the_command_prints_a_table_and_writes_json(
    world: World, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    classes, file = write(tmp_path / "classes.txt", NAMES), tmp_path / "result.json"
    assert main(["evaluate", str(world.run), str(pictures), "--classes", str(classes), "--json", str(file)]) == 0
    assert json.loads(file.read_text()) == {
        "made_by": f"made by efficientclip {__version__}",
        **classify(world.run, pictures, classes),
    }
    assert "猫" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("猫\n狗\n", "none of its 2 lines is for the label '02'; write label<TAB>name"),
        ("00\t猫\n01\t狗\n2\t鸟\n", "none of its 3 lines is for the label '02'"),
        ("猫\n", "two classes or more"),
        ("猫\n猫\n", "a name of its own"),
        ("1\t猫\n狗\n", "no label before a tab"),
        ("1\t猫\n1\t狗\n", "stands there twice"),
        ("1\t猫\n2\t\n", "a name of its own"),
    ],
)
def test_a_faulty_file_of_classes_is_refused(
    world: World, pictures: Path, tmp_path: Path, content: str, message: str
) -> None:
    (tmp_path / "classes.txt").write_text(content)
    with pytest.raises(UserError, match=f"--classes .*classes.txt: .*{message}"):
        classify(world.run, pictures, tmp_path / "classes.txt")


def test_classes_that_cannot_be_read_and_doubled_labels_are_refused(world: World, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none: No such file or directory"):
        read_classes(tmp_path / "none")
    (tmp_path / "gbk").write_bytes("鸟\n狗\n".encode("gbk"))
    with pytest.raises(UserError, match=r"gbk, line 1: not UTF-8"):
        read_classes(tmp_path / "gbk")
    files(tmp_path, {"a.png": picture(0)})
    table = write(tmp_path / "t.csv", ["image,label", "a.png,猫", "a.png,狗"])
    with pytest.raises(UserError, match=r"a\.png: has the labels 猫, 狗"):
        classify(world.run, table, write(tmp_path / "classes.txt", NAMES))


def test_only_line_ends_end_a_class(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_bytes("\ufeff0\t猫\u2028科\r\n1\t狗\x85\n\u200b\n2\t鸟\x0b类\n".encode())
    assert read_classes(tmp_path / "classes.txt") == [("0", "猫\u2028科"), ("1", "狗"), ("2", "鸟\x0b类")]
