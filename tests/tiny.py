"""Tiny stores and configs that every test builds on the spot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from transformers import BertTokenizer

from efficientclip.data.store import PAIR_FILES, TEXT_FILES, read_manifest, staging
from efficientclip.data.tokenizer import fingerprint
from efficientclip.prepare.writer import finish, token_dtype, write_ids, write_tokens

CHARACTERS = "猫狗鸟鱼红蓝黄绿大小上下天地山水火木金土人手足口目日月星云雨风雪花草树果"
WIDTH = 16


def tokenizer(folder: Path) -> BertTokenizer:
    vocabulary = folder / "vocab.txt"
    if not vocabulary.exists():
        folder.mkdir(parents=True, exist_ok=True)
        vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *CHARACTERS]) + "\n")
    return BertTokenizer(vocab=str(vocabulary))


def pair_store(
    path: Path, *, pairs: int = 240, images: int = 80, seed: int = 0, sources: Sequence[str] = ("tiny",)
) -> Path:
    """A pair store of random captions and features, tower `usem3`; captions recur, a tenth of the pairs is noise, and
    the pairs are of the `sources` in turns."""
    random = np.random.default_rng(seed)
    tokens = tokenizer(path.parent)
    captions = ["".join(random.choice(list(CHARACTERS), random.integers(1, 9))) for _ in range(pairs // 2)]
    captions = list(dict.fromkeys(captions))
    # Every image and every caption stands in a pair.
    chosen = {(number % images, number % len(captions)) for number in range(max(images, len(captions)))}
    while len(chosen) < pairs:
        chosen.add((int(random.integers(images)), int(random.integers(len(captions)))))
    features = random.standard_normal((images, WIDTH))
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    folder = staging(path)
    folder.mkdir(parents=True)
    features.astype(np.float16).tofile(folder / "features.bin")
    write_tokens(folder, tokens(captions)["input_ids"], token_dtype(len(tokens)))
    tokens.save_pretrained(folder / "tokenizer")
    rows = [
        {
            "key": f"pair-{number}",
            "caption": captions[caption],
            "source": sources[number % len(sources)],
            "image_id": image,
            "caption_id": caption,
            "noise": number % 10 == 0,
            "shard": "",
            "offset": 0,
            "length": 0,
        }
        for number, (image, caption) in enumerate(sorted(chosen))
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "pairs.parquet")
    image_ids, caption_ids = np.array(sorted(chosen)).T
    write_ids(folder, image_ids, caption_ids, len(captions))
    manifest = {
        "kind": "pairs",
        "tower": "usem3",
        "tokenizer": fingerprint(tokens),
        "width": WIDTH,
        "pairs": len(rows),
        "images": images,
        "captions": len(captions),
        "token_dtype": "uint16",
        "vocabulary": len(tokens),
    }
    finish(folder, path, manifest, PAIR_FILES)
    return path


def finished_again(path: Path) -> None:
    """Give the changed store at `path` the digests of what it holds now."""
    manifest = read_manifest(path)
    path.rename(staging(path))
    described = {key: value for key, value in manifest.items() if key not in ("format", "files", "sha256")}
    finish(staging(path), path, described, PAIR_FILES if manifest["kind"] == "pairs" else TEXT_FILES)


def text_store(path: Path, *, texts: int = 60, seed: int = 1) -> Path:
    random = np.random.default_rng(seed)
    tokens = tokenizer(path.parent)
    lines = ["".join(random.choice(list(CHARACTERS), random.integers(1, 30))) for _ in range(texts)]
    folder = staging(path)
    folder.mkdir(parents=True)
    write_tokens(folder, tokens(lines)["input_ids"], token_dtype(len(tokens)))
    tokens.save_pretrained(folder / "tokenizer")
    manifest = {
        "kind": "texts",
        "texts": texts,
        "tokenizer": fingerprint(tokens),
        "token_dtype": "uint16",
        "vocabulary": len(tokens),
        "special_tokens": sorted(tokens.all_special_ids),
        "mask_token": tokens.mask_token_id,
    }
    finish(folder, path, manifest, TEXT_FILES)
    return path


def config(folder: Path, **changes: Any) -> Path:
    """A config of a text run over the tiny stores; `changes` are dotted keys with `__` for the dots."""
    tree: dict[str, Any] = {
        "run": str(folder / "run"),
        "data": {"store": str(folder / "store"), "validation": {"held": str(folder / "store")}},
        "model": {
            "width": WIDTH,
            "teacher": {"kind": "usem3"},
            "text_tower": {
                "architecture": {
                    "model_type": "bert",
                    "hidden_size": 32,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 2,
                    "intermediate_size": 64,
                    "max_position_embeddings": 64,
                }
            },
        },
        "objective": {"bank_size": 24},
        "mlm": {"texts": str(folder / "texts"), "texts_per_batch": 7},
        "optimizer": {"lr": 1e-3},
        "training": {
            "pair_visits": 640,
            "batch_size": 32,
            "max_caption_tokens": 64,
            "threads": 1,
            "log_every": 1,
            "checkpoint_every": 5,
            "validate_every": 100,
        },
    }
    for dotted, value in changes.items():
        *path, last = dotted.split("__")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[last] = value
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(tree, allow_unicode=True))
    return file
