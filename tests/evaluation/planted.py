"""A run whose text features are planted, so that the right answers are known."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from efficientclip.data.pictures import decode_square
from efficientclip.data.store import TextStore
from efficientclip.evaluation.run import Run, open_run

Features = npt.NDArray[np.float32]


def picture_features(run: Path, pictures: list[bytes]) -> Features:
    """What the run's frozen tower makes of the pictures."""
    frozen = open_run(run).frozen
    return frozen.encode([decode_square(picture, frozen.tower.size) for picture in pictures])


def plant(monkeypatch: pytest.MonkeyPatch, feature_of: Callable[[str], Features]) -> None:
    """From now on a run's feature of a text is `feature_of` it, normalised."""

    def encode_texts(run: Run, texts: list[str], *, progress: bool = False) -> Features:
        features_ND = np.stack([feature_of(text) for text in texts]).astype(np.float32)
        normalised: Features = features_ND / np.linalg.norm(features_ND, axis=1, keepdims=True)
        return normalised

    def encode_store(run: Run, texts: TextStore, *, progress: bool = False, out: Features | None = None) -> Features:
        rows = [texts.tokens[begin:end] for begin, end in pairwise(texts.offsets)]
        words = [run.tokenizer.decode(row, skip_special_tokens=True).replace(" ", "") for row in rows]
        found = encode_texts(run, words)
        if out is not None:
            out[:] = found
        return found

    monkeypatch.setattr(Run, "encode_texts", encode_texts)
    monkeypatch.setattr(Run, "encode_store", encode_store)
