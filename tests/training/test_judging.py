"""Encoding and judging go on where they were cut short: no training and no finished part is made again."""

from __future__ import annotations

import json
import shutil
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from efficientclip.errors import UserError
from efficientclip.files.parts import Parts
from efficientclip.noise.cross_fit import read_cross_fit
from efficientclip.training.folds import MADE_OF, begin, end
from tests import tiny
from tests.training.launch import ended, run, start, start_ranks

# Parts of a store of 240 pairs, one line of {folder}/written each, and a death before the one numbered KILLED. LATE has
# rank 0 take its time over a tower's files.
SCRIPT = """
import os, signal, time
from pathlib import Path
from efficientclip import cross_fit
from efficientclip.files.parts import Parts
from efficientclip.noise import docket
from efficientclip.training import folds, ranks, trainer

folds.ENCODED, folds.BATCH, docket.PART, ranks.SILENT_SECONDS = 32, 16, 40, 3
write, verdicts, killed = Parts.write, docket.Docket.verdicts, os.environ.get("KILLED", "")
victim = os.environ.get("RANK", "0") == os.environ.get("VICTIM", "0")
count = 0

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def written(parts, part, values):
    global count
    if victim and killed == str(count):
        die()
    count += 1
    write(parts, part, values)
    with open({file!r}, "a") as file:
        file.write(f"{{parts.file.name}} {{part}}\\n")

def judged(*arguments):
    if killed == "verdicts":
        die()
    return verdicts(*arguments)

put_in_place = trainer.put_in_place

def late(*paths):
    time.sleep(1)
    put_in_place(*paths)

if "LATE" in os.environ and os.environ["RANK"] == "0":
    trainer.put_in_place = late
Parts.write, docket.Docket.verdicts = written, judged
cross_fit.main()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("judging")
    tiny.pair_store(path / "store")
    tiny.text_store(path / "texts")
    config = tiny.config(
        path,
        run=str(path / "run"),
        confidence__selection="calibrated",
        confidence__cross_fit=str(path / "judged"),
        confidence__cross_fit_share=0.2,
        confidence__cross_fit_batch_size=8,
        confidence__cross_fit_lr=8e-4,
    )
    (path / "script.py").write_text(SCRIPT.format(file=str(path / "written")))
    run(1, str(config), script=path / "script.py")
    shutil.copytree(path / "judged", path / "whole")
    return path


def written(folder: Path) -> Counter[str]:
    return Counter((folder / "written").read_text().splitlines())


def trained(judged: Path) -> dict[str, tuple[int, bytes]]:
    """What would change if a fold's tower trained, or wrote its model, again."""
    files = [file for fold in ("fold-0", "fold-1") for file in sorted((judged / fold).rglob("*")) if file.is_file()]
    return {str(file.relative_to(judged)): (file.stat().st_mtime_ns, file.read_bytes()) for file in files}


def back_to_training(folder: Path) -> None:
    """The fold towers alone, as before encoding."""
    (folder / "judged" / "cross_fit.parquet").unlink(missing_ok=True)
    for name in ("model", "judging"):
        shutil.rmtree(folder / "judged" / name, ignore_errors=True)
    (folder / "written").unlink(missing_ok=True)


def test_a_finished_cross_fit_leaves_no_parts(folder: Path) -> None:
    left = {path.name for path in (folder / "whole").iterdir()}
    assert left == {".efficientclip.json", "fold-0", "fold-1", "model", "cross_fit.parquet"}
    assert {name.split()[0] for name in written(folder)} == {"captions-0.bin", "captions-1.bin", "answers.bin"}
    assert len(written(folder)) > 12 and {*written(folder).values()} == {1}


def test_a_finished_cross_fit_judges_nothing_again(folder: Path) -> None:
    before, judged = written(folder), folder / "judged" / "cross_fit.parquet"
    changed = judged.stat().st_mtime_ns
    # Killed while it removed the parts.
    begin(judged.parent / "judging", {"store": "a"})
    (judged.parent / "judging" / "captions-0.bin").touch()
    run(1, str(folder / "config.yaml"), script=folder / "script.py")
    assert written(folder) == before and judged.stat().st_mtime_ns == changed
    assert {path.name for path in judged.parent.iterdir()} == {path.name for path in (folder / "whole").iterdir()}
    # Verdicts that are not whole, or of other towers, stand for nothing.
    judged.write_bytes(judged.read_bytes()[:-9])
    run(1, str(folder / "config.yaml"), script=folder / "script.py")
    assert {*written(folder).values()} == {2} and read_cross_fit(judged.parent).rate >= 0


