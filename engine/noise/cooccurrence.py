"""What captions say of each other, by the pictures on which they stand together: no tower is asked.

A picture's right captions meet on other pictures of its subject, too. A wrong one comes alone, however near it is: its
other pictures have other captions. Where captions stand on one picture each, or pictures have one caption each, this
tells nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..data.store import edges, ranges
from .answers import MOST_WITNESSES, Floats
from .neighbourhoods import Integers

TIES = 1 << 22  # of a caption to another one of its picture, at a time
OTHERS = np.array([1, 2, 3, 5, 9, 17])  # strata of how many other pictures a caption has
BINS = 8  # of a stratum's pairs
LEAST = 100  # pairs of a stratum, below which it tells nothing


@dataclass(frozen=True)
class Company:
    """Of n captions on a picture each; nothing is known where `witnesses` or `others` is 0."""

    others: Integers  # [n]: other pictures of the caption
    witnesses: Integers  # [n]: captions of the picture that have other pictures
    met: Integers  # [n]: how often the caption stands on its other pictures beside one of them
    lift: Floats  # [n]: mean of log(1 + lift) over them

    @property
    def known(self) -> npt.NDArray[np.bool_]:
        return (self.others > 0) & (self.witnesses > 0)

    def of(self, rows: Integers) -> Company:
        return Company(self.others[rows], self.witnesses[rows], self.met[rows], self.lift[rows])

    def bins(self) -> tuple[Integers, Integers]:
        """Of each pair a bin of like `lift` among those with like `others`, int64 [n], and the stratum of each bin; bin
        0 is for pairs of which nothing is known."""
        bin_N, stratum = np.zeros(len(self.lift), np.int64), [0]
        of = np.where(self.known, np.digitize(self.others, OTHERS), 0)
        for number in range(1, len(OTHERS) + 1):
            rows = np.flatnonzero(of == number)
            if len(rows) < LEAST:
                continue
            bounds = np.unique(np.quantile(self.lift[rows], np.linspace(0, 1, BINS + 1)[1:-1]))
            bin_N[rows] = len(stratum) + np.searchsorted(bounds, self.lift[rows], side="right")
            stratum += [number] * (len(bounds) + 1)
        return bin_N, np.array(stratum)


class Ties:
    """The graph of captions and pictures that pairs are.

    Captions and pictures with more than MOST_WITNESSES ties stand for no subject, and tell nothing.
    """

    def __init__(self, image_ids: Integers, caption_ids: Integers) -> None:
        self.image_ids, self.caption_ids = image_ids, caption_ids
        self._edges = np.unique(_edge(image_ids, caption_ids))
        image_E, caption_E = self._edges & 0xFFFFFFFF, self._edges >> 32
        starts, self._captions = edges(image_E, caption_E, int(image_E.max()) + 1)
        self._starts, self._captions_of = starts[:-1], np.diff(starts)
        self._pictures = np.count_nonzero(self._captions_of)
        self._pictures_of = np.bincount(caption_E)
        self._heard = (self._pictures_of > 1) & (self._pictures_of <= MOST_WITNESSES)
        self._degree = np.where(self._captions_of <= MOST_WITNESSES, self._captions_of, 0)
        # What it takes to see whom a caption meets.
        self._work = np.bincount(caption_E, self._degree[image_E])

    def hold(self, image_ids: Integers, caption_ids: Integers) -> npt.NDArray[np.bool_]:
        """Which of these are pairs."""
        asked = _edge(image_ids, caption_ids)
        return np.asarray(self._edges[np.minimum(np.searchsorted(self._edges, asked), len(self._edges) - 1)] == asked)

    def company(self, on: Integers, named: Integers | None = None) -> Company:
        """The company that the captions of the pairs `on` keep, or that those of the pairs `named` would keep in their
        place, on pictures which have them not.

        lift(t, w) = P(t, w) / (P(t) P(w)), over other pictures (of words: Church and Hanks 1990) than those of the pair
        and of the one that is named.
        """
        images, captions = self.image_ids[on], self.caption_ids[on if named is None else named]
        others = np.where(self._heard[captions], self._pictures_of[captions] - 1, 0)
        n, total = len(on), np.zeros(len(on))
        witnesses, met = np.zeros(n, np.int64), np.zeros(n, np.int64)
        for rows in self._parts(np.flatnonzero(others), images, captions):
            asked = np.unique(captions[rows])
            begin = np.searchsorted(self._edges, asked.astype(np.int64) << 32)
            ties = self._edges[ranges(begin, self._pictures_of[asked])]
            _, pair = self._meetings(ties & 0xFFFFFFFF, ties >> 32)
            meeting, count = np.unique(pair, return_counts=True)
            row, pair = self._meetings(images[rows], captions[rows])
            row, witness, own = rows[row], pair % len(self._heard), True
            if named is not None:
                kept = witness != self.caption_ids[on[row]]
                row, witness, pair = row[kept], witness[kept], pair[kept]
                theirs = self.image_ids[named[row]]
                own = (self._degree[theirs] > 0) & self.hold(theirs, witness)
            # What none meets stands behind all that are met.
            meeting, count = np.append(meeting, np.iinfo(np.int64).max), np.append(count, 0)
            at = np.searchsorted(meeting, pair)
            together = np.where(meeting[at] == pair, count[at], 0) - own
            expected = others[row] * (self._pictures_of[witness] - 1) / self._pictures
            witnesses += np.bincount(row, minlength=n)
            met += np.bincount(row, together, n).astype(np.int64)
            total += np.bincount(row, np.log1p(together / expected), n)
        return Company(others, witnesses, met, total / np.maximum(witnesses, 1))

    def settled(self, company: Company) -> Integers:
        """On how many other pictures each pair's caption is in company, int64 [pairs]; `company` is that of all."""
        met = company.met > 0
        return np.asarray(np.bincount(self.caption_ids, met)[self.caption_ids].astype(np.int64) - met)

    def _meetings(self, image_ids: Integers, caption_ids: Integers) -> tuple[Integers, Integers]:
        """Each caption with each other one of its picture that is heard: its place, and both as one number."""
        degree = self._degree[image_ids]
        place = np.repeat(np.arange(len(image_ids)), degree)
        witness = self._captions[ranges(self._starts[image_ids], degree)].astype(np.int64)
        caption = caption_ids[place].astype(np.int64)
        heard = self._heard[witness] & (witness != caption)
        return place[heard], (caption * len(self._heard) + witness)[heard]

    def _parts(self, rows: Integers, image_ids: Integers, caption_ids: Integers) -> list[Integers]:
        """`rows` by caption, cut between captions where about TIES have come together."""
        if len(rows) == 0:
            return []
        rows = rows[np.argsort(caption_ids[rows], kind="stable")]
        captions, begins = np.unique(caption_ids[rows], return_index=True)
        work = self._work[captions] + np.add.reduceat(self._degree[image_ids[rows]], begins)
        return np.split(rows, begins[np.flatnonzero(np.diff(np.cumsum(work) // TIES)) + 1])


def _edge(image_ids: Integers, caption_ids: Integers) -> Integers:
    return np.asarray(caption_ids.astype(np.int64) << 32 | image_ids)
