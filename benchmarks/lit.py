"""A text tower trained against a locked image tower (LiT, arXiv 2111.07991): our trainer beside open_clip's.

    python -m benchmarks.lit [--rounds 7]

The same two towers in both: ViT-B/32, frozen, and a text tower of 12 layers of width 512, fresh weights; batches of 64
pairs, captions of 20 tokens of a vocabulary of 49,408; no MLM, which open_clip does not have; two threads; fp32, and
bf16 by autocast.

- ours: the trainer's own loop on a store, 20,000 frozen rows in the bank as the recipes have it; no bank beside it.
- open_clip: its own program with `--lock-image`, on pictures that are in memory already; captions padded to the 77
  tokens that its users train with. Beside it a context of 20, which pads nothing.
- features: what the frozen tower makes of pictures in memory, once, as `prepare` does it. The last row spreads their
  time over 20 epochs.

Every one is a process of its own; they take turns. `peak_mib` is the most that a process held beyond its imports,
`step_mib` the most that a step held beyond what lay there before it: both train 63 million parameters, which with
gradients and moments are 967 MiB of the former.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import numpy.typing as npt
import torch
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from benchmarks.measuring import MIB, RESULTS, Memory, Neighbours, Row, hardware, require_green, show_and_record
from efficientclip.config import load_config
from efficientclip.data.batches import Batch
from efficientclip.data.store import PAIR_FILES, staging
from efficientclip.data.tokenizer import fingerprint
from efficientclip.hardware import COMPUTED_IN, compute_dtype
from efficientclip.model.frozen import FrozenImages, frozen_name
from efficientclip.prepare.writer import finish, token_dtype, write_ids, write_tokens
from efficientclip.training.runs import set_up
from efficientclip.training.trainer import Trainer
from tests import tiny

ROOT = Path(__file__).parents[1]
TESTS = ("tests/model/test_packed.py", "tests/kernels/test_contrastive.py")
PRECISIONS = {"fp32": "fp32", "bf16": "amp_bf16"}
THREADS, EPOCHS, PATCH = 2, 20, 32
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
KEY = ("hardware", "torch", "what", "precision")
SHOWN = ("what", "pairs_per_s", "over_open_clip", "peak_mib", "step_mib", "rounds", "note")
COLUMNS = (*KEY, *SHOWN[1:], "date", "command")

Seconds = dict[str, npt.NDArray[np.float64]]


@dataclass(frozen=True)
class Size:
    """Of both towers and of what they are trained on; a store has as many images as captions and pairs."""

    layers: int = 12
    width: int = 512
    heads: int = 8
    vocabulary: int = 49_408
    image_layers: int = 12
    image_width: int = 768
    pixels: int = 224
    pairs: int = 24_576
    bank: int = 20_000
    batch: int = 64
    tokens: int = 20
    context: int = 77


class Turns:
    """A process's place among the others: called before each step, it waits where a turn ends until the next begins.

    A turn's first step is not timed: memory of a process that was idle for seconds is slow at first.
    """

    def __init__(self, pipe: Connection) -> None:
        self.pipe, self.memory, self.left, self.timed = pipe, Memory("cpu"), 0, 0

    def begin(self) -> None:
        """What is held from now on counts."""
        self.memory.start()
        self.began = time.perf_counter()

    def __call__(self) -> None:
        if self.left == 0:
            self.pipe.send((time.perf_counter() - self.began, self.memory.peak()))
            try:
                self.timed, anew = self.pipe.recv()
            except EOFError:
                sys.exit()
            self.left = self.timed + 1
            if anew:
                self.memory.start()
        elif self.left == self.timed:
            self.began = time.perf_counter()
        self.left -= 1


# Implementations: each runs until its process is ended.


class PacedTrainer(Trainer):
    def __init__(self, turns: Turns, *given: Any) -> None:
        super().__init__(*given)
        self.turns = turns

    def train_step(self, batch: Batch) -> None:
        self.turns()
        super().train_step(batch)


def ours(turns: Turns, size: Size, precision: str, folder: Path, *, bank: bool) -> None:
    name = f"run-{precision}-{bank}"
    overrides = [f"run={folder / name}", f"training.precision={precision}", f"objective.bank_size={bank * size.bank}"]
    turns.begin()
    with set_up(load_config(folder / "config.yaml", overrides), partial(PacedTrainer, turns)) as trainer:
        trainer.train()


def features(turns: Turns, size: Size, precision: str, folder: Path) -> None:
    pictures = list(np.random.default_rng(0).integers(0, 256, (size.batch, size.pixels, size.pixels, 3), np.uint8))
    turns.begin()
    frozen = FrozenImages(load_config(folder / "config.yaml", [f"training.precision={precision}"]))
    while True:
        turns()
        frozen.encode(pictures)


class InMemory:
    """One batch of pictures and ever new captions, as `open_clip_train.data.DataInfo` would hand them out."""

    def __init__(self, turns: Turns, size: Size) -> None:
        self.turns, self.size, self.dataloader = turns, size, self
        self.num_samples, self.num_batches = size.pairs, size.pairs // size.batch
        self.images = torch.randn(size.batch, 3, size.pixels, size.pixels)

    def set_epoch(self, epoch: int) -> None:
        pass

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        size, (start, end) = self.size, (self.size.vocabulary - 2, self.size.vocabulary - 1)
        while True:
            self.turns()
            texts = torch.zeros(size.batch, size.context, dtype=torch.long)
            texts[:, : size.tokens] = torch.randint(1, start, (size.batch, size.tokens))
            texts[:, 0], texts[:, size.tokens - 1] = start, end
            yield self.images, texts


def described(size: Size) -> dict[str, Any]:
    """Both towers as open_clip names them."""
    return {
        "embed_dim": size.width,
        "vision_cfg": {
            "image_size": size.pixels, "layers": size.image_layers, "width": size.image_width, "patch_size": PATCH,
        },
        "text_cfg": {
            "context_length": size.context, "vocab_size": size.vocabulary, "width": size.width, "heads": size.heads,
            "layers": size.layers,
        },
    }  # fmt: skip


def open_clip(turns: Turns, size: Size, precision: str, folder: Path) -> None:
    import open_clip as package
    from open_clip_train import main as program

    file = folder / f"lit-{size.context}.json"
    file.write_text(json.dumps(described(size)))
    package.add_model_config(file)
    given = {
        "model": file.stem, "precision": PRECISIONS[precision], "batch-size": size.batch, "device": "cpu",
        "dataset-type": "synthetic", "logs": folder, "name": f"{file.stem}-{precision}",
    }  # fmt: skip
    turns.begin()
    with patch.object(program, "get_data", lambda *_, **__: {"train": InMemory(turns, size)}):
        program.main(["--lock-image", *(f"--{key}={value}" for key, value in given.items())])


Work = Callable[[Turns, Size, str, Path], None]


def unpadded(turns: Turns, size: Size, precision: str, folder: Path) -> None:
    open_clip(turns, replace(size, context=size.tokens), precision, folder)


OURS, OPEN_CLIP, FEATURES, SPREAD = "ours", "open_clip", "features", "ours, with features over 20 epochs"
WORKS: dict[str, Work] = {
    OURS: partial(ours, bank=True),
    "ours, no bank": partial(ours, bank=False),
    OPEN_CLIP: open_clip,
    "open_clip, context 20": unpadded,
    FEATURES: features,
}


# Measuring


def make(folder: Path, size: Size) -> Path:
    """The frozen tower and a store of random features of it, in `folder`; returns the file of a config of both."""
    description = {
        "hidden_size": size.image_width, "intermediate_size": 4 * size.image_width, "image_size": size.pixels,
        "num_hidden_layers": size.image_layers, "num_attention_heads": size.image_width // 64, "patch_size": PATCH,
        "projection_dim": size.width,
    }  # fmt: skip
    CLIPVisionModelWithProjection(CLIPVisionConfig(**description)).save_pretrained(folder / "vit")
    text = {
        "model_type": "bert", "hidden_size": size.width, "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads, "intermediate_size": 4 * size.width, "max_position_embeddings": size.context,
    }  # fmt: skip
    model = {
        "width": size.width,
        "image_tower": {"pretrained": str(folder / "vit"), "size": size.pixels},
        "text_tower": {"architecture": text},
    }
    training = {
        "pair_visits": 10**9, "batch_size": size.batch, "max_caption_tokens": size.context, "threads": THREADS,
        "checkpoint_every": 10**6,
    }  # fmt: skip
    data = {"store": str(folder / "store")}
    file = tiny.config(folder, model=model, training=training, data=data, mlm={}, optimizer={}, objective={})
    (folder / "vocab.txt").write_text("\n".join([*SPECIAL, *map(str, range(size.vocabulary - len(SPECIAL)))]))
    random, tokens, store = np.random.default_rng(0), tiny.tokenizer(folder), staging(folder / "store")
    store.mkdir()
    tokens.save_pretrained(store / "tokenizer")
    rows = random.standard_normal((size.pairs, size.width), np.float32)
    (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16).tofile(store / "features.bin")
    captions = random.integers(len(SPECIAL), size.vocabulary, (size.pairs, size.tokens))
    captions[:, 0], captions[:, -1] = SPECIAL.index("[CLS]"), SPECIAL.index("[SEP]")
    write_tokens(store, captions.tolist(), token_dtype(size.vocabulary))
    ids = np.arange(size.pairs)
    write_ids(store, ids, ids, size.pairs)
    (store / "pairs.parquet").touch()
    manifest = {
        "kind": "pairs", "tower": frozen_name(load_config(file)), "tokenizer": fingerprint(tokens), "width": size.width,
        "pairs": size.pairs, "images": size.pairs, "captions": size.pairs, "vocabulary": size.vocabulary,
        "token_dtype": str(token_dtype(size.vocabulary)),
    }  # fmt: skip
    finish(store, folder / "store", manifest, PAIR_FILES)
    return file


def serve(pipe: Connection, log: Path, work: Work, *given: Any) -> None:
    """Runs `work` in this process, which prints into `log`."""
    with log.open("w") as file:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(file.fileno(), stream.fileno())
    torch.set_num_threads(THREADS)
    work(Turns(pipe), *given)


class Worker:
    """A process that does `work` a turn at a time; `start` waits until it is ready for the first one."""

    def __init__(self, name: str, work: Work, size: Size, precision: str, folder: Path) -> None:
        self.log = folder / f"{name}-{precision}.log"
        self.pipe, theirs = multiprocessing.Pipe()
        given = (theirs, self.log, work, size, precision, folder)
        self.process = multiprocessing.get_context("spawn").Process(target=serve, args=given, daemon=True)
        self.process.start()
        theirs.close()

    def start(self) -> tuple[float, float]:
        try:
            answer: tuple[float, float] = self.pipe.recv()
        except EOFError:
            raise RuntimeError(f"{self.log.stem}: {self.log.read_text()[-2000:]}") from None
        return answer

    def turn(self, steps: int, *, anew: bool = False) -> tuple[float, float]:
        """Seconds a step, and the most bytes held beyond those of the beginning or, `anew`, of the turn's."""
        self.pipe.send((steps, anew))
        seconds, peak = self.start()
        return seconds / steps, peak

    def end(self) -> None:
        self.pipe.close()
        self.process.join(10)
        self.process.kill()


