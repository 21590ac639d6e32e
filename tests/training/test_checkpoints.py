"""A checkpoint is believed when its digests hold; a run never begins again while one is there, and loses none."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import tiny
from tests.faults import damage as damages
from tests.training.launch import run
from tests.training.test_resume import figures

EVERY = {"training__checkpoint_every": 5, "training__pair_visits": 640}
BESIDE = Path(__file__).with_name("beside.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoints")
    tiny.pair_store(path / "store")
    tiny.text_store(path / "texts")
    run(1, str(config(path, "whole")))
    return path


def config(folder: Path, name: str, **changes: object) -> Path:
    file = tiny.config(folder, **({"run": str(folder / name)} | EVERY | changes))
    return file.rename(folder / f"{name}.yaml")


@pytest.fixture
def half(folder: Path, tmp_path: Path) -> tuple[Path, str]:
    """A run that ended before its model was written, and its config."""
    shutil.copytree(folder / "whole", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "model")
    return tmp_path / "run", str(config(folder, tmp_path.name, run=str(tmp_path / "run")))


def cut(file: Path) -> None:
    damages.cut(file, np.random.default_rng())


def flip(file: Path) -> None:
    print(damages.flip(file, np.random.default_rng()))


NEWEST = "checkpoints/step-00000020"
MOMENTS = f"{NEWEST}/optimizer-00000.safetensors"


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        (f"{NEWEST}/state.npz", cut),
        (MOMENTS, flip),
        (f"{NEWEST}/digests.json", Path.unlink),
    ],
    ids=lambda value: value.__name__ if callable(value) else Path(value).name,
)
def test_a_broken_newest_checkpoint_is_passed_over_and_told(
    folder: Path, half: tuple[Path, str], file: str, damage: Callable[[Path], object]
) -> None:
    damage(half[0] / file)
    output = run(1, half[1])
    assert "notice: " in output and "going on from step-00000015" in output and NEWEST in output
    assert figures(half[0]) == figures(folder / "whole")
    assert (half[0] / "checkpoints" / "latest").read_text() == "step-00000020"


@pytest.mark.parametrize(
    "content", [None, "", "step-00000099", "\0\xff"], ids=["missing", "empty", "dangling", "garbage"]
)
def test_latest_is_a_hint(folder: Path, half: tuple[Path, str], content: str | None) -> None:
    latest = half[0] / "checkpoints" / "latest"
    latest.unlink()
    if content is not None:
        latest.write_text(content)
    before = figures(half[0])
    assert "resuming" in (output := run(1, half[1])) and "at step 20 " in output
    assert figures(half[0]) == before == figures(folder / "whole")
    assert (half[0] / "model" / "config.json").is_file()


def test_a_run_does_not_begin_again_where_no_checkpoint_is_whole(half: tuple[Path, str]) -> None:
    for state in half[0].glob("checkpoints/step-*/state.npz"):
        state.unlink()
    before = sorted(path.name for path in (half[0] / "checkpoints").iterdir())
    output = run(1, half[1], code=2)
    assert "no checkpoint is whole" in output and "state.npz" in output and "Traceback" not in output
    assert sorted(path.name for path in (half[0] / "checkpoints").iterdir()) == before


def test_what_is_pointed_to_is_not_pruned(half: tuple[Path, str]) -> None:
    """A run that goes on from an old checkpoint does not lose its new ones to later, broken ones."""
    folder = half[0] / "checkpoints"
    shutil.copytree(folder / "step-00000020", folder / "step-00000090")
    shutil.copytree(folder / "step-00000020", folder / "step-00000095")
    for name in ("step-00000020", "step-00000090", "step-00000095"):
        (folder / name / "state.npz").unlink()
    run(1, half[1])
    assert {"step-00000015", "step-00000020"} <= {path.name for path in folder.iterdir()}
    assert (folder / (folder / "latest").read_text() / "digests.json").is_file()


@contextmanager
def digests_broken(folder: Path) -> Iterator[None]:
    before = (folder / "digests.json").read_bytes()
    (folder / "digests.json").write_bytes(b"\xff")
    yield
    (folder / "digests.json").write_bytes(before)


def test_a_finished_run_is_not_begun_anew_and_keeps_a_users_files(half: tuple[Path, str], folder: Path) -> None:
    shutil.copytree(folder / "whole" / "model", half[0] / "model")
    (half[0] / "model" / "notes.md").write_text("mine")
    run(1, half[1])
    assert (half[0] / "model" / "notes.md").read_text() == "mine"
    history = {file: file.read_bytes() for file in (half[0] / "history").iterdir()}
    with digests_broken(half[0] / "model"):
        assert "model/digests.json: broken" in run(1, half[1], code=2)
    assert history == {file: file.read_bytes() for file in (half[0] / "history").iterdir()}
    shutil.rmtree(half[0] / "checkpoints")
    before = {path: path.stat().st_mtime_ns for path in half[0].rglob("*") if path.is_file()}
    output = run(1, half[1], "seed=7", code=2)
    assert "is finished, and its checkpoints are gone" in output
    assert before.items() <= {path: path.stat().st_mtime_ns for path in half[0].rglob("*") if path.is_file()}.items()


def test_a_checkpoint_is_written_beside_training_and_holds_its_own_step(folder: Path) -> None:
    """Momentum, bank and ECL's table change while it waits to be written."""
    changes: dict[str, object] = {"training__keep_checkpoints": 4, "confidence__selection": "schedule"}
    names = "at-once", "beside"
    run(2, str(config(folder, names[0], **changes)))
    run(2, str(config(folder, names[1], **changes)), script=BESIDE, LATER="3")
    for step in (5, 10, 15, 20):
        one, other = (folder / name / "checkpoints" / f"step-{step:08d}" for name in names)
        assert len(list(one.glob("optimizer-*"))) == 2
        assert {file.name for file in one.rglob("*")} == {file.name for file in other.rglob("*")}
        for file in one.rglob("*.safetensors"):
            held = load_file(other / file.relative_to(one))
            assert all(torch.equal(value, held[name]) for name, value in load_file(file).items())
        with np.load(one / "state.npz") as mine, np.load(other / "state.npz") as theirs:
            assert all(name == "written" or mine[name].tobytes() == theirs[name].tobytes() for name in mine)


