"""The distillation start's teacher: CLIP's text embeddings from any folder that holds them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from efficientclip.config import Teacher as Settings
from efficientclip.errors import UserError
from efficientclip.model import teacher
from efficientclip.model.teacher import Teacher
from tests import tiny
from tests.model import hub

TEXTS = ["a cat", "two dogs, one bird", "x", "a very long caption " * 5]


@pytest.mark.parametrize("saved", [hub.clip, hub.clip_text])
def test_a_folder_teaches_its_text_embeddings(tmp_path: Path, saved: Any) -> None:
    torch.manual_seed(0)
    clip = saved(tmp_path)
    tokenizer = hub.clip_tokenizer(tmp_path)
    features = Teacher(Settings(kind="clip", pretrained=str(tmp_path))).encode(TEXTS)
    assert features.shape == (len(TEXTS), tiny.WIDTH) and features.dtype == np.float32
    for text, feature in zip(TEXTS, features, strict=True):
        ids = torch.tensor([tokenizer(text, truncation=True, max_length=20)["input_ids"]])
        with torch.no_grad():
            expected = clip.text_projection(clip.text_model(input_ids=ids).pooler_output)[0]
        np.testing.assert_allclose(feature, expected / expected.norm(), atol=2e-6)


def test_a_text_that_comes_again_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def features(texts: Sequence[str]) -> npt.NDArray[np.float32]:
        asked.extend(texts)
        return np.array([[len(text), 1] for text in texts], np.float32)

    monkeypatch.setattr(teacher, "_usem3", lambda: features)
    rows_ND = Teacher(Settings(kind="usem3")).encode(["ab", "a", "ab", "abc", "a"])
    assert sorted(asked) == ["a", "ab", "abc"]
    np.testing.assert_allclose(rows_ND[:, 0] / rows_ND[:, 1], [2, 1, 2, 3, 1], rtol=1e-6)


def test_folders_that_cannot_teach_are_refused(tmp_path: Path) -> None:
    hub.bert(tmp_path / "bert")
    hub.clip_text(tmp_path / "half").text_model.save_pretrained(tmp_path / "half")
    for name, message in (
        ("bert", "bert is a bert; a CLIP is wanted"),
        ("half", "lacks 1 weights of a CLIP, text_projection.weight"),
        ("none", "none' is no model folder, run or reachable hub id"),
    ):
        with pytest.raises(UserError, match=rf"model\.teacher\.pretrained: .*{message}"):
            Teacher(Settings(kind="clip", pretrained=str(tmp_path / name)))
    hub.clip(tmp_path / "mute")
    with pytest.raises(UserError, match="holds no tokenizer"):
        Teacher(Settings(kind="clip", pretrained=str(tmp_path / "mute")))


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", np.array([1, 2]), np.array([1.0, np.nan], np.float32)])
def test_a_broken_mean_is_refused(tmp_path: Path, content: Any) -> None:
    file = tmp_path / "mean.npy"
    file.write_bytes(content) if isinstance(content, bytes) else np.save(file, content)
    with pytest.raises(UserError, match=rf"model\.teacher\.mean {file}: broken"):
        Teacher(Settings(kind="usem3", mean=file))
