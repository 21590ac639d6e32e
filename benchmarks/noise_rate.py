"""How near is the estimated noise rate to the planted one, and what does the estimate drop? Beside a caption centroid.

    python -m benchmarks.noise_rate configs/demo.yaml --shards data/demo/train --seeds 3

Rows are KIND-RATE-SEED. Wrong captions are planted in the demo's store; its features stay: `std` replaces a caption of
one picture as the demo does, `one` does so with one picture per concept, `cor` puts the same wrong caption on every
picture of a concept. The labels only judge. The centroid of a caption's other pictures needs no training: it shows what
redundancy gives away.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import tarfile
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from benchmarks.measuring import on_one_core
from efficientclip.config import load_config
from efficientclip.data.store import PAIR_FILES, Store, finish, write_ids, write_tokens
from efficientclip.data.tokenizer import load_tokenizer
from efficientclip.demo import Concept, Picture, assign_noise
from efficientclip.evaluation.verdicts import separation
from efficientclip.noise_rate import NEGLIGIBLE, CrossFit, read_cross_fit


def demo_pictures(shards: Path) -> list[Picture]:
    """The training pictures with their true captions, without pixels."""
    pictures = []
    for shard in sorted(shards.glob("*.tar")):
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


def noisy_pictures(pictures: list[Picture], kind: str, rate: float, seed: int) -> list[Picture]:
    """`pictures` with round(rate * pairs) wrong captions of `kind`; `one` keeps one picture of each concept."""
    random = np.random.default_rng([seed, 11])
    if kind == "one":
        pictures = [pictures[number] for number in random.permutation(len(pictures))]
        pictures = list({picture.concept.key: picture for picture in pictures}.values())
    if kind != "cor":
        return assign_noise(pictures, rate, seed)
    # Noise on one picture a concept, then copied to its others.
    first = {picture.concept.key: picture for picture in pictures}
    wrong = {picture.concept.key: picture.captions for picture in assign_noise(list(first.values()), rate, seed)}
    return [replace(picture, captions=wrong[picture.concept.key]) for picture in pictures]


def plant(source: Store, pictures: list[Picture], target: Path) -> Store:
    """A copy of the store whose pairs are those of `pictures`; the store's key names a picture."""
    if not target.exists():
        image_of = dict(zip(*(source.pairs()[name].to_pylist() for name in ("key", "image_id")), strict=True))
        pictures = [picture for picture in pictures if f"{picture.style}-{picture.concept.key}" in image_of]
        entries = [(number, entry) for number, picture in enumerate(pictures) for entry in picture.captions]
        texts = sorted({entry["text"] for _, entry in entries})
        number_of = {text: number for number, text in enumerate(texts)}
        caption_ids = np.array([number_of[entry["text"]] for _, entry in entries])
        image_ids = np.array([number for number, _ in entries])
        folder = target.with_name(target.name + ".partial")
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(source.path, folder)
        keys = [f"{picture.style}-{picture.concept.key}" for picture in pictures]
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


def judged(config: Path, store: Store, folder: Path, seed: int, overrides: list[str]) -> CrossFit:
    """The verdicts of `efficientclip cross-fit` on one core, unless they are there already."""
    if not (folder / "cross_fit.parquet").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        given = [f"seed={seed}", "training.threads=1", f"data.store={store.path}", f"confidence.cross_fit={folder}"]
        on_one_core(folder / "log.txt", "cross-fit", str(config), *given, *overrides)
    return read_cross_fit(folder, store)


def dropped(score: np.ndarray[Any, Any], rate: float) -> np.ndarray[Any, Any]:
    """The lowest `rate` of the pairs, bool [pairs]; none below a negligible rate."""
    drop = np.zeros(len(score), bool)
    if rate >= NEGLIGIBLE:
        drop[np.argsort(score, kind="stable")[: round(rate * len(score))]] = True
    return drop


def figures(store: Store, found: CrossFit) -> dict[str, Any]:
    """The estimate against the labels; the centroid drops as many pairs as the estimate says."""
    noise = store.pairs()["noise"].to_numpy(zero_copy_only=False).astype(bool)
    row: dict[str, Any] = {"pairs": len(store), "visits": found.visits, "true": f"{noise.mean():.3f}"}
    row["estimated"] = f"{found.rate:.3f}"
    row["mean p of wrong"] = f"{found.p[noise].mean():.3f}" if noise.any() else ""
    for name, score in (("cross-fit", found.clean_log_odds), ("centroid", centroid_score(store))):
        drop = dropped(score, found.rate)
        row[f"{name} AUC"] = f"{separation(score[~noise], score[noise]):.3f}" if noise.any() else ""
        row[f"{name} noise dropped"] = f"{drop[noise].mean():.3f}" if noise.any() else ""
        row[f"{name} clean dropped"] = f"{drop[~noise].mean():.3f}"
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", help="key=value, for the fold towers")
    parser.add_argument("--shards", type=Path, required=True, help="the demo's training tars: they hold the captions")
    parser.add_argument("--cases", default="std-0,std-0.1,std-0.3,std-0.5,one-0,one-0.3,cor-0.3", help="KIND-RATE,…")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("runs/noise-rate"))
    parser.add_argument("--csv", type=Path)
    given = parser.parse_args()
    config = load_config(given.config, given.overrides)
    if config.data.store is None:
        parser.error("the config names no data.store")
    source, pictures = Store(config.data.store), demo_pictures(given.shards)
    (given.folder / "stores").mkdir(parents=True, exist_ok=True)
    rows = []
    for case in given.cases.split(","):
        kind, rate = case.split("-")
        for seed in range(given.seeds):
            name = f"{case}-{seed}"
            planted = noisy_pictures(pictures, kind, float(rate), seed)
            store = plant(source, planted, given.folder / "stores" / name)
            found = judged(given.config, store, given.folder / name, seed, given.overrides)
            rows.append({"case": name, **figures(store, found), "date": str(date.today())})
            print(rows[-1], flush=True)
    table = Table(*rows[0], title="noise rate, estimated without labels")
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    Console(width=180).print(table)
    if given.csv:
        with given.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
