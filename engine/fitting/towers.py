"""Which towers `fit` puts together, and the recipe that they are trained by."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import model_info, try_to_load_from_cache
from transformers import AutoConfig
from transformers.image_processing_base import ImageProcessingMixin
from yaml import safe_load

from .. import __version__
from ..config import ImageTower, Model, load_config
from ..errors import UserError
from ..model.efficientclip import is_ours
from ..model.pretrained import image_width
from ..recipes import recipe
from ..training.run_folder import run_config

IMAGE, TEXT = "openai/clip-vit-base-patch32", "hfl/chinese-roberta-wwm-ext"
PATIENCE_SECONDS = 5
START = ("demo", "demo-distill", "demo-head")
# Of the demo's head: users have photographs, which the ImageNet tower has words for.
HEAD = ("head.classes=0.05",)
Tree = dict[str, Any]


@dataclass(frozen=True)
class Towers:
    """`tree` is a config's, without what belongs to one source of data; `start` is the folder of the towers that come
    with this package, where those are taken. `headless`: the image tower has no space of its own, and model.width
    is that of its pooled output, or of a text run's space, or what a config `asked` for."""

    tree: Tree
    image: str
    text: str
    start: Path | None = None
    headless: bool = False
    asked: bool = False


def choose(image: str | None, text: str | None) -> Towers:
    """The towers that are named, or else the usual ones of the hub where that, or its cache, is in reach, or else those
    that come with this package. UserError where one cannot be had, or is of another kind."""
    if image is None and text is None and not (_in_reach(IMAGE) and _in_reach(TEXT)):
        return embedded()
    tree: Tree = safe_load(recipe("efficientclip"))
    model = tree["model"]
    model["image_tower"], model["width"], projects = _image_tower(image or IMAGE)
    text = text or TEXT
    if is_ours(Path(text)):
        held = run_config(Path(text))
        model |= {"text_tower": held.model.model_dump(mode="json", exclude_none=True)["text_tower"], "start_from": text}
        model["width"] = model["width"] if projects else held.model.width
        tree["data"]["tokenizer"] = str(Path(text) / "tokenizer")
    else:
        _described("--text-tower", text)
        model["text_tower"], tree["data"]["tokenizer"] = {"pretrained": text}, text
    # Its optimiser is compiled for CUDA; without ZeRO, a user who needs it names a JSON.
    tree["optimizer"].pop("name")
    tree.pop("deepspeed")
    tree["mlm"] = {}
    return Towers(tree, image or IMAGE, text, headless=not projects)


def embedded() -> Towers:
    """An ImageNet tower and a text tower that was distilled on a dictionary, made once from package registries."""
    digest = hashlib.sha256("".join([__version__, *map(recipe, START), *HEAD]).encode()).hexdigest()[:12]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    start = cache / "efficientclip" / f"towers-{digest}"
    tree: Tree = safe_load(recipe("demo"))
    del tree["demo_data"], tree["data"]["validation"]
    tree["data"]["tokenizer"] = str(start / "data/demo/vocab.txt")
    tree["model"]["start_from"] = str(start / "runs/demo-distill")
    tree["model"]["image_tower"]["pretrained"] = str(start / "runs/demo-head")
    tree["mlm"]["texts"] = str(start / "stores/texts")
    return Towers(tree, "EfficientNet-Lite0 of ImageNet", "a BERT of 2 layers, distilled on a dictionary", start)


def of_config(file: Path, overrides: Sequence[str]) -> Towers:
    """Those of a user's config, and all else that it says."""
    config = load_config(file, overrides)
    if config.model.image_tower is None or config.model.text_tower is None or config.training.tower != "text":
        raise UserError(f"--config {file}: fit trains a text tower against an image tower; name both in it")
    tree: Tree = config.model_dump(mode="json", exclude_none=True)
    asked, name = config.model.width != Model.model_fields["width"].default, config.model.image_tower.pretrained
    headless = False
    if name is not None and not is_ours(Path(name)):
        field = "model.image_tower.pretrained:"
        width, projects = image_width(f"{field} {name}", _described(field, name, config.model.image_tower.revision))
        headless = not projects
        if headless and not asked:
            tree["model"]["width"] = width
    return Towers(tree, "of the config", "of the config", headless=headless, asked=asked)


def _image_tower(name: str) -> tuple[Tree, int, bool]:
    """The config's section, how wide its features are, and whether they lie in a space of its own."""
    if is_ours(Path(name)):
        held = run_config(Path(name))
        if held.model.image_tower is None:
            raise UserError(f"--image-tower {name}: is a run without an image tower; give an image run's folder")
        return (
            held.model.image_tower.model_dump(mode="json", exclude={"pretrained", "architecture", "revision"})
            | {"pretrained": name},
            held.model.width,
            True,
        )
    width, projects = image_width(f"--image-tower {name}:", _described("--image-tower", name))
    try:
        pixels, _ = ImageProcessingMixin.get_image_processor_dict(name)
        size = pixels.get("crop_size") or pixels["size"]
        edge = size if isinstance(size, int) else size.get("height", size.get("shortest_edge"))
        tower = ImageTower(pretrained=name, size=edge, mean=tuple(pixels["image_mean"]), std=tuple(pixels["image_std"]))
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"--image-tower {name}: its preprocessor_config.json does not tell size, mean and std of pictures"
            f" ({error}); put it beside the weights, or write a config and give --config"
        ) from error
    return tower.model_dump(mode="json", exclude_none=True), width, projects


def _described(option: str, name: str, revision: str | None = None) -> Any:
    try:
        return AutoConfig.from_pretrained(name, revision=revision or "main")
    except (OSError, ValueError) as error:
        raise UserError(f"{option} {name}: no model folder, run or reachable hub id ({error})") from error


def _in_reach(name: str) -> bool:
    """Whether the hub, or its cache, has it; a hub that does not answer is not asked again and again."""
    if isinstance(try_to_load_from_cache(name, "config.json"), str):
        return True
    try:
        model_info(name, timeout=PATIENCE_SECONDS)
    # What goes wrong depends on the client that the hub's library is built on.
    except Exception:
        return False
    return True
