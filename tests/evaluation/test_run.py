"""A run is whole in itself: it opens wherever it lies, with or without its store, at the newest of it that is whole."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from efficientclip import stopping
from efficientclip.cli import main
from efficientclip.config import load_config, save_config
from efficientclip.data.store import Store
from efficientclip.errors import UserError
from efficientclip.evaluation import run as runs
from efficientclip.evaluation.evaluate import evaluate
from efficientclip.evaluation.run import open_data, open_run
from efficientclip.evaluation.search import search
from efficientclip.files import digests
from efficientclip.files.ownership import MARK, mark
from efficientclip.training.run_folder import describe
from tests import tiny
from tests.evaluation.conftest import World


@pytest.fixture
def whole(built: World, tmp_path: Path) -> World:
    """A run and its store as `train` leaves them; the tests may move and change both."""
    shutil.copytree(built.store, tmp_path / "store")
    shutil.copytree(built.run, tmp_path / "run", ignore=shutil.ignore_patterns("config.yaml", "model"))
    given = load_config(built.run / "config.yaml", saved=True)
    data = given.data.model_copy(update={"store": tmp_path / "store", "validation": {}})
    config, store = given.model_copy(update={"run": tmp_path / "run", "data": data}), Store(tmp_path / "store")
    keys = ("tower", "tokenizer", "vocabulary", "width")
    identity = {"store": store.identity, "texts": None, **{key: store.manifest[key] for key in keys}, "validation": {}}
    describe(config, identity, store.path / "tokenizer")
    shutil.copytree(built.run / "model", config.run / "model")
    digests.write_digests(config.run / "model")
    prove(config.run)
    return World(config.run, store.path, built.tar)


def prove(run: Path, *names: str) -> None:
    """Digests of the run's own files, or of those that begin with `names` alone."""
    own = [name for name in digests.files_in(run) if not name.startswith(("model/", "checkpoints/"))]
    digests.write_digests(run, digests.described(run, [name for name in own if not names or name.startswith(names)]))


def checkpoint(run: Path, step: int, *, of: Path, scale: float = 1.0) -> Path:
    """A checkpoint of the model in `of`, its text projection by `scale`."""
    folder = run / "checkpoints" / f"step-{step:08d}"
    shutil.copytree(of / "model", folder / "model", ignore=shutil.ignore_patterns(digests.NAME))
    change_weights(folder / "model", lambda weights: weights["text.projection.weight"].mul_(scale))
    digests.write_digests(folder)
    return folder


