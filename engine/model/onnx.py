"""Both towers as ONNX, for machines without torch, each compared with the tower that it was written from."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.export import Dim
from tqdm import tqdm
from transformers import ChineseCLIPModel

from ..errors import UserError, short
from .efficientclip import EfficientCLIP

NEEDED = ("onnx", "onnxscript", "onnxruntime")
# What another order of sums may change of vectors of length 1.
TOLERANCE = 1e-4
WITHOUT = "export without --onnx, and report this"
Inputs = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Side:
    """A tower as it is written, what it shall answer, and inputs of some sizes: the first for tracing."""

    name: str
    module: nn.Module
    answer: Callable[[Inputs], torch.Tensor]
    inputs: list[Inputs]
    dynamic: dict[str, dict[int, Dim]]


def require_onnx() -> None:
    """UserError when a package that ONNX needs is missing."""
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        raise UserError(f"--onnx: {missing[0]} is missing; pip install 'efficientclip[onnx]'")


def write_onnx(model: ChineseCLIPModel | EfficientCLIP, folder: Path, *, size: int, longest: int) -> None:
    """Write text.onnx and image.onnx to `folder`, which is made.

    Text: `input_ids` and `attention_mask` int64 [N, L], L up to `longest`; image: `pixel_values` fp32 [N, 3, S, S], S =
    `size`. Both answer `features` fp32 [N, D], L2-normalised. UserError, which names the side, when one cannot be
    written, or onnxruntime makes something else of random inputs than the model does.
    """
    folder.mkdir()
    # They are slow to load.
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass
    from torch.onnx import errors, export

    for side in tqdm((_text(model, longest), _image(model, size)), desc="ONNX", unit="tower"):
        file = folder / f"{side.name}.onnx"
        try:
            with torch.no_grad(), _quiet():
                program = export(
                    side.module.eval(),
                    kwargs=side.inputs[0],
                    input_names=[*side.inputs[0]],
                    output_names=["features"],
                    dynamic_shapes=side.dynamic,
                    dynamo=True,
                    verbose=False,
                )
        except errors.OnnxExporterError as error:
            cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
            raise UserError(f"--onnx: the {side.name} tower cannot be written ({short(cause)}); {WITHOUT}") from error
        if program is None:
            raise UserError(f"--onnx: torch wrote nothing of the {side.name} tower; {WITHOUT}")
        # It has the paths of source files on this machine.
        ClearMetadataAndDocStringPass()(program.model)
        # One file a side, unless protobuf's 2 GB are too few.
        program.save(file, external_data=False)
        _check(side, file)


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter warns of torchvision, of its own calls, of what it does not fold, and of axes that share a name."""
    loggers = {name: logging.getLogger(name) for name in ("torch.onnx", "onnxscript")}
    levels = {name: logger.level for name, logger in loggers.items()}
    try:
        for logger in loggers.values():
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, logger in loggers.items():
            logger.setLevel(levels[name])


def _check(side: Side, file: Path) -> None:
    """UserError where onnxruntime answers otherwise than the tower, on inputs of other sizes than the traced one's."""
    import onnxruntime

    for inputs in side.inputs[1:]:
        with torch.no_grad():
            wanted_ND = side.answer(inputs).numpy()
        try:
            session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
            found_ND = session.run(["features"], {name: value.numpy() for name, value in inputs.items()})[0]
        except Exception as error:
            raise UserError(
                f"--onnx: onnxruntime cannot run the {side.name} tower ({short(error)}); {WITHOUT}"
            ) from error
        apart = float(np.abs(found_ND - wanted_ND).max()) if found_ND.shape == wanted_ND.shape else float("inf")
        if not apart <= TOLERANCE:
            raise UserError(
                f"--onnx: onnxruntime's features of the {side.name} tower are up to {apart:.2g} from its own; {WITHOUT}"
            )


def _text(model: ChineseCLIPModel | EfficientCLIP, longest: int) -> Side:
    module = ChineseTexts(model) if isinstance(model, ChineseCLIPModel) else PaddedTexts(model)
    embedding: Any = module.backbone.get_input_embeddings()
    words = embedding.num_embeddings
    random = torch.Generator().manual_seed(0)
    inputs = []
    for texts, length in ((2, min(longest, 8)), (1, min(longest, 5)), (5, longest)):
        ends = torch.randint(1, length + 1, (texts, 1), generator=random).index_fill(0, torch.tensor(0), length)
        ids = torch.randint(words, (texts, length), generator=random)
        inputs.append({"input_ids": ids, "attention_mask": (torch.arange(length) < ends).long()})
    shape = {0: Dim("texts"), 1: Dim("tokens", max=longest)}

    def answer(inputs: Inputs) -> torch.Tensor:
        return _normalised(model.get_text_features(**inputs))

    return Side("text", module, answer, inputs, {name: shape for name in inputs[0]})


def _image(model: ChineseCLIPModel | EfficientCLIP, size: int) -> Side:
    module = Pictures(model)
    random = torch.Generator().manual_seed(0)
    inputs = [{"pixel_values": torch.randn((images, 3, size, size), generator=random)} for images in (2, 1, 3)]

    def answer(inputs: Inputs) -> torch.Tensor:
        return _normalised(model.get_image_features(**inputs))

    return Side("image", module, answer, inputs, {"pixel_values": {0: Dim("images")}})


def _normalised(output: Any) -> torch.Tensor:
    features: torch.Tensor = getattr(output, "pooler_output", output)
    return F.normalize(features, dim=-1)


class ChineseTexts(nn.Module):
    """Chinese-CLIP's text half."""

    def __init__(self, model: ChineseCLIPModel) -> None:
        super().__init__()
        self.model, self.backbone = model, model.text_model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return _normalised(self.model.get_text_features(input_ids=input_ids, attention_mask=attention_mask))


class Pictures(nn.Module):
    """The image half."""

    def __init__(self, model: ChineseCLIPModel | EfficientCLIP) -> None:
        super().__init__()
        self.tower: Any = model.get_image_features if isinstance(model, ChineseCLIPModel) else model.image
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return _normalised(self.tower(pixel_values))


class PaddedTexts(nn.Module):
    """A text tower whose texts are padded: attention has a mask where packed rows have segments."""

    def __init__(self, model: EfficientCLIP) -> None:
        super().__init__()
        tower: Any = model.text
        self.backbone: Any = copy.deepcopy(tower.backbone)
        self.backbone.set_attn_implementation("sdpa")
        self.projection, self.pooling, self.first_position = tower.projection, tower.pooling, tower.first_position

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
        states_NLH = self.backbone(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=positions + self.first_position,
            token_type_ids=torch.zeros_like(input_ids),
        ).last_hidden_state
        if self.pooling == "mean":
            real_NL1 = attention_mask[..., None].to(states_NLH.dtype)
            pooled_NH = (states_NLH * real_NL1).sum(1) / real_NL1.sum(1)
        else:
            # The first real token has the largest of numbers that fall, the last of those that rise.
            rising = torch.arange(1, input_ids.shape[1] + 1)
            numbers = rising if self.pooling == "last" else rising.flip(0)
            place_N = (attention_mask * numbers).argmax(1)
            pooled_NH = states_NLH.gather(1, place_N[:, None, None].expand(-1, 1, states_NLH.shape[-1])).squeeze(1)
        return F.normalize(self.projection(pooled_NH).float(), dim=-1)
