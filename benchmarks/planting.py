"""Wrong captions, planted in pairs that are right: whatever is no caption of what a picture shows is wrong on it.

`random` draws a caption from all others, `permute` exchanges those of a share of the pairs among themselves ("Learning
with Noisy Correspondence"; what comes back right by chance is right). The others need the demo's concepts: `category`
draws from the same subgroup of emoji, `noun` from the concepts that share one of the English names and keywords
(after LEMoN's kinds), `near` from the NEIGHBOURS concepts whose pictures are most alike. `one` is `random` with one
picture a concept, `cor` puts the same wrong caption on all pictures of a concept, `source` spares all sources but one,
`rare` all but a little one of RARE pairs, which is made of pictures of that one. A rate is always one of all pairs.
"""

from __future__ import annotations

import json
import shutil
import tarfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from efficientclip.data.store import PAIR_FILES, Store
from efficientclip.data.tokenizer import load_tokenizer
from efficientclip.demo.concepts import Concept, Picture
from efficientclip.prepare.writer import finish, write_ids, write_tokens

NOISY_SOURCE, NEIGHBOURS, TRIES, RARE = "twitter", 10, 64, 2000

Random = np.random.Generator


@dataclass(frozen=True)
class Pairs:
    """Pairs of a store, by row: image id, caption, source, and what the picture shows: a concept of the demo's
    `concepts`, or itself alone."""

    store: Store
    images: Sequence[int]
    captions: Sequence[str]
    sources: Sequence[str]
    shows: Sequence[str]
    concepts: Mapping[str, Concept] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.images)

    def only(self, rows: Iterable[int]) -> Pairs:
        """Those rows, in their order."""
        names, kept = ("images", "captions", "sources", "shows"), list(rows)
        return replace(self, **{name: [getattr(self, name)[row] for row in kept] for name in names})

    @cached_property
    def captions_of(self) -> dict[str, set[str]]:
        """By what is shown."""
        found = defaultdict(set)
        for shown, caption in zip(self.shows, self.captions, strict=True):
            found[shown].add(caption)
        return found


def pairs_of_store(store: Store) -> Pairs:
    """Those of a store whose captions are held to be right; a picture shows what no other one does."""
    table = store.pairs(columns=["caption", "source"])
    captions, sources = (table[name].to_pylist() for name in ("caption", "source"))
    return Pairs(store, store.image_ids.tolist(), captions, sources, list(map(str, store.image_ids)))


def pairs_of_demo(store: Store, shards: Iterable[Path]) -> Pairs:
    """Those of the demo's store with the captions that its shards hold to be right; equal pictures are one."""
    image_of = dict(zip(*(store.pairs()[name].to_pylist() for name in ("key", "image_id")), strict=True))
    rows: dict[tuple[int, str], tuple[str, str]] = {}
    concepts = {}
    for picture in demo_pictures(shards):
        concepts[picture.concept.key] = picture.concept
        if (image := image_of.get(f"{picture.style}-{picture.concept.key}")) is not None:
            for caption in picture.concept.chinese:
                rows.setdefault((image, caption), (picture.style, picture.concept.key))
    images, captions = zip(*rows, strict=True)
    sources, shows = zip(*rows.values(), strict=True)
    return Pairs(store, images, captions, sources, shows, concepts)


def demo_pictures(shards: Iterable[Path]) -> list[Picture]:
    """The pictures in tars of the demo's data with their right captions, without pixels."""
    pictures = []
    for shard in shards:
        with tarfile.open(shard) as tar:
            for member in tar:
                stream = tar.extractfile(member)
                if member.name.endswith(".json") and stream is not None:
                    record = json.load(stream)
                    right = tuple(entry.get("original", entry["text"]) for entry in record["captions"])
                    concept = Concept(record["concept"], right, tuple(record["captions_en"]), record["subgroup"])
                    pictures.append(Picture(concept, record["source"], b""))
    return sorted(pictures, key=lambda picture: (picture.concept.key, picture.style))


def some_pictures(pairs: Pairs, count: int, seed: int) -> Pairs:
    """The pairs of pictures drawn at random, `count` of them or as many as there are, and those of the last picture."""
    return pairs.only(of_some(np.array(pairs.images), count, np.random.default_rng([seed, 21])).tolist())


