"""The profile against real runs of the same config, and the plan that it calibrates."""

from __future__ import annotations

import gzip
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from efficientclip import cli
from efficientclip.config import load_config
from efficientclip.errors import UserError
from efficientclip.evaluation.run import read_metrics
from efficientclip.files.ownership import claim_file
from efficientclip.hardware import read_hardware
from efficientclip.planning.measured import PARTS, Profile, read_profile
from efficientclip.planning.plan import DAY, plan
from efficientclip.planning.profile import Recorder
from efficientclip.planning.settings import DEVICES, Machine, settings_of
from tests import tiny
from tests.training import launch
from tests.training.launch import metrics, run

WARM_UP, STEPS = 2, 4
OPTIONS = ["--warm-up", str(WARM_UP), "--steps", str(STEPS), "--traced", "1"]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a config, and its profile on two ranks."""
    path = tmp_path_factory.mktemp("profile")
    tiny.pair_store(path / "store")
    tiny.text_store(path / "texts")
    config = tiny.config(
        path, training__validate_every=1, confidence__selection="schedule", confidence__reaudition_share=0.1
    )
    run(1, str(config))
    before = contents(path / "run")
    # A link stays, what it names is written.
    (path / "linked.json").symlink_to("two.json")
    run(2, str(config), *OPTIONS, "--output", str(path / "linked.json"), module="efficientclip.profile")
    assert (path / "linked.json").is_symlink()
    assert contents(path / "run") == before
    assert not list(path.glob(".*"))
    return path


@pytest.fixture
def two(folder: Path) -> Profile:
    return read_profile(folder / "two.json")


def own_plan(folder: Path, profile: Profile, **given: Any) -> Any:
    return plan(load_config(folder / "config.yaml"), settings_of(profile, **given))


def test_parts_add_up_and_ranks_wait_for_each_other(two: Profile) -> None:
    assert two.world_size == 2
    assert set(two.parts) == set(PARTS)
    assert sum(two.parts.values()) == pytest.approx(two.step_seconds)
    low, high = two.step_seconds_range
    assert low <= two.step_seconds_median <= high
    assert all(two.parts[part] > 0 for part in PARTS)
    assert min(two.once.values()) > 0
    assert two.peak_bytes > two.base_bytes > 0


def test_it_counts_what_the_run_counts(folder: Path, two: Profile) -> None:
    measured = metrics(folder / "run")[WARM_UP : WARM_UP + STEPS]
    # A line of one step has its tokens as a rate.
    tokens = [line["tokens_per_s"] * line["step_seconds"] for line in measured]
    assert two.tokens_per_step == pytest.approx(np.mean(tokens))
    assert two.pairs_per_step == 32
    assert two.tokens_per_step == pytest.approx(32 * two.caption_tokens + 7 * two.text_tokens)
    assert two.flop_per_second == pytest.approx(sum(two.flop_per_step.values()) / two.step_seconds / 2)
    assert two.settings == load_config(folder / "config.yaml")


def test_the_trace_names_the_parts(folder: Path) -> None:
    with gzip.open(folder / "two.trace.json.gz") as file:
        events = json.load(file)["traceEvents"]
    for name, made in (("two.trace.json.gz", "trace"), ("two.json", "profile")):
        assert claim_file(folder / name, made) == folder / name  # type: ignore[arg-type]
    names = {event["name"] for event in events if event.get("ph") == "X"}
    assert names >= {part for part in PARTS if part != "other"}


def test_a_plan_of_the_profiled_run_takes_its_steps(folder: Path, two: Profile) -> None:
    made = own_plan(folder, two)
    _, validations = read_metrics(folder / "run" / "metrics.jsonl")
    assert f"validations ({len(validations)})" in made.seconds
    pauses = sum(value for name, value in made.seconds.items() if name.startswith(("valid", "check", "set-up")))
    seconds = made.days(two.flop_per_second_computing, before=False) * DAY
    # Lengths are rounded to whole tokens, masks are counted by their share.
    assert seconds - pauses == pytest.approx(20 * two.step_seconds, rel=0.1)
    twice = own_plan(folder, two, pairs=1000)
    assert twice.settings.pairs == 1000


def test_a_plan_of_the_profiled_run_takes_its_memory(folder: Path, two: Profile) -> None:
    counted = sum(own_plan(folder, two.model_copy(update={"peak_bytes": 1.0})).memory.values())
    assert sum(own_plan(folder, two).memory.values()) == pytest.approx(max(counted, two.peak_bytes))
    larger = plan(load_config(folder / "config.yaml", ["model.width=64"]), settings_of(two))
    assert sum(larger.memory.values()) > max(counted, two.peak_bytes)


def test_micro_batches_and_overrides(folder: Path) -> None:
    config, output = str(folder / "config.yaml"), folder / "one.json"
    given = ["training.micro_batch_size=8", f"run={folder / 'new'}", *OPTIONS, "--output", str(output)]
    printed = run(1, config, *given, module="efficientclip.profile")
    assert "forward" in printed and str(output) in printed
    assert not (folder / "new").exists()
    found = read_profile(output)
    assert found.settings.training.micro_batch_size == 8
    captions = found.flop_per_step["captions"]
    assert found.flop_per_step["captions once more, to accumulate"] == pytest.approx(captions / 3)


def test_a_run_notes_its_machine(folder: Path) -> None:
    (entry,) = read_hardware(folder / "run" / "hardware.json")
    assert entry["from_step"] == 0
    assert entry["world_size"] == 1


def test_the_plan_prints_what_was_measured(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["plan", str(folder / "config.yaml"), "--calibrated-by", str(folder / "two.json")]
    assert cli.main(given) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "as measured" in printed
    assert "of a step waits for data" in printed
    assert "another config" not in printed
    assert cli.main([*given, "--pairs", "30k", "objective.bank_size=48"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "another config: objective.bank_size differ" in printed
    assert "30,000 pairs" in printed


def test_more_ranks_of_the_same_device_exchange_more(folder: Path, two: Profile) -> None:
    two = two.model_copy(update={"device": "NVIDIA H100 80GB HBM3"})
    four = own_plan(folder, two, machine=Machine(DEVICES["h100"], 4))
    ring = 3 / 4 / (1 / 2)
    assert four.seconds["communication"] == pytest.approx(20 * two.parts["communication"] * ring)
    with pytest.raises(UserError, match="the profile was made on NVIDIA H100"):
        own_plan(folder, two, machine=Machine(DEVICES["a100"], 4))


def _without(tree: dict[str, Any], *path: str) -> str:
    changed = json.loads(json.dumps(tree))
    node = changed
    for part in path[:-1]:
        node = node[part]
    del node[path[-1]]
    return json.dumps(changed)


def test_what_is_no_profile_is_refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree, file = json.loads((folder / "two.json").read_text()), tmp_path / "given.json"
    texts = {
        "Invalid JSON": (folder / "two.json").read_text()[:100],
        "format: Field required": '{"a": 1}',
        "format: Input should be": json.dumps({**tree, "format": "efficientclip-profile-0"}),
        "step_seconds: Field required": _without(tree, "step_seconds"),
        "backward missing": _without(tree, "parts", "backward"),
        "checkpoint missing": _without(tree, "once", "checkpoint"),
    }
    for message, text in texts.items():
        file.write_text(text)
        assert cli.main(["plan", str(folder / "config.yaml"), "--calibrated-by", str(file)]) == 2
        printed = capsys.readouterr().err
        assert message in printed and f"--calibrated-by {file}" in printed and printed.count("error:") == 1
    assert cli.main(["plan", str(folder / "config.yaml"), "--calibrated-by", str(tmp_path / "none.json")]) == 2
    assert "none.json: no such file" in capsys.readouterr().err
    assert cli.main(["plan", str(folder / "config.yaml"), "--pairs", "3"]) == 2
    assert "--gpus: needed unless" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "30"], "the run has 20 steps"),
        (["--steps", "0"], "must be 1 at least"),
        (["--output", "none/x.json"], "--output none/x.json"),
        (["--output", "{folder}/mine.json"], "mine.json: exists, and efficientclip did not write it"),
        (["--output", "{folder}/lone.json"], "lone.trace.json.gz: exists, and efficientclip did not write it"),
        (["--output", "{folder}/ours.json"], "ours.trace.json.gz: exists, and efficientclip did not write it"),
    ],
)
def test_mistakes_are_explained(folder: Path, arguments: list[str], message: str) -> None:
    foreign = ("mine.json", "lone.trace.json.gz", "ours.trace.json.gz")
    for name in foreign:
        (folder / name).write_text("mine")
    (folder / "ours.json").write_bytes((folder / "two.json").read_bytes())
    arguments = [argument.format(folder=folder) for argument in arguments]
    printed = run(1, str(folder / "config.yaml"), *arguments, module="efficientclip.profile", code=2)
    assert message in printed
    assert {(folder / name).read_text() for name in foreign} == {"mine"}
    assert "Traceback" not in printed
    assert not list(folder.glob(".*"))


def test_a_signal_leaves_nothing_behind(folder: Path, tmp_path: Path) -> None:
    arguments = [str(folder / "config.yaml"), *OPTIONS, "--output", str(tmp_path / "x.json")]
    process = launch.start(tmp_path / "log", *arguments, module="efficientclip.profile")
    deadline = time.monotonic() + 60
    while not list(folder.glob(".run-profile-*")):
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.01)
    process.terminate()
    process.join(30)
    assert process.exitcode == 143, (tmp_path / "log").read_text()
    assert not list(folder.glob(".*")) and [file.name for file in tmp_path.iterdir()] == ["log"]


def test_time_counts_to_the_innermost_span(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def work(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr(time, "perf_counter", lambda: now)
    recorder = Recorder(torch.device("cpu"))
    work(100)
    recorder.end_step()
    work(1)
    with recorder.span("backward"):
        work(2)
        with recorder.span("communication"):
            work(4)
        work(8)
    recorder.end_step()
    with recorder.span("checkpoint"):
        work(16)
        with recorder.span("communication"):
            work(32)
    recorder.end_step()
    first, second = recorder.steps()
    assert {part: seconds for part, seconds in first.items() if seconds} == {
        "other": 1, "backward": 10, "communication": 4,
    }  # fmt: skip
    # A checkpoint's barrier is its own.
    assert {part: seconds for part, seconds in second.items() if seconds} == {"checkpoint": 48}
