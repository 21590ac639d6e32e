"""Packed rows equal padded ones; the bank and the store's edges give the columns of a batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import BertModel

from efficientclip.config import Model, TextTower
from efficientclip.data.batches import Bank, FrozenTable, pack, packed_inputs
from efficientclip.data.pairs import PairLoader
from efficientclip.data.store import Store
from efficientclip.model.efficientclip import build_model
from tests import tiny


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tiny.pair_store(tmp_path_factory.mktemp("batches") / "store"))


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


def test_bank_adds_its_rows_and_every_edge_is_excluded(store: Store) -> None:
    edges = set(zip(store.caption_ids.tolist(), store.image_ids.tolist(), strict=True))
    bank = Bank(FrozenTable(store.features), 24, 0)
    id_of = {row.tobytes(): number for number, row in enumerate(store.features)}
    before = bank.features_QD.clone()
    for rank in range(2):
        with PairLoader(store, batch_size=32, rank=rank, world_size=2) as loader:
            batch = next(loader)
        bank.add_to(batch, store.caption_edges)
        assert batch.bank_QD is not None and batch.excluded is not None
        # The bank's own memory, in whatever order.
        assert batch.bank_QD.data_ptr() == bank.features_QD.data_ptr()
        outside = [id_of[row.tobytes()] for row in batch.bank_QD.numpy()]
        assert sorted(outside) == sorted(bank.ids[~np.isin(bank.ids, batch.frozen_ids_N)])
        columns = [*store.image_ids[batch.rows_N], *outside]
        expected = {
            (i, j)
            for i, row in enumerate(batch.rows_N[rank * 16 : rank * 16 + 16])
            for j, image in enumerate(columns)
            if (int(store.caption_ids[row]), int(image)) in edges and j != i + rank * 16
        }
        found = list(zip(*(part.tolist() for part in batch.excluded), strict=True))
        assert any(j >= 32 for _, j in expected) and sorted(found) == sorted(expected)
    bank.push(np.empty(0, np.int64), np.empty(0, bool), before[:0])
    assert torch.equal(bank.features_QD, before)


def test_bank_holds_no_row_twice_reads_no_store_and_comes_back_from_its_integers(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = FrozenTable(store.features)
    bank, other = Bank(table, 24, 0), Bank(table, 24, 5)
    random = np.random.default_rng(0)
    with PairLoader(store, batch_size=32) as loader:
        for batch, _ in zip(loader, range(7), strict=False):
            with monkeypatch.context() as patch:
                patch.setattr(FrozenTable, "rows", None)
                bank.add_to(batch, store.caption_edges)
                assert batch.frozen_MD is not None
                trained = random.random(32) < 0.6
                bank.push(batch.frozen_ids_N, trained, batch.frozen_MD)
            assert len(set(bank.ids.tolist())) == 24
            assert np.isin(bank.ids, batch.frozen_ids_N[trained]).any()
            assert torch.equal(bank.features_QD, table.rows(bank.ids))
    other.restore(bank.state())
    assert torch.equal(other.features_QD, bank.features_QD)
    # From here on both do the same.
    for one in (bank, other):
        one.add_to(batch, store.caption_edges)
    assert batch.bank_QD is not None and torch.equal(bank.features_QD, other.features_QD)
