"""One rank of the run that `test_loss_ranks` starts: both losses over ranks beside one rank with the whole batch.

Rank 0 writes what it saw to the file named on the command line, and prints the largest errors in fp32.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from efficientclip.kernels import chunked, contrastive_loss, sigmoid_loss
from efficientclip.kernels import ranks as kernel_ranks
from efficientclip.training.distributed import end_process
from tests.kernels import sigmoid_cases, test_contrastive
from tests.kernels.calls import Calls

Q, D = 19, 24
EXCHANGES = ("gather", "ring")
ONE_WAY = "one way"
LOSSES: dict[str, tuple[Callable[..., Any], Callable[..., dict[str, Any]]]] = {
    "contrastive": (contrastive_loss, test_contrastive.everything),
    "sigmoid": (sigmoid_loss, sigmoid_cases.everything),
}
SIZES: dict[int, dict[str, tuple[int, ...]]] = {
    2: {"ragged": (37, 90), "one alone": (1, 40), "one empty": (0, 30), "equal": (40, 40)},
    4: {"ragged, one empty": (13, 0, 41, 22), "equal": (20, 20, 20, 20)},
}


class Case(NamedTuple):
    """`positives` None: no options at all; ONE_WAY: from text to image alone, with excluded cells."""

    loss: str
    kind: str
    positives: str | None
    dtype: torch.dtype
    frozen: bool

    def __str__(self) -> str:
        return ", ".join([self.loss, self.kind, str(self.positives), str(self.dtype)] + ["frozen"] * self.frozen)


# A scalar's error is a matter of luck in one batch: fp32 is judged by its mean square over several.
BATCHES = {torch.float64: 1, torch.bfloat16: 1, torch.float32: 12}


def cases(world: int) -> list[Case]:
    found = []
    for loss in LOSSES:
        found.append(Case(loss, next(iter(SIZES[world])), None, torch.float32, False))
        for kind in SIZES[world]:
            for positives in ("pair", "ids"):
                for dtype in BATCHES:
                    found.append(Case(loss, kind, positives, dtype, False))
                found.append(Case(loss, kind, positives, torch.float64, True))
            if loss == "contrastive":
                found.append(Case(loss, kind, ONE_WAY, torch.float64, True))
    return found


def own_options(options: dict[str, Any], own: slice) -> dict[str, Any]:
    """The options of one rank's pairs."""
    mine: dict[str, Any] = {
        name: options[name][own] for name in ("image_ids", "caption_ids", "pair_weights") if name in options
    }
    if "excluded" in options:
        rows, columns = options["excluded"]
        here = (rows >= own.start) & (rows < own.stop)
        mine["excluded"] = rows[here] - own.start, columns[here]
    return options | mine


