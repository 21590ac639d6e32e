"""Cross-fit trains its towers for as long as that leaves fewer pairs in doubt, and goes on where it was cut short."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from efficientclip.errors import UserError
from efficientclip.noise.cross_fit import ROUNDS, read_cross_fit, read_doubts, settled
from tests import tiny
from tests.training.launch import run, start

# What is in doubt after so many visits of both towers; a death in the verdicts of those in KILLED, or right after.
SCRIPT = """
import os, signal
from efficientclip import cross_fit
from efficientclip.noise.cross_fit import CrossFit
from efficientclip.noise.docket import Docket
from efficientclip.training import folds

CrossFit.doubt = property(lambda found: {128: None, 256: 0.2, 512: 0.15, 1024: 0.149, 2048: 0.1}[found.visits])
verdicts, told, killed = Docket.verdicts, folds._tell_round, os.environ.get("KILLED", "")

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def judged(docket, answers, groups, visits):
    return die() if killed == f"in {visits}" else verdicts(docket, answers, groups, visits)

def tell(folder, found):
    return die() if killed == f"after {found.visits}" else told(folder, found)

Docket.verdicts, folds._tell_round = judged, tell
cross_fit.main()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rounds")
    tiny.pair_store(path / "store")
    tiny.text_store(path / "texts")
    tiny.config(
        path,
        run=str(path / "run"),
        confidence__selection="calibrated",
        confidence__cross_fit=str(path / "judged"),
        confidence__cross_fit_share=3.2,
        confidence__cross_fit_batch_size=8,
        confidence__cross_fit_lr=8e-4,
    )
    (path / "script.py").write_text(SCRIPT)
    output = run(2, str(path / "config.yaml"), script=path / "script.py")
    assert "after 128 pair visits how many are wrong is open: the towers train on" in output
    assert "after 512 pair visits 15.0% of the pairs are in doubt: the towers train on" in output
    return path


def test_it_ends_when_more_visits_tell_no_more(folder: Path) -> None:
    judged = folder / "judged"
    assert read_doubts(judged) == [None, 0.2, 0.15, 0.149]
    assert read_cross_fit(judged).visits == 1024
    rounds = ["", "-1", "-2", "-3"]
    towers = {f"fold-{half}{number}" for half in range(2) for number in rounds}
    kept = {".efficientclip.json", "model", "cross_fit.parquet", ROUNDS}
    assert {path.name for path in judged.iterdir()} == towers | kept
    # Nothing is trained or judged again.
    before = (judged / "cross_fit.parquet").stat().st_mtime_ns
    run(1, str(folder / "config.yaml"), script=folder / "script.py", KILLED="in 1024")
    assert (judged / "cross_fit.parquet").stat().st_mtime_ns == before
    assert {path.name for path in judged.iterdir()} == towers | kept


def test_killed_in_any_round_it_says_the_same(folder: Path) -> None:
    given, judged = str(folder / "config.yaml"), folder / "again"
    for killed in ("in 128", "after 256", "in 1024"):
        words = (given, f"confidence.cross_fit={judged}")
        process = start(folder / "log", *words, script=folder / "script.py", KILLED=killed)
        process.join(120)
        assert process.exitcode == -signal.SIGKILL
    run(1, *words, script=folder / "script.py")
    run(1, given, f"confidence.cross_fit={folder / 'alone'}", script=folder / "script.py")
    one, other = (pq.read_table(folder / name / "cross_fit.parquet") for name in ("again", "alone"))
    assert one.equals(other) and one.schema.metadata == other.schema.metadata
    assert read_doubts(judged) == read_doubts(folder / "judged")


def test_what_stands_in_its_place_is_named(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "judged" / ROUNDS, tmp_path)
    (tmp_path / ROUNDS).write_text('{"doubt": 1}')
    with pytest.raises(UserError, match=r"rounds\.json: .* remove the folder and run `efficientclip cross-fit CONFIG`"):
        read_doubts(tmp_path)


@pytest.mark.parametrize(
    ("doubts", "enough"),
    [([], False), ([0.0], False), ([None, 0.1], False), ([0.1, None], False), ([0.2, 0.15], False),
     ([0.2, 0.195], True), ([0.2, 0.3], True), ([0.0, 0.0], True)],
)  # fmt: skip
def test_fewer_in_doubt_are_worth_another_round(doubts: list[float | None], enough: bool) -> None:
    assert settled(doubts) is enough
