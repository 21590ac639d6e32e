"""One training step as the paper's code computes it beside ours: same tower, same texts, in turn; time and memory.

    python -m benchmarks.step [--pairs 64] [--rounds 3]

The published stack (20 GEGLU layers under CLIP's 12), captions of 20 tokens on average, unpaired texts of 20 or 64, 40
of them to 256 pairs, 20,000 queued image features, fp32 on CPUs and bf16 on CUDA, AdamW.

- paper: every text padded to 77 tokens; a second forward by the scoring copy; the vocabulary head on every position of
  the unpaired texts; logits of batch x (batch + queue) kept whole for both softmaxes.
- ours: packed tokens; the online score; the head on masked positions; the fused loss.

Nothing is recorded while the tests of the tower and of the loss are red, or the machine is busy.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measuring import MIB, RESULTS, Memory, Neighbours, hardware, require_green, show_and_record
from efficientclip.config import Model, TextTower
from efficientclip.data.batches import Segments
from efficientclip.kernels import contrastive_loss
from efficientclip.model.efficientclip import EfficientCLIP, build_model

ROOT = Path(__file__).parents[1]
TESTS = ("tests/model/test_published.py", "tests/kernels/test_contrastive.py")
WIDTH, VOCABULARY, CONTEXT, QUEUE, CAPTION_TOKENS, MASK_SHARE = 512, 21_128, 77, 20_000, 20, 0.15
PAD, MASK = 0, 4
KEY = ("pairs", "text_tokens", "hardware", "torch", "implementation")
COLUMNS = (*KEY, "seconds", "over_ours", "extra_mib", "token_slots", "rounds", "date", "command")

Texts = list[Tensor]


def tower() -> EfficientCLIP:
    text = TextTower.model_validate({"architecture": {"model_type": "efficientclip_text"}, "pooling": "last"})
    return build_model(Model(width=WIDTH, text_tower=text), seed=0, vocabulary=VOCABULARY, sides=("text",))


def texts_of(count: int, mean: int, seed: int) -> Texts:
    """Token ids of texts with `mean` tokens on average, 3 to 77."""
    random = np.random.default_rng(seed)
    lengths = np.sort(np.clip(random.poisson(mean, count), 3, CONTEXT))
    return [torch.from_numpy(random.integers(5, VOCABULARY, n)) for n in lengths]


def packed(texts: Texts) -> dict[str, Any]:
    """One row of all texts, as the tower takes it."""
    bounds = np.concatenate([[0], np.cumsum([len(text) for text in texts])]).astype(np.int32)
    return {
        "input_ids": torch.cat(texts),
        "position_ids": torch.cat([torch.arange(len(text)) for text in texts]),
        "segments": Segments.of(bounds),
    }


def masked(texts: Texts, seed: int) -> tuple[Texts, list[Tensor]]:
    """Texts with some tokens masked, and where."""
    generator = torch.Generator().manual_seed(seed)
    places = [torch.rand(len(text), generator=generator) < MASK_SHARE for text in texts]
    return [torch.where(place, MASK, text) for text, place in zip(texts, places, strict=True)], places


class Step:
    """Forward, backward and update of one tower on the same pairs and unpaired texts."""

    def __init__(self, captions: Texts, unpaired: Texts, device: torch.device) -> None:
        random = torch.Generator().manual_seed(1)
        self.device, self.captions, self.unpaired = device, captions, unpaired
        self.images_MD = F.normalize(torch.randn(len(captions), WIDTH, generator=random), dim=1).to(device)
        self.queue_QD = F.normalize(torch.randn(QUEUE, WIDTH, generator=random), dim=1).to(device)
        self.model = tower().to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6, fused=True)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    def inputs(self, texts: Texts) -> dict[str, Any]:
        return {name: value.to(self.device) for name, value in packed(texts).items()}

    def __call__(self) -> float:
        loss = self.loss()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def loss(self) -> Tensor:
        raise NotImplementedError


class Ours(Step):
    def slots(self) -> int:
        return sum(map(len, self.captions)) + sum(map(len, self.unpaired))

    def loss(self) -> Tensor:
        holed, places = masked(self.unpaired, 2)
        inputs = self.inputs([*self.captions, *holed])
        offset = sum(map(len, self.captions))
        positions = (torch.cat(places).nonzero().flatten() + offset).to(self.device)
        labels = torch.cat(self.unpaired)[torch.cat(places)].to(self.device)
        with self.autocast():
            output = self.model(
                **inputs,
                texts=torch.arange(len(self.captions), device=self.device),
                masked_positions=positions,
                masked_labels=labels,
            )
        contrast = contrastive_loss(
            output["features"], self.images_MD, self.queue_QD, logit_scale=output["logit_scale"],
            direction_weights=(1.0, 1.0),
        )  # fmt: skip
        return (contrast.loss + output["mlm_loss_sum"] / len(labels)) / 2


class Paper(Step):
    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.scoring = copy.deepcopy(self.model).requires_grad_(False)

    def slots(self) -> int:
        return CONTEXT * (2 * len(self.captions) + len(self.unpaired))

    def loss(self) -> Tensor:
        holed, places = masked(self.unpaired, 2)
        captions, unpaired = self.inputs(padded(self.captions)), self.inputs(padded(holed))
        ends = torch.tensor([len(text) - 1 for text in self.captions], device=self.device)
        ends = ends + CONTEXT * torch.arange(len(ends), device=self.device)
        wanted = [torch.where(place, text, -100) for text, place in zip(self.unpaired, places, strict=True)]
        labels = torch.cat(padded(wanted, -100))
        with self.autocast():
            with torch.no_grad():
                (self.features(self.scoring, captions, ends) * self.images_MD).sum(1)
            features_MD = self.features(self.model, captions, ends)
            text: Any = self.model.text
            states_TH = text.states(**named(unpaired))
            logits = text.mlm_head(states_TH)
        mlm = F.cross_entropy(logits.float(), labels.to(self.device), ignore_index=-100)
        scale = self.model.logit_scale.exp()
        # The queue lives on the host.
        queue_QD = self.queue_QD.cpu().to(self.device)
        z_NC = scale * features_MD @ torch.cat([self.images_MD, queue_QD]).T
        target = torch.arange(len(z_NC), device=self.device)
        contrast = F.cross_entropy(z_NC, target) + F.cross_entropy(z_NC[:, : len(z_NC)].T, target)
        return (contrast + mlm) / 2

    @staticmethod
    def features(model: EfficientCLIP, captions: dict[str, Any], ends: Tensor) -> Tensor:
        text: Any = model.text
        states_TH = text.states(**named(captions))
        return F.normalize(text.projection(F.embedding(ends, states_TH)).float(), dim=-1)


def padded(texts: Texts, filler: int = PAD) -> Texts:
    return [F.pad(text, (0, CONTEXT - len(text)), value=filler) for text in texts]


def named(inputs: dict[str, Any]) -> dict[str, Any]:
    ids, positions = inputs["input_ids"], inputs["position_ids"]
    return {"input_ids_T": ids, "position_ids_T": positions, "segments": inputs["segments"]}


def check_same_work(device: torch.device) -> None:
    """Texts that fill the context need no padding: there both steps have one loss."""
    captions, unpaired = texts_of(8, 500, 3), texts_of(2, 500, 4)
    ours, paper = (step(captions, unpaired, device).loss().item() for step in (Ours, Paper))
    if abs(ours - paper) > (2e-2 if device.type == "cuda" else 1e-4) * abs(paper):
        raise RuntimeError(f"the steps differ: loss {ours} here, {paper} as the paper's code computes it")


def measure(pairs: int, text_tokens: int, rounds: int, device: torch.device) -> tuple[list[dict[str, Any]], str | None]:
    captions = texts_of(pairs, CAPTION_TOKENS, 0)
    unpaired = texts_of(max(1, pairs * 40 // 256), text_tokens, 1)
    seconds: dict[str, list[float]] = {"ours": [], "paper": []}
    peaks: dict[str, float] = {}
    slots: dict[str, int] = {}
    steps: dict[str, Callable[[], float]] = {}
    neighbours = Neighbours()
    memory = Memory(device.type)
    for name, kind in (("ours", Ours), ("paper", Paper)):
        step = kind(captions, unpaired, device)
        step()
        memory.start()
        step()
        peaks[name], slots[name], steps[name] = memory.peak(), step.slots(), step
    for _ in range(rounds):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - started)
    busy = neighbours.busy(torch.get_num_threads(), seconds)
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    rows = [
        {
            "pairs": pairs, "text_tokens": text_tokens, "hardware": hardware(device.type), "torch": torch.__version__,
            "implementation": name, "seconds": f"{median:.3g}", "over_ours": f"{median / medians['ours']:.2f}",
            "extra_mib": f"{peaks[name] / MIB:.0f}", "token_slots": slots[name], "rounds": rounds,
            "date": date.today(), "command": "python -m benchmarks.step " + " ".join(sys.argv[1:]),
        }
        for name, median in medians.items()
    ]  # fmt: skip
    return rows, busy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args()
    require_green(ROOT, *TESTS)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    check_same_work(device)
    for text_tokens in (20, 64):
        rows, busy = measure(given.pairs, text_tokens, given.rounds, device)
        shown = [column for column in COLUMNS if column != "command"]
        title, file = f"training step, unpaired texts of {text_tokens}", given.results / "step.csv"
        show_and_record(rows, shown, title, busy, file, KEY, COLUMNS)


if __name__ == "__main__":
    main()
