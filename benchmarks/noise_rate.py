"""How near is the estimated noise rate to the planted one, and what is dropped for it? Beside a caption centroid.

    python -m benchmarks.noise_rate configs/demo.yaml --shards data/demo/train
    python -m benchmarks.noise_rate CONFIG --store STORE

Cases are KIND-RATE, of the kinds that `benchmarks.planting` describes; a figure is the mean over seeds, with the least
and the greatest. `source off` is the greatest error among the rates of a store's sources. The judge was developed on
seeds 0 to 4: `--first-seed` is 5 by default. Wrong captions are planted in the pairs of the demo's store, or of any
STORE whose captions are held to be right; its features stay. The labels only judge. Near misses are 0 where none are
told. The centroid of a caption's other pictures needs no training: it shows what redundancy gives away, and tells
nothing where each caption has one picture. F1 is that of the wrong pairs: where both drop as many as are estimated,
and at the best threshold of each. Cross-fits that are there already are not made again: remove `--folder` after a
change of the engine.
"""

from __future__ import annotations

import argparse
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
from rich.console import Console
from rich.table import Table
from sklearn.metrics import f1_score, precision_recall_curve

from benchmarks.measuring import RESULTS, hardware, once, record
from benchmarks.planting import KINDS, OF_ANY_STORE, pairs_of_demo, pairs_of_store, planted, some_pictures, write_store
from efficientclip.config import load_config
from efficientclip.data.store import Store
from efficientclip.evaluation.verdicts import caption_centroid_scores, separation
from efficientclip.noise.cross_fit import CrossFit, read_cross_fit
from efficientclip.noise.docket import sources
from efficientclip.planning.settings import parse_count

CASES = (
    "random-0", "random-0.1", "random-0.3", "random-0.5", "permute-0.2", "permute-0.4", "permute-0.6", "category-0.2",
    "category-0.4", "category-0.6", "noun-0.2", "noun-0.4", "noun-0.6", "near-0.3", "one-0", "one-0.1", "one-0.3",
    "cor-0.3", "source-0.2", "source-1", "rare-0.03", "rare-1",
)  # fmt: skip
NEAR = ("near", "near low", "near high")
KEY = ("hardware", "store", "pairs", "visits", "case", "seeds")
COLUMNS = (
    *KEY, "true", "estimated", "low", "high", "held", "source off", *NEAR, "skill", "mean p of wrong", "cross-fit AUC",
    "centroid AUC", "cross-fit F1", "centroid F1", "cross-fit best F1", "centroid best F1",
    "cross-fit noise dropped", "centroid noise dropped", "cross-fit clean dropped", "centroid clean dropped",
    "date", "command",
)  # fmt: skip
Floats = np.ndarray[Any, np.dtype[np.float64]]
Bools = np.ndarray[Any, np.dtype[np.bool_]]


def judged(config: Path, store: Store, folder: Path, seed: int, overrides: list[str]) -> tuple[CrossFit, float]:
    """The verdicts of `efficientclip cross-fit` on one core, and its CPU seconds."""
    given = [f"seed={seed}", "training.threads=1", f"data.store={store.path}", f"confidence.cross_fit={folder}"]
    seconds, _ = once(folder, "cross-fit", str(config), *given, *overrides)
    return read_cross_fit(folder, store), seconds


def centroid_score(store: Store) -> Floats:
    """Cosine of each pair's picture to the mean of its caption's other pictures [pairs]; average for none."""
    score = caption_centroid_scores(store).astype(np.float64)
    known = np.isfinite(score)
    score[~known] = score[known].mean() if known.any() else 0
    return score


def dropped(score: Floats, rate: float) -> Bools:
    """The lowest `rate` of the pairs, bool [pairs]."""
    drop = np.zeros(len(score), bool)
    drop[np.argsort(score, kind="stable")[: round(rate * len(score))]] = True
    return drop


def best_f1(noise: Bools, score: Floats) -> float:
    """F1 of the wrong pairs at the threshold of `score` that has the greatest; equal scores fall together."""
    precision, recall, _ = precision_recall_curve(noise, -score)
    return float((2 * precision * recall / np.maximum(precision + recall, 1e-12)).max())


