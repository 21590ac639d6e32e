"""A run goes on with another number of ranks, ZeRO stage or micro-batch size as if it had always been so."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from efficientclip.errors import UserError
from efficientclip.files import digests
from efficientclip.training import optimizer_state
from tests import tiny
from tests.training.launch import metrics, run

HALF, END = 6, 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("elastic")
    tiny.pair_store(path / "store")
    tiny.text_store(path / "texts")
    for stage in range(4):
        zero = {"stage": stage} | ({"stage3_param_persistence_threshold": 0} if stage == 3 else {})
        (path / f"zero{stage}.json").write_text(json.dumps({"zero_optimization": zero}))
    return path


def config(folder: Path, name: str, stage: int, **changes: Any) -> str:
    settings = {"run": str(folder / name), "deepspeed": str(folder / f"zero{stage}.json")}
    settings |= {"training__pair_visits": 32 * END, "training__checkpoint_every": HALF, "training__keep_checkpoints": 9}
    settings |= {"confidence__selection": "schedule", "confidence__reaudition_share": 0.1}
    return str(tiny.config(folder, **(settings | changes)).rename(folder / f"{name}.yaml"))


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in metrics(folder)]


@pytest.fixture(scope="module")
def whole(folder: Path) -> list[float]:
    """The losses of a run on one rank that nothing disturbs; its checkpoints are where the others go on."""
    run(1, config(folder, "whole", 0))
    return losses(folder / "whole")


def halved(folder: Path, source: str, name: str) -> None:
    """A copy of a run as it was after the step HALF."""
    shutil.copytree(folder / source, folder / name)
    shutil.rmtree(folder / name / "model", ignore_errors=True)
    for checkpoint in (folder / name / "checkpoints").glob("step-*"):
        if checkpoint.name != f"step-{HALF:08d}":
            shutil.rmtree(checkpoint)


def close(one: list[float], other: list[float]) -> bool:
    assert len(one) == len(other) == END
    return max(abs(a - b) / abs(a) for a, b in zip(one, other, strict=True)) <= 1e-4


@pytest.mark.parametrize(("ranks", "stage"), [(2, 1), (2, 3), (1, 2)])
def test_one_rank_goes_on_with_others(folder: Path, whole: list[float], ranks: int, stage: int) -> None:
    name = f"to-{ranks}-{stage}"
    halved(folder, "whole", name)
    assert f"at step {HALF} " in run(ranks, config(folder, name, stage))
    assert close(whole, losses(folder / name))


@pytest.mark.parametrize(("ranks", "stage", "then", "last"), [(2, 2, 1, 0), (4, 3, 2, 1)])
def test_what_ranks_wrote_others_take_up(
    folder: Path, whole: list[float], ranks: int, stage: int, then: int, last: int
) -> None:
    name = f"from-{ranks}-{stage}"
    run(ranks, config(folder, name, stage))
    assert close(whole, losses(folder / name))
    halved(folder, name, f"{name}-again")
    micro = {"training__micro_batch_size": 8, "training__log_every": 1, "training__validate_every": 7}
    run(then, config(folder, f"{name}-again", last, **micro))
    assert close(whole, losses(folder / f"{name}-again"))


def test_what_changes_the_numbers_is_refused_by_name(folder: Path, whole: list[float]) -> None:
    for key, value in {"training.precision": "bf16", "optimizer.lr": 1.0}.items():
        output = run(1, config(folder, "whole", 0, **{key.replace(".", "__"): value}), code=2)
        assert re.search(rf"holds checkpoints of another config \({key} differ", output), output


def test_a_checkpoint_of_an_earlier_version_is_refused_and_left(folder: Path, whole: list[float]) -> None:
    halved(folder, "whole", "earlier")
    checkpoint = folder / "earlier" / "checkpoints" / f"step-{HALF:08d}"
    for file in checkpoint.glob("optimizer-*"):
        file.unlink()
    (checkpoint / "digests.json").unlink()
    digests.write_digests(checkpoint)
    output = run(1, config(folder, "earlier", 0), code=2)
    assert "is of an earlier version" in output and f"model.start_from={checkpoint}" in output
    assert checkpoint.is_dir() and "Traceback" not in output


def test_a_parameter_without_a_gradient_has_no_moments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizer_state.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(optimizer_state.dist, "get_world_size", lambda: 1)

    def engine() -> Any:
        module = torch.nn.ModuleDict({name: torch.nn.Linear(3, 2) for name in ("used", "unused")})
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
        return SimpleNamespace(module=module, optimizer=optimizer, zero_optimization_stage=lambda: 0)

    one, other = engine(), engine()
    for _ in range(3):
        one.module["used"](torch.ones(1, 3)).sum().backward()
        one.optimizer.step()
    optimizer_state.write(optimizer_state.held(one), tmp_path)
    optimizer_state.load(other, tmp_path)
    for mine, theirs in zip(one.module.parameters(), other.module.parameters(), strict=True):
        kept, taken = one.optimizer.state[mine], other.optimizer.state[theirs]
        assert {name: value.tolist() for name, value in kept.items()} == {name: v.tolist() for name, v in taken.items()}
    assert not other.optimizer.state.get(other.module["unused"].weight)
    # DeepSpeed's FusedAdam counts at the last parameter alone, apex's by group, from its first step on.
    used = one.module["used"]
    one.optimizer.state[used.weight]["step"], one.optimizer.param_groups[0]["step"] = torch.tensor(0.0), 3
    optimizer_state.write(optimizer_state.held(one), tmp_path)
    again = engine()
    optimizer_state.load(again, tmp_path)
    assert [float(again.optimizer.state[p]["step"]) for p in again.module["used"].parameters()] == [3.0, 3.0]
    assert again.optimizer.param_groups[0]["step"] == 3
    (tmp_path / "optimizer-00000.safetensors").unlink()
    save_file(
        {"exp_avg/0/used.weight": torch.zeros(5)},
        tmp_path / "optimizer-00000.safetensors",
        {"steps": "{}", "without": "[]"},
    )
    with pytest.raises(UserError, match=r"holds 5 of 6 elements of exp_avg of used\.weight"):
        optimizer_state.load(engine(), tmp_path)
