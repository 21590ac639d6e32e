"""A user's mistakes in a run's settings end in one message that names key and remedy."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from efficientclip.config import Config, Optimizer, load_config
from efficientclip.errors import UserError
from efficientclip.hardware import compute_dtype
from efficientclip.training import optimizer as optimizers
from efficientclip.training import ranks
from efficientclip.training.deepspeed_json import deepspeed_config
from efficientclip.training.optimizer import build_optimizer, learning_rate
from tests import tiny
from tests.training.launch import metrics, run


def config(folder: Path, **changes: Any) -> Config:
    return load_config(tiny.config(folder, **changes))


def test_batch_that_the_world_size_does_not_divide(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"training\.batch_size: 32 pairs cannot be divided by 3 ranks.*30"):
        deepspeed_config(config(tmp_path), 3)
    with pytest.raises(UserError, match=r"training\.micro_batch_size: 5 does not divide the 16 pairs"):
        deepspeed_config(config(tmp_path, training__micro_batch_size=5), 2)


def test_keys_that_the_yaml_owns_are_refused_in_the_json(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"gradient_clipping": 2.0}))
    with pytest.raises(UserError, match=r"sets gradient_clipping, which optimizer\.clip of the YAML owns"):
        deepspeed_config(config(tmp_path, deepspeed=str(file)), 1)
    file.write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        deepspeed_config(config(tmp_path, deepspeed=str(file)), 1)
    with pytest.raises(UserError, match="is missing"):
        deepspeed_config(config(tmp_path, deepspeed=str(tmp_path / "none.json")), 1)


def test_optimisers_that_cannot_run_here_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    module = torch.nn.Linear(2, 2)
    with pytest.raises(UserError, match="LAMB needs the norm of each whole tensor, ZeRO stage 2"):
        build_optimizer(module, Optimizer(name="apex-fused-lamb"), 2)
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="needs a CUDA device"):
            build_optimizer(module, Optimizer(name="deepspeed-fused-adam"), 0)
    monkeypatch.setattr(optimizers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="NVIDIA Apex is not installed"):
        build_optimizer(module, Optimizer(name="apex-fused-adam"), 0)


def test_apex_of_the_package_index_is_told_from_nvidias(monkeypatch: pytest.MonkeyPatch) -> None:
    module = torch.nn.Linear(2, 2)
    fake = types.ModuleType("apex.optimizers")
    fake.FusedAdam = torch.optim.AdamW  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "apex.optimizers", fake)
    find_spec = optimizers.importlib.util.find_spec
    # torch looks for other modules by the same function.
    monkeypatch.setattr(
        optimizers.importlib.util, "find_spec", lambda name: object() if name.startswith("apex") else find_spec(name)
    )
    monkeypatch.setattr(importlib.metadata, "metadata", lambda name: {"Summary": "A toolkit for Pyramid"})
    with pytest.raises(UserError, match="Pyramid toolkit, not NVIDIA Apex"):
        build_optimizer(module, Optimizer(name="apex-fused-adam"), 0)
    monkeypatch.setattr(
        importlib.metadata, "metadata", lambda name: {"Summary": "PyTorch extensions written by NVIDIA"}
    )
    assert isinstance(build_optimizer(module, Optimizer(name="apex-fused-adam"), 0), torch.optim.AdamW)


def test_learning_rate_ends_when_training_ends() -> None:
    settings = Optimizer(lr=1.0, warmup_share=0.1, final_lr_share=0.2)
    assert learning_rate(0.05, settings) == pytest.approx(0.5)
    assert learning_rate(0.1, settings) == pytest.approx(1.0)
    assert learning_rate(1.0, settings) == pytest.approx(0.2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mistakes")
    tiny.pair_store(path / "store")
    tiny.text_store(path / "texts")
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__teacher": {"kind": "clip"}}, "holds features of usem3, but model.image_tower or model.teacher is"),
        ({"model__width": 8}, "features are 16 wide, model.width is 8"),
        ({"data__store": "nowhere"}, "nowhere: no manifest.json"),
        ({"mlm__texts": None}, "mlm.texts: not set"),
        ({"training__batch_size": 1000}, "training.batch_size: 1000 pairs, but only 240 are left"),
        ({"training__max_caption_tokens": 65}, "max_caption_tokens: 65, but model.text_tower has 64 positions"),
    ],
    ids=["tower", "width", "store", "texts", "batch", "positions"],
)
def test_settings_that_do_not_fit_the_store(folder: Path, changes: dict[str, Any], message: str) -> None:
    output = run(1, str(tiny.config(folder, run=str(folder / "run"), **changes)), code=2)
    assert f"error: {message}" in output or message in output
    assert "Traceback" not in output


def test_snapshot_scores_and_published_drops_resume(folder: Path) -> None:
    changes = {"confidence__score": "snapshot", "confidence__selection": "published", "confidence__warmup_epochs": 0}
    file = str(tiny.config(folder, run=str(folder / "published"), training__pair_visits=960, **changes))
    run(1, file)
    lines = metrics(folder / "published")
    shares = [line["kept_share"] for line in lines]
    assert shares[0] == 1 and shares[-1] == pytest.approx(0.9**4, abs=0.02) and shares == sorted(shares, reverse=True)


def test_a_validation_store_of_another_tokenizer_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n" + "\n".join(reversed(tiny.CHARACTERS)))
    other = tiny.pair_store(tmp_path / "other")
    output = run(1, str(tiny.config(folder, run=str(tmp_path / "run"), data__validation={"held": str(other)})), code=2)
    assert "data.validation.held: " in output and "another tokenizer" in output


def test_a_run_and_its_store_may_move(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders are renamed, reached by a link and from elsewhere; another store at the old place is told apart."""
    shutil.copytree(folder / "store", tmp_path / "store")
    given = {"data__store": str(tmp_path / "store"), "data__validation": {"held": str(tmp_path / "store")}}
    given |= {"training__pair_visits": 320, "run": str(tmp_path / "run"), "mlm__texts": str(folder / "texts")}
    file = tiny.config(tmp_path, **given)
    run(1, str(file))
    (tmp_path / "run").rename(tmp_path / "moved")
    (tmp_path / "link").symlink_to(tmp_path / "moved")
    (tmp_path / "store").rename(tmp_path / "elsewhere")
    tiny.pair_store(tmp_path / "store", seed=3)
    monkeypatch.chdir(tmp_path)
    places = ["data.store=elsewhere", "data.validation={held: elsewhere}"]
    assert "resuming" in run(1, "config.yaml", "run=link", *places)
    output = run(1, "moved/config.yaml", *places, code=2)
    assert f"add run={tmp_path / 'moved'} to go on with it" in output
    assert "resuming" in run(1, "moved/config.yaml", "run=moved", *places)
    output = run(1, "config.yaml", "run=moved", code=2)
    assert "was trained on other data than this config names (store, validation differ" in output
    assert "resuming" in run(1, "config.yaml", "run=link", *places, "training.log_every=2")
    output = run(1, "config.yaml", "run=link", *places, "seed=2", code=2)
    assert "checkpoints of another config (seed differ" in output


