"""What a person told of some pairs: which pairs that means, and that every selection obeys it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from efficientclip.config import Confidence
from efficientclip.data.store import Store
from efficientclip.errors import UserError
from efficientclip.noise.by_hand import read_by_hand
from efficientclip.noise.confidence import ConfidenceTable
from efficientclip.noise.cross_fit import CrossFit, write_cross_fit
from tests import tiny

HEADER = "row,key,caption,verdict\n"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tiny.pair_store(tmp_path / "store"))


def rewritten(store: Store, **columns: Any) -> Store:
    """`store` with other columns in its pair table."""
    pairs = store.pairs()
    for name, values in columns.items():
        pairs = pairs.set_column(pairs.column_names.index(name), name, pa.array(values))
    pq.write_table(pairs, store.path / "new")
    (store.path / "new").rename(store.path / "pairs.parquet")
    return store


def written(folder: Path, *lines: str, header: str = HEADER) -> Path:
    file = folder / "verdicts.csv"
    file.write_text(header + "".join(f"{line}\n" for line in lines), encoding="utf-8-sig")
    return file


def test_a_verdict_is_on_every_pair_of_its_key_and_caption(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("efficientclip.data.parquet.ROWS", 50)
    keys, captions = ([pair[name] for pair in store.pairs().to_pylist()] for name in ("key", "caption"))
    captions[7] = captions[207] = '猫, "大"'
    captions[9] = captions[7]
    keys[207] = keys[7]
    rewritten(store, key=keys, caption=captions)
    # Rows of another store; a key that is there with another caption, and the reverse.
    lines = [
        f'0,{keys[7]},"猫, ""大""",wrong',
        f"1,{keys[8]},{captions[8]},right",
        f"2,{keys[8]},无,wrong",
    ]
    found = read_by_hand(written(tmp_path, *lines, f"3,nowhere,{captions[8]},right"), store)
    assert np.flatnonzero(found.of_pairs < 0).tolist() == [7, 207]
    assert np.flatnonzero(found.of_pairs > 0).tolist() == [8]
    assert found.rows == {(keys[7], '猫, "大"'): 7, (keys[8], captions[8]): 8}
    assert str(found) == "1 pairs right, 2 wrong, by 4 verdicts; 2 of the verdicts match no pair of the store"
    # What matches nothing, and a second time, makes no other run; another verdict does.
    spreadsheet = [
        f"{keys[8]};{captions[8]};right;note",
        f'{keys[7]};"猫, ""大""";wrong;',
        f"{keys[8]};{captions[8]};right;",
    ]
    again = read_by_hand(written(tmp_path, *spreadsheet, header="key;caption;verdict;note\n"), store)
    assert again.identity == found.identity and str(again).endswith("by 2 verdicts")
    other = read_by_hand(written(tmp_path, lines[0], lines[1].replace("right", "wrong")), store)
    assert other.identity != found.identity


@pytest.mark.parametrize(
    ("lines", "header", "told"),
    [
        (["1,a,猫,right", "2,b,猫,right", "9,a,猫,wrong"], HEADER, "line 4: pair 'a' with '猫' is wrong, but right by"),
        (["1,a,猫,kept"], HEADER, "line 2: verdict 'kept'; write right or wrong"),
        (["1,a,right"], HEADER, "line 2: more or fewer cells than the header has"),
        (["1,猫,right"], "row,caption,verdict\n", "no column is named key"),
        (["1,a,猫"], "row,key,caption\n", "exactly one must be named verdict"),
        (['1,"a,猫,right'], HEADER, "line 2: unexpected end of data"),
        (None, HEADER, "no such file"),
    ],
    ids=["conflict", "word", "cells", "key", "verdict", "quote", "absent"],
)
def test_what_is_no_list_of_verdicts_is_refused(
    store: Store, tmp_path: Path, lines: list[str] | None, header: str, told: str
) -> None:
    file = tmp_path / "verdicts.csv" if lines is None else written(tmp_path, *lines, header=header)
    with pytest.raises(UserError) as caught:
        read_by_hand(file, store)
    assert str(caught.value).startswith("data.verdicts: ") and str(file) in str(caught.value)
    assert told in str(caught.value)


@pytest.mark.parametrize("rule", get_args(Confidence.model_fields["selection"].annotation))
def test_every_selection_obeys(tmp_path: Path, rule: str) -> None:
    random = np.random.default_rng(0)
    store, score = Store(tiny.pair_store(tmp_path / "store")), random.normal(np.arange(240) >= 60, 0.3)
    evidence = np.where(np.arange(240) >= 60, 1.0, -1.0) + random.normal(0, 0.3, 240)
    write_cross_fit(tmp_path, store, CrossFit(0.25, 7, np.zeros(240, np.int8), evidence, evidence, evidence, evidence))
    by_hand = np.zeros(240, np.int8)
    by_hand[:30:3], by_hand[100:240:20] = 1, -1
    settings = Confidence(selection=rule, cross_fit=tmp_path, warmup_epochs=0, drop_share=0.25, drops=2)
    tables = [ConfidenceTable(240, settings, 10, told) for told in (None, by_hand)]
    trained = [table.kept.copy() for table in tables]
    for epoch in range(4):
        for table in tables:
            # What is wrong is visited by nobody.
            rows = np.flatnonzero(table.kept | (by_hand >= 0))
            table.observe(epoch, rows, score[rows], table.kept[rows])
            table.select(epoch)
            trained.append(table.kept)
    free, obeying = tables
    for kept in trained[1:2] + trained[3::2]:
        assert kept[by_hand > 0].all() and not kept[by_hand < 0].any()
    assert (obeying.dropped_epoch[by_hand < 0] == 0).all() and (obeying.dropped_epoch[by_hand > 0] == -1).all()
    if rule == "none":
        assert obeying.kept.sum() == 240 - 7
        return
    assert not free.kept[by_hand > 0].all() and free.kept[by_hand < 0].any()
    if rule != "mixture":
        # Others go in the place of those that are right.
        shares = {"published": (240 - 7) * 0.75**4, "schedule": (240 - 7) * 0.75**2, "calibrated": 240 - 60 - 7}
        assert obeying.kept.sum() == pytest.approx(shares[rule], abs=2)
    again = ConfidenceTable(240, settings, 10, by_hand)
    again.restore(obeying.state())
    assert (again.kept == obeying.kept).all()


def test_right_pairs_stay_where_more_are_right_than_are_to_be_kept() -> None:
    by_hand = np.ones(100, np.int8)
    by_hand[90:] = 0
    table = ConfidenceTable(100, Confidence(selection="published", warmup_epochs=0, drop_share=0.5), 10, by_hand)
    for epoch in range(3):
        table.observe(epoch, np.arange(100), -by_hand.astype(float), np.ones(100, bool))
        table.select(epoch)
    assert table.kept[:90].all() and not table.kept[90:].any()