def change_weights(model: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    weights = load_file(model / "model.safetensors")
    change(weights)
    save_file(weights, model / "model.safetensors", {"format": "pt"})


def scale_of(run: Path) -> float:
    """Which of the checkpoints is opened, by its `scale`."""
    opened, last = open_run(run).model, load_file(run / "aside" / "model.safetensors")
    assert opened.text is not None
    return round(float(opened.text.projection.weight.detach().norm() / last["text.projection.weight"].norm()), 3)


def unfinished(world: World) -> Path:
    """The run before its end, with checkpoints 5 (best), 10 and 15, by which its projection is scaled."""
    prove(world.run, "config", "identity", "tokenizer")
    (world.run / "model").rename(world.run / "aside")
    aside = world.run / "aside-model"
    aside.mkdir()
    (aside / "model").symlink_to(world.run / "aside")
    for step in (5, 10, 15):
        checkpoint(world.run, step, of=aside, scale=step)
    (world.run / "checkpoints" / "best").write_text("step-00000005")
    return world.run


def test_a_run_opens_wherever_it_lies(whole: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = evaluate(whole.run, whole.store)
    whole.run.rename(tmp_path / "moved run")
    (tmp_path / "link").symlink_to("moved run")
    monkeypatch.chdir("/")
    assert evaluate(tmp_path / "moved run", whole.store) == expected
    monkeypatch.chdir(tmp_path)
    assert evaluate(Path("link"), whole.store) == evaluate(Path("moved run"), Path("store")) == expected


def test_the_training_store_is_not_needed_for_other_data(
    whole: World, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    expected, found = evaluate(whole.run, whole.store), search(whole.run, "红猫", None, 3)
    shutil.copytree(whole.store, tmp_path / "other")
    shutil.rmtree(whole.store)
    assert evaluate(whole.run, tmp_path / "other") == evaluate(whole.run, whole.tar) == expected
    assert [match.key for match in search(whole.run, "红猫", tmp_path / "other", 3)] == [match.key for match in found]
    for command in (["search", str(whole.run), "猫"], ["report", str(whole.run)], ["audit", str(whole.run)]):
        assert main(command) == 2
        assert "is not there now; put it back, or say where it lies with --store" in capsys.readouterr().err
        assert main([*command, "--store", str(tmp_path / "nowhere")]) == 2
        assert f"--store {tmp_path / 'nowhere'}: there is no store" in capsys.readouterr().err


def test_a_store_that_moved_is_known_again(whole: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = [match.key for match in search(whole.run, "红猫", None, 3)]
    whole.store.rename(tmp_path / "moved")
    assert [match.key for match in search(whole.run, "红猫", None, 3, tmp_path / "moved")] == found
    assert open_run(whole.run, tmp_path / "moved").manifest["pairs"] == 24
    other = tiny.pair_store(tmp_path / "tiny" / "other")
    # In the place of the first, too, another store is not taken for it.
    for arguments, place in ((["--store", str(other)], other), ([], whole.store)):
        if not arguments:
            other.rename(whole.store)
        assert main(["search", str(whole.run), "猫", *arguments]) == 2
        told = capsys.readouterr().err
        assert f"store {place}: is another one than that of run {whole.run}" in told and str(whole.store) in told
    assert evaluate(whole.run, tmp_path / "moved")


@pytest.mark.parametrize(
    ("pointer", "expected"),
    [("step-00000005", 5), ("", 15), ("step-00000099", 15), ("../../store", 15), (b"\xff\0", 15), (None, 15)],
)
def test_pointers_are_hints(
    whole: World, capsys: pytest.CaptureFixture[str], pointer: str | bytes | None, expected: int
) -> None:
    run = unfinished(whole)
    best = run / "checkpoints" / "best"
    best.unlink()
    if pointer is not None:
        best.write_bytes(pointer.encode() if isinstance(pointer, str) else pointer)
    (run / "checkpoints" / "latest").symlink_to("nowhere")
    shutil.copytree(run / "checkpoints" / "step-00000010", run / "checkpoints" / "step-00000020.partial")
    assert scale_of(run) == expected
    told = capsys.readouterr().err
    assert told.count("notice:") == 1 and f"its checkpoint step-{expected:08d} is used" in told


def test_a_checkpoint_that_is_not_whole_is_passed_over(whole: World, capsys: pytest.CaptureFixture[str]) -> None:
    run = unfinished(whole)
    best, middle, newest = sorted((run / "checkpoints").glob("step-*"))
    change_weights(best / "model", lambda weights: weights["logit_scale"].add_(1))
    (newest / digests.NAME).unlink()
    assert scale_of(run) == 10
    told = capsys.readouterr().err
    assert "step-00000010 is used" in told and f"{best / 'model' / 'model.safetensors'}: is not what was" in told
    shutil.rmtree(middle)
    with pytest.raises(UserError, match=r"neither a model nor a checkpoint.*step-00000005.*is not what was written"):
        open_run(run)


def test_a_broken_model_is_not_replaced_by_another(whole: World) -> None:
    checkpoint(whole.run, 5, of=whole.run)
    change_weights(whole.run / "model", lambda weights: weights["logit_scale"].add_(1))
    with pytest.raises(UserError, match=r"run/model/model\.safetensors: is not what was written"):
        open_run(whole.run)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(whole: World, value: float) -> None:
    change_weights(whole.run / "model", lambda weights: weights["text.projection.weight"][3].fill_(value))
    digests.write_digests(whole.run / "model")
    with pytest.raises(UserError, match=r"model\.safetensors: the weight text\.projection\.weight is not finite"):
        open_run(whole.run)


def test_weights_of_half_precision_are_opened_as_float32(world: World, tmp_path: Path) -> None:
    expected = open_run(world.run).encode_texts(["红猫"])
    shutil.copytree(world.run / "model", tmp_path / "half")
    (world.run / "model").unlink()
    (tmp_path / "half").rename(world.run / "model")
    change_weights(world.run / "model", lambda weights: weights.update({k: v.half() for k, v in weights.items()}))
    opened = open_run(world.run)
    assert {parameter.dtype for parameter in opened.model.parameters()} == {torch.float32}
    np.testing.assert_allclose(opened.encode_texts(["红猫"]), expected, atol=2e-3)


@pytest.mark.parametrize("damage", ["empty weights", "empty config", "a layer more", "a weight less"])
def test_a_model_of_an_earlier_version_is_looked_at_too(world: World, damage: str, built: World) -> None:
    (world.run / "model").unlink()
    shutil.copytree(built.run / "model", world.run / "model")
    weights, config = world.run / "model" / "model.safetensors", world.run / "model" / "config.json"
    if damage == "a weight less":
        change_weights(weights.parent, lambda weights: weights.pop("text.projection.weight"))
    elif damage == "a layer more":
        config.write_text(config.read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'))
    else:
        (weights if damage == "empty weights" else config).write_bytes(b"")
    with pytest.raises(UserError, match=rf"model {world.run / 'model'}: broken \("):
        open_run(world.run)


def test_another_tokenizer_in_an_unfinished_run_is_refused(whole: World, tmp_path: Path) -> None:
    run = unfinished(whole)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "vocab.txt").write_text(
        "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n" + "\n".join(tiny.CHARACTERS[::-1])
    )
    tiny.tokenizer(tmp_path / "other").save_pretrained(run / "tokenizer")
    with pytest.raises(UserError, match=r"run/tokenizer/tokenizer\.json: is not what was written"):
        open_run(run)
    shutil.rmtree(run / "tokenizer")
    with pytest.raises(UserError, match=r"run/tokenizer/.* is missing"):
        open_run(run)


@pytest.mark.parametrize(
    "gone",
    [
        (digests.NAME, MARK),
        (digests.NAME, "identity.json"),
        (f"model/{digests.NAME}", MARK),
        (digests.NAME, f"model/{digests.NAME}", "identity.json"),
    ],
)
def test_digests_that_are_gone_are_missed(
    whole: World, capsys: pytest.CaptureFixture[str], gone: tuple[str, ...]
) -> None:
    mark(whole.run, "run")
    expected = evaluate(whole.run, whole.store)
    for name in gone:
        (whole.run / name).unlink()
    change_weights(whole.run / "model", lambda weights: weights["text.projection.weight"].neg_())
    for command in (["evaluate", str(whole.run), str(whole.store)], ["verify", str(whole.run)]):
        assert main(command) == 2
        assert f"{whole.run / gone[0]}: is missing" in capsys.readouterr().err
    change_weights(whole.run / "model", lambda weights: weights["text.projection.weight"].neg_())
    # Earlier versions wrote none of these.
    for left in (MARK, "identity.json", digests.NAME, f"model/{digests.NAME}"):
        (whole.run / left).unlink(missing_ok=True)
    assert evaluate(whole.run, whole.store) == expected


@pytest.mark.parametrize("place", ["model", "checkpoints/step-00000005", "."])
def test_what_a_model_is_covered_by_may_lie_above_it(whole: World, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    mark(whole.run, "run")
    checkpoint(whole.run, 5, of=whole.run)
    (whole.run / "model" / digests.NAME).unlink()
    folder = whole.run / place
    models = {"model": folder, "checkpoints/step-00000005": folder / "model", ".": folder / "model"}
    if place == "checkpoints/step-00000005":
        digests.check_written(models[place], "*", remedy="")
        change_weights(models[place], lambda weights: weights["logit_scale"].add_(1))
        with pytest.raises(UserError, match=r"model\.safetensors: is not what was written"):
            digests.check_written(models[place], "*", remedy="")
        (folder / digests.NAME).unlink()
    monkeypatch.chdir(models[place])
    for given in (models[place], Path()):
        with pytest.raises(UserError, match=rf"{digests.NAME}: is missing"):
            digests.check_written(given, "*", remedy="")


def test_a_store_of_another_width_is_refused(whole: World, tmp_path: Path) -> None:
    config = load_config(whole.run / "config.yaml", saved=True)
    narrow = config.model_copy(update={"model": config.model.model_copy(update={"width": 8})})
    save_config(narrow, whole.run / "config.yaml")
    prove(whole.run)
    with (
        pytest.raises(UserError, match=r"features are 16 wide, but those of .*run are 8"),
        open_data(open_run(whole.run), shutil.copytree(whole.store, tmp_path / "copy")),
    ):
        pass


def test_a_temporary_store_goes_also_where_a_signal_ends_the_process(
    whole: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Path] = []
    prepare = runs.prepare

    def noted(source: Path, path: Path, *given: Any, **more: Any) -> Any:
        assert path.parent in stopping._scratch
        seen.append(path.parent)
        return prepare(source, path, *given, **more)

    monkeypatch.setattr(runs, "prepare", noted)
    with open_data(open_run(whole.run), whole.tar) as store:
        assert store.path.parent == seen[0]
    assert not seen[0].exists() and seen[0] not in stopping._scratch


@pytest.mark.parametrize("told", [True, False])
def test_a_run_of_an_earlier_version_knows_its_tower_by_the_weights(
    whole: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], told: bool
) -> None:
    expected = evaluate(whole.run, whole.store)
    manifest = json.loads((whole.store / "manifest.json").read_text())
    assert ", pixels " in manifest["tower"]
    del manifest["sha256"]
    manifest["tower"] = manifest["tower"].partition(", pixels")[0]
    if not told:
        manifest["tower"] = "image-run@0123456789abcdef"
    (whole.store / "manifest.json").write_text(json.dumps(manifest))
    for name in ("identity.json", digests.NAME, f"model/{digests.NAME}"):
        (whole.run / name).unlink()
    if told:
        assert evaluate(whole.run, whole.tar) == expected
        assert main(["export", str(whole.run), str(tmp_path / "out")]) == 0
    else:
        assert main(["evaluate", str(whole.run), str(whole.tar)]) == 2
        assert "against image-run@0123456789abcdef: other weights; put that one back" in capsys.readouterr().err


def test_the_reports_tables_are_missed_by_name(whole: World, capsys: pytest.CaptureFixture[str]) -> None:
    config = load_config(whole.run / "config.yaml", saved=True)
    held = {"held": whole.store.with_name("held"), "seen": whole.store}
    save_config(
        config.model_copy(update={"data": config.data.model_copy(update={"validation": held})}),
        whole.run / "config.yaml",
    )
    prove(whole.run)
    assert main(["report", str(whole.run)]) == 2
    assert (
        f"data.validation.held is not at {held['held']}; name it by --data held=PATH seen={whole.store}"
        in capsys.readouterr().err
    )
