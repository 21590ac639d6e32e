"""A rank of a trial: some pictures of the source, and some of the run's own steps.

    python -m efficientclip.fitting.trial_rank CONFIG '{"source": …, "images": …, "columns": …, "pairs": 24, …}'

on each of the ranks: the first prints `{}` as soon as all is imported, and in its last line the other Rates as JSON.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from ..config import Config, MaskedLanguageModelling, load_config
from ..data.pairs import MaskedTexts, PairSource
from ..data.sources import open_source
from ..data.store import Texts, edges
from ..data.tables import Columns
from ..data.tokenizer import load_tokenizer
from ..files.places import location
from ..model.frozen import FrozenImages
from ..training.distributed import end_process, process_group, release_memory
from ..training.ranks import together, told
from ..training.run_folder import owned
from ..training.runs import Inputs, masked_texts, new_trainer
from ..training.trainer import Trainer
from .budget import FOLD_BATCH, LEAST_BATCH

PICTURES, AT_ONCE, SECONDS = 256, 16, 1.5
# Steps, the first of which do not count; of the others as many as take COUNTED seconds. Where few pairs take SLOW
# seconds, more are not tried.
STEPS, WARM_UP, COUNTED, SLOW = 12, 3, 1.5, 1.0


def _measure(config: Config, asked: dict[str, Any], rank: int) -> dict[str, float]:
    captions, pictures = told(_pictures_a_second(config, asked) if rank == 0 else ([], 0.0))
    pairs, step, text = _pairs_a_second(config, captions, asked["pairs"], asked["pictures"])
    return {"pictures": pictures, "pairs": pairs, "step": step, "text": text}


def _pictures_a_second(config: Config, asked: dict[str, Any]) -> tuple[list[str], float]:
    """Captions of the first pictures of a source, and how many of these are encoded, by one rank on all cores."""
    share, cores = torch.get_num_threads(), len(os.sched_getaffinity(0))
    torch.set_num_threads(cores)
    part = open_source(
        asked["source"], asked["images"] and location(asked["images"]), Columns(**asked["columns"])
    ).parts[0]
    if part.listing is not None:
        part = replace(part, listing=part.listing.part(0, PICTURES), bad=())
    frozen = FrozenImages(config)
    captions, spent, pictures = list[str](), 0.0, 0
    with frozen.loader(part, threads=cores) as loader:
        started = time.monotonic()
        batch = next(iter(loader))
        decoding = (time.monotonic() - started) / len(batch)
        captions += [text for texts in batch.captions for text in texts]
        frozen.encode_pixels(batch.images[:AT_ONCE])
        for at in range(0, len(batch) - AT_ONCE + 1, AT_ONCE):
            started = time.monotonic()
            frozen.encode_pixels(batch.images[at : at + AT_ONCE])
            spent, pictures = spent + time.monotonic() - started, pictures + AT_ONCE
            if spent > SECONDS:
                break
    # On a CPU the same cores decode.
    each = spent / max(pictures, 1) + (decoding if frozen.device.type == "cpu" else 0)
    torch.set_num_threads(share)
    return captions, 1 / max(each, 1e-6)


class _Enough(Exception):
    """As many steps are done as tell how long one takes."""


class _Timed(Trainer):
    """Notes the seconds of each step, and ends by _Enough: nothing is saved."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.steps, self.seconds = STEPS, list[float]()

    def anywhere(self) -> tuple[int, bool]:
        found = super().anywhere()
        self.seconds.append(time.perf_counter() - self.started)
        if len(self.seconds) == WARM_UP:
            self.steps = told(min(STEPS, WARM_UP + max(1, round(COUNTED / self.seconds[-1]))))
        if len(self.seconds) == self.steps:
            raise _Enough
        return found


