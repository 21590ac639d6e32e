"""One rank of the run that `test_contrastive_ranks` starts: the loss over ranks beside that of the union batch.

Features are one linear map of the inputs, text and image each with its own, so that the gradients of the maps, averaged
over ranks, are what data parallelism would give. Rank 0 writes what it saw to the file named on the command line.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from efficientclip.kernels import contrastive, contrastive_loss
from efficientclip.training.distributed import end_process
from tests.kernels.test_contrastive import Calls

Q, D = 19, 24
EXCHANGES = ("gather", "ring")
SIZES: dict[int, dict[str, tuple[int, ...]]] = {
    2: {"ragged": (37, 90), "one alone": (1, 6), "one empty": (0, 30), "equal": (40, 40)},
    4: {"ragged, one empty": (13, 0, 41, 22)},
}
# By number of ranks: the options given, and the features' dtypes.
GIVEN: dict[int, list[tuple[str | None, torch.dtype]]] = {
    2: [(None, torch.float32), ("all", torch.float64), ("all", torch.float32), ("all", torch.bfloat16)],
    4: [("all", torch.float64), ("all", torch.float32)],
}


def union(sizes: tuple[int, ...], seed: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The same on every rank: inputs, and all options of the loss over the union batch."""
    rng = torch.Generator().manual_seed(seed)
    N = sum(sizes)

    def draw(high: int, size: int) -> Tensor:
        return torch.randint(0, high, (size,), generator=rng)

    inputs = {
        name: torch.randn(size, generator=rng, dtype=torch.float64)
        for name, size in {
            "text": (N, D),
            "image": (N, D),
            "bank": (Q, D),
            "text_map": (D, D),
            "image_map": (D, D),
        }.items()
    }
    weights = torch.rand(N, generator=rng)
    options = {
        "image_ids": draw(N // 2, N),
        "caption_ids": draw(N // 2, N),
        "bank_ids": draw(N // 2, Q),
        "excluded": (draw(N, 2 * N), draw(N + Q, 2 * N)),
        "pair_weights": weights * (weights > 0.3),
        "label_smoothing": 0.1,
        "direction_weights": (0.3, 0.9),
    }
    return inputs, options


def own_options(options: dict[str, Any], own: slice) -> dict[str, Any]:
    mine = dict(options)
    for name in ("image_ids", "caption_ids", "pair_weights"):
        if name in mine:
            mine[name] = mine[name][own]
    if "excluded" in mine:
        rows, columns = mine["excluded"]
        here = (rows >= own.start) & (rows < own.stop)
        mine["excluded"] = rows[here] - own.start, columns[here]
    return mine


def step(
    inputs: dict[str, Tensor],
    own: slice,
    options: dict[str, Any],
    dtype: torch.dtype,
    frozen: bool,
    computed: torch.dtype | None = None,
    **over: Any,
) -> dict[str, Tensor]:
    """Loss, what belongs to this rank's pairs, and the gradients of the parameters; features rounded to `dtype`."""
    maps = {name: inputs[name].clone().requires_grad_() for name in ("text_map", "image_map")}
    scale, bias = (torch.tensor([value], dtype=torch.float64, requires_grad=True) for value in (14.0, -2.0))
    # Mapped in fp64 whatever `dtype` is: only the loss may round.
    text, image = (
        torch.nn.functional.normalize(inputs[name][own] @ maps[f"{name}_map"], dim=1).to(dtype).to(computed or dtype)
        for name in ("text", "image")
    )
    out = contrastive_loss(
        text,
        image.detach() if frozen else image,
        torch.nn.functional.normalize(inputs["bank"], dim=1).to(dtype).to(computed or dtype),
        logit_scale=scale,
        logit_bias=bias,
        **over,
        **options,
    )
    out.loss.backward()
    leaves = {**maps, "scale": scale, "bias": bias}
    grads = {f"d_{n}": leaf.grad.double() for n, leaf in leaves.items() if leaf.grad is not None}
    return {"loss": out.loss.detach(), "per_pair": out.per_pair_loss_M, "positive": out.positive_logit_M, **grads}


def over_ranks(value: dict[str, Tensor], sizes: tuple[int, ...]) -> dict[str, Any]:
    """Gradients averaged, pairs joined, the loss of every rank."""
    seen: list[Any] = [None] * len(sizes)
    dist.all_gather_object(seen, value)
    joined: dict[str, Any] = {"loss": [float(part["loss"]) for part in seen]}
    for name in value:
        if name.startswith("d_"):
            joined[name] = sum(part[name] for part in seen) / len(sizes)
        elif name != "loss":
            joined[name] = torch.cat([part[name] for part in seen])
    return joined


def count_exchanges() -> dict[str, int]:
    """Wraps the gradients' collective, and the ring's exchange."""
    counts = {"_reduce_scatter": 0, "pass_on": 0}
    for owner, name in ((contrastive, "_reduce_scatter"), (contrastive._Ranks, "pass_on")):
        exchange = getattr(owner, name)

        def counted(*args: Any, name: str = name, exchange: Any = exchange, **kwargs: Any) -> Any:
            counts[name] += 1
            return exchange(*args, **kwargs)

        setattr(owner, name, counted)
    return counts


def largest(exchange: str, group: Any) -> dict[str, int]:
    """Bytes of the largest tensor in a step of 64 pairs a rank, and of the images of one rank and of all."""
    text, image = (torch.randn(64, 64, requires_grad=True) for _ in "12")
    with Calls() as calls:
        contrastive_loss(text, image, logit_scale=1.0, group=group, exchange=exchange).loss.backward()
    own = image.untyped_storage().nbytes()
    return {"seen": calls.largest, "own": own, "all": own * dist.get_world_size(group)}


def main(path: str, seed: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, group = dist.get_rank(), dist.group.WORLD
    contrastive.TILE_ROWS, contrastive.TILE_LOGITS = 16, 16 * 40
    counts = count_exchanges()
    results: dict[Any, Any] = {}
    for kind, sizes in SIZES[dist.get_world_size()].items():
        inputs, options = union(sizes, seed)
        own, everyone = slice(sum(sizes[:rank]), sum(sizes[: rank + 1])), slice(0, sum(sizes))
        for positives in ("pair", "ids"):
            for given, dtype in GIVEN[len(sizes)]:
                chosen = {"positives": positives, **(options if given else {})}
                for frozen in (True, False):
                    seen: dict[str, Any] = {}
                    for exchange in EXCHANGES:
                        counts.update(dict.fromkeys(counts, 0))
                        over = {"group": group, "exchange": exchange}
                        mine = step(inputs, own, own_options(chosen, own), dtype, frozen, **over)
                        seen[exchange] = over_ranks(mine, sizes), dict(counts)
                    if rank == 0:
                        whole = truth = step(inputs, everyone, chosen, dtype, frozen)
                        if dtype == torch.float32:
                            truth = step(inputs, everyone, chosen, dtype, frozen, torch.float64)
                        for exchange, (ranks, exchanges) in seen.items():
                            results[kind, positives, given, frozen, dtype, exchange] = ranks, whole, truth, exchanges
    for exchange in EXCHANGES:
        results["largest", exchange] = largest(exchange, group)
    text = torch.ones(3, D)
    try:
        contrastive_loss(text, text, torch.ones(5 + rank, D), logit_scale=1.0, group=group)
    except ValueError as error:
        results["disagreement"] = str(error)
    if rank == 0:
        torch.save(results, path)
    dist.barrier()
    dist.destroy_process_group()
    end_process(0)


if __name__ == "__main__":
    # The launcher puts its own options first.
    main(sys.argv[-2], int(sys.argv[-1]))