def test_another_config_does_not_resume_a_run(folder: Path) -> None:
    run(1, str(tiny.config(folder, run=str(folder / "same"), training__pair_visits=160)))
    output = run(1, str(tiny.config(folder, run=str(folder / "same"), training__pair_visits=320)), code=2)
    assert "checkpoints of another config (training.pair_visits differ" in output


@pytest.mark.parametrize(("cuda", "supported"), [(False, True), (False, False), (True, True), (True, False)])
def test_bfloat16_is_not_emulated(monkeypatch: pytest.MonkeyPatch, cuda: bool, supported: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda emulated: supported)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported)
    assert compute_dtype("fp32") is None and compute_dtype("fp16") == torch.float16
    assert compute_dtype("bf16") == (torch.bfloat16 if supported else None)


@pytest.mark.parametrize(("local_rank", "devices", "taken"), [(3, 4, 3), (3, 1, 0), (0, 1, 0), (4, 4, None)])
def test_a_rank_takes_the_device_that_it_is_shown(
    monkeypatch: pytest.MonkeyPatch, local_rank: int, devices: int, taken: int | None
) -> None:
    found: list[int] = []
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    monkeypatch.setattr(torch.cuda, "set_device", found.append)
    if taken is None:
        with pytest.raises(UserError, match="LOCAL_RANK: 4, but this node shows 4 devices"):
            ranks.take_device()
    else:
        ranks.take_device()
        assert found == [taken] and os.environ["LOCAL_RANK"] == str(taken)


