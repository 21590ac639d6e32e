"""How much of the oracle's gain does ECL recover, and which of its parts matter? Arms at equal pair visits.

    python -m benchmarks.ecl configs/demo.yaml --test stores/demo-test_vendor --seeds 5
    python -m benchmarks.ecl configs/demo.yaml data.store=STORE --test stores/demo-test_vendor

`calibrated` is the demo's rule; the oracle trains on the store without its noisy pairs, `none` on all of them. Arms
that are named for a score or a share change that of `calibrated` alone; `published` is the paper's rule as a whole.
The fold towers of `calibrated` count: its joint run has that many visits less. `data.store` may be one of those that
`benchmarks.noise_rate` planted. The share recovered is (R@10 of the arm - none) / (oracle - none), left empty where
the oracle gains nothing for sure; intervals are 95 % of a paired bootstrap over seeds and queries. Runs that are
there already are not made again: remove `--folder` after a change of the engine.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from benchmarks.measuring import RESULTS, hardware, once, record
from benchmarks.noise_rate import judged
from efficientclip.config import load_config
from efficientclip.data.store import Store
from efficientclip.model.efficientclip import load_model
from efficientclip.model.encode import encode_store
from efficientclip.objectives.retrieval import best_ranks
from efficientclip.prepare.writer import finish, write_ids

Floats = npt.NDArray[np.float64]

SCHEDULE = ["confidence.selection=schedule", "confidence.drop_share=0.19", "confidence.drops=2"]
# Arms are compared at equal visits, not at the best of each by validation.
FIXED = ["training.threads=1", "training.final=last"]
CALIBRATED = ["confidence.selection=calibrated"]
ARMS = {
    "none": ["confidence.selection=none"],
    "oracle": ["confidence.selection=none"],
    "calibrated": CALIBRATED,
    "schedule": SCHEDULE,
    "mixture": ["confidence.selection=mixture"],
    "published": [
        "confidence.selection=published",
        "confidence.score=snapshot",
        "confidence.warmup_epochs=0",
        "confidence.drop_share=0.1",
    ],
    "snapshot score": [*CALIBRATED, "confidence.score=snapshot"],
    "log-probability score": [*CALIBRATED, "confidence.score=log-probability"],
    "no re-audition": [*CALIBRATED, "confidence.reaudition_share=0"],
    "re-audition 15 %": [*CALIBRATED, "confidence.reaudition_share=0.15"],
}
BASES = ("none", "calibrated")
KEY = ("hardware", "pair_visits", "store", "noise", "test", "seeds", "arm")
DETECTION = ("noise_dropped", "clean_lost", "kept")
COLUMNS = (
    *KEY, "R@1", "R@10", "R@10_over_none", "R@10_over_calibrated", "R@1_over_calibrated",
    "oracle_gain_recovered", *DETECTION, "cpu_seconds", "date", "command",
)  # fmt: skip
DRAWS = 2000


def without_noise(store: Path, target: Path) -> None:
    """A copy of the store that holds the clean pairs alone, unless it is there and younger."""
    if target.exists() and target.stat().st_mtime > store.stat().st_mtime:
        return
    shutil.rmtree(target, ignore_errors=True)
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


def run(config: Path, arm: str, seed: int, store: Path, overrides: list[str], folder: Path) -> tuple[Path, float]:
    """Train one arm on one core; its run and its CPU seconds."""
    target, seconds = folder / f"{arm}-{seed}", 0.0
    arguments = [str(config), f"seed={seed}", f"data.store={store}", *FIXED, *ARMS[arm], *overrides]
    if CALIBRATED[0] in arguments:
        verdicts = folder / f"cross-fit-{seed}"
        found, seconds = judged(config, Store(store), verdicts, seed, overrides)
        arguments.append(f"confidence.cross_fit={verdicts}")
        left = load_config(config, arguments[1:]).training.pair_visits - found.visits
        arguments.append(f"training.pair_visits={left}")
    return target, seconds + once(target, "train", *arguments, f"run={target}")[0]


def ranks_of(run_folder: Path, test: Store, max_tokens: int) -> np.ndarray[Any, Any]:
    """Text->image ranks of the test queries."""
    texts = encode_store(load_model(run_folder), test, max_tokens)
    return best_ranks(texts, test.features.astype(np.float32), test.caption_edges)


def detection(run_folder: Path, store: Store) -> tuple[float, float, float]:
    """Noise dropped, clean pairs lost, share kept."""
    noise = noise_of(store)
    kept = pq.read_table(run_folder / "confidence.parquet")["kept"].to_numpy(zero_copy_only=False).astype(bool)
    return float((~kept[noise]).mean()) if noise.any() else np.nan, float((~kept[~noise]).mean()), float(kept.mean())


def noise_of(store: Store) -> np.ndarray[Any, Any]:
    """Which pairs are labelled wrong, bool [pairs]."""
    return store.pairs()["noise"].to_numpy(zero_copy_only=False).astype(bool)


def interval(values: Floats, form: str) -> str:
    """Ends of the 95 % interval of bootstrap draws."""
    low, high = np.quantile(values, [0.025, 0.975])
    return f"({low:{form}} to {high:{form}})"


def compared(hits: dict[str, Floats], seed: int = 0) -> dict[str, dict[str, str]]:
    """Differences of recall, in per cent, and the share recovered, by arm; `hits` are [seeds, queries] of 0 and 1."""
    random = np.random.default_rng(seed)
    S, Q = next(iter(hits.values())).shape
    drawn = [(random.integers(S, size=S), random.integers(Q, size=Q)) for _ in range(DRAWS)]
    means = {arm: np.array([100 * hit[np.ix_(*draw)].mean() for draw in drawn]) for arm, hit in hits.items()}
    mean = {arm: 100 * hit.mean() for arm, hit in hits.items()}
    found: dict[str, dict[str, str]] = {arm: {} for arm in hits}
    for arm in hits:
        for base in BASES:
            if base in hits and arm != base:
                gain = interval(means[arm] - means[base], "+.1f")
                found[arm][f"over_{base}"] = f"{mean[arm] - mean[base]:+.1f} {gain}"
        if {"none", "oracle"} <= hits.keys() and arm not in ("none", "oracle"):
            possible = means["oracle"] - means["none"]
            if np.quantile(possible, 0.025) > 0:
                share = (mean[arm] - mean["none"]) / (mean["oracle"] - mean["none"])
                shares = interval((means[arm] - means["none"]) / possible, ".0%")
                found[arm]["oracle_gain_recovered"] = f"{share:.0%} {shares}"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", help="key=value, for every arm")
    parser.add_argument("--test", type=Path, required=True, help="labelled store of the queries")
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path("runs/ecl"))
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time, one core each")
    given = parser.parse_intermixed_args()
    config = load_config(given.config, given.overrides)
    if config.data.store is None:
        parser.error("the config names no data.store")
    arms = given.arms.split(",")
    if unknown := set(arms) - ARMS.keys():
        parser.error(f"--arms: {', '.join(sorted(unknown))} unknown; choose of {', '.join(ARMS)}")
    given.folder.mkdir(parents=True, exist_ok=True)
    store, clean, test = Store(config.data.store), given.folder / "oracle-store", Store(given.test)
    without_noise(store.path, clean)
    jobs = [(seed, arm) for seed in range(given.seeds) for arm in arms]

    # The arm says which store it is.
    overrides = [override for override in given.overrides if not override.startswith("data.store=")]

    def trained(job: tuple[int, str]) -> tuple[Path, float]:
        seed, arm = job
        return run(given.config, arm, seed, clean if arm == "oracle" else store.path, overrides, given.folder)

    with ThreadPoolExecutor(given.jobs) as pool:
        if any(CALIBRATED[0] in ARMS[arm] for arm in arms):
            # Before the arms, two of which would make the same verdicts at once.
            folder_of = [given.folder / f"cross-fit-{seed}" for seed in range(given.seeds)]
            list(pool.map(lambda n: judged(given.config, store, folder_of[n], n, overrides), range(given.seeds)))
        folders = dict(zip(jobs, pool.map(trained, jobs), strict=True))
    common = {
        "hardware": hardware("cpu"), "pair_visits": config.training.pair_visits, "seeds": given.seeds,
        "store": store.path.name, "noise": f"{noise_of(store).mean():.2f}", "test": test.path.name,
        "date": date.today(),
        "command": "python -m benchmarks.ecl " + " ".join(sys.argv[1:]),
    }  # fmt: skip
    rows, hits, first = [], {}, {}
    for arm in arms:
        runs, spent = zip(*(folders[seed, arm] for seed in range(given.seeds)), strict=True)
        ranks = np.array([ranks_of(one, test, config.training.max_caption_tokens) for one in runs])
        hits[arm], first[arm] = (ranks <= 10).astype(np.float64), (ranks <= 1).astype(np.float64)
        by_seed = 100 * hits[arm].mean(1)
        row = common | {"arm": arm, "R@1": f"{100 * first[arm].mean():.1f}", "cpu_seconds": f"{np.mean(spent):.0f}"}
        row["R@10"] = f"{by_seed.mean():.1f} ± {by_seed.std(ddof=1) if len(runs) > 1 else 0:.1f}"
        if arm != "oracle":
            found = zip(*(detection(one, store) for one in runs), strict=True)
            of_runs = {name: np.mean(of) for name, of in zip(DETECTION, found, strict=True)}
            row |= {name: f"{mean:.3f}" for name, mean in of_runs.items() if not np.isnan(mean)}
        rows.append(row)
    for row, at_ten, at_one in zip(rows, compared(hits).values(), compared(first).values(), strict=True):
        row |= {name if name in COLUMNS else f"R@10_{name}": value for name, value in at_ten.items()}
        row |= {"R@1_over_calibrated": at_one.get("over_calibrated", "")}
    shown = [name for name in COLUMNS if name not in ("hardware", "command", "date")]
    table = Table(*shown, title="ECL, text to image on pictures of a style that no training saw; ± is the deviation")
    for row in rows:
        table.add_row(*(str(row.get(name, "")) for name in shown))
    Console(width=200).print(table)
    record(rows, RESULTS / "ecl.csv", KEY, COLUMNS)


if __name__ == "__main__":
    main()