def of_some(images: npt.NDArray[np.int64], count: int, random: Random) -> npt.NDArray[np.int64]:
    """Places of pictures drawn at random, `count` or all, and those of the last picture."""
    order = random.permutation(np.unique(images))
    enough = np.searchsorted(np.cumsum(np.bincount(images)[order]), count) + 1
    return np.flatnonzero(np.isin(images, order[:enough]))


def planted(right: Pairs, kind: str, rate: float, seed: int) -> tuple[Pairs, npt.NDArray[np.bool_]]:
    """The pairs with a share of `rate` wrong captions, as far as `kind` has any, each once; and which are wrong."""
    pairs = KINDS[kind](right, rate, np.random.default_rng([seed, 11]))
    first = {edge: row for row, edge in reversed([*enumerate(zip(pairs.images, pairs.captions, strict=True))])}
    pairs = pairs.only(sorted(first.values()))
    of_pictures = {*zip(right.images, right.captions, strict=True)}
    rows = zip(pairs.images, pairs.captions, pairs.shows, strict=True)
    return pairs, np.array(
        [text not in right.captions_of[shown] and (image, text) not in of_pictures for image, text, shown in rows]
    )


def replaced(
    pairs: Pairs,
    rate: float,
    random: Random,
    *,
    units: Iterable[Sequence[int]] | None = None,
    donors: Mapping[str, Iterable[str]] | None = None,
) -> Pairs:
    """A share of `rate` of the pairs with a caption that neither what is shown nor the picture has.

    The rows of a unit (by default a pair each) get the same one. It is drawn from the captions of all that is shown, or
    of the `donors` of what a picture shows; where these have none that is free, the pair stays.
    """
    every = sorted(pairs.captions_of)
    pools: dict[str | None, list[str]] = {}

    def pool(shown: str | None) -> list[str]:
        if shown not in pools:
            of = every if shown is None or donors is None else sorted(donors[shown])
            pools[shown] = [caption for one in of for caption in sorted(pairs.captions_of[one])]
        return pools[shown]

    held = defaultdict(set)
    for image, caption in zip(pairs.images, pairs.captions, strict=True):
        held[image].add(caption)
    captions, left = list(pairs.captions), round(rate * len(pairs))
    parts = [[row] for row in range(len(pairs))] if units is None else [*units]
    for part in random.permutation(len(parts)).tolist():
        rows = parts[part]
        if left < len(rows):
            break
        shown = pairs.shows[rows[0]]
        drawn = pool(None if donors is None else shown)
        taken = pairs.captions_of[shown].union(*(held[pairs.images[row]] for row in rows))
        tries = random.choice(len(drawn), min(TRIES, len(drawn)), replace=False)
        wrong = next((drawn[number] for number in tries if drawn[number] not in taken), None)
        if wrong is not None:
            left -= len(rows)
            for row in rows:
                captions[row] = wrong
                held[pairs.images[row]].add(wrong)
    return replace(pairs, captions=captions)


def exchanged(pairs: Pairs, rate: float, random: Random) -> Pairs:
    """The captions of a share of `rate` of the pairs, exchanged among these."""
    rows = random.permutation(len(pairs))[: round(rate * len(pairs))]
    captions = np.array(pairs.captions, object)
    captions[rows] = captions[random.permutation(rows)]
    return replace(pairs, captions=captions.tolist())


def one_picture(pairs: Pairs, random: Random) -> Pairs:
    """The pairs of one picture of all that show the same."""
    order = random.permutation(len(pairs)).tolist()
    kept = {pairs.shows[row]: pairs.images[row] for row in order}
    return pairs.only(row for row in range(len(pairs)) if kept[pairs.shows[row]] == pairs.images[row])


def same_caption(pairs: Pairs) -> Iterable[Sequence[int]]:
    """Rows that have the same caption of the same thing."""
    found = defaultdict(list)
    for row, edge in enumerate(zip(pairs.shows, pairs.captions, strict=True)):
        found[edge].append(row)
    return found.values()


def of_source(pairs: Pairs, name: str) -> npt.NDArray[np.int64]:
    return np.flatnonzero(np.array(pairs.sources) == name)


def with_rare_source(pairs: Pairs, random: Random) -> Pairs:
    """RARE pairs of NOISY_SOURCE, those of pictures drawn at random, as a source of their own."""
    rows = of_source(pairs, NOISY_SOURCE)
    sources = np.array(pairs.sources, object)
    sources[rows[of_some(np.array(pairs.images)[rows], RARE, random)]] = "rare"
    return replace(pairs, sources=sources.tolist())