def measure(
    size: Size, precision: str, rounds: int, folder: Path, works: dict[str, Work]
) -> tuple[list[Row], str | None]:
    """Rows of `works`, of which OURS is the first, and why they are worthless if the machine was busy."""
    lacking = {name for name in works if name.startswith(OPEN_CLIP) and not find_spec("open_clip_train")}
    workers = {name: Worker(name, works[name], size, precision, folder) for name in works if name not in lacking}
    for worker in workers.values():
        worker.start()
    peaks = {name: worker.turn(2)[1] / MIB for name, worker in workers.items()}
    steps = {name: worker.turn(1, anew=True)[1] / MIB for name, worker in workers.items()}
    warm = {name: worker.turn(1)[0] for name, worker in workers.items()}
    taken = {name: np.empty(rounds) for name in workers}
    neighbours = Neighbours()
    for turn in range(rounds):
        for name, worker in workers.items():
            # A machine that changes meanwhile changes long turns and short ones unlike.
            taken[name][turn] = worker.turn(max(1, round(max(warm.values()) / warm[name] / 2)))[0]
    busy = neighbours.busy(THREADS, taken)
    for worker in workers.values():
        worker.end()
    if FEATURES in taken:
        taken[SPREAD] = taken[OURS] + taken[FEATURES] / EPOCHS
    return [_row(name, size, precision, taken, peaks, steps) for name in (*works, *(taken.keys() - works))], busy


