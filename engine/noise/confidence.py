"""Ensemble Confident Learning (EfficientCLIP, arXiv 2109.04699): pairs the model keeps not believing are thrown out.

Every visit gives a pair one score: the cosine of its text and image, or what the loss makes of it. Scores are z-scored
within the global batch, since pairs late in an epoch look cleaner than early ones, and averaged over the visits: the
ensemble is over time. After an epoch a rule chooses the pairs of the next one. Rank 0 alone holds the table, 34 bytes a
pair at most, and tells the others what it chose.
Dropped pairs are re-auditioned on a small share of visits with weight 0, and come back if they turn out better.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ..config import Confidence
from ..errors import UserError
from .cross_fit import read_cross_fit

BoolArray = npt.NDArray[np.bool_]
FloatArray = npt.NDArray[np.float64]

# Scores that a mixture is fitted to: an error of its means by .004 deviations.
FITTED = 1 << 16


class ConfidenceTable:
    """Scores and verdicts of n pairs; every array is indexed by the store's pair row. A choice that would leave fewer
    than `least` pairs, a global batch, is not made: the last one stays.

    by_hand, int8 [n]: pairs that are right (1) are kept, those that are wrong (-1) are not, whatever the rule.
    """

    def __init__(
        self, n_pairs: int, config: Confidence, least: int = 1, by_hand: npt.NDArray[np.int8] | None = None
    ) -> None:
        self.config, self.least, self.by_hand = config, least, by_hand
        self.score_sum = np.zeros(n_pairs, np.float64)
        self.times_seen = np.zeros(n_pairs, np.int32)
        self.kept = np.ones(n_pairs, bool)
        self.dropped_epoch = np.full(n_pairs, -1, np.int32)
        self.drops_done = 0
        # Of the current epoch alone.
        self.epoch_sum = np.zeros(n_pairs, np.float32)
        self.epoch_seen = np.zeros(n_pairs, np.int32)
        if config.selection == "calibrated" and config.cross_fit is not None:
            found = read_cross_fit(config.cross_fit)
            if len(found.p) != n_pairs:
                raise UserError(
                    f"confidence.cross_fit: {config.cross_fit} judges {len(found.p)} pairs, this run has {n_pairs};"
                    " run `efficientclip cross-fit CONFIG` for its store"
                )
            self.noise_rate, self.clean_log_odds = found.rate, found.clean_log_odds
            self.kept = self._likely_wrong_dropped()
        self.kept = self._obeying(self.kept)
        self.dropped_epoch[~self.kept] = 0

    def observe(self, epoch: int, rows_N: npt.NDArray[np.int64], score_N: FloatArray, counted_N: BoolArray) -> None:
        """Take in one global batch of scores; mean and deviation come from the pairs that train (`counted`)."""
        if epoch < self.config.warmup_epochs or not counted_N.any():
            return
        trained = score_N[counted_N]
        z_N = (score_N - trained.mean()) / max(float(trained.std()), 1e-12)
        np.add.at(self.score_sum, rows_N, z_N)
        np.add.at(self.times_seen, rows_N, 1)
        np.add.at(self.epoch_sum, rows_N, z_N.astype(np.float32))
        np.add.at(self.epoch_seen, rows_N, 1)

    @property
    def epoch_score(self) -> npt.NDArray[np.float32]:
        """Average z-score of each pair since `start_epoch`; NaN where it was not scored."""
        return _mean(self.epoch_sum, self.epoch_seen)

    def start_epoch(self) -> None:
        self.epoch_sum[:] = 0
        self.epoch_seen[:] = 0

    @property
    def mean_score(self) -> FloatArray:
        """Average z-score of each pair; NaN where it was never scored."""
        return _mean(self.score_sum, self.times_seen)

    def select(self, epoch: int) -> None:
        """Choose the pairs that the epoch after `epoch` trains on."""
        rule = self.config.selection
        if rule == "none" or epoch < self.config.warmup_epochs:
            return
        if rule == "mixture":
            keep = self._by_mixture()
        elif rule == "calibrated":
            keep = self._likely_wrong_dropped()
        elif rule == "schedule" and self.drops_done == self.config.drops:
            keep = self._lowest_dropped(int(self.kept.sum()))
        else:
            keep = self._lowest_dropped(round(float(self.kept.sum()) * (1 - self.config.drop_share)))
            self.drops_done += 1
        keep = self._obeying(keep)
        if keep.sum() < self.least:
            return
        self.dropped_epoch[self.kept & ~keep] = epoch
        self.dropped_epoch[keep] = -1
        self.kept = keep

    def _obeying(self, keep: BoolArray) -> BoolArray:
        return keep if self.by_hand is None else (keep | (self.by_hand > 0)) & (self.by_hand >= 0)

    def _right_above_all(self, score: FloatArray) -> FloatArray:
        """`score`, changed, so that others go in the place of pairs that are right."""
        if self.by_hand is not None:
            score[self.by_hand > 0] = np.inf
        return score

    def _lowest_dropped(self, count: int) -> BoolArray:
        """Keep the `count` best; published ECL never lets a dropped pair return; unscored pairs stay as they are."""
        score = self.mean_score
        candidates = self.kept | (self.config.selection != "published")
        # An unscored pair has not been judged: kept ones rank first, dropped ones last.
        score = np.where(np.isnan(score), np.where(self.kept, np.inf, -np.inf), score)
        score = self._right_above_all(np.where(candidates, score, -np.inf))
        return lowest(-score, count) & candidates

    def _by_mixture(self) -> BoolArray:
        """Drop the pairs that the lower of two Gaussians fitted to the scores explains better."""
        score = self.mean_score
        scored = ~np.isnan(score)
        keep = self.kept.copy()
        keep[scored] = clean_probability(score[scored]) >= 0.5
        return keep

    def _likely_wrong_dropped(self) -> BoolArray:
        """Drop as many pairs as are estimated to be wrong: the lowest by both towers that did not train on them and
        the one that does."""
        total = self._right_above_all(together(self.clean_log_odds, self.mean_score))
        return ~lowest(total, round(self.noise_rate * len(total)))

    def verdicts(self) -> dict[str, npt.NDArray[Any]]:
        """Of each pair, by the name of the column."""
        return {
            "row": np.arange(len(self.kept)),
            "score": self.mean_score,
            "times_seen": self.times_seen,
            "kept": self.kept,
            "dropped_epoch": self.dropped_epoch,
        }

    def state(self) -> dict[str, Any]:
        """Everything a resumed run needs, as arrays."""
        return {
            "score_sum": self.score_sum,
            "times_seen": self.times_seen,
            "kept": self.kept,
            "dropped_epoch": self.dropped_epoch,
            "drops_done": np.int64(self.drops_done),
            "epoch_sum": self.epoch_sum,
            "epoch_seen": self.epoch_seen,
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.score_sum, self.times_seen = state["score_sum"].copy(), state["times_seen"].copy()
        self.kept, self.dropped_epoch = state["kept"].copy(), state["dropped_epoch"].copy()
        self.drops_done = int(state["drops_done"])
        if "epoch_sum" not in state:
            raise UserError("checkpoint: an earlier version wrote it, without the epoch's scores; start a new run")
        self.epoch_sum, self.epoch_seen = state["epoch_sum"].copy(), state["epoch_seen"].copy()


def _mean(total: npt.NDArray[Any], times: npt.NDArray[np.int32]) -> npt.NDArray[Any]:
    """`total` / `times` in the dtype of `total`; NaN where `times` is 0."""
    return np.divide(total, times, out=np.full_like(total, np.nan), where=times > 0)


def lowest(score: FloatArray, count: int) -> BoolArray:
    """The `count` lowest of scores without NaN; of equal ones the first."""
    if count <= 0:
        return np.zeros(len(score), bool)
    bound = np.partition(score, count - 1)[count - 1]
    chosen = score < bound
    chosen[np.flatnonzero(score == bound)[: count - np.count_nonzero(chosen)]] = True
    return chosen


def together(clean_log_odds: FloatArray, mean_score: FloatArray) -> FloatArray:
    """What a cross-fit's towers and the run itself say of each pair, alike in weight; lower is more suspicious."""
    total = standardised(clean_log_odds)
    total += standardised(mean_score)
    return total


