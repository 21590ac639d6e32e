"""How much of the oracle's gain does ECL recover? Arms side by side at equal pair visits, several seeds each.

    python -m benchmarks.ecl configs/demo.yaml --test stores/demo-test_vendor --seeds 5

The oracle trains on the store without its noisy pairs, `none` on all of them. The fold towers of `calibrated`
count: its joint run has that many visits less, and starts from their mean. The share recovered is
(R@10 of the arm - none) / (oracle - none), over the seeds; its interval is a paired bootstrap over the queries.
"""

from __future__ import annotations

import argparse
import csv
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from benchmarks.measuring import on_one_core
from efficientclip.config import load_config
from efficientclip.data.store import Store, finish, write_ids
from efficientclip.model.efficientclip import load_model
from efficientclip.model.encode import encode_store
from efficientclip.noise_rate import read_cross_fit
from efficientclip.objectives.retrieval import best_ranks

ARMS = {
    "none": ["confidence.selection=none"],
    "oracle": ["confidence.selection=none"],
    "schedule": ["confidence.selection=schedule"],
    "mixture": ["confidence.selection=mixture"],
    "calibrated": ["confidence.selection=calibrated"],
    "published": [
        "confidence.selection=published",
        "confidence.score=snapshot",
        "confidence.warmup_epochs=0",
        "confidence.drop_share=0.1",
    ],
}


def without_noise(store: Path, target: Path) -> None:
    """A copy of the store that holds the clean pairs alone."""
    if target.exists():
        return
    source = Store(store)
    folder = target.with_name(target.name + ".partial")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(store, folder)
    pairs = source.pairs()
    clean = pairs.filter(pc.invert(pc.fill_null(pairs["noise"], False)))
    pq.write_table(clean, folder / "pairs.parquet")
    write_ids(folder, clean["image_id"].to_numpy(), clean["caption_id"].to_numpy(), len(source.offsets) - 1)
    manifest = {key: value for key, value in source.manifest.items() if key not in ("files", "format")}
    finish(folder, target, manifest | {"pairs": len(clean)}, list(source.manifest["files"]))


def run(config: Path, arm: str, seed: int, store: Path, overrides: list[str], folder: Path) -> Path:
    """Train one arm on one core unless it is there already; returns its run folder."""
    target = folder / f"{arm}-{seed}"
    if (target / "confidence.parquet").is_file():
        return target
    arguments = [str(config), f"run={target}", f"seed={seed}", f"data.store={store}", "training.threads=1"]
    arguments += [*ARMS[arm], *overrides]
    log = folder / f"{arm}-{seed}.log"
    if arm == "calibrated":
        judged = folder / f"cross-fit-{seed}"
        arguments.append(f"confidence.cross_fit={judged}")
        on_one_core(log, "cross-fit", *arguments)
        left = load_config(config, arguments[1:]).training.pair_visits - read_cross_fit(judged).visits
        arguments += [f"training.pair_visits={left}", f"model.start_from={judged}"]
    on_one_core(log, "train", *arguments)
    return target


def ranks_of(run_folder: Path, test: Store, max_tokens: int) -> np.ndarray[Any, Any]:
    """Text->image ranks of the test queries."""
    texts = encode_store(load_model(run_folder), test, max_tokens)
    return best_ranks(texts, test.features.astype(np.float32), test.caption_edges)


def detection(run_folder: Path, store: Store) -> tuple[float, float, float]:
    """Noise dropped, clean pairs lost, share kept."""
    noise = store.pairs()["noise"].to_numpy(zero_copy_only=False).astype(bool)
    kept = pq.read_table(run_folder / "confidence.parquet")["kept"].to_numpy(zero_copy_only=False).astype(bool)
    return float((~kept[noise]).mean()), float((~kept[~noise]).mean()), float(kept.mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", help="key=value, for every arm")
    parser.add_argument("--test", type=Path, required=True, help="labelled store of the queries")
    parser.add_argument("--arms", default="none,oracle,schedule,mixture")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path("runs/ecl"))
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time, one core each")
    parser.add_argument("--csv", type=Path)
    given = parser.parse_args()
    config = load_config(given.config, given.overrides)
    if config.data.store is None:
        parser.error("the config names no data.store")
    given.folder.mkdir(parents=True, exist_ok=True)
    oracle_store = given.folder / "oracle-store"
    without_noise(config.data.store, oracle_store)
    arms = given.arms.split(",")
    jobs = [(arm, seed) for seed in range(given.seeds) for arm in arms]
    with ThreadPoolExecutor(given.jobs) as pool:
        folders = list(
            pool.map(
                lambda job: run(
                    given.config, *job, oracle_store if job[0] == "oracle" else config.data.store, given.overrides,
                    given.folder,
                ),
                jobs,
            )
        )  # fmt: skip
    test, store = Store(given.test), Store(config.data.store)
    hits: dict[str, list[Any]] = {arm: [] for arm in arms}
    first: dict[str, list[float]] = {arm: [] for arm in arms}
    found: dict[str, list[tuple[float, float, float]]] = {arm: [] for arm in arms}
    for (arm, _), folder in zip(jobs, folders, strict=True):
        ranks = ranks_of(folder, test, config.training.max_caption_tokens)
        hits[arm].append(ranks <= 10)
        first[arm].append(float((ranks <= 1).mean()))
        if arm != "oracle":
            found[arm].append(detection(folder, store))
    mean_hits = {arm: np.mean(values, axis=0) for arm, values in hits.items()}
    draws = np.random.default_rng(0).integers(0, len(mean_hits["none"]), (2000, len(mean_hits["none"])))
    rows = []
    for arm in arms:
        row: dict[str, Any] = {"arm": arm, "seeds": given.seeds}
        row["R@1"] = f"{100 * np.mean(first[arm]):.1f}"
        row["R@10"] = f"{100 * mean_hits[arm].mean():.1f} ± {100 * np.std([h.mean() for h in hits[arm]]):.1f}"
        if found[arm]:
            dropped, lost, kept = np.mean(found[arm], axis=0)
            row |= {"noise dropped": f"{dropped:.3f}", "clean lost": f"{lost:.3f}", "kept": f"{kept:.3f}"}
        if arm not in ("none", "oracle") and "oracle" in arms:
            gain, ceiling = mean_hits[arm] - mean_hits["none"], mean_hits["oracle"] - mean_hits["none"]
            shares = gain[draws].mean(1) / ceiling[draws].mean(1)
            low, high = np.quantile(shares, [0.025, 0.975])
            row["oracle gain recovered"] = f"{gain.mean() / ceiling.mean():.0%} ({low:.0%} to {high:.0%})"
        rows.append(row)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    table = Table(*columns, title=f"ECL, {config.training.pair_visits} pair visits, {date.today()}")
    for row in rows:
        table.add_row(*(str(row.get(name, "")) for name in columns))
    Console(width=140).print(table)
    if given.csv:
        with given.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
