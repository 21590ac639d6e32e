"""How near is the estimated noise rate to the planted one, and what does the estimate drop? Beside a caption centroid.

    python benchmarks/noise_rate.py configs/demo.yaml --shards data/demo/train --seeds 3

Wrong captions are planted in the demo's store, whose features stay: `std` replaces a caption of one picture as the
demo does, `one` does so with one picture per concept, `cor` puts the same wrong caption on every picture of a concept.
The labels only judge. The centroid of a caption's other pictures needs no training: it shows what redundancy gives away.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
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

from efficientclip.config import load_config
from efficientclip.confidence import standardised
from efficientclip.data.store import PAIR_FILES, Store, finish, write_ids, write_tokens
from efficientclip.data.tokenizer import load_tokenizer
from efficientclip.demo import Concept, Picture, assign_noise
from efficientclip.evaluation.verdicts import separation
from efficientclip.noise_rate import NEGLIGIBLE, read_cross_fit


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
    """Cosine of each pair's picture to the mean of its caption's other pictures, float64 [pairs]; their mean for none."""
    features = store.features[store.image_ids].astype(np.float64)
    total = np.zeros((len(store.offsets) - 1, store.width))
    np.add.at(total, store.caption_ids, features)
    others = total[store.caption_ids] - features
    length = np.linalg.norm(others, axis=1)
    alone = length < 1e-6
    score = (others * features).sum(1) / np.maximum(length, 1e-6)
    score[alone] = score[~alone].mean()
    return score
