"""The plan's counts against formulas worked by hand, and its advice."""

from __future__ import annotations

import pkgutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from efficientclip import cli
from efficientclip.config import Confidence, Config, load_config
from efficientclip.data.store import Store, TextStore, read_manifest
from efficientclip.errors import UserError
from efficientclip.noise.cross_fit import COLUMNS, FILE
from efficientclip.planning.plan import MERGE_SECONDS, TERMS, code_of, pauses, plan
from efficientclip.planning.settings import DEVICES, GIB, Machine, Settings, parse_count, parse_devices, stored
from efficientclip.planning.tables import advice
from efficientclip.planning.work import measure_work
from tests import tiny

HIDDEN, LAYERS, INNER, VOCABULARY, LENGTH = 64, 3, 256, 1000, 20


def config(objective: dict[str, Any] | None = None, **training: Any) -> Config:
    text = {
        "model_type": "bert", "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
        "intermediate_size": INNER, "vocab_size": VOCABULARY,
    }  # fmt: skip
    image = {
        "model_type": "clip_vision_model", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 128, "image_size": 32, "patch_size": 8,
    }  # fmt: skip
    return Config.model_validate(
        {
            "run": "runs/x",
            "model": {
                "width": 32,
                "text_tower": {"architecture": text},
                "image_tower": {"architecture": image, "size": 32},
            },
            "objective": objective or {},
            "training": {"pair_visits": 1_000_000, "batch_size": 1024, **training},
        }
    )


H100 = DEVICES["h100"]
SETTINGS = Settings(1_000_000, 500_000, LENGTH, 32, Machine(H100, 8))


def test_operations_of_a_token_are_those_of_its_products() -> None:
    work = measure_work(config(), LENGTH, torch.float32)
    products = LAYERS * (4 * HIDDEN * HIDDEN + 2 * HIDDEN * INNER)
    attention = LAYERS * 2 * HIDDEN * LENGTH
    assert work.token == pytest.approx(2 * (products + attention), rel=1e-6)
    assert work.picture > 0
    # At least each product's input and each attention's operands are kept.
    assert work.kept_by_token > LAYERS * (6 * HIDDEN + INNER) * 4
    half = measure_work(config(), LENGTH, torch.bfloat16)
    # Token numbers and the statistics of layer norms keep their width.
    assert work.kept_by_token / 2 < half.kept_by_token < 0.7 * work.kept_by_token
    assert work.kept_once == 0
    cast = measure_work(config(), LENGTH, torch.float32, torch.bfloat16)
    assert cast.token == work.token
    assert cast.kept_by_token < work.kept_by_token
    # Backward needs the narrow copy of each product's weights.
    assert cast.kept_once == LAYERS * (4 * HIDDEN * HIDDEN + 2 * HIDDEN * INNER) * 2
    # There what attention takes and gives is kept in fp32.
    on_cpu = measure_work(config(), LENGTH, torch.float32, torch.bfloat16, on_cpu=True)
    assert on_cpu.kept_by_token - cast.kept_by_token == LAYERS * 4 * HIDDEN * 2 and on_cpu.token == cast.token


def test_a_store_tells_the_vocabulary_that_the_config_leaves_open(tmp_path: Path) -> None:
    store = tiny.pair_store(tmp_path / "store")
    described = load_config(tiny.config(tmp_path))
    assert measure_work(described, 5).vocabulary == read_manifest(store)["vocabulary"]
    assert measure_work(config(), 5).vocabulary == VOCABULARY


def test_accumulation_and_the_scoring_copy_are_counted() -> None:
    whole = plan(config(), SETTINGS)
    work = measure_work(config(), LENGTH)
    again = plan(config(micro_batch_size=16), SETTINGS).flop
    assert again["captions once more, to accumulate"] == pytest.approx(whole.flop["captions"] / 3)
    assert plan(config(micro_batch_size=128), SETTINGS).flop == whole.flop
    changed = config().model_copy(update={"confidence": Confidence(score="snapshot")})
    assert plan(changed, SETTINGS).flop["scoring copy"] == pytest.approx(1e6 * LENGTH * work.token)


def test_a_plan_adds_up() -> None:
    made = plan(config(), SETTINGS)
    work = measure_work(config(), LENGTH, torch.float32)
    assert made.flop["captions"] == pytest.approx(3e6 * (LENGTH * work.token + 2 * HIDDEN * 32))
    assert made.flop["contrastive loss"] == pytest.approx(1e6 * 6 * 32 * (1024 + 20_000))
    assert made.flop["pictures through the frozen tower"] == pytest.approx(500_000 * work.picture)
    assert made.memory["bank"] == 20_000 * 32 * 2
    assert made.storage["features"] == 500_000 * 32 * 2
    fixed = sum(made.seconds.values()) / 86_400
    assert list(made.rates.values()) == [0.1 * 67e12, 0.2 * 67e12, 0.4 * 67e12]
    assert list(plan(config(precision="bf16"), SETTINGS).rates.values()) == [0.1 * 989e12, 0.2 * 989e12, 0.4 * 989e12]
    assert made.days(1e13) - fixed == pytest.approx(4 * (made.days(4e13) - fixed))
    features = 500_000 * work.picture / 1e13 / 8
    merged = SETTINGS.pairs * MERGE_SECONDS
    assert made.days(1e13) - made.days(1e13, before=False) == pytest.approx((features + merged) / 86_400)
    assert made.device_days(1e13) == pytest.approx(8 * made.days(1e13))