@pytest.mark.parametrize("killed", ["0", "3", "last", "verdicts"])
def test_killed_and_repeated_it_says_the_same(folder: Path, killed: str) -> None:
    back_to_training(folder)
    before = trained(folder / "judged")
    if killed == "last":
        run(1, str(folder / "config.yaml"), script=folder / "script.py")
        killed = str(written(folder).total() - 1)
        back_to_training(folder)
    process = start(folder / "log", str(folder / "config.yaml"), script=folder / "script.py", KILLED=killed)
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    assert not (folder / "judged" / "cross_fit.parquet").exists()
    run(1, str(folder / "config.yaml"), script=folder / "script.py")
    assert {*written(folder).values()} == {1}
    assert trained(folder / "judged") == before
    one, other = (pq.read_table(folder / name / "cross_fit.parquet") for name in ("judged", "whole"))
    assert one.equals(other) and one.schema.metadata == other.schema.metadata


def test_ranks_share_the_parts_and_say_what_one_says(folder: Path) -> None:
    back_to_training(folder)
    config = str(folder / "config.yaml")
    ranks = start_ranks(folder, (config,), (config,), script=folder / "script.py", KILLED="2", VICTIM="1")
    codes, output = ended(folder, ranks, 60)
    assert codes == [2, -signal.SIGKILL] and "the same command goes on" in output and "Traceback" not in output
    run(2, config, script=folder / "script.py")
    assert {*written(folder).values()} == {1}
    one, two = (read_cross_fit(folder / name) for name in ("judged", "whole"))
    np.testing.assert_array_equal(one.p, two.p)
    np.testing.assert_array_equal(one.clean_log_odds, two.clean_log_odds)


def test_ranks_wait_for_the_towers_that_rank_0_writes(folder: Path) -> None:
    run(
        2, str(folder / "config.yaml"), f"confidence.cross_fit={folder / 'late'}", script=folder / "script.py", LATE="1"
    )
    assert (folder / "late" / "cross_fit.parquet").is_file()


def test_parts_of_other_towers_are_made_anew(folder: Path) -> None:
    back_to_training(folder)
    process = start(folder / "log", str(folder / "config.yaml"), script=folder / "script.py", KILLED="verdicts")
    process.join(120)
    made_of = json.loads((folder / "judged" / "judging" / MADE_OF).read_text())
    made_of["towers"][1]["model.safetensors"]["xxh3"] = "0" * 32
    (folder / "judged" / "judging" / MADE_OF).write_text(json.dumps(made_of))
    run(1, str(folder / "config.yaml"), script=folder / "script.py")
    assert {*written(folder).values()} == {2}


def test_a_folder_that_cross_fit_did_not_begin_stays(tmp_path: Path) -> None:
    (tmp_path / "judging").mkdir()
    begin(tmp_path / "judging", {"store": "a"})
    (tmp_path / "judging" / "kept").touch()
    begin(tmp_path / "judging", {"store": "a"})
    assert (tmp_path / "judging" / "kept").exists()
    begin(tmp_path / "judging", {"store": "b"})
    assert [path.name for path in (tmp_path / "judging").iterdir()] == [MADE_OF]
    end(tmp_path / "judging")
    assert not (tmp_path / "judging").exists()
    (tmp_path / "judging").mkdir()
    (tmp_path / "judging" / "letter").touch()
    with pytest.raises(UserError, match=r"judging: holds files, but no made_of\.json"):
        begin(tmp_path / "judging", {"store": "a"})


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_parts_are_rows_of_one_file(tmp_path: Path, dtype: Any) -> None:
    values = np.random.default_rng(0).standard_normal((23, 5)).astype(dtype)
    parts = Parts(tmp_path / "rows.bin", [7, 1, 0, 15], 5, dtype)
    assert parts.begin() == [0, 1, 2, 3]
    for part in (3, 0):
        parts.write(part, values[parts.starts[part] : parts.starts[part + 1]])
    again = Parts(tmp_path / "rows.bin", [7, 1, 0, 15], 5, dtype)
    assert again.begin() == [1, 2]
    for part in (1, 2):
        again.write(part, values[again.starts[part] : again.starts[part + 1]])
    assert again.begin() == []
    np.testing.assert_array_equal(again.read(), values)
    # A file of another size is not this one.
    assert Parts(tmp_path / "rows.bin", [7, 1, 0, 16], 5, dtype).begin() == [0, 1, 2, 3]
    assert Parts(tmp_path / "none.bin", [], 5, dtype).read().shape == (0, 5)
