"""`training.recompute`: the same bits from a fraction of the activations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from efficientclip.config import ImageTower, Model, TextTower
from efficientclip.data.batches import Segments
from efficientclip.errors import UserError
from efficientclip.model.efficientclip import build_model
from tests import tiny
from tests.training.launch import metrics, run

SIZES = {"hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 128}
BERT = {"model_type": "bert", "num_hidden_layers": 6, **SIZES}
PUBLISHED = {
    "model_type": "efficientclip_text",
    "num_hidden_layers": 4,
    **SIZES,
    "clip": {"num_hidden_layers": 2, **SIZES},
}


@pytest.mark.parametrize("compute", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("architecture", [BERT, PUBLISHED], ids=["bert", "published"])
def test_the_same_gradients_from_less(architecture: dict[str, Any], compute: torch.dtype | None) -> None:
    tower = TextTower.model_validate({"architecture": architecture, "pooling": "last"})
    bounds, ids = np.arange(0, 401, 10).astype(np.int32), torch.arange(400)
    slope = torch.randn(40, 32)
    found = []
    for again in (False, True):
        model = build_model(Model(width=32, text_tower=tower), seed=0, vocabulary=100, sides=("text",)).train()
        model.compute = compute
        if again:
            model.recompute_layers()
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t.nbytes) or t, lambda t: t):
            output = model(
                input_ids=ids % 100, position_ids=ids % 10, segments=Segments.of(bounds), texts=torch.arange(40)
            )
        (output["features"] * slope).sum().backward()
        gradients = [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
        found.append((sum(kept), torch.cat(gradients)))
    assert torch.equal(found[0][1], found[1][1])
    assert found[1][0] < found[0][0] / 4


@pytest.mark.parametrize("stage", [0, 3])
def test_a_run_learns_the_same(tmp_path: Path, stage: int) -> None:
    tiny.pair_store(tmp_path / "store", pairs=96, images=40)
    tiny.text_store(tmp_path / "texts")
    (tmp_path / "zero.json").write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    given = {"deepspeed": str(tmp_path / "zero.json"), "training__pair_visits": 128}
    for again in (False, True):
        changes = {"run": str(tmp_path / f"run-{again}"), "training__recompute": again}
        run(1, str(tiny.config(tmp_path, **given, **changes)))
    one, other = ([line["loss"] for line in metrics(tmp_path / f"run-{again}")] for again in (False, True))
    assert one == other and len(one) == 4


def test_a_tower_that_cannot_is_refused() -> None:
    tower = ImageTower.model_validate({"architecture": {"model_type": "resnet", "hidden_sizes": [8, 8, 8, 8]}})
    model = build_model(Model(width=8, image_tower=tower), seed=0, vocabulary=None, sides=("image",))
    with pytest.raises(UserError, match=r"training\.recompute: a resnet cannot compute its layers again; remove it"):
        model.recompute_layers()
