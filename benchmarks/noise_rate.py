"""How near is the estimated noise rate to the planted one, and what does the estimate drop? Beside a caption centroid.

    python -m benchmarks.noise_rate configs/demo-own.yaml --shards data/demo/train

Cases are KIND-RATE; a figure is the mean over seeds, with the least and the greatest. The judge was developed on
seeds 0 to 2: `--first-seed` is 3 by default. Wrong captions are planted in the demo's store, its features stay: `std`
puts a wrong caption on one picture as the demo does, `one` does so with one picture per concept, `cor` puts the same
wrong caption on every picture of a concept, `source` spares all pictures but those of one source, `near` takes the
caption from the most similar concepts. The labels only judge. The centroid of a caption's other pictures needs no
training: it shows what redundancy gives away. Cross-fits that are there already are not made again: remove `--folder`
after a change of the engine.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tarfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from benchmarks.measuring import RESULTS, hardware, once, record
from efficientclip.config import load_config
from efficientclip.data.store import PAIR_FILES, Store
from efficientclip.data.tokenizer import load_tokenizer
from efficientclip.demo.concepts import Concept, Picture, assign_noise
from efficientclip.evaluation.verdicts import separation
from efficientclip.noise.cross_fit import CrossFit, read_cross_fit
from efficientclip.prepare.writer import finish, write_ids, write_tokens

CASES = ("std-0", "std-0.1", "std-0.3", "std-0.5", "one-0", "one-0.1", "one-0.3", "cor-0.3", "source-0.2", "near-0.3")
NOISY_SOURCE, NEIGHBOURS = "twitter", 10
KEY = ("hardware", "visits", "case", "seeds")
COLUMNS = (
    *KEY, "pairs", "true", "estimated", "mean p of wrong", "cross-fit AUC", "centroid AUC",
    "cross-fit noise dropped", "centroid noise dropped", "cross-fit clean dropped", "centroid clean dropped",
    "date", "command",
)  # fmt: skip


def demo_pictures(shards: Iterable[Path]) -> list[Picture]:
    """The pictures in tars of the demo's data with their true captions, without pixels."""
    pictures = []
    for shard in shards:
        with tarfile.open(shard) as tar:
            for member in tar:
                stream = tar.extractfile(member)
                if member.name.endswith(".json") and stream is not None:
                    record = json.load(stream)
                    true = tuple(entry.get("original", entry["text"]) for entry in record["captions"])
                    concept = Concept(record["concept"], true, tuple(record["captions_en"]))
                    captions = [{"text": text, "noise": False} for text in true]
                    pictures.append(Picture(concept, record["source"], b"", captions))
    return sorted(pictures, key=lambda picture: (picture.concept.key, picture.style))


def noisy_pictures(pictures: list[Picture], kind: str, rate: float, seed: int, source: Store) -> list[Picture]:
    """`pictures` with round(rate * pairs) wrong captions of `kind`; `one` keeps one picture of each concept."""
    random = np.random.default_rng([seed, 11])
    if kind == "one":
        pictures = [pictures[number] for number in random.permutation(len(pictures))]
        pictures = list({picture.concept.key: picture for picture in pictures}.values())
    if kind == "cor":
        # Noise on one picture a concept, then copied to its others.
        first = {picture.concept.key: picture for picture in pictures}
        wrong = {picture.concept.key: picture.captions for picture in assign_noise(list(first.values()), rate, seed)}
        return [replace(picture, captions=wrong[picture.concept.key]) for picture in pictures]
    if kind == "source":
        noisy = [picture for picture in pictures if picture.style == NOISY_SOURCE]
        share = rate * sum(len(picture.captions) for picture in pictures) / sum(len(p.captions) for p in noisy)
        return [*(p for p in pictures if p.style != NOISY_SOURCE), *assign_noise(noisy, share, seed)]
    wrong_everywhere = assign_noise(pictures, rate, seed)
    return near_misses(wrong_everywhere, random, source) if kind == "near" else wrong_everywhere


