"""README.md of an exported folder: a model card, whose head the Hugging Face hub reads."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import ChineseCLIPModel, PreTrainedModel

from ..data.store import Store
from ..errors import UserError, reading
from ..files import digests
from ..hardware import in_words, read_hardware
from ..noise.cross_fit import read_near, read_rates, read_visits
from ..objectives.retrieval import CUTOFFS
from ..training.run_folder import RESTORE, run_identity
from .evaluate import DIRECTIONS
from .run import Run, read_metrics

CANDIDATES = {"t2i": "candidates", "i2t": "texts"}
TASKS = {"t2i": "text-to-image-retrieval", "i2t": "image-to-text-retrieval"}
LICENCE_ID = re.compile(r"[a-z0-9][a-z0-9.+-]*")
UNLICENSED = (
    "## Licence",
    "",
    "None is named yet: it is whose model this is to choose one, minding those of the data and of the image tower.",
    "",
)
ONNX = (
    "By onnxruntime, without torch; vectors are L2-normalised:",
    "",
    "```python",
    "import onnxruntime",
    "",
    'sides = {side: onnxruntime.InferenceSession(f"{folder}/onnx/{side}.onnx") for side in ("text", "image")}',
    'texts = processor(text=["一条狗"], padding=True, truncation=True, return_tensors="np")',
    'text = sides["text"].run(None, {name: texts[name] for name in ("input_ids", "attention_mask")})[0]',
    'image = sides["image"].run(None, dict(processor(images=Image.open("picture.jpg"), return_tensors="np")))[0]',
    "```",
    "",
)


class Licence(NamedTuple):
    """As the hub is told: by its identifier there, or, as one of one's own, by name and link; none: not named."""

    id: str | None = None
    name: str | None = None
    link: str | None = None


def licence_of(given: str | None) -> Licence:
    """By the hub's identifier, or by NAME=LINK where it has none; UserError for what it would refuse by its form."""
    if given is None:
        return Licence()
    name, own, link = given.partition("=")
    if not LICENCE_ID.fullmatch(name) or (own and not link) or given == "other":
        raise UserError(
            f"--license {given}: give the hub's identifier, in small letters (apache-2.0, cc-by-nc-4.0), or for any"
            " other licence NAME=LINK, whose link is an address or a file that you put into the folder"
        )
    return Licence("other", name, link) if own else Licence(name)


