"""All that is to be seen on a GPU, in one command: right values, then speed, then a short training run.

    make gpu        or    python -m benchmarks.gpu

Exit code 0 if everything is as it should be, 1 if anything is not, 2 where there is no CUDA device.

Shapes: M pairs, Q rows of a bank, D width.
"""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.measuring import RESULTS
from efficientclip.kernels import (
    contrastive_loss,
    contrastive_loss_naive,
    paired_similarity,
    positive_ranks,
    sigmoid_loss,
    sigmoid_loss_naive,
    top_k,
)
from efficientclip.kernels.similarity import paired_similarity_naive, positive_ranks_naive, top_k_naive
from tests import tiny
from tests.kernels import sigmoid_cases, test_contrastive
from tests.training.launch import metrics

ROOT = Path(__file__).parents[1]
SHAPES = ((1000, 300, 100), (2048, 0, 512), (511, 5000, 1024))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SCALE, BIAS = 30.0, -3.0


@dataclass(frozen=True)
class Check:
    op: str
    what: str
    error: float
    allowed: float

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed


def rms(value: Tensor) -> float:
    return float(value.double().square().mean().sqrt())


def moved(value: Any, device: str) -> Any:
    if isinstance(value, tuple) and value and isinstance(value[0], Tensor):
        return tuple(part.to(device) for part in value)
    return value.to(device) if isinstance(value, Tensor) else value


# Values


def loss_and_gradients(
    loss: Callable[..., Any], data: dict[str, Any], dtype: torch.dtype, device: str, options: dict[str, Any]
) -> dict[str, Tensor]:
    scalar = {"dtype": torch.float64 if dtype == torch.float64 else torch.float32, "device": device}
    text, image = (data[name].to(device, dtype, copy=True).requires_grad_() for name in ("text", "image"))
    bank = None if data["bank"] is None else data["bank"].to(device, dtype)
    scale, bias = (torch.tensor(value, **scalar, requires_grad=True) for value in (SCALE, BIAS))
    options = {name: moved(value, device) for name, value in options.items()}
    out = loss(text, image, bank, logit_scale=scale, logit_bias=bias, **options)
    out.loss.backward()
    found = {**out._asdict(), "d_text": text.grad, "d_image": image.grad, "d_scale": scale.grad, "d_bias": bias.grad}
    return {name: value.detach().double().cpu() for name, value in found.items()}


def loss_checks(device: str, M: int, Q: int, D: int, dtype: torch.dtype) -> Iterator[Check]:
    """Errors at most twice those of plain torch in the same dtype, or a few units in a logit's last place."""
    rng = torch.Generator().manual_seed(0)
    unit = torch.finfo(torch.float32).eps * (1 + SCALE - BIAS)
    for loss, naive, cases, spread in (
        (contrastive_loss, contrastive_loss_naive, test_contrastive, 1.0),
        # A row's cells add up, where a softmax takes their mean.
        (sigmoid_loss, sigmoid_loss_naive, sigmoid_cases, (M + Q) ** 0.5),
    ):
        data = cases.features(rng, M, Q, D, hard=M > 30)
        rounded = {name: None if value is None else value.to(dtype).double() for name, value in data.items()}
        for case, options in (("plain", {}), ("all options", cases.everything(rng, M, Q))):
            truth = loss_and_gradients(naive, rounded, torch.float64, "cpu", options)
            torchs = loss_and_gradients(naive, data, dtype, device, options)
            ours = loss_and_gradients(loss, data, dtype, device, options)
            for name, value in truth.items():
                size = spread * (SCALE / M if name in ("d_text", "d_image") else 1)
                allowed = 2 * rms(torchs[name] - value) + 8 * unit * size + 8 * 2**-23 * rms(value)
                what = f"{name}, {case}, {dtype}, {M} x {M + Q} x {D}"
                yield Check(loss.__name__, what, rms(ours[name] - value), allowed)


def similarity_checks(device: str, M: int, Q: int, D: int, dtype: torch.dtype) -> Iterator[Check]:
    """Small whole numbers have exact products, so ranks and rows must be exact; cosines as near as torch's in fp32."""
    rng = torch.Generator().manual_seed(0)
    Q = Q or M
    query, bank = (torch.randint(-1, 2, (size, D), generator=rng).to(dtype) for size in (M, Q))
    rows, groups = torch.randint(0, Q, (2 * M,), generator=rng), 2 * torch.arange(M + 1)
    on_device = [value.to(device) for value in (query, bank, rows, groups)]
    what = f"{dtype}, {M} x {Q} x {D}"
    ranks = positive_ranks(*on_device).cpu()
    yield Check("positive_ranks", what, rms(ranks - positive_ranks_naive(query, bank, rows, groups)), 0)
    found, expected = top_k(*on_device[:2], min(10, Q)), top_k_naive(query, bank, min(10, Q))
    for name, one, other in zip(("scores", "rows"), found, expected, strict=True):
        yield Check("top_k", f"{name}, {what}", rms(one.cpu() - other), 0)

    text, bank = (torch.randn(size, D, generator=rng).to(dtype) for size in (M, Q))
    pairs = [value.to(device) for value in (text, bank, rows[:M])]
    truth = paired_similarity_naive(text, bank, rows[:M])
    torchs = F.cosine_similarity(pairs[0].float(), pairs[1].float()[pairs[2]])
    allowed = 2 * rms(torchs.cpu() - truth) + 8 * 2**-23
    yield Check("paired_similarity", what, rms(paired_similarity(*pairs).cpu() - truth), allowed)


