"""The paper's stack: packed equals padded, CLIP's layers do as in CLIP, and it trains under ZeRO."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModel, CLIPTextConfig

from efficientclip.config import Model, load_config
from efficientclip.data.batches import Segments
from efficientclip.errors import UserError
from efficientclip.model import packed
from efficientclip.model.efficientclip import build_model
from efficientclip.model.published import EfficientCLIPTextConfig, EfficientCLIPTextModel
from tests import tiny
from tests.model import hub
from tests.training.test_parity import train

CLIP = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "max_position_embeddings": 20}
STACK = {"num_hidden_layers": 3, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 60}


@pytest.fixture
def seed() -> int:
    seed = int(np.random.default_rng().integers(2**31))
    print(f"seed {seed}")
    torch.manual_seed(seed)
    return seed


def stack(implementation: str = packed.NAME) -> EfficientCLIPTextModel:
    config = EfficientCLIPTextConfig(**STACK, clip=CLIP)
    model: EfficientCLIPTextModel = AutoModel.from_config(config, attn_implementation=implementation)
    return model


def test_defaults_are_the_published_sizes() -> None:
    config = EfficientCLIPTextConfig()
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (20, 512, 8)
    assert config.intermediate_size == 4 * 512
    clip = config.clip
    assert isinstance(clip, CLIPTextConfig)
    assert (clip.num_hidden_layers, clip.hidden_size, clip.num_attention_heads) == (12, 512, 8)
    assert clip.max_position_embeddings == 77 and clip.hidden_act == "quick_gelu"


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-12)])
def test_packed_equals_padded_in_values_and_gradients(seed: int, dtype: torch.dtype, tolerance: float) -> None:
    one, other = stack().to(dtype), stack("sdpa").to(dtype)
    other.load_state_dict(one.state_dict())
    lengths = torch.tensor([1, 3, 3, 9, 20])
    texts = [torch.randint(0, 60, (int(length),)) for length in lengths]
    cu_seqlens = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32).numpy()
    states = one(
        torch.cat(texts)[None],
        position_ids=torch.cat([torch.arange(length) for length in lengths])[None],
        segments=Segments.of(cu_seqlens),
    ).last_hidden_state[0]
    mask = torch.arange(20) < lengths[:, None]
    ids = torch.zeros(len(texts), 20, dtype=torch.long)
    ids[mask] = torch.cat(texts)
    padded_states = other(ids, attention_mask=mask.long()).last_hidden_state[mask]
    in_a_row, padded = F.normalize(states, dim=-1), F.normalize(padded_states, dim=-1)
    torch.testing.assert_close(in_a_row, padded, rtol=0, atol=tolerance)
    slope = torch.randn_like(padded)
    (in_a_row * slope).sum().backward()
    (padded * slope).sum().backward()
    gradients = [torch.cat([p.grad.flatten() for p in model.parameters()]) for model in (one, other)]
    assert float((gradients[0] - gradients[1]).norm() / gradients[1].norm()) <= tolerance
    assert float((gradients[0] - gradients[1]).abs().max() / gradients[1].abs().max()) <= tolerance


def test_new_layers_look_both_ways_and_clips_only_back(seed: int) -> None:
    model = stack("sdpa").eval()
    ids = torch.randint(0, 60, (1, 8))
    changed = ids.clone()
    changed[0, -1] = (ids[0, -1] + 1) % 60

    def differ(with_new_layers: bool) -> torch.Tensor:
        kept = model.layers
        model.layers = kept if with_new_layers else torch.nn.ModuleList()
        states = [model(each).last_hidden_state[0] for each in (ids, changed)]
        model.layers = kept
        return (states[0] - states[1]).abs().amax(1)

    assert (differ(True) > 1e-6).all()
    assert (differ(False)[:-1] == 0).all() and differ(False)[-1] > 1e-4


def settings(**text: Any) -> Model:
    architecture = {"model_type": "efficientclip_text", "hidden_size": 32, "num_hidden_layers": 0}
    return Model.model_validate(
        {"width": tiny.WIDTH, "text_tower": {"architecture": architecture, "pooling": "last", **text}}
    )


@pytest.mark.parametrize("saved", [hub.clip, hub.clip_text])
def test_clips_layers_and_projection_come_from_a_folder(tmp_path: Path, seed: int, saved: Any) -> None:
    clip = saved(tmp_path / "clip")
    model = build_model(settings(clip_layers=str(tmp_path / "clip")), seed=0, vocabulary=58, sides=("text",)).eval()
    assert model.text is not None
    # Without new layers, and with CLIP's own token embedding, the stack is CLIP.
    embedding: Any = model.text.backbone.get_input_embeddings()
    embedding.load_state_dict(clip.text_model.embeddings.token_embedding.state_dict())
    ids = torch.randint(0, 56, (4, 9))
    ids[:, -1] = 57
    ids[2, 5:] = 57
    mask = torch.ones_like(ids)
    mask[2, 6:] = 0
    with torch.no_grad():
        states = clip.text_model(input_ids=ids, attention_mask=mask).pooler_output
        expected = F.normalize(clip.text_projection(states), dim=-1)
    torch.testing.assert_close(model.get_text_features(ids, mask), expected, rtol=0, atol=2e-6)


def test_the_stack_has_clips_positions() -> None:
    model = settings(architecture={"model_type": "efficientclip_text", **STACK, "clip": CLIP})
    tower = build_model(model, seed=0, vocabulary=None, sides=("text",)).text
    assert tower is not None and tower.positions == CLIP["max_position_embeddings"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pooling": "cls"}, "set `pooling: last`"),
        ({"clip_layers": "x", "architecture": {"model_type": "bert"}}, "`clip_layers` needs"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings(**changes)


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    hub.clip(tmp_path / "clip")
    hub.bert(tmp_path / "bert")

    def build(model: Model) -> None:
        build_model(model, seed=0, vocabulary=58, sides=("text",))

    wider = {"model_type": "efficientclip_text", "hidden_size": 64, "num_hidden_layers": 0}
    clip = str(tmp_path / "clip")
    for model, message in (
        (settings(clip_layers=str(tmp_path / "bert")), r"clip_layers: .*bert is a bert; a CLIP is wanted"),
        (settings(clip_layers=str(tmp_path / "none")), r"clip_layers: .*none' is no model folder"),
        (settings(clip_layers=clip, architecture=wider), r"hidden_size is 64, but CLIP's layers are 32 wide"),
        (settings(clip_layers=clip).model_copy(update={"width": 8}), r"model.text_tower: .*set model.width to 16"),
    ):
        with pytest.raises(UserError, match=message):
            build(model)


def test_shards_and_micro_batches_train_as_one_rank(tmp_path: Path) -> None:
    tiny.pair_store(tmp_path / "store")
    tiny.text_store(tmp_path / "texts")
    stack = {name: value for name, value in STACK.items() if name != "vocab_size"}
    clip = {**CLIP, "max_position_embeddings": 64}
    tower = {"architecture": {"model_type": "efficientclip_text", **stack, "clip": clip}}
    changes = {"model__text_tower": {**tower, "pooling": "last"}, "training__pair_visits": 160}
    gradients, losses = train(tmp_path, "alone", 1, 0, **changes)
    sharded, again = train(tmp_path, "zero3", 2, 3, training__micro_batch_size=8, **changes)
    model = build_model(load_config(tmp_path / "zero3" / "config.yaml").model, seed=0, vocabulary=45, sides=("text",))
    assert gradients.keys() == sharded.keys() == {name for name, _ in model.named_parameters()}
    whole = torch.cat([gradient.flatten() for gradient in gradients.values()])
    difference = torch.cat([(gradients[name] - sharded[name]).flatten() for name in gradients])
    assert float(difference.norm() / whole.norm()) <= 2e-6
    # Queries and keys get ten-thousandths of the gradient, and their rounding shows; a key's bias truly gets none.
    names = [name for name in gradients if not name.endswith("k_proj.bias")]
    assert max(float((gradients[n] - sharded[n]).norm() / gradients[n].norm()) for n in names) <= 1e-4
    assert losses == pytest.approx(again, rel=1e-4) and len(losses) == 5
