"""`efficientclip search RUN QUERY`: the pictures that a trained run finds for a text."""

from __future__ import annotations

import io
import re
import sys
import textwrap
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findSystemFonts
from matplotlib.ft2font import FT2Font
from rich.table import Table
from rich.text import Text

from efficientclip.kernels import top_k

from .. import __version__
from ..data.cache import Cache
from ..data.pictures import decode_square
from ..data.shards import read_picture
from ..data.sources import Source, open_pictures
from ..data.store import Store
from ..data.tables import USUAL, Columns
from ..errors import UserError, tell
from ..files.atomic import write_atomically
from ..files.ownership import MADE_BY
from ..files.places import Location, location
from ..objectives.retrieval import Features, read_only
from ..prepare.parts import digest
from .run import Run, is_store, left_out, open_data, open_run

COLUMNS = 5
EDGE = 256
CAPTION_LINE, CAPTION_LINES = 14, 2
IDS_AT_ONCE = 1 << 22
# Columns of the pair table that tell a pair and lead to its picture.
SHOWN = ("key", "caption", "shard", "offset", "length")


@dataclass(frozen=True)
class Match:
    """One found image: `captions` are all that its pairs carry, `pixels` RGB uint8 [EDGE, EDGE, 3]."""

    score: float
    key: str
    captions: list[str]
    pixels: npt.NDArray[np.uint8]


def search(
    run: Path,
    query: str,
    data: Location | None,
    top: int,
    store: Path | None = None,
    images: Location | None = None,
    columns: Columns = USUAL,
) -> list[Match]:
    """The `top` images nearest to `query`, best first; by default from the run's training store.

    `data` is a store, tars, or what `open_pictures` reads: captions are shown where there are some.
    """
    opened = open_run(run, store)
    if data is not None and not is_store(data):
        source, bad = open_pictures(data, images, columns, Cache.of(opened.config.data)), Counter[str]()
        matches = _nearest_pictures(opened, query, source, bad, top)
        if bad:
            tell(f"notice: source {data}{left_out({'left_out': bad})}")
        return matches
    if images is not None or columns.given:
        raise UserError("--images, --image-column and its like: of pictures that lie in no store; leave them out")
    with open_data(opened, data) as searched:
        scores_1T, ids_1T = nearest(searched.features, opened.encode_texts([query]), top)
        found = pairs_by(searched, "image_id", ids_1T)
        return [
            Match(
                score=float(score),
                key=found[image][0]["key"],
                captions=[pair["caption"] for pair in found[image]],
                pixels=square_picture(found[image][0], EDGE),
            )
            for score, image in zip(scores_1T[0], ids_1T[0].tolist(), strict=True)
        ]


def _nearest_pictures(run: Run, query: str, source: Source, bad: Counter[str], top: int) -> list[Match]:
    """As of a store: equal pictures are one, with the captions of all."""
    known: dict[bytes, dict[str, Any]] = {}
    rows: list[npt.NDArray[np.float16]] = []
    for batch, features_MD in run.encode_source(source, bad, keep_encoded=True):
        for at, key in enumerate(batch.keys):
            place = {"shard": batch.files[at], "offset": batch.offsets[at], "length": batch.lengths[at]}
            one = known.setdefault(digest(batch.encoded[at] or b""), {"key": key, "captions": {}, **place})
            if len(known) > len(rows):
                rows.append(features_MD[at].astype(np.float16))
            one["captions"] |= dict.fromkeys(batch.captions[at])
    found = list(known.values())
    scores_1T, ids_1T = nearest(np.stack(rows), run.encode_texts([query]), top)
    return [
        Match(float(score), found[image]["key"], [*found[image]["captions"]], square_picture(found[image], EDGE))
        for score, image in zip(scores_1T[0], ids_1T[0].tolist(), strict=True)
    ]