def test_links_are_those_of_a_node_or_between_nodes() -> None:
    P, steps = measure_work(config(), LENGTH).parameters, 977
    one = plan(config(), SETTINGS).seconds
    assert one["gradients between devices"] == pytest.approx(steps * 2 * 7 / 8 * P * 4 / 450e9)
    # Images in fp16, for the loss and for the bank.
    assert one["features between devices"] == pytest.approx(steps * 7 / 8 * 1024 * 32 * 2 * 2 / 450e9)
    assert one["checkpoints (5)"] == pytest.approx(5 * P * (4 + 8 / 8) / 64e9)
    four = plan(config(), replace(SETTINGS, machine=parse_devices("4x8xH100"))).seconds
    assert four["gradients between devices"] == pytest.approx(steps * 2 * 31 / 32 * P * 4 / 400e9)
    two = plan(config(), replace(SETTINGS, machine=parse_devices("2x1xA100"))).seconds
    assert two["gradients between devices"] == pytest.approx(steps * P * 4 / 25e9)
    assert "gradients between devices" not in plan(config(), replace(SETTINGS, machine=parse_devices("1xH100"))).seconds


def test_layers_that_are_recomputed_keep_their_inputs_and_cost_a_forward() -> None:
    plain, again = plan(config(), SETTINGS), plan(config(recompute=True), SETTINGS)
    assert again.flop["layers once more, to recompute"] == pytest.approx(plain.flop["captions"] / 3)
    inputs = 128 * LENGTH * LAYERS * HIDDEN * 4
    assert again.memory["activations"] == pytest.approx(inputs + plain.memory["activations"] / LAYERS)


def test_cross_fit_is_paid_before_the_run(tmp_path: Path) -> None:
    ecl = Confidence(selection="calibrated", cross_fit=tmp_path, cross_fit_share=0.2)
    made = plan(config().model_copy(update={"confidence": ecl}), SETTINGS)
    trained = made.flop["captions"] + made.flop["contrastive loss"]
    assert made.flop["cross-fit's two towers"] == pytest.approx(0.2 * trained)
    assert made.days(1e13, before=False) == pytest.approx(plan(config(), SETTINGS).days(1e13, before=False))


@pytest.mark.parametrize(
    "training", [{"tower": "both"}, {"micro_batch_size": 16, "recompute": True, "precision": "bf16"}], ids=str
)
def test_every_term_names_code_that_is_there(training: dict[str, Any]) -> None:
    made = plan(config({"bank_size": 0} if "tower" in training else None, **training), SETTINGS)
    assert all(code_of(name) for name in (*made.flop, *made.seconds, *made.memory))
    for name in TERMS.values():
        assert pkgutil.resolve_name(f"efficientclip.{name}") is not None


@pytest.mark.parametrize("momentum", [0.0, 0.99])
def test_where_both_towers_train_pictures_and_copies_are_counted(momentum: float) -> None:
    frozen = measure_work(config(), LENGTH)
    made = config({"bank_size": 4096 if momentum else 0, "momentum": momentum}, tower="both")
    work, planned = measure_work(made, LENGTH), plan(made, SETTINGS)
    assert work.picture == 0
    assert work.pair == pytest.approx(frozen.pair + frozen.picture)
    assert work.parameters > frozen.parameters
    forward = 1e6 * (LENGTH * work.token + work.pair)
    assert planned.flop["captions and pictures"] == pytest.approx(3 * forward)
    products = 6 * (1024 + 4096) if momentum else 4 * 1024
    assert planned.flop["contrastive loss"] == pytest.approx(1e6 * 2 * 32 * products)
    assert planned.flop.get("momentum copies", 0) == pytest.approx(forward * bool(momentum))
    assert ("momentum copies" in planned.memory) == bool(momentum)
    assert planned.memory["activations"] > plan(config(), SETTINGS).memory["activations"]
    assert not planned.storage


