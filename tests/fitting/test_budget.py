"""How much is trained, in what batches, and what is told of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from yaml import safe_load

from efficientclip.errors import UserError
from efficientclip.fitting.budget import held_out, parse_time, sized, told, visits_of, visits_within
from efficientclip.fitting.towers import of_config
from efficientclip.fitting.trial import Rates
from efficientclip.recipes import recipe
from tests import tiny
from tests.model import hub

RATES = Rates(start=5.0, pictures=100.0, pairs=1000.0, step=0.1, text=6.0)


@pytest.mark.parametrize("name", ["demo", "efficientclip"])
@pytest.mark.parametrize("pairs", [20, 374, 21_000, 250_000, 5_000_000])
def test_any_number_of_pairs_makes_steps_enough(name: str, pairs: int) -> None:
    tree = safe_load(recipe(name))
    visits = visits_of(pairs, None)
    made = sized(tree, pairs, visits)
    batch = made["training"]["batch_size"]
    assert batch <= tree["training"]["batch_size"] and 2 * batch <= max(pairs, 4)
    assert visits // batch >= 100 and made["optimizer"]["lr"] <= tree["optimizer"]["lr"]
    assert made["confidence"]["cross_fit_share"] * visits >= min(8_000, 40 * pairs) * 0.999
    assert made["confidence"]["cross_fit_batch_size"] * 2 <= max(pairs, 4)


def test_the_demos_number_of_pairs_is_trained_as_the_demo() -> None:
    tree = safe_load(recipe("demo"))
    made = sized(tree, 21_070, 200_000)
    assert made["training"]["batch_size"] == 1024 and made["optimizer"]["lr"] == tree["optimizer"]["lr"]
    for key in ("cross_fit_share", "cross_fit_batch_size", "cross_fit_lr"):
        assert made["confidence"][key] == pytest.approx(tree["confidence"][key])


def test_a_budget_is_kept_by_what_is_told() -> None:
    tree = safe_load(recipe("demo"))
    for minutes in (5, 30):
        made = sized(tree, 10_000, visits_within(60 * minutes, tree, RATES, 10_000, 4_000, 2))
        assert sum(told(made, RATES, 10_000, 4_000, 2).values()) == pytest.approx(60 * minutes, rel=0.01)
    with pytest.raises(UserError, match=r"--budget: 1 minutes are too few .* give \d+ minutes or more"):
        visits_within(60, tree, RATES, 10_000, 4_000, 2)


def test_steps_take_their_time_whatever_they_hold() -> None:
    """Of 24 pairs, whose steps hold 8 and 4, and of 21,070, whose steps hold 1,024 and 128."""
    tree, quick = safe_load(recipe("demo")), replace(RATES, step=0.0)
    for pairs, visits, steps in (
        (24, 2_400, {"train": 300, "cross-fit": 240}),
        (21_070, 200_000, {"train": 196, "cross-fit": 258}),
    ):
        made = sized(tree, pairs, visits)
        slow, fast = (told(made, rates, pairs, pairs, 2) for rates in (RATES, quick))
        for stage, seconds in slow.items():
            assert seconds - fast[stage] == pytest.approx(RATES.step * steps.get(stage, 0))
        # Unpaired texts are read while the towers train, not by those of the folds.
        made["mlm"]["texts_per_batch"] *= 2
        more = told(made, RATES, pairs, pairs, 2)
        batch = made["training"]["batch_size"]
        texts = visits / batch * made["mlm"]["texts_per_batch"] / 2
        assert more["train"] - slow["train"] == pytest.approx(6 * texts / RATES.pairs)
        assert more["cross-fit"] == slow["cross-fit"]


def test_lengths_of_time_are_read() -> None:
    assert [parse_time(text) for text in ("90s", "15m", "1.5h")] == [90, 900, 5400]
    with pytest.raises(UserError, match="write it as 15m, 2h or 90s"):
        parse_time("15")


def test_too_few_pairs_are_all_trained_on() -> None:
    assert [held_out(pairs, None, 2) for pairs in (20, 399, 400, 21_000, 10**7)] == [0, 0, 50, 630, 2_500]
    assert [held_out(1_000, 0.2, parts) for parts in (1, 2)] == [200, 100]


def test_a_config_of_few_keys_is_sized_alike(tmp_path: Path) -> None:
    hub.clip_vision(tmp_path / "tower")
    file = tiny.config(tmp_path, model__image_tower={"pretrained": str(tmp_path / "tower")})
    towers = of_config(file, ["training.batch_size=64"])
    made = sized(towers.tree, 100, 10_000)
    assert made["training"]["batch_size"] == 16 and made["objective"]["bank_size"] == 24
    with pytest.raises(UserError, match="name both in it"):
        of_config(tiny.config(tmp_path), [])
