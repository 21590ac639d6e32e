"""`efficientclip report RUN`: what a run reached, as one page that opens from disk and fetches nothing."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import numpy.typing as npt
import torch
from markupsafe import Markup

from .. import __version__
from ..data.store import Store
from ..errors import UserError
from ..files.atomic import write_atomically
from ..files.ownership import MADE_BY, claim_file
from ..files.places import Location
from ..hardware import in_words, machine_name, read_hardware
from ..noise.cross_fit import read_near, read_rates
from .charts import Line, histogram, line_chart
from .evaluate import DIRECTIONS, MEASURES, caption_features, measure, write_json
from .gallery import Shown, caption_queries, free_queries, has_pictures, named_pictures, surest_pairs
from .run import left_out, open_data, open_run, read_metrics, trained_on
from .verdicts import Detection, Verdicts, detection, read_verdicts


@dataclass(frozen=True)
class Figure:
    value: str
    label: str
    note: str


@dataclass(frozen=True)
class Chart:
    title: str
    note: str
    svg: Markup


def write_report(
    run: Path,
    tables: Mapping[str, Location],
    output: Path | None = None,
    *,
    gallery: Sequence[str] = (),
    replace: bool = False,
    store: Path | None = None,
) -> Path:
    """Write the page `output`, by default RUN/report.html, and results.json beside it; returns the page.

    `tables`: set names to stores or pictures with captions; `gallery` names those whose queries and pictures are shown,
    by default the first. Pictures stand with the nearest captions of the first set. ECL's part needs
    confidence.parquet, which the end of training writes. UserError, before any work, where something else is there;
    `replace` overwrites it.
    """
    if unknown := [name for name in gallery if name not in tables]:
        raise UserError(f"--gallery {unknown[0]}: is no set of --data; choose of {', '.join(tables)}")
    instead = "name a page elsewhere by --output FILE.html"
    file = claim_file(output or run / "report.html", "page", replace=replace, instead=instead)
    figures = claim_file(file.with_name("results.json"), "result", replace=replace, instead=instead)
    opened = open_run(run, store)
    if opened.store is None:
        raise UserError(f"run {run}: trained from shards, without a store to report on; use `efficientclip evaluate`")
    store_trained = trained_on(run, opened.config, opened.store)
    results: dict[str, Any] = {}
    shown: dict[str, Shown] = {}
    names: tuple[Store, npt.NDArray[np.float32]] | None = None
    with ExitStack() as stack:
        for name, path in tables.items():
            data = stack.enter_context(open_data(opened, path))
            text_KD = caption_features(opened, data)
            results[name] = measure(data, text_KD)
            first, names = names is None, names or (data, text_KD)
            if (name in gallery or (first and not gallery)) and has_pictures(data):
                free = free_queries(opened, data) if first else []
                shown[name] = Shown(caption_queries(data, text_KD), free, named_pictures(data, *names))
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(results, figures)
    steps, validations = read_metrics(run / "metrics.jsonl")
    verdicts = read_verdicts(run, store_trained)
    judged = opened.config.confidence.cross_fit
    detected = None if verdicts is None else detection(verdicts)
    arguments = ["--data", *(f"{name}={path}" for name, path in tables.items())] if tables else []
    arguments += ["--gallery", *gallery] if gallery else []
    arguments += ["--output", str(output)] if output else []
    page = template("report.html").render(
        run=opened,
        store=store_trained.manifest,
        parameters=sum(parameter.numel() for parameter in opened.model.parameters()),
        figures=list(_figures(results, steps, detected)),
        results=results,
        left_out=left_out,
        measures=MEASURES,
        gallery=shown,
        charts=list(_training_charts(steps, validations)),
        ecl_charts=[] if verdicts is None else list(_ecl_charts(steps, verdicts, detected)),
        detection=detected,
        sources={} if verdicts is None else store_trained.sources().shares(verdicts.kept),
        rates=[] if judged is None else read_rates(judged),
        near="" if judged is None else read_near(judged),
        dropped=[] if verdicts is None else surest_pairs(verdicts, store_trained, kept=False),
        kept=[] if verdicts is None else surest_pairs(verdicts, store_trained, kept=True),
        config=(run / "config.yaml").read_text(encoding="utf-8"),
        command=shlex.join(["efficientclip", "report", str(run), *arguments]),
        written=datetime.now().astimezone(),
        machine=in_words(read_hardware(run / "hardware.json")),
        hardware=machine_name(),
        versions=f"efficientclip {__version__}, torch {torch.__version__}",
    )
    write_atomically(file, page.encode())
    return output or run / "report.html"


def template(name: str) -> jinja2.Template:
    """A page's template; all of them extend page.html."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["made_by"] = f"{MADE_BY} {__version__}"
    return environment.get_template(name)