def test_zero_shards_memory(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    parts = {}
    for stage in (0, 1, 2, 3):
        file.write_text(f'{{"zero_optimization": {{"stage": {stage}}}}}')
        parts[stage] = plan(config().model_copy(update={"deepspeed": file}), SETTINGS).memory
    assert parts[1]["master weights"] == pytest.approx(parts[1]["weights"] / 8)
    for name, stage in (("optimiser", 1), ("gradients", 2), ("weights", 3)):
        assert parts[stage - 1][name] == pytest.approx(8 * parts[stage][name])


def test_advice_names_what_does_not_fit() -> None:
    small = replace(SETTINGS, machine=Machine(replace(H100, memory=1.2 * GIB), 8))
    large = config(batch_size=262_144)
    assert "training.micro_batch_size" in advice(plan(large, small), large)[0]
    assert advice(plan(config(), SETTINGS), config())[0].startswith("fits")


def test_a_calibrated_run_has_the_epochs_of_what_it_keeps(tmp_path: Path) -> None:
    data = config().data.model_copy(update={"validation": {"held": tmp_path}})
    ecl = {"none": Confidence(), "calibrated": Confidence(selection="calibrated", cross_fit=tmp_path)}
    plain, calibrated = (
        config().model_copy(update={"data": data, "confidence": ecl[rule].model_copy(update={"reaudition_share": 0})})
        for rule in ecl
    )
    assert any("cross-fit comes before" in note for note in advice(plan(calibrated, SETTINGS), calibrated))
    assert pauses(calibrated, 100_000, 977) == pauses(plain, 100_000, 977)
    table = pa.table({name: pa.array([], pa.float64()) for name in COLUMNS})
    pq.write_table(table.replace_schema_metadata({"rate": "0.5", "visits": "7", "pairs": ""}), tmp_path / FILE)
    assert pauses(calibrated, 100_000, 977) == pauses(plain, 50_000, 977) != pauses(plain, 100_000, 977)


def test_validations_by_steps_are_counted_as_they_fall(tmp_path: Path) -> None:
    file = tiny.config(tmp_path, training__validate_every=None)
    rhythms = ("validate_every=1", "validate_every_steps=6", "validate_every_steps=5")
    configs = [load_config(file, [f"training.{rhythm}", "training.checkpoint_every=1000"]) for rhythm in rhythms]
    # An epoch is 7 steps; the last step is validated, whatever the rhythm.
    assert [pauses(config, 240, 20) for config in configs] == [(3, 3), (4, 4), (4, 4)]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: parse_devices("8xABC"), "known devices: A100"),
        (lambda: parse_devices("8xABC:1:2:3"), "NAME:TFLOPS16:TFLOPS32:GIB:GBPS"),
        (lambda: parse_devices("8xABC:0:2:3:4"), "NAME:TFLOPS16:TFLOPS32:GIB:GBPS"),
        (lambda: parse_devices("H100"), "write it as 8xH100"),
        (lambda: parse_devices("0x8xH100"), "4x8xH100 for four nodes"),
        (lambda: parse_count("many"), "--pairs 'many'"),
    ],
)
def test_mistakes_are_explained(call: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        call()


def test_any_device_is_known_by_name_or_by_its_data_sheet() -> None:
    assert parse_devices("1xT4").device.memory == 16 * GIB
    assert parse_devices("2x8xrtx4090").world_size == 16
    machine = parse_devices("2xP40:12:11.5:24:346")
    assert (str(machine), machine.device.peak_in("bf16"), machine.device.peak_in("fp32")) == ("2 x P40", 12e12, 11.5e12)
    assert (machine.device.memory, machine.device.bandwidth) == (24 * GIB, 346e9)


def test_the_store_tells_how_many_pairs_there_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store, texts = Store(tiny.pair_store(tmp_path / "store")), TextStore(tiny.text_store(tmp_path / "texts"))
    file = tiny.config(tmp_path)
    told = stored(load_config(file))
    assert (told["pairs"], told["images"]) == (len(store), len(store.features))
    assert told["caption_tokens"] == pytest.approx(np.diff(store.offsets).mean())
    assert 0 < told["text_tokens"] <= np.diff(texts.offsets).mean()
    assert cli.main(["plan", str(file), "--gpus", "1xT4"]) == 0
    assert "240 pairs" in capsys.readouterr().out
    assert cli.main(["plan", str(file), "--gpus", "1xT4", "--pairs", "2M"]) == 0
    assert "2,000,000 pairs" in capsys.readouterr().out
    (tmp_path / "store" / "manifest.json").unlink()
    assert cli.main(["plan", str(file), "--gpus", "1xT4"]) == 2
    assert "--pairs: needed unless --calibrated-by names a profile, or the config a store" in capsys.readouterr().err


def test_the_command_prints_its_assumptions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from efficientclip.config import save_config

    file = tmp_path / "run.yaml"
    save_config(config(), file)
    assert cli.main(["plan", str(file), "--pairs", "2M", "--gpus", "4xA100", "--epochs", "3"]) == 0
    printed = capsys.readouterr().out
    assert "GPU-days" in printed
    assert "2,000,000 pairs" in printed
    assert "assumed: A100: 20 TFLOP/s dense fp32" in printed