def kernel_checks(
    device: str, shapes: Sequence[tuple[int, int, int]] = SHAPES, dtypes: Sequence[torch.dtype] = DTYPES
) -> list[Check]:
    checks = []
    for shape in shapes:
        for dtype in dtypes:
            checks += [*loss_checks(device, *shape, dtype), *similarity_checks(device, *shape, dtype)]
    return checks


# Other programs


def pytest_passes(*arguments: str, **environment: str) -> bool:
    command = [sys.executable, "-m", "pytest", "-q", *arguments]
    return not subprocess.run(command, cwd=ROOT, env=os.environ | environment).returncode


def training_losses(device: str, folder: Path) -> list[float]:
    """Losses of a short run on a store of random captions and features."""
    tiny.pair_store(folder / "store")
    tiny.text_store(folder / "texts")
    config = tiny.config(folder)
    command = [sys.executable, "-m", "efficientclip.train", str(config)]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"DS_ACCELERATOR": device}, check=True)
    return [line["loss"] for line in metrics(folder / "run")]


# Report


def speeds(device: str, file: Path) -> Iterator[tuple[str, str]]:
    """Today's rows of ours: what was measured, and the figures."""
    if not file.exists():
        return
    with file.open() as source:
        for row in csv.DictReader(source):
            if (row["implementation"], row["device"], row["date"]) == ("ours", device, str(date.today())):
                bank = f" + {int(row['bank']):,} frozen" if row["bank"] != "0" else ""
                images = "frozen" if row["frozen"] == "True" else "trainable"
                yield (
                    f"{row['pass']}, N = {int(row['N']):,}{bank}, D = {row['D']}, {row['dtype']}, {images}",
                    f"{row['seconds']} s, {float(row['share_of_mm']):.0%} of torch.mm's rate, {row['extra_mib']} MiB, "
                    f"{row['ratio'] or '?'} of {row['ratio_to'] or 'no peer'}'s time",
                )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: to try this program")
    parser.add_argument("--sizes", help="pairs N of the benchmark instead of the default ones, up to a million")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV file and its picture")
    given = parser.parse_args(arguments)
    if given.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device: nothing to run here; CPU figures come from `make bench`", file=sys.stderr)
        return 2

    table = Table("part", "what", "found", "verdict")
    failed = False

    def note(part: str, what: str, found: str, passed: bool | None = None) -> None:
        nonlocal failed
        failed |= passed is False
        table.add_row(part, what, found, "" if passed is None else "ok" if passed else "[red]WRONG")

    checks = kernel_checks(given.device)
    for op in dict.fromkeys(check.op for check in checks):
        of_op = [check for check in checks if check.op == op]
        wrong = [check for check in of_op if not check.passed]
        note("values", op, f"{len(of_op) - len(wrong)} of {len(of_op)} within bounds", not wrong)
        for check in wrong[:5]:
            note("", check.what, f"error {check.error:.1e}, allowed {check.allowed:.1e}")
    # Tests ask for deterministic algorithms, which cuBLAS refuses without a fixed workspace.
    passed = pytest_passes("tests/kernels", CUBLAS_WORKSPACE_CONFIG=":4096:8")
    note("tests", "tests/kernels", "pytest", passed)
    suite = ["benchmarks/test_contrastive.py", "--benchmark-only", "--long", "--device", given.device]
    suite += ["--results", str(given.results.absolute()), *(["--sizes", given.sizes] if given.sizes else [])]
    passed = pytest_passes(*suite)
    rows = list(speeds(given.device, given.results / "contrastive.csv"))
    note("speed", "benchmarks/test_contrastive.py", f"{len(rows)} figures of ours", passed and bool(rows))
    for what, found in rows:
        note("", what, found)
    with tempfile.TemporaryDirectory() as folder:
        try:
            losses = training_losses(given.device, Path(folder))
        except subprocess.CalledProcessError as error:
            note("training", "tiny store", f"exit code {error.returncode}", False)
        else:
            note("training", "tiny store", f"loss {losses[0]:.3f} to {losses[-1]:.3f}", losses[-1] < losses[0])
    name = torch.cuda.get_device_name() if given.device == "cuda" else "CPU"
    Console(width=150).print(f"{name}, torch {torch.__version__}", table)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
