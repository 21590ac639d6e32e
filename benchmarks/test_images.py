"""The image loader beside open_clip's pipeline, SPDL, DALI and libjpeg-turbo, in one run; see docs/performance.md.

pytest benchmarks/test_images.py --benchmark-only
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

from benchmarks.images import COLUMNS, KEY, encoded_pictures, errors, extra_memory, make_shards, measure, missing
from benchmarks.measuring import record

TESTS = ("tests/data/test_images.py",)
ROUNDS = 5
SHOWN = (
    "implementation", "threads", "images_per_s", "over_open_clip", "over_spdl", "over_decoding", "mean_error",
    "max_error", "extra_mib", "note",
)  # fmt: skip


@pytest.mark.skipif(
    missing("skimage") or missing("sklearn"), reason="photographs: pip install scikit-image scikit-learn"
)
@pytest.mark.parametrize(("height", "width"), [(480, 640), (256, 341)], ids=["640x480", "short side 256"])
@pytest.mark.usefixtures("green")
def test_images(
    benchmark: Any,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    height: int,
    width: int,
) -> None:
    shards = make_shards(tmp_path_factory.getbasetemp() / "photographs", height, width)
    extra = extra_memory(shards)
    rows, busy = measure(shards, lambda ours, others: benchmark.pedantic(ours, setup=others, rounds=ROUNDS))
    if benchmark.disabled:
        return
    rows[0]["extra_mib"] = f"{extra:.0f}"
    if not missing("torchvision"):
        for row, scaled in ((rows[0], False), (rows[2], True)):
            row["mean_error"], row["max_error"] = (f"{error:.5f}" for error in errors(shards, scaled))
    table = Table(*SHOWN, title=f"JPEGs {width} x {height}, {len(encoded_pictures(shards))} of them")
    for row in rows:
        table.add_row(*(str(row.get(name) or "") for name in SHOWN))
    with capsys.disabled():
        Console(width=160).print("", table)
    if busy:
        pytest.skip(f"{busy}; nothing recorded")
    file: Path = request.config.getoption("--results")
    file.mkdir(parents=True, exist_ok=True)
    record(rows, file / "images.csv", KEY, COLUMNS)
