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

Q, D = 19, 24
SIZES = {"ragged": (37, 90), "one alone": (1, 6), "one empty": (0, 30), "equal": (40, 40)}


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
    inputs: dict[str, Tensor], own: slice, options: dict[str, Any], dtype: torch.dtype, frozen: bool, group: Any
) -> dict[str, Tensor]:
    """Loss, what belongs to this rank's pairs, and the gradients of the parameters."""
    maps = {name: inputs[name].clone().requires_grad_() for name in ("text_map", "image_map")}
    scale, bias = (torch.tensor([value], dtype=torch.float64, requires_grad=True) for value in (14.0, -2.0))
    # Mapped in fp64 whatever `dtype` is: only the loss may round.
    text, image = (
        torch.nn.functional.normalize(inputs[name][own] @ maps[f"{name}_map"], dim=1).to(dtype)
        for name in ("text", "image")
    )
    out = contrastive_loss(
        text,
        image.detach() if frozen else image,
        torch.nn.functional.normalize(inputs["bank"], dim=1).to(dtype),
        logit_scale=scale,
        logit_bias=bias,
        group=group,
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
    """Wraps the two collectives that the loss uses."""
    counts = {"_all_gather": 0, "_reduce_scatter": 0}
    for name in counts:
        collective = getattr(contrastive, name)

        def counted(*args: Any, name: str = name, collective: Any = collective, **kwargs: Any) -> Any:
            counts[name] += 1
            return collective(*args, **kwargs)

        setattr(contrastive, name, counted)
    return counts


def main(path: str, seed: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, group = dist.get_rank(), dist.group.WORLD
    contrastive.TILE_ROWS, contrastive.TILE_LOGITS = 16, 16 * 40
    counts = count_exchanges()
    results: dict[Any, Any] = {}
    for kind, sizes in SIZES.items():
        inputs, options = union(sizes, seed)
        own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        for positives in ("pair", "ids"):
            for given in (None, "all"):
                chosen = {"positives": positives, **(options if given else {})}
                for frozen in (True, False):
                    for dtype in (torch.float64, torch.float32, torch.bfloat16):
                        counts.update(_all_gather=0, _reduce_scatter=0)
                        mine = step(inputs, own, own_options(chosen, own), dtype, frozen, group)
                        exchanges = dict(counts)
                        whole = step(inputs, slice(0, sum(sizes)), chosen, dtype, frozen, None)
                        key = (kind, positives, given, frozen, str(dtype))
                        results[key] = over_ranks(mine, sizes), whole, exchanges
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
