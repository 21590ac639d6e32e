"""Batches are functions of seed, epoch and step; ranks cut the same global batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import BertModel

from efficientclip.config import Model, TextTower
from efficientclip.data.batches import (
    Bank,
    CaptionPairs,
    EpochPlan,
    FrozenTable,
    MaskedTextBatches,
    pack,
    packed_inputs,
)
from efficientclip.data.store import Store, TextStore
from efficientclip.errors import UserError
from efficientclip.model.efficientclip import build_model
from tests import tiny


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tiny.pair_store(tmp_path_factory.mktemp("batches") / "store"))


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> TextStore:
    return TextStore(tiny.text_store(tmp_path_factory.mktemp("batches") / "texts"))


def plan(kept: np.ndarray, epoch: int = 0, share: float = 0.1) -> EpochPlan:  # type: ignore[type-arg]
    return EpochPlan(kept=kept, batch_size=20, reaudition_share=share, seed=3, epoch=epoch)


def test_an_epoch_visits_kept_pairs_once_and_auditions_dropped_ones_at_weight_zero() -> None:
    kept = np.random.default_rng(0).random(500) < 0.7
    epoch = plan(kept)
    batches = [epoch.batch(step) for step in range(epoch.steps)]
    trained = np.concatenate([b.rows_N[b.weights_N == 1] for b in batches])
    again = np.concatenate([b.rows_N[b.weights_N == 0] for b in batches])
    assert len(set(trained)) == len(trained) > kept.sum() - 20 and kept[trained].all()
    assert len(again) == 2 * epoch.steps and not kept[again].any() and len(set(again)) == len(again)
    other = plan(kept, epoch=1).batch(0).rows_N
    assert not np.array_equal(other, batches[0].rows_N)
    np.testing.assert_array_equal(plan(kept).batch(0).rows_N, batches[0].rows_N)


def test_a_batch_larger_than_what_is_left_is_a_clear_error() -> None:
    with pytest.raises(UserError, match=r"training\.batch_size: 20 pairs, but only 5 are left"):
        plan(np.arange(500) < 5)


def test_packed_rows_equal_padded_ones_and_hold_no_padding(store: Store) -> None:
    shape = {"model_type": "bert", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    tower = TextTower(pretrained=None, architecture=shape | {"intermediate_size": 64, "max_position_embeddings": 64})
    model = build_model(Model(width=tiny.WIDTH, text_tower=tower), seed=0, vocabulary=100, sides=("text",)).eval()
    assert model.text is not None
    ids = np.random.default_rng(0).permutation(len(store.offsets) - 1)[:30]
    packed = pack(store, ids, 77)
    assert len(packed.input_ids) == (store.offsets[ids + 1] - store.offsets[ids]).sum()
    with torch.no_grad():
        features = model(**packed_inputs(packed))["features"]
        padded = BertModel(model.text.backbone.config, add_pooling_layer=False).eval()
        padded.load_state_dict(model.text.backbone.state_dict())
        padded.set_attn_implementation("eager")
        rows = [torch.from_numpy(store.tokens[store.offsets[i] : store.offsets[i + 1]].astype(np.int64)) for i in ids]
        batch = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(r) for r in rows], batch_first=True)
        states = padded(input_ids=batch, attention_mask=mask).last_hidden_state[:, 0]
        expected = torch.nn.functional.normalize(model.text.projection(states), dim=-1)
    torch.testing.assert_close(features, expected, atol=2e-6, rtol=1e-5)


def test_ranks_cut_the_same_batch_and_exclude_every_edge(store: Store, texts: TextStore) -> None:
    masked = MaskedTextBatches(texts, texts_per_batch=7, mask_share=0.15, max_tokens=40, seed=0)
    source = CaptionPairs(store, max_tokens=77, masked_texts=masked)
    whole = EpochPlan(kept=np.ones(len(store), bool), batch_size=32, reaudition_share=0, seed=0, epoch=0).batch(0)
    edges = set(zip(store.caption_ids.tolist(), store.image_ids.tolist(), strict=True))
    bank = Bank(FrozenTable(store.features), 24, 0)
    found, masks = [], 0
    for rank in range(2):
        part = source.batch(whole, bank, 0, rank, 2)
        columns = np.concatenate([store.image_ids[whole.rows_N], bank.outside(store.image_ids[whole.rows_N])[0]])
        rows_M = whole.rows_N[rank * 16 : rank * 16 + 16]
        expected = {
            (i, j)
            for i, row in enumerate(rows_M)
            for j, image in enumerate(columns)
            if (int(store.caption_ids[row]), int(image)) in edges and j != i + rank * 16
        }
        assert set(zip(*(part.excluded[0].tolist(), part.excluded[1].tolist()), strict=True)) == expected
        found.append(part.frozen_MD)
        masks += part.masked
    alone = source.batch(whole, bank, 0, 0, 1)
    torch.testing.assert_close(torch.cat(found), alone.frozen_MD)
    assert masks == alone.masked


def test_masks_choose_ordinary_tokens_and_follow_the_text(texts: TextStore) -> None:
    batches = MaskedTextBatches(texts, texts_per_batch=30, mask_share=0.15, max_tokens=40, seed=0)
    one, again = batches.batch(1, 0, 1), batches.batch(1, 0, 1)
    torch.testing.assert_close(one.packed.input_ids, again.packed.input_ids)
    assert not np.isin(one.labels.numpy(), texts.manifest["special_tokens"]).any()
    masked = one.packed.input_ids[one.positions] == texts.manifest["mask_token"]
    assert 0.6 < masked.float().mean() < 0.95
    other = MaskedTextBatches(texts, texts_per_batch=30, mask_share=0.15, max_tokens=40, seed=1).batch(1, 0, 1)
    assert one.labels.tolist() != other.labels.tolist()


def test_bank_holds_no_row_twice_and_comes_back_from_its_integers(store: Store) -> None:
    table = FrozenTable(store.features)
    bank = Bank(table, 24, 0)
    random = np.random.default_rng(0)
    for _ in range(20):
        batch = random.integers(0, len(table), 16)
        ids, features = bank.outside(batch)
        assert not np.isin(ids, batch).any() and features is not None
        torch.testing.assert_close(features, table.rows(ids))
        bank.push(batch)
        assert len(set(bank.ids.tolist())) == 24
    other = Bank(table, 24, 5)
    other.restore(bank.state())
    torch.testing.assert_close(other.features_QD, bank.features_QD)
