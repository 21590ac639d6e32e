"""An image tower that has no space of its own gets one: of the user's pictures, once for a folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from yaml import safe_dump, safe_load

from efficientclip.config import load_config
from efficientclip.errors import UserError
from efficientclip.fitting.budget import told, visits_within
from efficientclip.fitting.head import Head
from efficientclip.fitting.towers import of_config
from efficientclip.fitting.trial import Rates
from efficientclip.recipes import recipe
from efficientclip.verify import broken, verify
from tests import formats, tiny
from tests.model import hub
from tests.training.launch import run

RATES = Rates(start=5.0, pictures=100.0, pairs=1000.0, step=0.0, text=0.0)
PICTURES = 20


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    """A tower without a space, and a table whose columns have names of their own, of pictures in another folder."""
    hub.dinov2(tmp_path / "tower")
    (tmp_path / "photos").mkdir()
    rows = ["photo,words"]
    for number in range(PICTURES):
        (tmp_path / "photos" / f"{number}.png").write_bytes(formats.picture(number, hub.PIXELS))
        rows.append(f"{number}.png,猫")
    (tmp_path / "products.csv").write_text("\n".join(rows), encoding="utf-8")
    return tmp_path


def head_of(shop: Path, *, asked: bool = False, layers: tuple[int, ...] = ()) -> Head:
    tower = {"pretrained": str(shop / "tower"), "size": hub.PIXELS}
    config = load_config(
        tiny.config(shop, data={}, mlm={}, model={"width": 32, "image_tower": tower}, head={"layers": [*layers]})
    )
    assert config.model.image_tower is not None
    return Head.of(shop / "head", config, config.model.image_tower, asked=asked)


def made(shop: Path, head: Head, width: int, code: int = 0) -> str:
    (shop / "head.yaml").write_text(safe_dump(head.tree(shop / "products.csv", width)))
    options = "--images", str(shop / "photos"), "--image-column", "photo", "--caption-column", "words"
    return run(1, str(shop / "head.yaml"), *options, module="efficientclip.fit_head", code=code)


def test_a_head_is_made_of_a_table_once(shop: Path) -> None:
    head = head_of(shop)
    assert head.stands is None and head.on_tower.pretrained == str(shop / "tower")
    assert "20 pictures in" in made(shop, head, 24, code=2)
    assert head_of(shop).stands is None
    assert f"{shop / 'head'}: a head of 10 dimensions" in made(shop, head, head.width(PICTURES))
    assert broken(verify(shop / "head")) is None
    stands = head_of(shop)
    assert stands.stands == 10 and stands.on_tower.pretrained == str(shop / "head")
    # Another one would change all features.
    told = r"head: is a head of tower@\w+, pixels \w+, of 10 dimensions and head\.layers=\[\]; now {}; name another"
    with pytest.raises(UserError, match=told.format(r"head\.layers=\[-1\]")):
        head_of(shop, layers=(-1,))
    with pytest.raises(UserError, match=told.format(r"model\.width=32")):
        head_of(shop, asked=True)
    hub.dinov2(shop / "tower")
    with pytest.raises(UserError, match=told.format("other weights")):
        head_of(shop)


def test_a_space_has_as_many_dimensions_as_tower_and_pictures_tell(shop: Path) -> None:
    head = head_of(shop)
    assert [head.width(pictures) for pictures in (1, 20, 62, 64, 10**6, None)] == [1, 10, 31, 31, 31, 31]
    assert [head_of(shop, asked=True).width(pictures) for pictures in (20, None)] == [32, 32]


def test_a_config_names_a_tower_without_a_space(shop: Path) -> None:
    tower = {"pretrained": str(shop / "tower"), "size": hub.PIXELS}
    text = {"data": {}, "mlm": {}}
    # The usual width is no wish: of this tower 32 are the most.
    for width, most, asked in ((512, 32, False), (8, 8, True)):
        towers = of_config(tiny.config(shop, **text, model__image_tower=tower, model__width=width), [])
        assert (towers.headless, towers.tree["model"]["width"], towers.asked) == (True, most, asked)
    hub.clip_vision(shop / "clip")
    towers = of_config(tiny.config(shop, **text, model__image_tower=tower | {"pretrained": str(shop / "clip")}), [])
    assert not towers.headless


def test_its_time_is_told_and_counts_in_a_budget() -> None:
    tree = safe_load(recipe("demo"))
    seconds = told(tree, RATES, 10_000, 4_000, 2, head=True)
    assert next(iter(seconds)) == "head" and seconds["head"] == pytest.approx(40 + 6)
    assert "head" not in told(tree, RATES, 10_000, 4_000, 2)
    without, within = (visits_within(900, tree, RATES, 10_000, 4_000, 2, head=head) for head in (False, True))
    assert (without - within) * 1.165 / 1000 == pytest.approx(46, rel=0.01)