def test_a_kill_while_a_checkpoint_is_written_costs_that_one_alone(folder: Path) -> None:
    file = str(config(folder, "killed"))
    run(1, file, script=BESIDE, LATER="3", KILLED_BEFORE="12", code=-9)
    checkpoints = folder / "killed" / "checkpoints"
    assert {path.name for path in checkpoints.iterdir()} == {"step-00000005", "step-00000010.partial", "latest"}
    assert "at step 5 " in run(1, file)
    assert figures(folder / "killed") == figures(folder / "whole")


def test_a_full_disk_beside_training_ends_all_ranks_with_one_message(folder: Path) -> None:
    file = str(config(folder, "full"))
    output = run(2, file, script=BESIDE, LATER="3", FULL="1", code=2)
    assert output.count("error: ") == 1 and "step-00000005.partial: No space left on device" in output
    assert "Traceback" not in output
    run(2, file)
    assert (folder / "full" / "model" / "digests.json").is_file()


def test_weights_that_are_not_finite_are_not_saved(folder: Path) -> None:
    file = config(folder, "blown", optimizer__lr=1e30, optimizer__clip=0, mlm__texts_per_batch=0)
    output = run(1, str(file), code=2)
    assert "parameter " in output and "is not finite" in output and "Traceback" not in output


def test_the_best_by_validation_is_the_model(folder: Path) -> None:
    """Validation falls from the first epoch on: the targets are random."""
    changes = {"training__pair_visits": 960, "training__validate_every": 1, "optimizer__lr": 0.03}
    output = run(1, str(config(folder, "best", **changes)))
    best = (folder / "best" / "checkpoints" / "best").read_text()
    recall = [
        (line["step"], line["validation"]["held"]["t2i"]["R@10"])
        for line in map(json.loads, (folder / "best" / "metrics.jsonl").read_text().splitlines())
        if "validation" in line
    ]
    chosen = max(recall, key=lambda found: found[1])
    assert int(best.removeprefix("step-")) == chosen[0]
    weights = load_file(folder / "best" / "model" / "model.safetensors")
    kept = load_file(folder / "best" / "checkpoints" / best / "model" / "model.safetensors")
    assert all(torch.equal(weights[name], kept[name]) for name in weights)
    if chosen[0] != recall[-1][0]:
        assert f"step {chosen[0]}, the best by validation" in output
    output = run(1, str(folder / "best.yaml"), "training.final=last")
    weights = load_file(folder / "best" / "model" / "model.safetensors")
    kept = load_file(folder / "best" / "checkpoints" / f"step-{recall[-1][0]:08d}" / "model" / "model.safetensors")
    assert all(torch.equal(weights[name], kept[name]) for name in weights)


def test_a_nan_in_a_pair_names_it(folder: Path, tmp_path: Path) -> None:
    """Whoever writes a store with NaN and right digests is told the row before anything trains."""
    shutil.copytree(folder / "store", tmp_path / "store")
    file = tmp_path / "store" / "features.bin"
    features = np.fromfile(file, np.float16).reshape(-1, tiny.WIDTH)
    features[7, 3] = np.nan
    features.tofile(file)
    tiny.finished_again(tmp_path / "store")
    given = tiny.config(tmp_path, run=str(tmp_path / "run"), mlm__texts=str(folder / "texts"))
    output = run(1, str(given), code=2)
    assert "features.bin: row 7 is not finite" in output and "Traceback" not in output


def test_a_start_with_a_nan_names_the_parameter(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "whole" / "model", tmp_path / "start" / "model")
    file = tmp_path / "start" / "model" / "model.safetensors"
    weights = load_file(file)
    name = "text.projection.weight"
    weights[name][0, 0] = float("nan")
    save_file(weights, file, metadata={"format": "pt"})
    (file.parent / "digests.json").unlink()
    given = config(folder, "nan", model__start_from=str(tmp_path / "start"))
    output = run(1, str(given), code=2)
    assert name in output and "not finite" in output and "Traceback" not in output