def figures(store: Store, found: CrossFit) -> dict[str, float]:
    """The estimate against the labels; the centroid drops as many pairs as the estimate says."""
    noise = store.pairs()["noise"].to_numpy(zero_copy_only=False).astype(bool)
    true, whole = float(noise.mean()), found.whole
    if whole is None:
        raise SystemExit(f"noise_rate: the cross-fit of {store.path} is of an earlier version; remove --folder")
    row = {"pairs": len(store), "visits": found.visits, "true": true, "estimated": whole.rate, "low": whole.low}
    row |= {"high": whole.high, "held": float(whole.low <= true <= whole.high), "skill": whole.skill}
    shares = {name: float(noise[rows].mean()) for name, rows in sources(store)}
    row["source off"] = max(abs(source.rate - shares[source.name]) for source in found.sources)
    near = found.near if found.near is not None and found.near.droppable else None
    row |= {"near": near.rate, "near low": near.low, "near high": near.high} if near else dict.fromkeys(NEAR, 0.0)
    if noise.any():
        row["mean p of wrong"] = float(found.p[noise].mean())
    for name, score in (("cross-fit", found.clean_log_odds), ("centroid", centroid_score(store))):
        drop = dropped(score, found.rate)
        row[f"{name} clean dropped"] = float(drop[~noise].mean())
        if noise.any():
            row[f"{name} AUC"] = separation(score[~noise], score[noise])
            row[f"{name} F1"] = float(f1_score(noise, drop))
            row[f"{name} best F1"] = best_f1(noise, score)
            row[f"{name} noise dropped"] = float(drop[noise].mean())
    return row


def over_seeds(found: list[dict[str, float]]) -> dict[str, str]:
    """Mean, and beside it the least and the greatest where they differ."""
    row = {}
    for name in found[0]:
        values = np.array([one[name] for one in found])
        digits = 0 if values.max() > 1 else 3
        spread = f" ({values.min():.{digits}f} to {values.max():.{digits}f})" if np.ptp(values) > 0 else ""
        row[name] = f"{values.mean():.{digits}f}{spread if digits else ''}"
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", help="key=value, for the fold towers")
    of = parser.add_mutually_exclusive_group(required=True)
    of.add_argument("--shards", type=Path, help="the demo's training tars: they hold the captions of data.store")
    of.add_argument("--store", type=Path, help="a store whose captions are held to be right")
    parser.add_argument("--cases", help="KIND-RATE,…")
    parser.add_argument("--pairs", type=parse_count, help="about so many, all those of pictures drawn at random")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path("runs/noise-rate"))
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="cross-fits at a time, one core each")
    given = parser.parse_intermixed_args()
    config = load_config(given.config, given.overrides)
    if given.store is not None:
        kinds, source = OF_ANY_STORE, Store(given.store)
        if pc.any(source.pairs(columns=["noise"])["noise"]).as_py():
            parser.error(f"--store {given.store}: its labels say that captions are wrong; give one that is clean")
        right = pairs_of_store(source)
    elif config.data.store is None:
        parser.error("the config names no data.store")
    else:
        kinds, source = KINDS, Store(config.data.store)
        right = pairs_of_demo(source, sorted(given.shards.glob("*.tar")))
    cases = given.cases.split(",") if given.cases else [case for case in CASES if case.split("-")[0] in kinds]
    if unknown := {case.split("-")[0] for case in cases} - kinds.keys():
        parser.error(f"--cases: {', '.join(sorted(unknown))} unknown here; choose of {', '.join(kinds)}")
    (given.folder / "stores").mkdir(parents=True, exist_ok=True)

    def measure(case: str, seed: int) -> dict[str, float]:
        kind, rate = case.split("-")
        name = f"{case}-{seed}" + (f"-{given.pairs}" if given.pairs else "")
        drawn = some_pictures(right, given.pairs, seed) if given.pairs else right
        store = write_store(*planted(drawn, kind, float(rate), seed), given.folder / "stores" / name)
        verdicts, _ = judged(given.config, store, given.folder / name, seed, given.overrides)
        found = figures(store, verdicts)
        print(name, over_seeds([found]), flush=True)
        return found

    seeds = range(given.first_seed, given.first_seed + given.seeds)
    with ThreadPoolExecutor(given.jobs) as pool:
        results = {case: [pool.submit(measure, case, seed) for seed in seeds] for case in cases}
    common = {
        "hardware": hardware("cpu"), "store": source.path.name, "seeds": f"{seeds[0]} to {seeds[-1]}",
        "date": date.today(),
        "command": "python -m benchmarks.noise_rate " + " ".join(sys.argv[1:]),
    }  # fmt: skip
    rows = [common | {"case": case} | over_seeds([one.result() for one in found]) for case, found in results.items()]
    shown = [name for name in COLUMNS if name not in ("hardware", "store", "seeds", "command", "date")]
    table = Table(*shown, title="noise rate, estimated without labels")
    for row in rows:
        table.add_row(*(str(row.get(name, "")) for name in shown))
    Console(width=200).print(table)
    record(rows, RESULTS / "noise_rate.csv", KEY, COLUMNS)


if __name__ == "__main__":
    main()
