"""What a machine is measured to do, by as many processes as will do it."""

from __future__ import annotations

from pathlib import Path

import pytest

from efficientclip.data.tables import USUAL
from efficientclip.errors import UserError
from efficientclip.fitting.trial import measure
from tests import formats, tiny
from tests.model import hub


def test_two_ranks_tell_what_a_step_costs_beside_its_pairs(tmp_path: Path) -> None:
    hub.clip_vision(tmp_path / "tower")
    tiny.text_store(tmp_path / "texts")
    rows = ["image,caption"]
    for number in range(20):
        (tmp_path / f"{number}.png").write_bytes(formats.picture(number, hub.PIXELS))
        rows.append(f"{number}.png,猫狗")
    (tmp_path / "products.csv").write_text("\n".join(rows), encoding="utf-8")
    tower = {"pretrained": str(tmp_path / "tower"), "size": hub.PIXELS}
    config = tiny.config(
        tmp_path,
        data={"tokenizer": str(tmp_path / "vocab.txt")},
        model__image_tower=tower,
        mlm__texts_per_batch=56,
        training__batch_size=16,
    )
    rates = measure(config, tmp_path / "products.csv", None, USUAL, 20, 20, 2)
    # 56 texts of some 20 tokens, beside 16 captions of 4.
    assert min(rates.start, rates.pictures, rates.pairs, rates.step, rates.text) > 0
    # What one rank finds, both end with.
    (tmp_path / "tower" / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"^model\.image_tower\.pretrained: .* holds no weights of a model"):
        measure(config, tmp_path / "products.csv", None, USUAL, 20, 20, 2)
