"""How fast this machine is at a config's own work: some pictures and steps, in a process like those that will do it.

    python -m efficientclip.fitting.trial CONFIG '{"source": …, "images": …, "columns": …, "pairs": 24}'

on each of the ranks: the first prints `{}` as soon as all is imported, then the Rates as JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from ..config import Config, load_config
from ..data.batches import Batch, pack, packed_inputs
from ..data.sources import open_source
from ..data.store import Texts, TextStore
from ..data.tables import Columns
from ..data.tokenizer import load_tokenizer
from ..errors import UserError
from ..files.places import Location, location
from ..hardware import compute_dtype
from ..launchers import free_port
from ..model.efficientclip import build_model
from ..model.encode import to_device
from ..model.frozen import FrozenImages
from ..objectives.losses import pair_losses
from ..training.distributed import end_process, process_group
from ..training.ranks import together, told
from .stages import Stage, environment

PICTURES, AT_ONCE, SECONDS = 256, 16, 1.5
# Of steps on many captions the fastest counts, of those on few, where ranks wait for each other, the one in the middle.
STEPS, CAPTIONS = 3, 512
SMALL_STEPS, FEW = 9, 4


@dataclass(frozen=True)
class Rates:
    """`start`: seconds until a process has imported all; pictures and pairs a second of the whole machine; `step`:
    seconds of a step beside its pairs; `text`: how many pairs' time an unpaired text takes."""

    start: float
    pictures: float
    pairs: float
    step: float
    text: float


def measure(
    config: Path, source: Location, images: Location | None, columns: Columns, pairs: int | None, ranks: int
) -> Rates:
    """Rates of the config at `config` on the first pictures of `source`, on as many `ranks` as will train; UserError
    where these cannot be read. `pairs`: how many it has, if that is known."""
    asked = {"source": str(source), "images": images and str(images), "columns": vars(columns), "pairs": pairs}
    words = [sys.executable, "-m", "efficientclip.fitting.trial", str(config), json.dumps(asked)]
    shared = environment(Stage("", (), ranks=ranks))
    shared |= {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with ExitStack() as stack:
        said = stack.enter_context(tempfile.TemporaryFile("w+"))

        def begun(rank: int) -> subprocess.Popen[str]:
            out, own = subprocess.DEVNULL if rank else subprocess.PIPE, {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            return stack.enter_context(subprocess.Popen(words, stdout=out, stderr=said, text=True, env=shared | own))

        started = time.monotonic()
        first = begun(0)
        lines = iter(first.stdout or ())
        next(lines, "")
        start = time.monotonic() - started
        # Beside each other they would import more slowly than a stage does.
        others = [begun(rank) for rank in range(1, ranks)]
        told = next(lines, "")
        codes = [process.wait() for process in (first, *others)]
        said.seek(0)
        printed = ["the trial said nothing", *said.read().strip().splitlines()]
    if any(codes):
        errors = [line.removeprefix("error: ") for line in printed if line.startswith("error: ")]
        raise UserError([*errors, printed[-1]][0])
    return Rates(**{**json.loads(told), "start": start})


def _measure(config: Config, asked: dict[str, Any], rank: int, ranks: int) -> Rates:
    captions, pictures = told(_pictures_a_second(config, asked) if rank == 0 else ([], 0.0))
    return Rates(0.0, pictures, *_pairs_a_second(config, captions, asked["pairs"], ranks))


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


def _pairs_a_second(config: Config, captions: list[str], pairs: int | None, ranks: int) -> tuple[float, float, float]:
    """Of all ranks, each with its share of the cores, or a device, in steps on random images; a step's seconds beside
    its pairs; and the pairs that an unpaired text is worth."""
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    tokenizer = load_tokenizer(config.data.tokenizer)
    M, D = min(CAPTIONS, max(1, config.training.batch_size // ranks)), config.model.width
    ids = tokenizer([captions[at % len(captions)] for at in range(M)])["input_ids"]
    model = build_model(config.model, seed=0, vocabulary=len(tokenizer), sides=("text",))
    torch.nn.Module.to(model, device)
    model.compute = compute_dtype(config.training.precision)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    bank = min(config.objective.bank_size, pairs or config.objective.bank_size)

    def seconds(M: int) -> float:
        """Of one step, in which ranks sum their gradients."""
        rows_M = np.arange(M)
        inputs = to_device(packed_inputs(pack(Texts.of(ids[:M]), rows_M, config.training.max_caption_tokens)), device)
        random_KD = torch.nn.functional.normalize(torch.randn(M + bank, D, device=device), dim=1)
        frozen_MD, bank_QD = random_KD.half().split([M, bank])
        weights_M = torch.ones(M, device=device)
        batch = Batch(rows_M, np.ones(M, np.float32), rows_M, rows_M, frozen_MD, weights_M, [inputs], 0, 0, 0, bank_QD)
        started = time.monotonic()
        made = model(**inputs)
        pair_losses(made["features"], made["logit_scale"], batch, config.objective).total.backward()
        if ranks > 1:
            gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
            dist.all_reduce(torch.nn.utils.parameters_to_vector(gradients))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.monotonic() - started

    many = min(seconds(M) for _ in range(STEPS))
    step = 0.0
    if M > 2 * FEW:
        few = median(seconds(FEW) for _ in range(SMALL_STEPS))
        step = max(0.0, few - FEW * max(0.0, many - few) / (M - FEW))
    many, step = told((many, min(step, many / 2)))
    return ranks * M / (many - step), step, _text(config, sum(map(len, ids)) / M)


def _text(config: Config, caption_tokens: float) -> float:
    """How many pairs' time an unpaired text takes: its tokens, and the vocabulary head's, beside a caption's."""
    if config.mlm.texts is None or not config.mlm.texts_per_batch:
        return 0.0
    store = TextStore(config.mlm.texts)
    lengths = torch.from_numpy(store.offsets.copy()).diff().clamp(max=config.data.max_text_tokens)
    return float(lengths.double().mean()) / caption_tokens


def _tell() -> None:
    if os.environ["RANK"] == "0":
        print("{}", flush=True)

    def work() -> int:
        config, asked = load_config(Path(sys.argv[1])), json.loads(sys.argv[2])
        with process_group(config) as rank:
            rates = _measure(config, asked, rank, dist.get_world_size())
            if rank == 0:
                print(json.dumps(asdict(rates)), flush=True)
        return 0

    end_process(together(work))


if __name__ == "__main__":
    _tell()