def nearest(
    features_KD: Features, query_QD: npt.NDArray[np.float32], top: int
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Cosines [Q, T] and rows [Q, T] of the T = min(top, K) nearest features, best first."""
    try:
        scores, ids = top_k(torch.from_numpy(query_QD), read_only(features_KD), min(top, len(features_KD)))
    except ValueError as error:
        raise UserError(f"search: {error}; the model or the store is broken") from error
    return scores.numpy(), ids.numpy()


def pairs_by(
    store: Store, column: Literal["image_id", "caption_id"], ids: npt.NDArray[np.integer[Any]], most: int | None = None
) -> dict[int, list[dict[str, Any]]]:
    """Pairs that carry one of `ids`, by id: SHOWN of each, in the order of the store; `most` of an id, if given."""
    ids_N = store.image_ids if column == "image_id" else store.caption_ids
    wanted = np.unique(ids)
    parts = (slice(start, start + IDS_AT_ONCE) for start in range(0, len(ids_N), IDS_AT_ONCE))
    rows = np.concatenate([part.start + np.flatnonzero(np.isin(ids_N[part], wanted)) for part in parts])
    rows = rows[np.argsort(ids_N[rows], kind="stable")]
    before = np.arange(len(rows)) - np.searchsorted(ids_N[rows], ids_N[rows])
    rows = rows[before < (len(rows) if most is None else most)]
    found: dict[int, list[dict[str, Any]]] = {}
    for one, pair in zip(ids_N[rows].tolist(), store.pairs(rows, SHOWN).to_pylist(), strict=True):
        found.setdefault(one, []).append(pair)
    return found


def square_picture(pair: dict[str, Any], size: int) -> npt.NDArray[np.uint8]:
    """RGB uint8 [size, size, 3] of a row of the pair table, cut square as the image tower sees it."""
    if not pair["length"]:
        raise UserError(f"pair {pair['key']} of {pair['shard'] or 'the store'}: has no picture, only text")
    encoded = read_picture(location(pair["shard"]), pair["offset"], pair["length"])
    try:
        return decode_square(encoded, size)
    except ValueError as error:
        raise UserError(
            f"shard {pair['shard']}: no picture at byte {pair['offset']} ({error}); the shard changed,"
            " prepare the store anew"
        ) from error


def match_table(matches: Sequence[Match], query: str) -> Table:
    """Matches for the terminal."""
    table = Table(title=Text(query))
    table.add_column("rank", justify="right")
    table.add_column("cosine", justify="right")
    table.add_column("captions", overflow="fold")
    table.add_column("key")
    for rank, match in enumerate(matches, 1):
        table.add_row(str(rank), f"{match.score:.3f}", Text("、".join(match.captions)), Text(match.key))
    return table


def draw_matches(matches: Sequence[Match], query: str, file: Path) -> None:
    """Write the matches as a grid of pictures; without a Chinese font its text is left out, with a notice."""
    font = _chinese_font()
    if font is None:
        print(
            "notice: no Chinese font is installed, so the picture has no Chinese text; Debian has one in the"
            " package fonts-wqy-microhei",
            file=sys.stderr,
        )

    def shown(text: str) -> str:
        # A dollar would start a formula.
        return text.replace("$", r"\$") if font is not None or text.isascii() else ""

    columns = min(COLUMNS, len(matches))
    rows = -(-len(matches) // columns)
    figure = Figure(figsize=(2.1 * max(columns, 3), 2.7 * rows + 0.6), layout="constrained")
    figure.suptitle(shown(query), fontproperties=font, fontsize=16)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for place in axes:
        place.axis("off")
    for place, match in zip(axes, matches, strict=False):
        lines = textwrap.wrap("、".join(match.captions), CAPTION_LINE)
        if len(lines) > CAPTION_LINES:
            lines = [*lines[: CAPTION_LINES - 1], lines[CAPTION_LINES - 1][: CAPTION_LINE - 1] + "…"]
        place.imshow(match.pixels)
        title = "\n".join([f"{match.score:.3f}", *map(shown, lines)])
        place.set_title(title, fontproperties=font, fontsize=9)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120, metadata={"Software": f"{MADE_BY} {__version__}"})
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, picture.getvalue())


def _chinese_font() -> FontProperties | None:
    """A font that has the letter 猫; matplotlib's own list is cached and misses fonts installed later."""
    plain = re.compile(r"(notosans(cjk|sc)|sourcehansans|wqy|pingfang|yahei|msyh|simhei)(?!.*(bold|black|light|thin))")

    def unlikeliness(path: str) -> tuple[bool, str]:
        return plain.search(Path(path).name.lower()) is None, path

    for path in sorted(findSystemFonts(), key=unlikeliness):
        with suppress(RuntimeError):
            if FT2Font(path).get_char_index(ord("猫")):
                return FontProperties(fname=path)
    return None