def model_card(opened: Run, whole: PreTrainedModel, licence: Licence, *, onnx: bool) -> str:
    """The card of `whole`, which was exported from the run `opened`; `onnx`: as ONNX, too.

    UserError where what the run left of itself is broken.
    """
    steps, validations = read_metrics(opened.folder / "metrics.jsonl")
    results, recall = _recall(opened.folder, validations[-1]["validation"] if validations else {})
    chinese = isinstance(whole, ChineseCLIPModel)
    library, features = ("transformers", ".pooler_output") if chinese else ("efficientclip", "")
    name, tower = type(whole).__name__, opened.config.model.image_tower
    head = ModelCardData(
        language="zh",
        license=licence.id,
        license_name=licence.name,
        license_link=licence.link,
        library_name=library,
        pipeline_tag="zero-shot-image-classification",
        tags=["chinese-clip", "efficientclip", *(["onnx"] if onnx else [])],
        base_model=_on_the_hub(opened) or None,
        model_name=opened.folder.name if results else None,
        eval_results=results or None,
    )
    parts = [
        "---",
        head.to_yaml(),
        "---",
        "",
        f"# {opened.folder.name}",
        "",
        "Chinese texts and pictures in one space, trained by EfficientCLIP: a text tower learns against the features",
        f"of a frozen image tower (`{_named(tower.pretrained) if tower else ''}`).",
        f"{sum(parameter.numel() for parameter in whole.parameters()):,} parameters; features of"
        f" {opened.config.model.width} values.",
        "",
        "## Use",
        "",
        "```python",
        "import torch",
        "from PIL import Image",
        "from transformers import ChineseCLIPProcessor",
        f"from {library} import {name}",
        "",
        'folder = "path/to/this/folder"',
        f"model, processor = {name}.from_pretrained(folder), ChineseCLIPProcessor.from_pretrained(folder)",
        'texts = processor(text=["一只戴帽子的猫", "一条狗"], padding=True, truncation=True, return_tensors="pt")',
        'pictures = processor(images=Image.open("picture.jpg"), return_tensors="pt")',
        "with torch.inference_mode():",
        f"    text = torch.nn.functional.normalize(model.get_text_features(**texts){features}, dim=-1)",
        f"    image = torch.nn.functional.normalize(model.get_image_features(**pictures){features}, dim=-1)",
        "print(image @ text.T)  # cosines",
        "```",
        "",
        f"As a classifier of pictures{'' if chinese else ', where the class was imported as above'}:",
        "",
        "```python",
        "from transformers import pipeline",
        "",
        'classify = pipeline("zero-shot-image-classification", model=folder)',
        'print(classify("picture.jpg", candidate_labels=["猫", "狗"], hypothesis_template="一张{}的照片"))',
        "```",
        "",
        "By sentence-transformers, whose vectors are L2-normalised:",
        "",
        "```python",
        "from sentence_transformers import SentenceTransformer",
        "",
        "encoder = SentenceTransformer(folder)",
        'text, image = encoder.encode("一只戴帽子的猫"), encoder.encode(Image.open("picture.jpg"))',
        "```",
        "",
        *(ONNX if onnx else ()),
        f"Texts are cut to {opened.config.training.max_caption_tokens} tokens, as in training.",
        "",
        "## Data",
        "",
        *_data(opened),
        "",
        "## Noise",
        "",
        *_noise(opened),
        "",
        "## Resources",
        "",
        *_resources(opened, steps),
        "",
        "## Recall",
        "",
        *recall,
        "",
        "## Intended use",
        "",
        "Research on retrieval between Chinese texts and pictures, and zero-shot classification of pictures. The model",
        "has the biases of its captions, and of the data that its image tower saw. Measure it on your own",
        "data before you rely on it; it is not meant for the identification or surveillance of people.",
        "",
        *(UNLICENSED if licence.id is None else ()),
    ]
    return "\n".join(parts)


def _named(pretrained: str | None) -> str:
    """What a tower was begun from: its name on the hub, or that of its folder here."""
    if pretrained is None:
        return "from scratch"
    return Path(pretrained).name if Path(pretrained).exists() else pretrained


def _on_the_hub(opened: Run) -> list[str]:
    """The models that the towers were begun from, as far as they are the hub's."""
    towers = (opened.config.model.text_tower, opened.config.model.image_tower)
    found = []
    for name in dict.fromkeys(tower.pretrained for tower in towers if tower is not None and tower.pretrained):
        try:
            validate_repo_id(name)
        except HFValidationError:
            continue
        if not Path(name).exists():
            found.append(name)
    return found


def _data(opened: Run) -> Iterator[str]:
    manifest = opened.manifest
    if opened.store is None:
        paths = (source.path for source in opened.config.data.sources.values())
        yield f"- images and captions of {', '.join(path.name for path in paths if path is not None)}"
        return
    source = Path(str(manifest["source"])).name if "source" in manifest else opened.store.name
    # Without its store, a run does not know how many pairs it had.
    counts = [f"{manifest[kind]:,} {kind}" for kind in ("pairs", "images", "captions") if kind in manifest]
    yield f"- {f'{counts[0]} of {counts[1]} and {counts[2]}: ' if len(counts) == 3 else ''}{source}"
    if bad := sum(manifest.get("bad_counts", {}).values()):
        yield f"- {bad:,} bad samples were left out"
    if by_hand := (run_identity(opened.folder) or {}).get("verdicts"):
        yield f"- a person's verdicts: {by_hand['right']:,} pairs never dropped, {by_hand['wrong']:,} never trained on"
    kept = _kept(opened.folder)
    if kept is not None:
        yield f"- {kept.mean():.1%} of the pairs were still trained on at the end (Ensemble Confident Learning)"
    if opened.config.mlm.texts_per_batch and opened.config.mlm.texts is not None:
        yield f"- unpaired texts for masked-language modelling: {opened.config.mlm.texts.name}"
    pairs = manifest.get("pairs")
    if pairs and (kept is None or len(kept) == pairs):
        shares = Store(opened.store).sources().shares(np.ones(pairs, np.bool_) if kept is None else kept)
        if len(shares) > 1:
            yield from ("", "| source | pairs | kept |", "|---|---|---|")
            yield from (f"| {_cell(name)} | {count:,} | {share:.1%} |" for name, (count, share) in shares.items())


