"""Stages are commands that the command line takes, run once each, and told by what they said where they fail."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from efficientclip import cli
from efficientclip.errors import UserError
from efficientclip.fitting import demo, stages
from efficientclip.fitting.stages import Stage, Stages, command, environment, last_line, span


def test_the_demos_stages_are_commands_on_files_that_ship(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run: list[Stage] = []
    monkeypatch.setattr(Stages, "run_anyway", lambda self, *given: run.extend(given))
    assert demo.demo(tmp_path, ranks=2) == tmp_path / "runs" / "demo" / "report.html"
    taken: list[object] = []
    monkeypatch.setattr(cli, "reported", lambda command: taken.append(command) or 0)
    for stage in run:
        assert cli.main(list(stage.words)) == 0
        assert all(Path(word).is_file() for word in stage.words if word.endswith(".yaml")) and stage.folder == tmp_path
    assert len(taken) == len(run) == 11
    assert [stage.ranks for stage in run if stage.words[0] in ("train", "cross-fit")] == [2, 2, 2]
    # Each waits for such as come before it.
    names = [stage.name for stage in run]
    assert all({*(stage.waits or ())} <= {*names[:at]} for at, stage in enumerate(run))


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stages:
    """Stages whose commands are shell scripts."""
    monkeypatch.setattr(stages, "command", lambda stage: ["sh", "-c", *stage.words])
    return Stages(tmp_path / "stages.json", tmp_path / "logs", Console(file=io.StringIO()))


def test_a_stage_runs_once_as_long_as_what_it_made_is_there(made: Stages, tmp_path: Path) -> None:
    file = tmp_path / "made"
    stage = Stage("one", [f"echo x >> {file}"], 1.0, made=[file])
    for _ in range(2):
        made.run([stage])
    assert file.read_text() == "x\n" and [*json.loads((tmp_path / "stages.json").read_text())] == ["one"]
    again = Stages(tmp_path / "stages.json", tmp_path / "logs", made.console)
    again.run([stage])
    assert file.read_text() == "x\n"
    file.unlink()
    again.run([stage])
    assert file.read_text() == "x\n"
    again.forget([stage])
    Stages(tmp_path / "stages.json", tmp_path / "logs", made.console).run([stage])
    assert file.read_text() == "x\nx\n"


def test_a_stage_that_fails_says_why_and_those_before_it_stay(made: Stages, tmp_path: Path) -> None:
    first = Stage("first", [f"echo x >> {tmp_path / 'made'}"])
    broken = Stage("second", ["echo 'error: table t.csv: broken; mend it' >&2; echo 'bar 10%|#' ; exit 2"])
    with pytest.raises(
        UserError, match=r"^second: ended with code 2: table t\.csv: broken; mend it; .*logs/second\.log"
    ):
        made.run([first, broken])
    with pytest.raises(UserError):
        made.run([first, broken])
    assert (tmp_path / "made").read_text() == "x\n"


def test_a_stage_begins_when_those_that_it_waits_for_are_done(made: Stages, tmp_path: Path) -> None:
    """Two wait for each other's file: they run beside each other, the third after both."""

    def meets(own: str, other: str) -> str:
        return f"touch {tmp_path / own}; until [ -e {tmp_path / other} ]; do sleep 0.05; done; echo {own} is done"

    before = Stage("before", [f"sleep 0.3; touch {tmp_path / 'stands'}"], 1.0)
    one = Stage("one", [f"[ -e {tmp_path / 'stands'} ] && {meets('1', '2')}"], 2.0, waits=["before"])
    two = Stage("two", [f"[ -e {tmp_path / 'stands'} ] && {meets('2', '1')}"], 3.0, waits=["before"])
    last = Stage("last", [f"[ -e {tmp_path / '1'} ] && echo whole"], 4.0)
    made.run_anyway(before, one, two, last)
    assert isinstance(made.console.file, io.StringIO)
    told = made.console.file.getvalue().splitlines()
    assert told[0].startswith("1/4 before: ") and told[-1].endswith("; whole") and len(told) == 4
    # What is told is the longest way through them.
    assert made.told == 8.0 and 0.3 <= made.took < 8.0


def test_one_that_fails_ends_those_beside_it(made: Stages, tmp_path: Path) -> None:
    long = Stage("long", [f"trap 'touch {tmp_path / 'ended'}; exit 1' TERM; sleep 60 & wait"], waits=[])
    broken = Stage("broken", ["sleep 0.3; echo 'error: it is broken' >&2; exit 2"], waits=[])
    after = Stage("after", [f"touch {tmp_path / 'after'}"])
    with pytest.raises(UserError, match=r"^broken: ended with code 2: it is broken"):
        made.run([long, broken, after])
    assert (tmp_path / "ended").exists() and not (tmp_path / "after").exists() and not made.done


def test_the_last_line_is_that_of_no_bar(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("a store: 3 pairs\nx:  10%|#  |\rx: 100%|###|\n\n", encoding="utf-8")
    assert last_line(log) == "a store: 3 pairs"
    log.write_bytes(b"")
    assert last_line(log) == ""


def test_ranks_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages.os, "sched_getaffinity", lambda _: range(8))
    assert environment(Stage("", ["train"], ranks=2))["OMP_NUM_THREADS"] == "4"
    assert environment(Stage("", ["prepare"]))["OMP_NUM_THREADS"] == "8"
    assert environment(Stage("", ["report"], waits=["train"]))["OMP_NUM_THREADS"] == "4"
    assert command(Stage("", ["cross-fit", "c.yaml"], ranks=2))[-3:] == [
        "--module",
        "efficientclip.cross_fit",
        "c.yaml",
    ]
    # Two fits on one machine do not meet at one port.
    ports = {command(Stage("", ["train", "c.yaml"], ranks=1))[5] for _ in range(2)}
    assert len(ports) == 2 and "29500" not in ports
    assert command(Stage("", ["report", "r"]))[1:] == ["-m", "efficientclip", "report", "r"]


def test_lengths_of_time_are_words() -> None:
    assert [span(seconds) for seconds in (0.4, 59, 61, 7260)] == ["0 s", "59 s", "1 min 1 s", "2 h 1 min"]