def _figures(
    results: Mapping[str, Any], steps: Sequence[dict[str, Any]], detected: Detection | None
) -> Iterator[Figure]:
    for name, report in list(results.items())[:1]:
        for direction, candidates in (("t2i", report["candidates"]), ("i2t", report["texts"])):
            note = f"{name}: {candidates:,} candidates, chance is {min(10 / candidates, 1):.1%}"
            yield Figure(f"{report[direction]['R@10']:.1f}%", f"{DIRECTIONS[direction]} recall@10", note)
    if detected is not None:
        yield Figure(f"{detected.noise_dropped:.1%}", "of the noise dropped", f"of {detected.noisy:,} wrong captions")
        yield Figure(f"{detected.clean_lost:.1%}", "of the clean pairs lost", f"of {detected.clean:,} right captions")
        yield Figure(f"{detected.auc:.3f}", "AUC of the ECL score", "clean against noisy, chance is 0.5")
    if steps:
        speed = float(np.median([line["pairs_per_s"] for line in steps]))
        note = f"{steps[-1]['step']:,} steps, {speed:,.0f} pairs a second"
        yield Figure(f"{steps[-1]['visits']:,}", "pair visits", note)


def _training_charts(steps: Sequence[dict[str, Any]], validations: Sequence[dict[str, Any]]) -> Iterator[Chart]:
    if validations:
        lines = [
            Line(
                f"{name}, {shown}",
                [line["visits"] for line in validations],
                [line["validation"][name][direction]["R@10"] for line in validations],
                colour,
                dashed=direction == "i2t",
            )
            for colour, name in enumerate(validations[-1]["validation"])
            for direction, shown in DIRECTIONS.items()
        ]
        recall = line_chart(lines, y_label="recall@10 in %", y_from_zero=True)
        yield Chart("Validation recall", "held-out pairs, after each epoch", recall)
    if any(line["contrastive"] for line in steps):
        loss = line_chart([_curve(steps, "contrastive")], y_label="nats")
        yield Chart("Contrastive loss", "mean of both directions, batch and bank", loss)
    if any(line["mlm"] for line in steps):
        loss = line_chart([_curve(steps, "mlm")], y_label="nats")
        yield Chart("Masked-language-modelling loss", "mean over the masked tokens", loss)
    if steps:
        rate = line_chart([_curve(steps, "lr")], y_label="learning rate", y_from_zero=True)
        yield Chart("Learning rate", "a function of the visits, whatever is dropped", rate)


def _ecl_charts(steps: Sequence[dict[str, Any]], verdicts: Verdicts, detected: Detection | None) -> Iterator[Chart]:
    scored, noise = verdicts.scored, verdicts.noise
    groups = {"all pairs": verdicts.score[scored]}
    if noise is not None:
        groups = {
            "right caption": verdicts.score[scored & ~noise],
            "wrong caption": verdicts.score[scored & noise],
        }
    note = "at the end of training" if detected is None else f"at the end of training, AUC {detected.auc:.3f}"
    scores = histogram(groups, x_label="mean score, in standard deviations of the batch")
    yield Chart("Scores of the pairs", note, scores)
    if steps:
        kept = line_chart([_curve(steps, "kept_share", 100)], y_label="% of all pairs", y_from_zero=True)
        yield Chart("Pairs kept", "what ECL leaves to train on", kept)


def _curve(steps: Sequence[dict[str, Any]], key: str, factor: float = 1) -> Line:
    return Line(key, [line["visits"] for line in steps], [line[key] * factor for line in steps])