def near_misses(pictures: list[Picture], random: np.random.Generator, source: Store) -> list[Picture]:
    """The same pairs are wrong, by captions of the NEIGHBOURS concepts whose pictures are most like the own."""
    image_of = dict(zip(*(source.pairs()[name].to_pylist() for name in ("key", "image_id")), strict=True))
    concepts = {picture.concept.key: picture.concept for picture in pictures}
    number_of = {key: number for number, key in enumerate(concepts)}
    mean_CD = np.zeros((len(concepts), source.width))
    for picture in pictures:
        if (image := image_of.get(picture_key(picture))) is not None:
            mean_CD[number_of[picture.concept.key]] += source.features[image]
    mean_CD /= np.maximum(np.linalg.norm(mean_CD, axis=1, keepdims=True), 1e-6)
    nearest_CN = np.argsort(-(mean_CD @ mean_CD.T), axis=1)[:, 1 : NEIGHBOURS + 1]
    every = list(concepts.values())
    for picture in pictures:
        near = [caption for n in nearest_CN[number_of[picture.concept.key]] for caption in every[n].chinese]
        for entry in picture.captions:
            taken = {*picture.concept.chinese, *(other["text"] for other in picture.captions)}
            if entry["noise"] and (free := [caption for caption in near if caption not in taken]):
                entry["text"] = free[random.integers(len(free))]
    return pictures


def picture_key(picture: Picture) -> str:
    """The picture's key in the demo's shards and store."""
    return f"{picture.style}-{picture.concept.key}"


def plant(source: Store, pictures: list[Picture], target: Path) -> Store:
    """A copy of the store whose pairs are those of `pictures`; the store's key names a picture."""
    if not target.exists():
        image_of = dict(zip(*(source.pairs()[name].to_pylist() for name in ("key", "image_id")), strict=True))
        pictures = [picture for picture in pictures if picture_key(picture) in image_of]
        entries = [(number, entry) for number, picture in enumerate(pictures) for entry in picture.captions]
        texts = sorted({entry["text"] for _, entry in entries})
        number_of = {text: number for number, text in enumerate(texts)}
        caption_ids = np.array([number_of[entry["text"]] for _, entry in entries])
        image_ids = np.array([number for number, _ in entries])
        folder = target.with_name(target.name + ".partial")
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(source.path, folder)
        keys = [picture_key(picture) for picture in pictures]
        np.array(source.features[[image_of[key] for key in keys]]).tofile(folder / "features.bin")
        tokenizer = load_tokenizer(source.path / "tokenizer")
        write_tokens(folder, tokenizer(texts)["input_ids"], np.dtype(source.manifest["token_dtype"]))
        write_ids(folder, image_ids, caption_ids, len(texts))
        columns = {
            "key": [keys[number] for number in image_ids],
            "caption": [texts[number] for number in caption_ids],
            "source": [pictures[number].style for number in image_ids],
            "image_id": pa.array(image_ids, pa.int32()),
            "caption_id": pa.array(caption_ids, pa.int32()),
            "noise": [bool(entry["noise"]) for _, entry in entries],
        }
        places = source.pairs().select(["key", "shard", "offset", "length"]).to_pylist()
        place_of = {row["key"]: row for row in places}
        columns |= {name: [place_of[key][name] for key in columns["key"]] for name in ("shard", "offset", "length")}
        pq.write_table(pa.table(columns), folder / "pairs.parquet")
        counts = {"pairs": len(entries), "images": len(pictures), "captions": len(texts)}
        manifest = {key: value for key, value in source.manifest.items() if key not in ("files", "format")}
        finish(folder, target, manifest | counts, PAIR_FILES)
    return Store(target)


