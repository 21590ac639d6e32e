"""How fast this machine is at a config's own work: some pictures and steps, in a process like those that will do it.

    python -m efficientclip.fitting.trial CONFIG '{"source": …, "images": …, "columns": …, "ranks": 2}'

prints `{}` as soon as all is imported, then the Rates as JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..config import Config, load_config
from ..data.batches import Batch, pack, packed_inputs
from ..data.sources import open_source
from ..data.store import Texts, TextStore
from ..data.tables import Columns
from ..data.tokenizer import load_tokenizer
from ..errors import UserError, reported
from ..files.places import Location, location
from ..hardware import compute_dtype, cores_of_rank
from ..model.efficientclip import build_model
from ..model.encode import to_device
from ..model.frozen import FrozenImages
from ..objectives.losses import pair_losses
from ..training.distributed import process_group
from .stages import Stage, environment

PICTURES, AT_ONCE, SECONDS = 256, 16, 1.5
STEPS, CAPTIONS = 3, 512


@dataclass(frozen=True)
class Rates:
    """`start`: seconds until a process has imported all; pictures and pairs a second of the whole machine."""

    start: float
    pictures: float
    pairs: float


def measure(config: Path, source: Location, images: Location | None, columns: Columns, ranks: int) -> Rates:
    """Rates of the config at `config` on the first pictures of `source`; UserError where these cannot be read."""
    asked = {"source": str(source), "images": images and str(images), "columns": vars(columns), "ranks": ranks}
    words = [sys.executable, "-m", "efficientclip.fitting.trial", str(config), json.dumps(asked)]
    started = time.monotonic()
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(Stage("", ()))
    ) as process:
        lines = iter(process.stdout or ())
        next(lines, "")
        start = time.monotonic() - started
        told = next(lines, "")
        said = process.communicate()[1].strip().splitlines()
    if process.returncode:
        raise UserError((said or ["the trial said nothing"])[-1].removeprefix("error: "))
    return Rates(**{**json.loads(told), "start": start})


def _measure(config: Config, asked: dict[str, Any]) -> Rates:
    part = open_source(
        asked["source"], asked["images"] and location(asked["images"]), Columns(**asked["columns"])
    ).parts[0]
    if part.listing is not None:
        part = replace(part, listing=part.listing.part(0, PICTURES), bad=())
    frozen = FrozenImages(config)
    captions, spent, pictures = list[str](), 0.0, 0
    with frozen.loader(part, threads=cores_of_rank()) as loader:
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
    del frozen
    return Rates(0.0, 1 / max(each, 1e-6), _pairs_a_second(config, captions, asked["ranks"]))


def _pairs_a_second(config: Config, captions: list[str], ranks: int) -> float:
    """Of all ranks, each with its share of the cores, or a device: steps on random images."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    if not cuda:
        torch.set_num_threads(max(1, torch.get_num_threads() // ranks))
    tokenizer = load_tokenizer(config.data.tokenizer)
    M, D = min(CAPTIONS, max(1, config.training.batch_size // ranks)), config.model.width
    ids = tokenizer([captions[at % len(captions)] for at in range(M)])["input_ids"]
    model = build_model(config.model, seed=0, vocabulary=len(tokenizer), sides=("text",))
    torch.nn.Module.to(model, device)
    model.compute = compute_dtype(config.training.precision)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    rows_M, weights_M = np.arange(M), torch.ones(M, device=device)
    inputs = to_device(packed_inputs(pack(Texts.of(ids), rows_M, config.training.max_caption_tokens)), device)
    random_KD = torch.nn.functional.normalize(torch.randn(M + config.objective.bank_size, D, device=device), dim=1)
    frozen_MD, bank_QD = random_KD.half().split([M, config.objective.bank_size])
    batch = Batch(rows_M, np.ones(M, np.float32), rows_M, rows_M, frozen_MD, weights_M, [inputs], 0, 0, 0, bank_QD)
    best = float("inf")
    for _ in range(STEPS):
        started = time.monotonic()
        made = model(**inputs)
        pair_losses(made["features"], made["logit_scale"], batch, config.objective).total.backward()
        optimizer.step()
        optimizer.zero_grad()
        if cuda:
            torch.cuda.synchronize()
        best = min(best, time.monotonic() - started)
    return ranks * M / (best * (1 + _unpaired(config, sum(map(len, ids)) / M)))


def _unpaired(config: Config, caption_tokens: float) -> float:
    """What unpaired texts add to a step, as a share: their tokens, and the vocabulary head's, beside the captions'."""
    if config.mlm.texts is None or not config.mlm.texts_per_batch:
        return 0.0
    store = TextStore(config.mlm.texts)
    lengths = torch.from_numpy(store.offsets.copy()).diff().clamp(max=config.data.max_text_tokens)
    tokens = config.mlm.texts_per_batch * float(lengths.double().mean())
    return tokens / (config.training.batch_size * caption_tokens)


def _tell() -> None:
    print("{}", flush=True)
    config, asked = load_config(Path(sys.argv[1])), json.loads(sys.argv[2])
    with process_group(config):
        print(json.dumps(asdict(_measure(config, asked))), flush=True)


if __name__ == "__main__":
    sys.exit(reported(_tell))
