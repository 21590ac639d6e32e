"""Pictures against frozen sentence features: the image start trains a small tower on them, held in memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from .. import config as settings
from ..errors import UserError, tell
from .batches import IntArray
from .images import ImageLoader
from .pairs import PairSource, weighted
from .pictures import standardise
from .sources import Source
from .store import edges


@dataclass(frozen=True)
class Pictures:
    """Decoded pictures uint8 [n, S, S, 3], their keys, their English captions, the name first, and the number of the
    source of each."""

    pixels: torch.Tensor
    keys: list[str]
    captions: list[list[str]]
    origins: list[int]


def load_pictures(sources: Sequence[Source], size: int, max_bad_shards: int = 0) -> Pictures:
    """All pictures of the sources that carry `captions_en`, which tars' .json members do; bad shards are told."""
    pixels: list[torch.Tensor] = []
    keys: list[str] = []
    captions: list[list[str]] = []
    origins: list[int] = []
    with ImageLoader(
        sources,
        batch_size=256,
        size=size,
        train=False,
        dtype=torch.uint8,
        channels_last=True,
        captions=False,
        max_bad_shards=max_bad_shards,
    ) as loader:
        for batch in loader:
            chosen = [at for at, english in enumerate(batch.captions_en) if english]
            pixels.append(batch.images.permute(0, 2, 3, 1)[chosen])
            keys += [batch.keys[at] for at in chosen]
            captions += [batch.captions_en[at] for at in chosen]
            origins += [batch.origins[at] for at in chosen]
        for shard in loader.bad_shards:
            tell(f"notice: left out: {shard.cause}")
        if loader.bad_samples:
            bad = loader.bad_samples[0]
            raise UserError(f"shard {bad.shard}, {bad.key}: {bad.cause}; mend the sample or take it out")
    if not keys:
        paths = ", ".join(str(source.path) for source in sources) or "no source"
        raise UserError(f"data.sources: no picture with `captions_en` in {paths}")
    return Pictures(torch.cat(pixels), keys, captions, origins)


class PicturePairs(PairSource):
    """Pictures, each paired with one frozen row: what the teacher makes of its English captions.

    The row is the mean of the name and of the keywords' mean: it says what the picture is, and what it is near to.
    `weights`: how often an epoch visits the pictures of each source, once without.
    """

    def __init__(
        self,
        pictures: Pictures,
        encode: Callable[[list[str]], npt.NDArray[np.float32]],
        tower: settings.ImageTower,
        augmentation: settings.Augmentation,
        seed: int,
        weights: Sequence[float] = (),
    ) -> None:
        target_of: dict[tuple[str, ...], int] = {}
        targets = np.array([target_of.setdefault(tuple(captions), len(target_of)) for captions in pictures.captions])
        texts = {text: number for number, text in enumerate(dict.fromkeys(t for group in target_of for t in group))}
        encoded = encode(list(texts))
        rows = []
        for name, *keywords in target_of:
            row = encoded[texts[name]]
            if keywords:
                row = row + encoded[[texts[keyword] for keyword in keywords]].mean(0)
            rows.append(row / np.linalg.norm(row))
        super().__init__(
            trained_ids=np.arange(len(targets), dtype=np.int32),
            frozen_ids=targets.astype(np.int32),
            features=np.stack(rows).astype(np.float16),
            edges=edges(np.arange(len(targets)), targets, len(targets)),
        )
        if weights:
            self.weights = weighted(np.array(pictures.origins), weights)
        self.pictures, self.tower, self.augmentation, self.seed = pictures, tower, augmentation, seed

    def names(self, rows: IntArray) -> list[str]:
        return [self.pictures.keys[image] for image in self.trained_ids[rows]]

    def inputs(self, trained_ids_M: IntArray, step: int, rank: int, world_size: int) -> dict[str, Any]:
        m = len(trained_ids_M)
        generator = torch.Generator().manual_seed(((self.seed << 32) + step) % 2**63)
        # Drawn for the whole batch, then sliced: the views do not depend on the world size.
        draws = torch.rand((m * world_size, 11), generator=generator)[rank * m : (rank + 1) * m]
        pixels = self.pictures.pixels[torch.from_numpy(trained_ids_M)]
        views = augment(pixels.permute(0, 3, 1, 2).contiguous().float() / 255, draws, self.augmentation)
        return {"pixels": standardise(views, self.tower.mean, self.tower.std)}


def augment(planes: torch.Tensor, draws: torch.Tensor, how: settings.Augmentation) -> torch.Tensor:
    """Random views of pictures [M, 3, S, S] in 0..1 from uniform draws [M, 11]; the ground is white."""
    u = draws * 2 - 1
    zoom = torch.exp(math.log(how.min_scale) + (math.log(how.max_zoom_out) - math.log(how.min_scale)) * draws[:, 0])
    stretch = torch.exp(u[:, 10] * 0.5 * (1 - how.min_scale))
    angle = u[:, 1] * how.rotation_degrees * math.pi / 180
    mirror = torch.where(draws[:, 2] < 0.5, -1.0, 1.0) if how.flip else torch.ones(len(u))
    cos, sin = torch.cos(angle), torch.sin(angle)
    across = torch.stack([zoom * stretch * cos * mirror, zoom * sin * mirror], 1)[:, None, None]
    down = torch.stack([-zoom * sin, zoom / stretch * cos], 1)[:, None, None]
    size = planes.shape[-1]
    # Pixel centres in -1..1; affine_grid's product with three columns is slower than these two sums.
    centres = (torch.arange(size) * 2 + 1) / size - 1
    grid = across * centres[:, None] + (down * centres[:, None, None] + (u[:, 3:5] * how.shift)[:, None, None])
    views = F.grid_sample(planes - 1, grid, padding_mode="zeros", align_corners=False) + 1
    if how.colour > 0 or how.grey_share > 0:
        matrix, offset = _colours(u, draws[:, 9] < how.grey_share, how.colour)
        views = torch.baddbmm(offset, matrix, views.flatten(2)).clamp_(0, 1).view_as(views)
    return views


def _colours(u: torch.Tensor, to_grey: torch.Tensor, strength: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Saturation, contrast, brightness, tint and grey are linear in RGB: one matrix [M, 3, 3] and offset [M, 3, 1]."""
    saturation, contrast = (1 + strength * u[:, 7])[:, None, None], (1 + 0.5 * strength * u[:, 6])[:, None, None]
    tint = 1 + 0.3 * strength * torch.stack([u[:, 8], u[:, 5] * u[:, 7], -u[:, 8]], 1)
    gain = ((1 + 0.5 * strength * u[:, 5])[:, None] * tint)[:, :, None]
    grey = torch.full((3, 3), 1 / 3)
    matrix = gain * contrast * (saturation * torch.eye(3) + (1 - saturation) * grey)
    offset = gain * (0.5 - 0.5 * contrast)
    grey_view = to_grey[:, None, None]
    return torch.where(grey_view, grey @ matrix, matrix), torch.where(grey_view, grey @ offset, offset)
