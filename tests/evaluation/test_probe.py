from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from efficientclip import __version__
from efficientclip.cli import main
from efficientclip.errors import UserError
from efficientclip.evaluation.probe import probe
from tests import tiny
from tests.evaluation.conftest import World


def write(file: Path, rows: list[tuple[str, str]]) -> Path:
    file.write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in rows), encoding="utf-8")
    return file


def texts(random: np.random.Generator, count: int) -> list[str]:
    others = [character for character in tiny.CHARACTERS if character not in "猫狗"]
    return ["".join(random.choice(others, 4)) for _ in range(count)]


@pytest.fixture
def seed() -> int:
    return int(np.random.default_rng().integers(1 << 30))


def test_planted_labels_are_found_and_random_ones_are_not(world: World, tmp_path: Path, seed: int) -> None:
    print(f"seed {seed}")
    random = np.random.default_rng(seed)
    labels = random.choice(["猫", "狗"], 400)
    bare = texts(random, 400)
    planted = write(
        tmp_path / "planted.csv", [(label * 4 + text[:1], label) for text, label in zip(bare, labels, strict=True)]
    )
    report = probe(world.run, planted, None, 0)
    assert report["accuracy"] > 95 and report["macro_f1"] > 95
    assert (report["train"], report["test"], report["labels"]) == (320, 80, 2)
    chance = write(tmp_path / "chance.csv", list(zip(bare, labels, strict=True)))
    # Five standard deviations of 80 coins.
    assert 22 < probe(world.run, chance, None, 0)["accuracy"] < 78


def test_the_test_file_alone_is_scored(world: World, tmp_path: Path, seed: int) -> None:
    print(f"seed {seed}")
    random = np.random.default_rng(seed)
    rows = [(label * 4 + text[:1], label) for label in "猫狗" for text in texts(random, 40)]
    train = write(tmp_path / "train.csv", rows)
    # Cats are right, dogs are called cats: 30 of 40 right; F1 is 6/7 for cats and 0 for dogs.
    exchanged = [("狗" * 4, "猫")] * 10 + [("猫" * 4, "猫")] * 30
    report = probe(world.run, train, write(tmp_path / "test.csv", exchanged), 0)
    assert (report["accuracy"], report["test"], report["train"]) == (75.0, 40, 80)
    assert report["macro_f1"] == round(100 * (2 * 30 / (30 + 40) + 0) / 2, 2)


def test_the_split_is_a_function_of_the_seed(world: World, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    # A third of the labels is drawn anew, so that accuracy depends on which texts are held out.
    said = random.choice(list("猫狗"), 100)
    labels = np.where(random.random(100) < 1 / 3, random.choice(list("猫狗"), 100), said)
    rows = [
        (text[:1] + animal * 3, label) for text, animal, label in zip(texts(random, 100), said, labels, strict=True)
    ]
    train = write(tmp_path / "train.csv", rows)
    results = [probe(world.run, train, None, seed) for seed in (0, 0, 1, 2, 3)]
    assert results[0] == results[1] and any(report != results[0] for report in results)


def test_the_command_prints_a_table_and_writes_json(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [(label * 3, label) for label in "猫狗" for _ in range(20)]
    train, test = write(tmp_path / "a.csv", rows), write(tmp_path / "b.csv", rows[10:])
    arguments = ["--text-train", str(train), "--text-test", str(test), "--json", str(tmp_path / "result.json")]
    assert main(["evaluate", str(world.run), *arguments]) == 0
    assert json.loads((tmp_path / "result.json").read_text()) == {
        "made_by": f"made by efficientclip {__version__}",
        **probe(world.run, train, test, 0),
    }
    assert "macro-F1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("rows", "test_rows", "message"),
    [
        ([("猫", "x")] * 9, None, "a.csv: needs texts of two labels or more"),
        ([("猫", "x")] * 9 + [("狗", "y")], None, "a.csv: too few texts to hold a fifth out"),
        ([("猫", "x"), ("狗", "y")] * 9, [("猫", "x"), ("鸟", "z")], "b.csv: no text of .*a.csv has its label 'z'"),
        ([("猫", "x"), ("", "y")] * 9, None, "a.csv, line 3: no text, no label or .*, as in 9 rows"),
    ],
)
def test_faulty_tables_are_refused(
    world: World, tmp_path: Path, rows: list[tuple[str, str]], test_rows: list[tuple[str, str]] | None, message: str
) -> None:
    train = write(tmp_path / "a.csv", rows)
    test = None if test_rows is None else write(tmp_path / "b.csv", test_rows)
    with pytest.raises(UserError, match=message):
        probe(world.run, train, test, 0)
