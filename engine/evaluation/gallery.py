"""Pictures for the report: what queries find, and which pairs ECL believes or not."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc
from markupsafe import Markup
from PIL import Image

from ..data.store import Store
from ..objectives.retrieval import best_ranks
from .run import Run
from .search import SHOWN, nearest, pairs_by, square_picture
from .verdicts import Verdicts

EDGE = 160
QUERIES = 24
FREE_QUERIES = ["一只戴帽子的猫", "红色的水果", "在下雨", "开心的人", "交通工具", "海里的动物"]
FOUND, FREELY_FOUND = 3, 6
CAPTIONS = 3
SUREST = 24


@dataclass(frozen=True)
class Card:
    """A picture as data URI (None where a pair has only text), the text below it, and whether it is right."""

    picture: str | None
    text: str
    note: str
    right: bool | None
    history: Markup | None = None
    row: int | None = None  # of the pair, where a person may mark it


@dataclass(frozen=True)
class Answers:
    """The best pictures for one query; `rank` is that of its best right answer, None where none is known."""

    query: str
    rank: float | None
    cards: list[Card]


@dataclass(frozen=True)
class Shown:
    """What a page shows of a set: queries of its captions, free ones, and pictures with the nearest captions."""

    queries: list[Answers]
    free: list[Answers]
    pictures: list[Card]


def has_pictures(store: Store) -> bool:
    """False for a store of parallel text."""
    return bool(pc.all(pc.greater(store.pairs(columns=["length"])["length"], 0)).as_py())


def caption_queries(store: Store, text_KD: npt.NDArray[np.float32]) -> list[Answers]:
    """Every k-th caption of the store as query: hits and misses as they come."""
    ids = _every_kth(len(text_KD))
    found = pairs_by(store, "caption_id", ids, most=1)
    queries = [found[caption][0]["caption"] for caption in ids.tolist()]
    indptr, images = store.caption_edges
    right = [images[indptr[caption] : indptr[caption + 1]] for caption in ids]
    text_QD = text_KD[ids]
    positives = np.cumsum([0, *map(len, right)], dtype=np.int64), np.concatenate(right)
    ranks = best_ranks(text_QD, store.features, positives)
    return [
        Answers(query, float(rank), cards)
        for query, rank, cards in zip(queries, ranks, _found(store, text_QD, FOUND, right), strict=True)
    ]


def free_queries(run: Run, store: Store) -> list[Answers]:
    """Texts that are nobody's caption: no right answer is known."""
    cards = _found(store, run.encode_texts(FREE_QUERIES), FREELY_FOUND, None)
    return [Answers(query, None, row) for query, row in zip(FREE_QUERIES, cards, strict=True)]


def named_pictures(store: Store, names: Store, name_KD: npt.NDArray[np.float32]) -> list[Card]:
    """Every k-th picture of the store with the nearest captions of `names`, whose features are `name_KD`."""
    ids = _every_kth(len(store.features))
    scores_QT, captions_QT = nearest(name_KD, store.features[ids].astype(np.float32), CAPTIONS)
    pictures = pairs_by(store, "image_id", ids, most=1)
    captions = pairs_by(names, "caption_id", captions_QT, most=1)
    return [
        Card(
            _data_uri(pictures[image][0]),
            "、".join(captions[caption][0]["caption"] for caption in nearest_T),
            " · ".join(f"{score:.2f}" for score in scores_T),
            None,
        )
        for image, nearest_T, scores_T in zip(ids.tolist(), captions_QT.tolist(), scores_QT, strict=True)
    ]


def _every_kth(count: int) -> npt.NDArray[np.int64]:
    step = max(count // QUERIES, 1)
    return np.arange(step // 2, count, step)[:QUERIES]


def surest_pairs(verdicts: Verdicts, store: Store, *, kept: bool) -> list[Card]:
    """The pairs that ECL is surest to keep, or to drop."""
    rows = verdicts.surest(kept=kept, count=SUREST)
    pairs = store.pairs(rows, SHOWN).to_pylist()
    return [judged_card(pair, verdicts, row) for row, pair in zip(rows.tolist(), pairs, strict=True)]


def judged_card(pair: dict[str, Any], verdicts: Verdicts, row: int, edge: int = EDGE) -> Card:
    """A row of the pair table and its score; `right` is False where the store's label says that ECL was mistaken."""
    note, right = f"{verdicts.score[row]:+.2f}", None
    if verdicts.noise is not None:
        note += " · wrong" if verdicts.noise[row] else " · right"
        right = bool(verdicts.noise[row] != verdicts.kept[row])
    return Card(_data_uri(pair, edge) if pair["length"] else None, pair["caption"], note, right)


def _found(
    store: Store, text_QD: npt.NDArray[np.float32], top: int, right: Sequence[npt.NDArray[np.int32]] | None
) -> list[list[Card]]:
    scores_QT, ids_QT = nearest(store.features, text_QD, top)
    pairs = pairs_by(store, "image_id", ids_QT, most=CAPTIONS)

    def card(query: int, image: int, score: float) -> Card:
        captions = "、".join([pair["caption"] for pair in pairs[image]])
        is_right = None if right is None else image in right[query]
        note = f"✓ {score:.3f}" if is_right else f"{score:.3f}"
        return Card(_data_uri(pairs[image][0]), captions, note, is_right)

    return [
        [card(query, image, score) for image, score in zip(ids, scores, strict=True)]
        for query, (ids, scores) in enumerate(zip(ids_QT.tolist(), scores_QT.tolist(), strict=True))
    ]


def _data_uri(pair: dict[str, Any], edge: int = EDGE) -> str:
    encoded = io.BytesIO()
    Image.fromarray(square_picture(pair, edge)).save(encoded, format="webp", quality=88)
    return f"data:image/webp;base64,{base64.b64encode(encoded.getvalue()).decode()}"
