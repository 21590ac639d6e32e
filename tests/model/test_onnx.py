"""`export --onnx`: both towers answer in onnxruntime as they do here; what does not leaves no folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ChineseCLIPProcessor

from efficientclip.cli import main
from efficientclip.evaluation.run import open_run
from efficientclip.model import onnx as module
from tests.test_export import STACK, TEXTS, pictures, trained, yaml_tower

REASON = "pip install 'efficientclip[onnx]'"
runtime = pytest.importorskip("onnxruntime", reason=REASON)
pytest.importorskip("onnxscript", reason=REASON)

# Each image tower beside another text tower.
TOWERS: dict[str, tuple[str, dict[str, Any]]] = {
    "Chinese-CLIP": ("clip", {}),
    "EfficientNet-Lite, mean": ("lite", {"pooling": "mean"}),
    "fitted head, RoBERTa": ("fitted", {"model_type": "roberta", "pad_token_id": 0, "type_vocab_size": 1}),
    "ResNet, published": ("resnet", {"architecture": STACK, "pooling": "last"}),
}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(("tower", "text"), TOWERS.values(), ids=TOWERS)
def test_onnxruntime_answers_as_the_run_does(tmp_path: Path, tower: str, text: dict[str, Any]) -> None:
    described = yaml_tower(tmp_path)
    described["architecture"] |= {key: value for key, value in text.items() if key not in ("pooling", "architecture")}
    described |= {key: value for key, value in text.items() if key in ("pooling", "architecture")}
    run, out = trained(tmp_path, tower, model__text_tower=described), tmp_path / "out"
    assert main(["export", str(run), str(out), "--onnx"]) == 0
    assert sorted(path.name for path in (out / "onnx").iterdir()) == ["image.onnx", "text.onnx"]
    sides = {side: runtime.InferenceSession(out / "onnx" / f"{side}.onnx") for side in ("text", "image")}
    processor = ChineseCLIPProcessor.from_pretrained(out)
    opened, squares = open_run(run), pictures()
    tokens = processor(text=TEXTS, padding=True, truncation=True, return_tensors="np")
    pixels = processor(images=[Image.fromarray(square) for square in squares], return_tensors="np")
    asked = {name: tokens[name] for name in ("input_ids", "attention_mask")}
    found_ND, images_ND = sides["text"].run(None, asked)[0], sides["image"].run(None, dict(pixels))[0]
    assert found_ND.dtype == images_ND.dtype == np.float32
    np.testing.assert_allclose(found_ND, opened.encode_texts(TEXTS), rtol=0, atol=1e-5)
    np.testing.assert_allclose(images_ND, opened.frozen.encode(squares), rtol=0, atol=1e-5)
    # One text, as a search asks.
    alone = {name: value[:1, :3] for name, value in asked.items()}
    np.testing.assert_allclose(sides["text"].run(None, alone)[0], found_ND[:1], rtol=0, atol=1e-5)
    # Each holds its own side alone, and no path of this machine.
    sizes = {path.stem: path.stat().st_size for path in (out / "onnx").iterdir()}
    assert sum(sizes.values()) < (out / "model.safetensors").stat().st_size + 100_000
    assert not any(b".py" in path.read_bytes() for path in (out / "onnx").iterdir())
    assert "\nimport onnxruntime\n" in (out / "README.md").read_text() and main(["verify", str(out)]) == 0


def test_a_side_that_answers_otherwise_is_named_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, real = trained(tmp_path, "clip"), module._text

    def otherwise(*given: Any) -> module.Side:
        side = real(*given)
        return replace(side, answer=lambda inputs: side.answer(inputs) + 2e-4)

    monkeypatch.setattr(module, "_text", otherwise)
    assert main(["export", str(run), str(tmp_path / "out"), "--onnx"]) == 2
    assert "error: --onnx: onnxruntime's features of the text tower are up to 0.0002 from" in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_a_side_that_cannot_be_written_is_named_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise torch.onnx.errors.OnnxExporterError("no such operator")

    run = trained(tmp_path, "clip")
    monkeypatch.setattr(torch.onnx, "export", fails)
    assert main(["export", str(run), str(tmp_path / "out"), "--onnx"]) == 2
    assert "error: --onnx: the text tower cannot be written (no such operator); " in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_a_missing_package_is_told_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    assert main(["export", str(tmp_path / "none"), str(tmp_path / "out"), "--onnx"]) == 2
    assert "error: --onnx: onnx is missing; pip install 'efficientclip[onnx]'" in capsys.readouterr().err