def _kept(run: Path) -> npt.NDArray[np.bool_] | None:
    """Which pairs the run trained on at its end, by row; None: it has not told."""
    file = run / "confidence.parquet"
    digests.check_written(run, file.name, remedy=RESTORE)
    if not file.is_file():
        return None
    with reading("verdicts", file, RESTORE):
        table = pq.read_table(file, columns=["row", "kept"]).sort_by("row")
        return np.asarray(table["kept"].to_numpy(), np.bool_)


def _noise(opened: Run) -> Iterator[str]:
    folder = opened.config.confidence.cross_fit
    if folder is None:
        yield "Not estimated."
        return
    rates = read_rates(folder)
    if not rates:
        yield "Not told: what `efficientclip cross-fit` found is not at hand."
        return
    yield "Wrong pairs, estimated before training, without labels, by two towers that each judged pairs which they had"
    yield "not trained on:"
    yield from ("", "| pairs of | pairs | wrong | 90 % interval |", "|---|---|---|---|")
    for rate in rates:
        told = "cannot be told" if rate.open else f"{rate.rate:.1%}"
        yield f"| {_cell(rate.name)} | {rate.pairs:,} | {told} | {rate.low:.1%} to {rate.high:.1%} |"
    if near := read_near(folder):
        yield from ("", f"{near}.")


def _resources(opened: Run, steps: list[dict[str, Any]]) -> Iterator[str]:
    training, before = opened.config.training, opened.config.model.start_from
    yield f"- {training.pair_visits:,} pair visits in batches of {training.batch_size:,}"
    visits = np.diff([0, *(line["visits"] for line in steps)])
    seconds = sum(n / line["pairs_per_s"] for n, line in zip(visits, steps, strict=True))
    if seconds:
        yield f"- {seconds / 3600:.2g} hours of training steps, {training.pair_visits / seconds:,.0f} pairs a second"
    yield f"- hardware: {in_words(read_hardware(opened.folder / 'hardware.json'))}"
    if (folder := opened.config.confidence.cross_fit) is not None and (beside := read_visits(folder)) is not None:
        yield f"- before it {beside:,} pair visits of the two towers that estimated the noise"
    if before is not None:
        yield f"- the run {before.name}, to which its weights go back, is not counted here"


def _recall(run: Path, tables: Mapping[str, Any]) -> tuple[list[EvalResult], list[str]]:
    """For the hub and for readers: from the report where there is one, else from the last validation, `tables`."""
    results = run / "results.json"
    with reading("results", results, f"write it anew by `efficientclip report {run}`"):
        if results.is_file():
            tables = json.loads(results.read_text(encoding="utf-8"))
        tables = {name: report for name, report in tables.items() if name != "made_by"}
        return list(_results(tables)), list(_recall_table(tables))


def _results(tables: Mapping[str, Any]) -> Iterator[EvalResult]:
    """The recalls as the hub's model-index has them."""
    for name, report in tables.items():
        for key, task in TASKS.items():
            for k in CUTOFFS:
                yield EvalResult(
                    task_type=task,
                    dataset_type=re.sub(r"\W+", "-", name).strip("-") or "data",
                    dataset_name=name,
                    metric_type=f"recall_at_{k}",
                    metric_name=f"R@{k} in %",
                    metric_value=round(float(report[key][f"R@{k}"]), 2),
                )


def _recall_table(tables: Mapping[str, Any]) -> Iterator[str]:
    if not tables:
        yield "Not measured: the run has neither validation data nor a report (`efficientclip report`)."
        return
    yield "| data | direction | candidates | " + " | ".join(f"R@{k} %" for k in CUTOFFS) + " |"
    yield "|" + "---|" * (3 + len(CUTOFFS))
    for name, report in tables.items():
        for key, shown in DIRECTIONS.items():
            figures = " | ".join(f"{report[key][f'R@{k}']:.1f}" for k in CUTOFFS)
            yield f"| {_cell(name)} | {shown} | {report[CANDIDATES[key]]:,} | {figures} |"


def _cell(text: str) -> str:
    """In a table of Markdown."""
    return text.replace("|", "\\|")
