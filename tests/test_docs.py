"""README and docs name what is there: files, recipes, settings, commands; both READMEs are short and tell the same."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from textwrap import dedent
from typing import Any, get_args, get_origin

import pytest

from benchmarks import noise_rate, tables
from efficientclip import cli
from efficientclip.config import Config, Section, load_config
from efficientclip.data import tables as columns

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md")), ROOT / "benchmarks" / "README.md"]
# It tells of what once was.
NOW = [page for page in PAGES if page.name != "CHANGELOG.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", NOW, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_are_named_are_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"`((?:configs|tests|benchmarks|kernels|csrc|engine|docs)/[\w./*-]+)`", text)
    assert [name for name in named if not [*ROOT.glob(name.rstrip("/"))]] == []


@pytest.mark.parametrize("page", NOW, ids=lambda page: str(page.relative_to(ROOT)))
def test_tests_that_are_named_are_there(page: Path) -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", page.read_text(encoding="utf-8"))
    gone = [(file, name) for file, name in named if f"\ndef {name}(" not in (ROOT / file).read_text(encoding="utf-8")]
    assert gone == []


COMMAND = re.compile(r"(^ {4}|`)(?:efficientclip |[^`\n#]*--module efficientclip\.)([a-z][^`\n#]*)", re.MULTILINE)


@pytest.mark.parametrize("page", NOW, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_are_what_the_command_line_takes(
    page: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parsed: list[object] = []
    monkeypatch.setattr(cli, "reported", lambda command: parsed.append(command) or 0)
    commands = COMMAND.findall(page.read_text(encoding="utf-8").replace("\\\n", " "))
    for begin, command in commands:
        name, *rest = shlex.split(re.sub(r"[][…]", "", command))
        try:
            cli.main([name.replace("_", "-"), *rest])
        except SystemExit:
            wrong = capsys.readouterr().err.splitlines()[-1]
            # In a sentence, or before dots, a command may be begun alone.
            begun = "the following arguments are required" in wrong and (begin == "`" or "…" in command)
            assert begun, f"efficientclip {command}: {wrong}"
    assert parsed or not page.name.startswith("README") or page.parent != ROOT


def is_key(annotation: Any, parts: list[str]) -> bool:
    """Whether a dotted key leads somewhere in a section, or in what may stand under names that a user gives."""
    if not parts or annotation is Any:
        return True
    if get_origin(annotation) is dict:
        return is_key(get_args(annotation)[1], parts[1:])
    if isinstance(annotation, type) and issubclass(annotation, Section):
        field = annotation.model_fields.get(parts[0])
        return field is not None and is_key(field.annotation, parts[1:])
    return any(is_key(part, parts) for part in get_args(annotation))


@pytest.mark.parametrize("page", NOW, ids=lambda page: str(page.relative_to(ROOT)))
def test_keys_that_are_named_are_of_the_config(page: Path) -> None:
    code = re.findall(r"^ {4}.*|`[^`\n]+`", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    key = re.compile(rf"(?<![\w./-])(?:{'|'.join(Config.model_fields)})(?:\.\w+)+")
    named = {found for part in code for found in key.findall(part) if not found.endswith((".csv", ".json", ".py"))}
    assert [found for found in sorted(named) if not is_key(Config, found.split("."))] == []
    assert not is_key(Config, ["training", "batchsize"]) and is_key(Config, ["data", "sources", "coco", "weight"])


def test_configs_that_are_shown_are_whole(tmp_path: Path) -> None:
    pages = "\n".join(page.read_text(encoding="utf-8") for page in NOW)
    shown = re.findall(r"^    run: .*\n(?:    .*\n)+", pages, flags=re.MULTILINE)
    assert shown
    for text in shown:
        (tmp_path / "shown.yaml").write_text(dedent(text), encoding="utf-8")
        load_config(tmp_path / "shown.yaml")


def test_the_page_on_data_has_the_names_of_columns() -> None:
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    kinds = (kind for name, kind in vars(columns).items() if name.endswith("_COLUMNS"))
    said = {re.sub(r"\W", "", word) for word in page.split()}
    assert {name for kind in kinds for name in kind} <= said


def test_make_targets_that_are_named_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for page in NOW:
        named = re.findall(r"(?:^ +|`)make ([a-z][\w-]*)", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
        assert [name for name in named if name not in targets] == [], page.name


@pytest.mark.parametrize("picture", sorted((ROOT / "docs").glob("*.svg")), ids=lambda picture: picture.name)
def test_a_picture_fetches_nothing_and_names_no_folder_of_the_machine_that_drew_it(picture: Path) -> None:
    drawn = picture.read_text(encoding="utf-8").replace("&#160;", " ")
    assert re.findall(r"url\((?!#)|href=|<image|<script|/(?:tmp|root|work)/", drawn) == []


def test_the_readme_is_short_and_both_tell_the_same() -> None:
    one, other = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh-CN.md"))
    assert max(one.count("\n"), other.count("\n")) <= 150
    assert [found[2] for found in tables.BLOCK.finditer(one)] == [found[2] for found in tables.BLOCK.finditer(other)]


def test_what_was_measured_stands_in_the_pages_as_in_the_results(capsys: pytest.CaptureFixture[str]) -> None:
    assert tables.main(["--check"]) == 0, capsys.readouterr().err
    shown = {found[2] for page in tables.PAGES for found in tables.BLOCK.finditer(page.read_text(encoding="utf-8"))}
    assert shown == tables.TABLES.keys()


def test_claims_make_each_kind_of_noise_that_a_table_shows() -> None:
    picks = [pick for table in tables.TABLES.values() for row in table.rows for pick in row.picks]
    shown = {where["case"] for pick in picks if pick.file == "noise_rate" for where in pick.wheres}
    assert len(shown) > 10 and shown <= {*noise_rate.CASES}


def test_a_figure_that_was_changed_is_told_and_made_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, right = tmp_path / "README.zh-CN.md", (ROOT / "README.zh-CN.md").read_text(encoding="utf-8")
    page.write_text(right.replace("| 本项目 |", "| 别的 |"), encoding="utf-8")
    assert tables.main(["--check", str(page)]) == 1
    assert "README.zh-CN.md: peers: not what benchmarks/results holds; run `make tables`" in capsys.readouterr().err
    assert tables.main([str(page)]) == 0
    assert page.read_text(encoding="utf-8") == right


def test_a_block_without_a_table_or_an_end_is_refused() -> None:
    with pytest.raises(SystemExit, match="no such table"):
        tables.written("<!-- results: peer -->\n<!-- end -->", chinese=False)
    with pytest.raises(SystemExit, match="has no `<!-- end -->`"):
        tables.written("<!-- results: peers -->\n| | |", chinese=False)


def test_of_rows_that_fit_the_newest_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        "hardware,arm,pairs,R@10,date",
        "A,none,100,1.0,2026-11-29",
        "B(R),none,101,0.25 ± 0.1,2026-11-30",
        "C,none,200,4.0,2026-11-30",
        "A,all,100,76%,2026-11-28",
    ]
    (tmp_path / "ecl.csv").write_text("\n".join(rows), encoding="utf-8")
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    newest, other = tables.pick("ecl", arm="none", pairs=(90, 110)), tables.pick("ecl", arm="all")
    mean = tables.Pick("ecl", ({"pairs": "100", "arm": "none"}, {"pairs": "200"}))
    table = tables.Table(("", "R"), [tables.row("{R@10}", "{R@10:.2f} {1[R@10]} {2[R@10]:.1f}", newest, other, mean)])
    lines = table.markdown(chinese=False).splitlines()
    assert lines[2] == "| 0.25 ± 0.1 | .25 76 % 2.5 |"
    assert lines[4] == "`ecl.csv`: B, 2026-11-30; A, 2026-11-28; A, 2026-11-29; C, 2026-11-30"
    with pytest.raises(SystemExit, match="has no row of"):
        tables.pick("ecl", arm="best").rows()
