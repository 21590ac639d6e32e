"""The space of an image tower that has none: a head of the user's own pictures, made once for a folder.

It has the principal directions of what the tower says of them (`fit-head` without a teacher). Another one would change
all features, so it stays, however long the table grows.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import Config, ImageTower
from ..errors import UserError
from ..files.places import Location
from ..model.efficientclip import is_ours
from ..model.frozen import image_tower_name, tower_difference
from ..training.run_folder import run_config, run_identity

# Pictures that are looked at, at most, and how many at once; dimensions at most.
PICTURES, AT_ONCE, WIDTH = 65_536, 64, 512


@dataclass(frozen=True)
class Head:
    """The head in `folder`, for the image tower of `config`: of `stands` dimensions, None where there is none yet.
    `asked`: model.width is what it shall have, not the most that it may."""

    folder: Path
    config: Config
    tower: ImageTower
    asked: bool
    stands: int | None

    @classmethod
    def of(cls, folder: Path, config: Config, tower: ImageTower, *, asked: bool) -> Head:
        """UserError where the head in `folder` is of another tower, of other hidden states or of another width."""
        if not is_ours(folder):
            return cls(folder, config, tower, asked, None)
        held, weights = run_config(folder), (run_identity(folder) or {}).get("weights")
        difference = tower_difference(weights, image_tower_name(tower))
        if difference is None and held.head != config.head:
            difference = f"head.layers={config.head.layers}"
        if difference is None and asked and held.model.width != config.model.width:
            difference = f"model.width={config.model.width}"
        if difference is not None:
            raise UserError(
                f"{folder}: is a head of {weights}, of {held.model.width} dimensions and"
                f" head.layers={held.head.layers}; now {difference}; name another --out, or remove that folder"
            )
        return cls(folder, config, tower, asked, held.model.width)

    @property
    def on_tower(self) -> ImageTower:
        """The tower that the features of a store are of."""
        return self.tower if self.stands is None else self.tower.model_copy(update={"pretrained": str(self.folder)})

    def width(self, pictures: int | None) -> int:
        """Dimensions of one that is made of so many pictures (None: not known). Half as many at most: each direction
        is told by two, and missing or repeated pictures do not leave fewer directions than dimensions."""
        if self.asked:
            return self.config.model.width
        # What a layer norm puts out lies in one direction less.
        most = min(WIDTH, self.config.model.width - 1)
        return most if pictures is None else max(1, min(most, pictures // 2))

    def tree(self, source: Location, width: int) -> dict[str, Any]:
        """The config by which `fit-head` makes it of `source`."""
        config = self.config
        cached = config.data.model_dump(mode="json", include={"max_bad_shards", "cache", "cache_gib"})
        return {
            "run": str(self.folder),
            "seed": config.seed,
            "data": {"sources": {"pictures": str(source)}, **cached},
            "model": {"width": width, "image_tower": self.tower.model_dump(mode="json")},
            "head": config.head.model_dump(),
            "training": {
                "precision": config.training.precision,
                "tower": "image",
                "pair_visits": PICTURES,
                "batch_size": AT_ONCE,
            },
        }