class _Sample(PairSource):
    """`pairs` captions, which come again, and random pictures."""

    def __init__(
        self, captions: Sequence[Sequence[int]], pairs: int, pictures: int, width: int, masked: MaskedTexts | None
    ) -> None:
        own = np.arange(pairs, dtype=np.int32)
        rows_RD = np.random.default_rng(0).standard_normal((min(pictures, 4096), width), np.float32)
        rows_RD /= np.linalg.norm(rows_RD, axis=1, keepdims=True)
        features = rows_RD.astype(np.float16)[np.arange(pictures) % len(rows_RD)]
        shown = own % pictures
        super().__init__(trained_ids=own, frozen_ids=shown, features=features, edges=edges(own, shown, pairs))
        self.captions, self.masked = Texts.of([captions[at % len(captions)] for at in range(pairs)]), masked


def _pairs_a_second(
    config: Config, captions: list[str], pairs: int | None, pictures: int | None
) -> tuple[float, float, float]:
    """Of all ranks, in the run's own steps; a step's seconds beside its pairs; and the pairs that an unpaired text is
    worth."""
    tokenizer = load_tokenizer(config.data.tokenizer)
    ids = tokenizer(captions)["input_ids"]
    batch, bank, masked = config.training.batch_size, config.objective.bank_size, masked_texts(config)
    if pairs is not None:
        # Of a small table there are small batches.
        batch = min(batch, max(LEAST_BATCH, pairs // 4))
    if pictures is not None:
        bank = min(bank, pictures)
    world = dist.get_world_size()
    few = max(1, min(FOLD_BATCH, batch // 2) // world) * world
    batch = max(1, batch // world) * world

    def seconds(size: int, masked: MaskedTexts | None) -> float:
        """Of one step of `size` pairs."""
        sampled = max(STEPS * size, bank)
        source = _Sample(ids, sampled, min(sampled, pictures or sampled), config.model.width, masked)
        inputs = Inputs(source, lambda module: {}, {}, len(tokenizer))
        with tempfile.TemporaryDirectory() as folder:
            made = _config(config, Path(told(folder)) / "run", size, bank, mlm=masked is not None)
            with owned(made.run, "run", "a trial"):
                trainer = new_trainer(made, _Timed, inputs)
                with suppress(_Enough):
                    trainer.train()
            found = told(median(trainer.seconds[WARM_UP:]))
        del trainer
        release_memory()
        return found

    of_few = seconds(few, None)
    if of_few > SLOW or batch < 2 * few:
        # What a step costs beside its pairs is little beside these, or cannot be told.
        many, of_many = few, of_few
        each, step = of_few / few, 0.0
    else:
        many, of_many = batch, seconds(batch, None)
        each = max(of_many - of_few, 0.5 * of_many * (1 - few / many)) / (many - few)
        step = max(0.0, of_few - few * each)
    text = 0.0
    if masked is not None:
        texts = max(1, round(masked.per_batch * many / config.training.batch_size))
        text = max(0.0, seconds(many, replace(masked, per_batch=texts)) - of_many) / texts / each
    return 1 / each, step, text


def _config(config: Config, run: Path, size: int, bank: int, *, mlm: bool) -> Config:
    """That of a run which does not come to its end, and chooses no pairs."""
    micro = config.training.micro_batch_size
    budget = {"batch_size": size, "pair_visits": 2 * STEPS * size, "micro_batch_size": micro and min(micro, size)}
    unseen = {"report_to": [], "checkpoint_every": 2 * STEPS}
    training = config.training.model_copy(update=budget | unseen)
    return config.model_copy(
        update={
            "run": run,
            "training": training,
            "confidence": config.confidence.model_copy(update={"selection": "none"}),
            "model": config.model.model_copy(update={"start_from": None}),
            "mlm": config.mlm if mlm else MaskedLanguageModelling(),
            "objective": config.objective.model_copy(update={"bank_size": bank}),
        }
    )


def _tell() -> None:
    if os.environ["RANK"] == "0":
        print("{}", flush=True)

    def work() -> int:
        config, asked = load_config(Path(sys.argv[1])), json.loads(sys.argv[2])
        with process_group(config) as rank:
            rates = _measure(config, asked, rank)
            if rank == 0:
                print(json.dumps(rates), flush=True)
        return 0

    end_process(together(work))


if __name__ == "__main__":
    _tell()