@pytest.mark.parametrize(
    ("zero", "key"),
    [
        ({"round_robin_gradients": True}, "round_robin_gradients"),
        ({"compute_grad_norm": False}, "compute_grad_norm"),
        ({"offload_optimizer": {"device": "nvme", "nvme_path": "/tmp"}}, "offload_optimizer.device"),
        ({"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}, "offload_optimizer.ratio"),
    ],
)
def test_what_checkpoints_cannot_hold_is_refused(tmp_path: Path, zero: dict[str, Any], key: str) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 2, **zero}}))
    with pytest.raises(UserError, match=rf"ds\.json sets zero_optimization\.{key}: .*; remove it there"):
        deepspeed_config(config(tmp_path, deepspeed=str(file)), 1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, r"zero_optimization is null; give an object, or remove it"),
        ([2], r"zero_optimization is \[2\]; give an object"),
        ({"stage": 7}, r"zero_optimization\.stage: Input should be 0, 1, 2"),
        ({"stage": 2, "reduce_bucket": 5}, r"zero_optimization\.reduce_bucket: Extra inputs are not permitted; change"),
        ({"offload_optimizer": {"device": "gpu"}}, r"zero_optimization\.offload_optimizer\.device: Input should be"),
    ],
    ids=str,
)
def test_what_zero_cannot_be_told_is_named(tmp_path: Path, given: Any, message: str) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"zero_optimization": given}))
    with pytest.raises(UserError, match=rf"deepspeed: .*ds\.json: {message}"):
        deepspeed_config(config(tmp_path, deepspeed=str(file)), 1)


@pytest.mark.parametrize("ranks", [1, 2])
def test_no_compiler_is_needed(folder: Path, tmp_path: Path, ranks: int) -> None:
    zero = tmp_path / "zero.json"
    zero.write_text(json.dumps({"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}))
    named = {"run": str(tmp_path / "run"), "deepspeed": str(zero), "training__pair_visits": 64}
    run(ranks, str(tiny.config(folder, **named)), CXX="no-compiler", TORCH_EXTENSIONS_DIR=str(tmp_path / "built"))
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2] and not (tmp_path / "built").exists()


def test_an_operator_that_cannot_be_compiled_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", "no-compiler")
    monkeypatch.setenv("PATH", os.environ["PATH"])
    with pytest.raises(UserError, match=r"deepspeed-cpu-adam: .* not compile it .*apt-get install g\+\+ python3-dev"):
        build_optimizer(torch.nn.Linear(2, 2), Optimizer(name="deepspeed-cpu-adam"), 0)


def test_the_mark_of_a_build_that_was_killed_holds_nothing_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("PATH", os.environ["PATH"])
    mark = tmp_path / "slow" / "lock"
    mark.parent.mkdir()
    mark.touch()
    seen: list[bool] = []
    builder = types.SimpleNamespace(name="slow", load=lambda verbose: seen.append(mark.exists()))
    accelerator = types.SimpleNamespace(create_op_builder=lambda name: builder)
    monkeypatch.setattr(optimizers, "get_accelerator", lambda: accelerator)
    optimizers.load_operator("SlowBuilder", "slow")
    assert seen == [False]
