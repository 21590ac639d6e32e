"""The frozen side: an image tower or teacher whose features are computed once and stored."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .. import config as settings
from ..data.images import ImageLoader
from ..data.pictures import normalise
from ..data.sources import Source
from ..errors import UserError, reading
from ..files import digests
from ..hardware import compute_dtype
from .efficientclip import build_model

PICTURES_AT_ONCE = 256
# On a CPU, whose caches hold what a layer says of so few: ViT-B/32 is 1.1, EfficientNet-Lite0 1.8 times as fast.
ON_A_CPU = 16
# What a tower is called: its folder and weights, or hub id and revision, then what else tells its features.
TOWER = re.compile(
    r"(?P<weights>.*@(?P<digest>[0-9a-f]{16})|.*?)(?P<pixels>, pixels [0-9a-f]{8})?(?P<mean> less [0-9a-f]{16})?"
)


class FrozenImages:
    """`encode` maps square pictures uint8 [M, S, S, 3] to L2-normalised float32 [M, width].

    `model` is the tower, `description` the Hugging Face config it is built from; `drawn`: it came without a projection,
    and has a random one.
    """

    def __init__(self, config: settings.Config) -> None:
        if config.model.image_tower is None:
            raise UserError("model.image_tower: not set; pictures cannot be encoded without it")
        self.tower = config.model.image_tower
        self.name = image_tower_name(self.tower)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.compute = compute_dtype(config.training.precision)
        settings_without_start = config.model.model_copy(update={"start_from": None})
        whole = build_model(settings_without_start, seed=config.seed, vocabulary=None, sides=("image",))
        if whole.image is None:
            raise UserError("model.image_tower: could not be built")
        self.model, self.description, self.drawn = whole.image.eval().to(self.device), whole.config.image, whole.drawn

    def encode(self, pictures: Sequence[npt.NDArray[np.uint8]]) -> npt.NDArray[np.float32]:
        return self.encode_pixels(normalise(torch.from_numpy(np.stack(pictures)), self.tower.mean, self.tower.std))

    def loader(self, source: Source, **options: Any) -> ImageLoader:
        """Pictures of `source`, in its order, as `encode_pixels` takes them; `options` are others of ImageLoader."""
        tower = self.tower
        given = {"size": tower.size, "mean": tower.mean, "std": tower.std, "train": False, **options}
        return ImageLoader(source, batch_size=PICTURES_AT_ONCE, **given)

    @torch.inference_mode()
    def encode_pixels(self, pixels: torch.Tensor) -> npt.NDArray[np.float32]:
        """Normalised pixels float32 [M, 3, S, S] to L2-normalised features float32 [M, width]."""
        with torch.autocast(self.device.type, self.compute, enabled=self.compute is not None):
            parts = pixels.split(pictures_at_once(self.device))
            features_MD = torch.cat([self.model(part.to(self.device, non_blocking=True)) for part in parts])
        features: npt.NDArray[np.float32] = features_MD.cpu().numpy()
        return features


def pictures_at_once(device: torch.device) -> int:
    """Pictures that a tower encodes at once there."""
    return ON_A_CPU if device.type == "cpu" else PICTURES_AT_ONCE


def image_tower_name(tower: settings.ImageTower) -> str:
    """Identity of a tower's weights and of the pixels it is given: features of another tower are refused by it."""
    if tower.pretrained is None:
        raise UserError(
            "model.image_tower.architecture: fresh weights cannot encode; give model.image_tower.pretrained"
        )
    pixels = json.dumps([tower.size, [float(value) for value in (*tower.mean, *tower.std)]])
    return f"{_weights_name('model.image_tower', tower)}, pixels {hashlib.sha256(pixels.encode()).hexdigest()[:8]}"


def tower_difference(found: str | None, expected: str | None, *, earlier: bool = False) -> str | None:
    """In what the towers of two names differ; None: they are the same, whatever their folders are called.

    `earlier`: names of earlier versions, which do not tell of pixels, are compared by the rest.
    """
    one, other = (TOWER.fullmatch(name or "") for name in (found, expected))
    if one is None or other is None or (one["digest"] or one["weights"]) != (other["digest"] or other["weights"]):
        return "other weights"
    if one["mean"] != other["mean"]:
        return "another mean to subtract"
    told = {one["pixels"], other["pixels"]}
    if len(told) > 1 and not (earlier and None in told):
        return f"another size, mean or std of pictures{', or none told' if None in told else ''}"
    return None


def _weights_name(field: str, tower: settings.Tower | settings.Teacher) -> str:
    """A hub id with its revision, or a folder with the digest of its weights."""
    folder = Path(tower.pretrained or "")
    if folder.is_absolute() and not folder.is_dir():
        found = "is a file, not a folder" if folder.exists() else "no such folder"
        raise UserError(f"{field}.pretrained: {folder}: {found}; put it back, or name where it is now")
    if not folder.is_dir():
        return f"{tower.pretrained}@{tower.revision or 'main'}"
    for held in (folder / "model", folder):
        # As transformers chooses: one file before shards, safetensors before PyTorch's own.
        for pattern in ("model.safetensors", "model-*.safetensors", "pytorch_model.bin", "pytorch_model-*.bin"):
            if files := sorted(held.glob(pattern)):
                return f"{folder.name}@{_digest_of(files)[:16]}"
    raise UserError(f"{field}.pretrained: {folder} holds no weights of a model; has its run finished?")


def _digest_of(files: Sequence[Path]) -> str:
    """Of the content of one file, or of the digests of several."""
    found = []
    for file in files:
        with reading("weights", file, "restore the file from a copy"):
            found.append(_digest_once(file, digests.signature(file)))
    return found[0] if len(found) == 1 else hashlib.sha256("".join(found).encode()).hexdigest()


@cache
def _digest_once(file: Path, signature: digests.Signature) -> str:
    """Of a file that is as it was when it had that `signature`."""
    return digests.digest_of(file)


def frozen_name(config: settings.Config) -> str:
    """Identity of the frozen side a text run trains against: the image tower, or else the teacher."""
    if config.model.image_tower is not None:
        return image_tower_name(config.model.image_tower)
    if config.model.teacher is not None:
        return teacher_name(config.model.teacher)
    raise UserError("model: set image_tower (pictures) or teacher (parallel text), the frozen side of the store")


def teacher_name(teacher: settings.Teacher) -> str:
    """Identity of a teacher's weights and of the mean that is subtracted."""
    name = teacher.kind if teacher.kind == "usem3" else _weights_name("model.teacher", teacher)
    if teacher.mean is None:
        return name
    if not teacher.mean.is_file():
        raise UserError(f"model.teacher.mean: {teacher.mean} is missing; `efficientclip demo-data` writes the demo's")
    return f"{name} less {hashlib.sha256(teacher.mean.read_bytes()).hexdigest()[:16]}"
