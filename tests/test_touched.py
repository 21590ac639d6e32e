"""`make check` runs the tests that touch a change, nearest first, and none that would end too late."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import pytest

from tests import touched
from tests.imports import ROOT
from tests.touched import changed, fitting, touching

pytest_plugins = ["pytester"]


@pytest.mark.parametrize(
    ("file", "first"),
    [
        ("engine/noise/rate.py", ["tests/noise/test_rate.py"]),
        ("engine/export.py", ["tests/test_export.py"]),
        ("kernels/sigmoid.py", ["tests/kernels/test_sigmoid.py"]),
        ("engine/evaluation/report.html", ["tests/evaluation/test_report.py"]),
        ("tests/test_cli.py", ["tests/test_cli.py"]),
        ("docs/noise.md", ["tests/test_docs.py"]),
        ("csrc/tar.cpp", ["tests/csrc/test_images.py", "tests/csrc/test_loader.py"]),
        ("LICENSE", []),
    ],
)
def test_a_change_begins_with_its_own_tests(file: str, first: list[str]) -> None:
    assert touching([file])[: len(first)] == first and (first or not touching([file]))


def test_importers_come_next_and_what_no_test_imports_stands_for_them() -> None:
    found = touching(["engine/evaluation/verdicts.py"])
    assert found.index("tests/evaluation/test_verdicts.py") < found.index("tests/evaluation/test_report.py")
    # Only the trainer imports it, and tests start that by runs.
    assert "tests/training/test_second_stage.py" in touching(["engine/training/tally.py"])
    assert "tests/data/test_pairs.py" in touching(["tests/tiny.py"])


def test_files_are_chosen_by_what_they_took(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(touched, "DURATIONS", tmp_path / "durations")
    files = [f"tests/test_{name}.py" for name in "abcd"]
    assert [*fitting(files, 3 * touched.UNKNOWN)] == files[:3]
    touched.DURATIONS.write_text(json.dumps({f"{files[0]}::one": 9, f"{files[0]}::two": 2, f"{files[1]}::one": 1}))
    assert [*fitting(files, 11)] == files[:1] and [*fitting(files, 11.5)] == files[:2]


def test_what_changed_is_told_by_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> None:
        who = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "init.defaultBranch=main")
        subprocess.run(["git", *who, *arguments], cwd=tmp_path, check=True, capture_output=True)

    monkeypatch.setattr(touched, "ROOT", tmp_path)
    git("init")
    for name in ("same", "branch", "edited"):
        (tmp_path / name).write_text(name)
    git("add", ".")
    git("commit", "-m", "first")
    assert changed() == []
    git("switch", "-c", "work")
    (tmp_path / "branch").write_text("other")
    git("commit", "-am", "second")
    (tmp_path / "edited").write_text("other")
    (tmp_path / "new").touch()
    assert changed() == ["branch", "edited", "new"]


def test_a_test_that_would_end_too_late_is_skipped(pytester: pytest.Pytester) -> None:
    pytester.makeconftest((Path(__file__).parent / "conftest.py").read_text())
    pytester.makepyfile("import time\ndef test_long(): time.sleep(0.3)\ndef test_short(): pass")
    pytester.runpytest_subprocess().assert_outcomes(passed=2)
    # Long is more than is left, short is not.
    pytester.runpytest_subprocess("--until", "1e12").assert_outcomes(passed=2)
    cached = pytester.path / touched.DURATIONS.relative_to(ROOT)
    long, short = json.loads(cached.read_text())
    cached.write_text(json.dumps({long: 1e6, short: 1}))
    result = pytester.runpytest_subprocess("-rs", "--until", str(time.time() + 1e5))
    result.assert_outcomes(passed=1, skipped=1)
    result.stdout.fnmatch_lines(["*would not end in time: `make test` runs it"])