def standardised(score: FloatArray) -> FloatArray:
    """Mean 0 and deviation 1 over the scored pairs; 0 for pairs without a score (NaN)."""
    scored = ~np.isnan(score)
    if not scored.any():
        return np.zeros(len(score))
    z = (score - score[scored].mean()) / max(float(score[scored].std()), 1e-12)
    return np.where(scored, z, 0.0)


def clean_probability(score: FloatArray, iterations: int = 200) -> FloatArray:
    """Posterior of the upper component of a two-Gaussian mixture fitted by expectation maximisation, to FITTED scores
    drawn at random where there are more."""
    if len(score) < 2 or np.ptp(score) == 0:
        return np.ones(len(score))
    fitted = score if len(score) <= FITTED else np.random.default_rng(0).choice(score, FITTED, replace=False)
    mean = np.quantile(fitted, [0.15, 0.7])
    deviation = np.full(2, fitted.std())
    share = np.array([0.3, 0.7])
    posterior = np.full((len(fitted), 2), 0.5)
    for _ in range(iterations):
        posterior = _posterior(fitted, mean, deviation, share)
        weight = posterior.sum(axis=0) + 1e-12
        mean = (posterior * fitted[:, None]).sum(axis=0) / weight
        deviation = np.sqrt((posterior * (fitted[:, None] - mean) ** 2).sum(axis=0) / weight) + 1e-6
        share = weight / weight.sum()
    upper = int(mean.argmax())
    if fitted is not score:
        posterior = _posterior(score, mean, deviation, share)
    # Beyond the upper mean the wider Gaussian may win again: a higher score is never less clean.
    order = np.argsort(score, kind="stable")
    probability = np.empty(len(score))
    probability[order] = np.maximum.accumulate(posterior[order, upper])
    return probability


def _posterior(score_N: FloatArray, mean_2: FloatArray, deviation_2: FloatArray, share_2: FloatArray) -> FloatArray:
    log_density = -0.5 * ((score_N[:, None] - mean_2) / deviation_2) ** 2 - np.log(deviation_2) + np.log(share_2)
    posterior: FloatArray = np.exp(log_density - log_density.max(axis=1, keepdims=True))
    posterior /= posterior.sum(axis=1, keepdims=True)
    return posterior
