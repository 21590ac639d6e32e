"""How much a run trains, in what batches, and how long each stage will take on this machine."""

from __future__ import annotations

import math
import os
import re
from copy import deepcopy

from ..errors import UserError
from ..planning.plan import JUDGE_SECONDS, MERGE_SECONDS
from .head import PICTURES as HEAD_PICTURES
from .towers import Tree
from .trial import Rates

EPOCHS = 10.0
# A small table is visited oftener: in fewer steps nothing settles; the smallest would be learned by heart.
LEAST_VISITS, MOST_EPOCHS, LEAST_STEPS, LEAST_BATCH = 20_000, 100, 150, 16
# Of both fold towers: what the demo's rate no longer falls behind, and a least number.
FOLD_SHARE, FOLD_VISITS, FOLD_EPOCHS, FOLD_BATCH = 0.165, 8_000, 40, 128
HELD_SHARE, HELD_LEAST, HELD_MOST, TOO_FEW = 0.03, 50, 2_500, 400
# Seconds on the clock of a command, in starts of a process: its imports, a launcher and its ranks, and its end.
ALONE, LAUNCHED = 1.2, 2.0
# Validations, checkpoints, the judge's groups, pages with their pictures.
TRAINING_ENDS, PAGE = 6.0, 4.0
PAGES = "report, audit, export"


def held_out(pairs: int, share: float | None, parts: int) -> int:
    """Pairs of each part that is held out; 0 of too few."""
    if share is not None:
        return round(pairs * share / parts)
    return 0 if pairs < TOO_FEW else min(HELD_MOST, max(HELD_LEAST, round(HELD_SHARE * pairs)))


def sized(tree: Tree, pairs: int, visits: int) -> Tree:
    """`tree` with its budget, and batches of which `pairs` make enough; the rates fall with the root of the batch."""
    made = deepcopy(tree)
    training, ecl = made["training"], made["confidence"]
    usual = training["batch_size"]
    most = max(LEAST_BATCH, min(visits // LEAST_STEPS, pairs // 4))
    batch = min(usual, 1 << int(math.log2(most)), 1 << int(math.log2(max(pairs // 2, 1))))
    rate = made["optimizer"]["lr"]
    training |= {"pair_visits": visits, "batch_size": batch}
    made["optimizer"]["lr"] = rate * math.sqrt(batch / usual)
    folds = min(FOLD_BATCH, max(1, batch // 2))
    ecl["cross_fit_share"] = round(min(10.0, max(FOLD_SHARE, min(FOLD_VISITS, FOLD_EPOCHS * pairs) / visits)), 4)
    usual_rate = ecl.get("cross_fit_lr") or rate * math.sqrt(FOLD_BATCH / usual)
    ecl |= {"cross_fit_batch_size": folds, "cross_fit_lr": usual_rate * math.sqrt(folds / FOLD_BATCH)}
    if texts := made["mlm"].get("texts_per_batch"):
        made["mlm"]["texts_per_batch"] = max(1, round(texts * batch / usual))
    made["objective"]["bank_size"] = min(made["objective"]["bank_size"], pairs)
    training["checkpoint_every"] = max(10, min(training.get("checkpoint_every", 200), visits // batch // 4))
    return made


def visits_of(pairs: int, epochs: float | None) -> int:
    """Pair visits of `epochs` passes, or of the usual ones."""
    if epochs is not None:
        return max(1, round(epochs * pairs))
    return max(min(LEAST_VISITS, MOST_EPOCHS * pairs), round(EPOCHS * pairs))


def visits_within(
    seconds: float, tree: Tree, rates: Rates, pairs: int, pictures: int, ranks: int, *, head: bool = False
) -> int:
    """As many of `tree`'s run as end in `seconds`, both fold towers' with them; UserError where one pass would not."""

    def needed(visits: int) -> float:
        return sum(told(sized(tree, pairs, visits), rates, pairs, pictures, ranks, head=head).values())

    if (need := needed(pairs)) > seconds:
        raise UserError(
            f"--budget: {seconds / 60:.0f} minutes are too few for one pass over {pairs:,} pairs on this machine; give"
            f" {math.ceil(need / 60)} minutes or more"
        )
    least, most = pairs, 2 * pairs
    while needed(most) <= seconds:
        least, most = most, 2 * most
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (middle, most) if needed(middle) <= seconds else (least, middle)
    return least


def told(tree: Tree, rates: Rates, pairs: int, pictures: int, ranks: int, *, head: bool = False) -> dict[str, float]:
    """Seconds of each stage that `tree` asks for; `head`: with that of an image tower which lacks one."""
    alone, launched = ALONE * rates.start, LAUNCHED * rates.start
    training, ecl = tree["training"], tree["confidence"]
    visits, folds = training["pair_visits"], ecl.get("cross_fit_share", 0.0) * training["pair_visits"]

    def steps(visits: float, batch: int, texts: int = 0) -> float:
        return visits * (1 + texts / batch * rates.text) / rates.pairs + math.ceil(visits / batch) * rates.step

    found = {"head": alone + min(pictures, HEAD_PICTURES) / rates.pictures} if head else {}
    found |= {
        "prepare": alone + pictures / rates.pictures + pairs * MERGE_SECONDS,
        "split": 1.0 + pairs * MERGE_SECONDS,
    }
    if ecl.get("selection") == "calibrated":
        fold_steps = steps(folds, ecl.get("cross_fit_batch_size") or training["batch_size"])
        found["cross-fit"] = launched + TRAINING_ENDS + fold_steps + pairs * JUDGE_SECONDS / ranks
    return found | {
        "train": launched
        + TRAINING_ENDS
        + steps(visits, training["batch_size"], tree["mlm"].get("texts_per_batch", 0)),
        # Beside each other, as far as there are cores.
        PAGES: max(alone + PAGE, (3 * alone + 2 * PAGE) / len(os.sched_getaffinity(0))),
    }


def parse_time(text: str) -> float:
    """Seconds of 15m, 2h, 1.5h or 90s."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text)
    if not found:
        raise UserError(f"--budget {text!r}: write it as 15m, 2h or 90s")
    return float(found[1]) * {"s": 1, "m": 60, "h": 3600}[found[2]]