def step(
    case: Case,
    data: dict[str, Tensor],
    own: slice,
    options: dict[str, Any],
    computed: torch.dtype | None = None,
    **over: Any,
) -> dict[str, Tensor]:
    """Values and gradients in fp64, of features rounded to the case's dtype and computed with in `computed`."""
    dtype = computed or case.dtype
    text, image, bank = (data[name].to(case.dtype).to(dtype) for name in ("text", "image", "bank"))
    text, image = text[own].requires_grad_(), image[own].requires_grad_(not case.frozen)
    # In fp64, so that no rounding of their gradients hides the errors.
    scale, bias = (torch.tensor([value], dtype=torch.float64, requires_grad=True) for value in (14.0, -2.0))
    out = LOSSES[case.loss][0](text, image, bank, logit_scale=scale, logit_bias=bias, **over, **options)
    out.loss.backward()
    named = {"loss": out.loss, "per_pair": out.per_pair_loss_M, "positive": out.positive_logit_M}
    leaves = {"d_text": text, "d_image": image, "d_scale": scale, "d_bias": bias}
    named |= {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return {name: value.detach().double() for name, value in named.items()}


def over_ranks(seen: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Of what each rank saw: pairs joined, the losses of all ranks, gradients as data parallelism averages them."""
    world = len(seen)
    joined = {name: [part[name] for part in seen] for name in seen[0]}
    return {
        "loss": torch.stack(joined.pop("loss")),
        **{name: sum(joined.pop(name)) / world for name in ("d_scale", "d_bias")},
        **{name: torch.cat(parts) / (world if name.startswith("d_") else 1) for name, parts in joined.items()},
    }


def error(name: str, found: Sequence[dict[str, Tensor]], truth: Sequence[dict[str, Tensor]]) -> float:
    """Relative root mean square error over all batches."""
    wrong = sum(float((one[name] - true[name]).square().mean()) for one, true in zip(found, truth, strict=True))
    size = sum(float(true[name].square().mean()) for true in truth)
    return (wrong / size) ** 0.5


def count_exchanges() -> dict[str, int]:
    """Wraps the gradients' collective, and the ring's exchange."""
    counts = {"reduce_scatter": 0, "pass_on": 0}
    for owner, name in ((kernel_ranks, "reduce_scatter"), (kernel_ranks.Ranks, "pass_on")):
        exchange = getattr(owner, name)

        def counted(*args: Any, name: str = name, exchange: Any = exchange, **kwargs: Any) -> Any:
            counts[name] += 1
            return exchange(*args, **kwargs)

        setattr(owner, name, counted)
    return counts


def largest(loss: str, exchange: str, group: Any) -> dict[str, int]:
    """Bytes of the largest tensor in a step of 64 pairs a rank, and of the images of one rank and of all."""
    text, image = (torch.randn(64, 64, requires_grad=True) for _ in "12")
    with Calls() as calls:
        LOSSES[loss][0](text, image, logit_scale=1.0, group=group, exchange=exchange).loss.backward()
    own = image.untyped_storage().nbytes()
    return {"seen": calls.largest, "own": own, "all": own * dist.get_world_size(group)}


def disagreement(loss: str, rank: int, group: Any) -> str:
    text = torch.ones(3, D)
    try:
        LOSSES[loss][0](text, text, torch.ones(5 + rank, D), logit_scale=1.0, group=group)
    except ValueError as error:
        return str(error)
    return ""


def summary(results: dict[Any, Any]) -> str:
    """By loss and exchange, of each quantity: the largest error in fp32, and as multiple of one rank's."""
    lines = []
    for loss in LOSSES:
        for exchange in EXCHANGES:
            worst: dict[str, tuple[float, float]] = {}
            for (case, how), (ranks, whole, truth, _) in results.items():
                if case.loss == loss and how == exchange and case.dtype == torch.float32:
                    for name in truth[0]:
                        if truth[0][name].any():
                            found = error(name, ranks, truth)
                            times = found / error(name, whole, truth)
                            before = worst.get(name, (0.0, 0.0))
                            worst[name] = max(before[0], found), max(before[1], times)
            columns = [f"{name} {found:.1e} ({times:.2f}x)" for name, (found, times) in worst.items()]
            lines.append(" ".join([loss, exchange, *columns]))
    return "\n".join(lines)


def measure(seed: int, group: Any) -> dict[tuple[Case, str], tuple[list[Any], ...]]:
    """By case and exchange: of each batch what ranks, one rank and one rank in fp64 found; exchanges."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    counts = count_exchanges()
    mine: list[tuple[Case, dict[str, Any]]] = []
    alone: list[tuple[Any, Any]] = []
    for case in cases(world):
        sizes = SIZES[world][case.kind]
        N, own = sum(sizes), slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        rng = torch.Generator().manual_seed(seed)
        for batch in range(BATCHES[case.dtype]):
            data = sigmoid_cases.features(rng, N, Q, D)
            options = LOSSES[case.loss][1](rng, N, Q) | {"positives": case.positives} if case.positives else {}
            if case.positives == ONE_WAY:
                options = {"direction_weights": (1.0, 0.0), "excluded": options["excluded"]}
            seen: dict[str, Any] = {}
            for exchange in EXCHANGES:
                counts.update(dict.fromkeys(counts, 0))
                values = step(case, data, own, own_options(options, own), group=group, exchange=exchange)
                seen[exchange] = values, dict(counts)
            mine.append((case, seen))
            # The ranks take turns at being alone.
            if batch % world == rank:
                whole = [step(case, data, slice(0, N), options, computed) for computed in (None, torch.float64)]
                alone.append((len(mine) - 1, whole))
    everyone: list[Any] = [None] * world
    dist.all_gather_object(everyone, (mine, alone))
    found = {number: whole for _, theirs in everyone for number, whole in theirs}
    results: dict[tuple[Case, str], tuple[list[Any], ...]] = {}
    for number, (case, seen) in enumerate(mine):
        for exchange, (_, exchanges) in seen.items():
            ranks = over_ranks([theirs[number][1][exchange][0] for theirs, _ in everyone])
            kept = results.setdefault((case, exchange), ([], [], [], []))
            for values, value in zip(kept, (ranks, *found[number], exchanges), strict=True):
                values.append(value)
    return results


def main(path: str, seed: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, group = dist.get_rank(), dist.group.WORLD
    chunked.TILE_ROWS, chunked.TILE_LOGITS = 32, 32 * 64
    results = measure(seed, group)
    if rank == 0:
        print(summary(results), flush=True)
    named: dict[Any, Any] = {(*case, exchange): value for (case, exchange), value in results.items()}
    for loss in LOSSES:
        named["disagreement", loss] = disagreement(loss, rank, group)
        for exchange in EXCHANGES:
            named["largest", loss, exchange] = largest(loss, exchange, group)
    if rank == 0:
        torch.save(named, path)
    dist.barrier()
    dist.destroy_process_group()
    end_process(0)


if __name__ == "__main__":
    # The launcher puts its own options first.
    main(sys.argv[-2], int(sys.argv[-1]))
