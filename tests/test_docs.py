"""README and docs name what is there: files, recipes, settings, commands; both READMEs are short and tell the same."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from efficientclip.cli import main

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks" / "README.md"]
# It tells of what once was.
NOW = [page for page in PAGES if page.name != "CHANGELOG.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", NOW, ids=lambda page: page.name)
def test_files_that_are_named_are_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"`((?:configs|tests|benchmarks|kernels|csrc|engine|docs)/[\w./*-]+)`", text)
    assert [name for name in named if not [*ROOT.glob(name.rstrip("/"))]] == []


@pytest.mark.parametrize("page", NOW, ids=lambda page: page.name)
def test_commands_that_are_named_exist(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    commands = re.findall(r"^    ([a-z-]+)", capsys.readouterr().out, flags=re.MULTILINE)
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"(?:^ +|`)efficientclip ([a-z][a-z-]+)", text, flags=re.MULTILINE)
    assert named or page not in (ROOT / "README.md", ROOT / "README.zh-CN.md")
    assert [name for name in named if name not in commands] == []


def test_make_targets_that_are_named_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for page in NOW:
        named = re.findall(r"(?:^ +|`)make ([a-z][\w-]*)", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
        assert [name for name in named if name not in targets] == [], page.name


def test_the_readme_is_short_and_both_tell_the_same() -> None:
    one, other = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh-CN.md"))
    assert max(one.count("\n"), other.count("\n")) <= 150
    figures = re.compile(r"\d+(?:,\d{3})+|\d*\.\d+")

    def measured(text: str) -> list[str]:
        rows = [line for line in text.splitlines() if line.startswith("|")]
        return sorted(figure for line in rows for figure in figures.findall(line))

    assert measured(one) == measured(other)