def centroid_score(store: Store) -> np.ndarray[Any, Any]:
    """Cosine of each pair's picture to the mean of its caption's other pictures, float64 [pairs]; average for none."""
    features = store.features[store.image_ids].astype(np.float64)
    total = np.zeros((len(store.offsets) - 1, store.width))
    np.add.at(total, store.caption_ids, features)
    others = total[store.caption_ids] - features
    length = np.linalg.norm(others, axis=1)
    alone = length < 1e-6
    score = (others * features).sum(1) / np.maximum(length, 1e-6)
    score[alone] = score[~alone].mean()
    return score


def judged(config: Path, store: Store, folder: Path, seed: int, overrides: list[str]) -> tuple[CrossFit, float]:
    """The verdicts of `efficientclip cross-fit` on one core, and its CPU seconds."""
    given = [f"seed={seed}", "training.threads=1", f"data.store={store.path}", f"confidence.cross_fit={folder}"]
    seconds, _ = once(folder, "cross-fit", str(config), *given, *overrides)
    return read_cross_fit(folder, store), seconds


def dropped(score: np.ndarray[Any, Any], rate: float) -> np.ndarray[Any, Any]:
    """The lowest `rate` of the pairs, bool [pairs]."""
    drop = np.zeros(len(score), bool)
    drop[np.argsort(score, kind="stable")[: round(rate * len(score))]] = True
    return drop


def figures(store: Store, found: CrossFit) -> dict[str, float]:
    """The estimate against the labels; the centroid drops as many pairs as the estimate says."""
    noise = store.pairs()["noise"].to_numpy(zero_copy_only=False).astype(bool)
    row = {"pairs": len(store), "visits": found.visits, "true": float(noise.mean()), "estimated": found.rate}
    if noise.any():
        row["mean p of wrong"] = float(found.p[noise].mean())
    for name, score in (("cross-fit", found.clean_log_odds), ("centroid", centroid_score(store))):
        drop = dropped(score, found.rate)
        row[f"{name} clean dropped"] = float(drop[~noise].mean())
        if noise.any():
            row[f"{name} AUC"] = separation(score[~noise], score[noise])
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
    parser.add_argument("--shards", type=Path, required=True, help="the demo's training tars: they hold the captions")
    parser.add_argument("--cases", default=",".join(CASES), help="KIND-RATE,…")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("runs/noise-rate"))
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="cross-fits at a time, one core each")
    given = parser.parse_args()
    config = load_config(given.config, given.overrides)
    if config.data.store is None:
        parser.error("the config names no data.store")
    source, pictures = Store(config.data.store), demo_pictures(sorted(given.shards.glob("*.tar")))
    (given.folder / "stores").mkdir(parents=True, exist_ok=True)

    def measure(case: str, seed: int) -> dict[str, float]:
        kind, rate = case.split("-")
        planted = noisy_pictures(pictures, kind, float(rate), seed, source)
        name = f"{case}-{seed}"
        store = plant(source, planted, given.folder / "stores" / name)
        verdicts, _ = judged(given.config, store, given.folder / name, seed, given.overrides)
        found = figures(store, verdicts)
        print(name, over_seeds([found]), flush=True)
        return found

    cases, seeds = given.cases.split(","), range(given.first_seed, given.first_seed + given.seeds)
    with ThreadPoolExecutor(given.jobs) as pool:
        results = {case: [pool.submit(measure, case, seed) for seed in seeds] for case in cases}
    common = {
        "hardware": hardware("cpu"), "seeds": f"{seeds[0]} to {seeds[-1]}", "date": date.today(),
        "command": "python -m benchmarks.noise_rate " + " ".join(sys.argv[1:]),
    }  # fmt: skip
    rows = [common | {"case": case} | over_seeds([one.result() for one in found]) for case, found in results.items()]
    shown = [name for name in COLUMNS if name not in ("hardware", "command", "date")]
    table = Table(*shown, title="noise rate, estimated without labels")
    for row in rows:
        table.add_row(*(str(row.get(name, "")) for name in shown))
    Console(width=200).print(table)
    record(rows, RESULTS / "noise_rate.csv", KEY, COLUMNS)


if __name__ == "__main__":
    main()
