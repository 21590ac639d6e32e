"""`efficientclip recipes`, and that a wheel has what it lists. That recipes run: tests/training/test_recipes.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from efficientclip.cli import main
from efficientclip.recipes import shipped

ROOT = Path(__file__).parents[1]
FILES = sorted(file.relative_to(ROOT) for file in (ROOT / "configs").rglob("*") if file.is_file())


def test_all_of_configs_is_listed_with_a_sentence_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    listed = dict(line.split(maxsplit=1) for line in lines)
    names = [file.relative_to("configs") for file in FILES]
    assert sorted(listed) == sorted(str(name.with_suffix("") if name.suffix == ".yaml" else name) for name in names)
    assert all(said.endswith("." if name in listed and "/" not in name else "}") for name, said in listed.items())


@pytest.mark.parametrize("asked", ["clip", "clip.yaml", "configs/clip.yaml"])
def test_one_is_printed_or_written_and_says_what_else_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], asked: str
) -> None:
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "configs/clip.yaml").read_text(encoding="utf-8")
    needs = "efficientclip recipes deepspeed/zero2.json configs/deepspeed/zero2.json"
    assert main(["recipes", asked]) == 0
    printed = capsys.readouterr()
    assert printed.out == text and needs in printed.err
    assert main(needs.split()[1:]) == 0
    assert main(["recipes", asked, "new/mine.yaml"]) == 0
    assert capsys.readouterr() == ("", "")
    assert Path("new/mine.yaml").read_text(encoding="utf-8") == text
    zero = "configs/deepspeed/zero2.json"
    assert Path(zero).read_text(encoding="utf-8") == (ROOT / zero).read_text(encoding="utf-8")


def test_nothing_is_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("run: mine\n")
    assert main(["recipes", "demo", str(mine)]) == 2
    assert f"{mine}: exists" in capsys.readouterr().err and mine.read_text() == "run: mine\n"


def test_a_wrong_name_is_told_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "wenland"]) == 2
    assert "recipe wenland: there is none; did you mean `wenlan`?" in capsys.readouterr().err


def test_a_wheel_has_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # pip brings pybind11 into an environment of its own; what is not compiled needs no more of it than the name.
    helpers = tmp_path / "pybind11/setup_helpers.py"
    helpers.parent.mkdir()
    helpers.write_text("def Pybind11Extension(*_, **__): return __import__('setuptools').Extension('none', [])\n")
    built = tmp_path / "built"
    steps = ["egg_info", "--egg-base", str(tmp_path), "build_py", "--build-lib", str(built)]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    made = [sys.executable, "setup.py", "--quiet", *steps]
    subprocess.run(made, cwd=ROOT, env=environment, check=True, capture_output=True)
    package = built / "efficientclip"
    assert sorted(file.relative_to(package) for file in (package / "configs").rglob("*") if file.is_file()) == FILES
    monkeypatch.setattr("efficientclip.recipes.__file__", str(package / "recipes.py"))
    assert sorted(file.relative_to(package) for file in shipped().values()) == FILES