def _row(
    name: str, size: Size, precision: str, taken: Seconds, peaks: dict[str, float], steps: dict[str, float]
) -> Row:
    row: Row = {
        "hardware": hardware("cpu"), "torch": torch.__version__, "what": name, "precision": precision,
        "date": date.today(), "command": "python -m benchmarks.lit " + " ".join(sys.argv[1:]),
    }  # fmt: skip
    if name not in taken:
        return row | {"note": "not installed: pip install 'open_clip_torch[training]'"}
    row |= {"pairs_per_s": f"{size.batch / np.median(taken[name]):.3g}", "rounds": len(taken[name])}
    if compute_dtype(precision) != COMPUTED_IN[precision]:
        row["note"] = "bf16 emulated" if name.startswith(OPEN_CLIP) else "in fp32: this CPU would emulate bf16"
    if name in peaks:
        row |= {"peak_mib": f"{peaks[name]:.0f}", "step_mib": f"{steps[name]:.0f}"}
    if OPEN_CLIP in taken and name != FEATURES:
        row["over_open_clip"] = f"{np.median(taken[OPEN_CLIP] / taken[name]):.2f}"
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--precisions", default=",".join(PRECISIONS))
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args()
    require_green(ROOT, *TESTS)
    with tempfile.TemporaryDirectory(prefix="lit-") as name:
        make(Path(name), Size())
        for precision in given.precisions.split(","):
            rows, busy = measure(Size(), precision, given.rounds, Path(name), WORKS)
            title, file = f"locked image tower, {precision}", given.results / "lit.csv"
            show_and_record(rows, SHOWN, title, busy, file, KEY, COLUMNS)


if __name__ == "__main__":
    main()