def in_source(pairs: Pairs, name: str, rate: float, random: Random) -> Pairs:
    """`replaced`, of a source's pairs alone."""
    return replaced(pairs, rate, random, units=of_source(pairs, name)[:, None].tolist())


def sharing(pairs: Pairs, traits: Callable[[Concept], Iterable[str]]) -> dict[str, set[str]]:
    """By concept: the others that have a trait in common with it."""
    have = defaultdict(set)
    for key in pairs.captions_of:
        for trait in traits(pairs.concepts[key]):
            have[trait].add(key)
    return {key: set().union(*(have[one] for one in traits(pairs.concepts[key]))) - {key} for key in pairs.captions_of}


def nearest(pairs: Pairs) -> dict[str, set[str]]:
    """By what is shown: the NEIGHBOURS whose pictures' mean feature is most like its own."""
    every = sorted(pairs.captions_of)
    number = {shown: n for n, shown in enumerate(every)}
    mean_CD = np.zeros((len(every), pairs.store.width))
    for shown, image in dict.fromkeys(zip(pairs.shows, pairs.images, strict=True)):
        mean_CD[number[shown]] += pairs.store.features[image]
    mean_CD /= np.maximum(np.linalg.norm(mean_CD, axis=1, keepdims=True), 1e-6)
    order_CN = np.argsort(-(mean_CD @ mean_CD.T), axis=1)[:, 1 : NEIGHBOURS + 1]
    return {shown: {every[n] for n in order_N} for shown, order_N in zip(every, order_CN, strict=True)}


OF_ANY_STORE: dict[str, Callable[[Pairs, float, Random], Pairs]] = {"random": replaced, "permute": exchanged}
KINDS = OF_ANY_STORE | {
    "category": lambda pairs, rate, random: replaced(
        pairs, rate, random, donors=sharing(pairs, lambda concept: [concept.subgroup])
    ),
    "noun": lambda pairs, rate, random: replaced(
        pairs, rate, random, donors=sharing(pairs, lambda concept: concept.english)
    ),
    "near": lambda pairs, rate, random: replaced(pairs, rate, random, donors=nearest(pairs)),
    "one": lambda pairs, rate, random: replaced(one_picture(pairs, random), rate, random),
    "cor": lambda pairs, rate, random: replaced(pairs, rate, random, units=same_caption(pairs)),
    "source": lambda pairs, rate, random: in_source(pairs, NOISY_SOURCE, rate, random),
    "rare": lambda pairs, rate, random: in_source(with_rare_source(pairs, random), "rare", rate, random),
}


def write_store(pairs: Pairs, wrong: npt.NDArray[np.bool_], target: Path) -> Store:
    """A store of the pairs beside the features of theirs, labelled, unless it is there."""
    if not target.exists():
        source = pairs.store
        texts = sorted(set(pairs.captions))
        number = {text: n for n, text in enumerate(texts)}
        image_ids, caption_ids = np.array(pairs.images), np.array([number[text] for text in pairs.captions])
        folder = target.with_name(target.name + ".partial")
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(source.path, folder)
        tokenizer = load_tokenizer(source.path / "tokenizer")
        write_tokens(folder, tokenizer(texts)["input_ids"], np.dtype(source.manifest["token_dtype"]))
        write_ids(folder, image_ids, caption_ids, len(texts))
        names = ("key", "shard", "offset", "length")
        place_of: dict[int, dict[str, Any]] = dict(
            zip(source.image_ids.tolist(), source.pairs(columns=names).to_pylist(), strict=True)
        )
        columns = {name: [place_of[image][name] for image in pairs.images] for name in names}
        columns |= {
            "caption": pairs.captions,
            "source": pairs.sources,
            "image_id": pa.array(image_ids, pa.int32()),
            "caption_id": pa.array(caption_ids, pa.int32()),
            "noise": wrong,
        }
        pq.write_table(pa.table(columns), folder / "pairs.parquet")
        manifest = {key: value for key, value in source.manifest.items() if key not in ("files", "format")}
        finish(folder, target, manifest | {"pairs": len(pairs), "captions": len(texts)}, PAIR_FILES)
    return Store(target)
