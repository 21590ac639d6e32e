"""`efficientclip fit-head CONFIG`: a space for a frozen image tower that has none, or another one, in closed form.

What the tower says of a picture (its pooled output and the means of the hidden states `head.layers`, each normalised,
end to end) is centred and projected on its principal directions, each divided by the root of its singular value. The
normalised rows are then turned by the orthogonal matrix that brings them nearest to what the teacher makes of the
pictures' English names (Schönemann 1966): a text tower that was distilled from that teacher knows this space already.

A tower that was trained as a classifier knows words: with `head.classes`, the teacher's features of its classes' names,
each times the class's row (a linear form of ConSE, 1312.5650), are added in the directions in which the pictures hardly
vary. Pictures of another kind than those fitted on, photographs where these are drawings, differ just there.

The folder that it leaves is that of a finished image run: model.image_tower.pretrained takes it.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from tqdm import tqdm
from transformers import PreTrainedModel

from ..config import Config, ImageTower
from ..data.cache import Cache
from ..data.images import ImageLoader
from ..data.sources import Source
from ..data.tables import USUAL, Columns
from ..errors import UserError, tell
from ..files.places import Location
from ..hardware import compute_dtype, record_hardware
from ..model.efficientclip import EfficientCLIP, EfficientCLIPConfig, backbone_config, load_model
from ..model.frozen import image_tower_name, pictures_at_once, teacher_name
from ..model.pretrained import load_classes, load_image_tower
from ..model.teacher import Teacher
from .distributed import process_group
from .records import Metrics
from .run_folder import describe, finished, owned, place_model, seal
from .runs import listed, opened_sources, picture_reports

Floats = npt.NDArray[np.float64]
# Of the mean variance of what the tower says: the classes' names come in where the pictures vary less.
HARDLY = 0.03
# Before the first step: no line of a call that was cut short stays.
NEVER = -1


def fit_head(config: Config, images: Location | None = None, columns: Columns = USUAL) -> int:
    """Fit the head and write it with its tower to `config.run`; the exit code.

    Up to training.pair_visits pictures of data.sources are looked at, training.batch_size at a time; where these are
    tables, `images` and `columns` tell of them. Without model.teacher the space is not turned. UserError where there
    are fewer pictures than dimensions.
    """
    tower = config.model.image_tower
    if tower is None or tower.pretrained is None or config.training.tower != "image":
        raise UserError("fit-head: needs training.tower=image and model.image_tower.pretrained, the tower to be fitted")
    if config.head.classes and config.model.teacher is None:
        raise UserError("head.classes: needs model.teacher, which reads what the tower's classes are called")
    with process_group(config), owned(config.run, "run", "fit-head"):
        if dist.get_world_size() > 1:
            raise UserError("fit-head: runs on one rank; start it without a launcher")
        cache = Cache.of(config.data)
        sources = opened_sources(config, cache, images, columns)
        identity = {
            **dict.fromkeys(("store", "tower", "tokenizer")),
            "pictures": listed(sources),
            "teacher": None if config.model.teacher is None else teacher_name(config.model.teacher),
            "weights": image_tower_name(tower),
        }
        if finished(config, identity):
            print(f"{config.run}: stands already")
            return 0
        if (config.run / "checkpoints").exists():
            raise UserError(f"run {config.run}: holds a run that was trained; name another folder in `run`")
        # Cut short, it left nothing that could go on.
        shutil.rmtree(config.run / "model", ignore_errors=True)
        describe(config, identity, None)
        record_hardware(config.run / "hardware.json", 0, 1)
        teacher = None if config.model.teacher is None else Teacher(config.model.teacher)
        model = _fitted(config, tower, teacher, sources)
        reports = {} if teacher is None else picture_reports(config, tower, teacher, cache)(model)
        Metrics(config.run, NEVER, ()).validation(0, 0, 0, reports)
        place_model(model.cpu(), config.run / "model")
        seal(config.run, {})
        shown = (f"; {name} t2i R@10 {report['t2i']['R@10']:.1f}" for name, report in reports.items())
        print(f"{config.run}: a head of {config.model.width} dimensions{''.join(shown)}")
    return 0


def _fitted(config: Config, tower: ImageTower, teacher: Teacher | None, sources: Sequence[Source]) -> EfficientCLIP:
    """The tower with its head."""
    # Before hours of pictures.
    classes = load_classes("model.image_tower", tower) if config.head.classes else None
    run = Path(tower.pretrained or "")
    image = load_model(run).image if (run / "model" / "config.json").is_file() else None
    loaded = load_image_tower("model.image_tower", tower)[0] if image is None else image.backbone
    # Of a model of two towers, the pictures' half.
    backbone: PreTrainedModel = getattr(loaded, "vision_model", loaded)
    image_config = {**backbone_config(backbone, tower), "fitted": config.head.layers}
    model = EfficientCLIP(EfficientCLIPConfig(image=image_config, width=config.model.width), image_backbone=backbone)
    model.compute = compute_dtype(config.training.precision)
    torch.nn.Module.to(model, "cuda" if torch.cuda.is_available() else "cpu").eval()
    pooled_NF, names = _pooled(config, tower, model, sources)
    targets = None if teacher is None else teacher.encode(names)
    weight_DF, bias_D = principal_head(pooled_NF, targets, config.model.width)
    if classes is not None and teacher is not None:
        rows_CP, labels = classes
        named_CD = teacher.encode(labels)
        weight_DF, bias_D = with_classes(pooled_NF, weight_DF, rows_CP.numpy(), named_CD, config.head.classes)
    projection: torch.nn.Linear = model.image.projection  # type: ignore[union-attr, assignment]
    with torch.no_grad():
        projection.weight.copy_(torch.from_numpy(weight_DF))
        projection.bias.copy_(torch.from_numpy(bias_D))
    return model


@torch.inference_mode()
def _pooled(
    config: Config, tower: ImageTower, model: EfficientCLIP, sources: Sequence[Source]
) -> tuple[npt.NDArray[np.float32], list[str]]:
    """What the tower says of pictures, float32 [N, F], and the English name of each, where a teacher is to read it."""
    image: Any = model.image
    most, named = config.training.pair_visits, config.model.teacher is not None
    parts: list[npt.NDArray[np.float32]] = []
    names: list[str] = []
    device, compute = model.logit_scale.device, model.compute
    found = 0
    loader = ImageLoader(
        sources,
        batch_size=config.training.batch_size,
        size=tower.size,
        mean=tower.mean,
        std=tower.std,
        train=False,
        captions=False,
        max_bad_shards=config.data.max_bad_shards,
    )
    with loader, tqdm(desc=config.run.name, unit="picture") as bar:
        for batch in loader:
            chosen = [at for at, english in enumerate(batch.captions_en) if english or not named][: most - found]
            with torch.autocast(device.type, compute, enabled=compute is not None):
                for pixels in batch.images[chosen].split(pictures_at_once(device)):
                    parts.append(image.pooled(pixels.to(device)).float().cpu().numpy())
            names += [batch.captions_en[at][0] for at in chosen] if named else []
            found += len(chosen)
            bar.update(len(chosen))
            if found == most:
                break
        for shard in loader.bad_shards:
            tell(f"notice: left out: {shard.cause}")
    if found <= config.model.width:
        paths = ", ".join(str(source.path) for source in sources) or "no source"
        told = " with `captions_en`, which model.teacher reads," if named else ""
        raise UserError(
            f"data.sources: {found} pictures{told} in {paths}; a head of model.width={config.model.width} needs more:"
            " lower it"
        )
    return np.concatenate(parts), names


def principal_head(
    pooled_NF: npt.NDArray[np.float32], targets_ND: npt.NDArray[np.float32] | None, width: int
) -> tuple[Floats, Floats]:
    """Weight [width, F] and bias [width] of the head: normalise(weight x + bias) is the feature of what is pooled to x.

    UserError where the pictures differ in fewer than `width` directions, or the teacher's features are narrower.
    """
    centre_F = pooled_NF.mean(0, dtype=np.float64)
    offset_NF = pooled_NF - centre_F
    variance_F, directions_FF = np.linalg.eigh(offset_NF.T @ offset_NF)
    # The largest last.
    singular_D = np.sqrt(np.maximum(variance_F[::-1][:width], 0))
    if len(singular_D) < width or singular_D[-1] < 1e-6 * singular_D[0]:
        raise UserError(
            f"model.width: {width}, but the tower tells pictures apart in {int((variance_F > 0).sum())} directions at"
            " most; lower it, or name more head.layers"
        )
    weight_DF = directions_FF[:, ::-1][:, :width].T / np.sqrt(singular_D / singular_D[0])[:, None]
    if targets_ND is not None:
        if targets_ND.shape[1] != width:
            raise UserError(
                f"model.width: {width}, but the teacher's features are {targets_ND.shape[1]} wide; set it so"
            )
        rows_ND = offset_NF @ weight_DF.T
        rows_ND /= np.linalg.norm(rows_ND, axis=1, keepdims=True)
        left, _, right = np.linalg.svd(rows_ND.T @ targets_ND)
        weight_DF = (left @ right).T @ weight_DF
    return weight_DF, -weight_DF @ centre_F


def with_classes(
    pooled_NF: npt.NDArray[np.float32],
    weight_DF: Floats,
    rows_CP: npt.NDArray[np.float32],
    named_CD: npt.NDArray[np.float32],
    share: float,
) -> tuple[Floats, Floats]:
    """Weight [D, F] and bias [D] of the head weight_DF with what the classes tell: rows_CP are the classifier's,
    named_CD the features of the classes' names.

    Added is the B [D, P] that minimises the mean of |B x|² over the pictures' pooled outputs x, centred, plus HARDLY
    times their mean variance times |B - named_CD^T rows_CP|², scaled: on the pictures it is `share` as long as what the
    head says. UserError where the classifier reads other features than the pooled output, the first P of the F.
    """
    centre_F = pooled_NF.mean(0, dtype=np.float64)
    width = rows_CP.shape[1]
    first_NP = pooled_NF[:, :width]
    # Each part of what a head reads has length 1.
    if first_NP.shape[1] < width or np.abs(np.linalg.norm(first_NP, axis=1) - 1).max() > 1e-3:
        raise UserError(
            f"head.classes: the tower's classifier reads {width} features, which are not its pooled output; set it to 0"
        )
    offset_NP = first_NP - centre_F[:width]
    variance_PP = offset_NP.T @ offset_NP / len(offset_NP)
    ridge_PP = HARDLY * variance_PP.trace() / width * np.eye(width)
    told_DP = (named_CD - named_CD.mean(0, dtype=np.float64)).T @ (rows_CP - rows_CP.mean(0, dtype=np.float64))
    added_DP = np.linalg.solve(variance_PP + ridge_PP, ridge_PP @ told_DP.T).T
    said, added = (pooled_NF - centre_F) @ weight_DF.T, offset_NP @ added_DP.T
    lengths = [np.linalg.norm(rows_ND, axis=1).mean() for rows_ND in (said, added)]
    weight_DF = weight_DF.copy()
    weight_DF[:, :width] += share * lengths[0] / max(lengths[1], 1e-12) * added_DP
    return weight_DF, -weight_DF @ centre_F
