"""One rank of the run that `test_sigmoid_ranks` starts: the loss over ranks beside that of the union batch.

Features are one linear map of the inputs, text and image each with its own, so that the gradients of the maps, averaged
over ranks, are what data parallelism would give. Rank 0 writes what it saw to the file named on the command line.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import normalize

from efficientclip.kernels import contrastive, sigmoid_loss
from efficientclip.training.distributed import end_process
from tests.kernels.sigmoid_cases import everything

Q, D = 19, 24
SIZES = {"ragged": (37, 90), "one alone": (1, 6), "one empty": (0, 30), "equal": (40, 40)}


def own_options(options: dict[str, Any], own: slice) -> dict[str, Any]:
    """The options of one rank's pairs."""
    rows, columns = options["excluded"]
    here = (rows >= own.start) & (rows < own.stop)
    mine = {name: options[name][own] for name in ("image_ids", "caption_ids", "pair_weights")}
    return options | mine | {"excluded": (rows[here] - own.start, columns[here])}


def step(
    inputs: dict[str, Tensor], own: slice, options: dict[str, Any], dtype: torch.dtype, frozen: bool, group: Any
) -> dict[str, Tensor]:
    """Loss, what belongs to this rank's pairs, and the gradients of the parameters."""
    maps = {name: inputs[name].clone().requires_grad_() for name in ("text_map", "image_map")}
    scale, bias = (torch.tensor([value], dtype=torch.float64, requires_grad=True) for value in (14.0, -2.0))
    # Mapped in fp64 whatever `dtype` is: only the loss may round.
    text, image = (normalize(inputs[n][own] @ maps[f"{n}_map"], dim=1).to(dtype) for n in ("text", "image"))
    bank = normalize(inputs["bank"], dim=1).to(dtype)
    out = sigmoid_loss(
        text, image.detach() if frozen else image, bank, logit_scale=scale, logit_bias=bias, group=group, **options
    )
    out.loss.backward()
    leaves = {**maps, "scale": scale, "bias": bias}
    grads = {f"d_{n}": leaf.grad.double() for n, leaf in leaves.items() if leaf.grad is not None}
    return {"loss": out.loss.detach(), "per_pair": out.per_pair_loss_M, "positive": out.positive_logit_M, **grads}


def over_ranks(value: dict[str, Tensor]) -> dict[str, Any]:
    """Gradients averaged, pairs joined, the loss of every rank."""
    seen: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(seen, value)
    joined: dict[str, Any] = {"loss": [float(part["loss"]) for part in seen]}
    for name in value:
        if name.startswith("d_"):
            joined[name] = sum(part[name] for part in seen) / len(seen)
        elif name != "loss":
            joined[name] = torch.cat([part[name] for part in seen])
    return joined


def main(path: str, seed: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, group = dist.get_rank(), dist.group.WORLD
    contrastive.TILE_ROWS, contrastive.TILE_LOGITS = 16, 16 * 40
    results: dict[Any, Any] = {}
    for kind, sizes in SIZES.items():
        rng, N = torch.Generator().manual_seed(seed), sum(sizes)
        shapes = {"text": N, "image": N, "bank": Q, "text_map": D, "image_map": D}
        inputs = {n: torch.randn(size, D, generator=rng, dtype=torch.float64) for n, size in shapes.items()}
        options = everything(rng, N, Q)
        own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        for positives in ("pair", "ids"):
            for frozen in (True, False):
                for dtype in (torch.float64, torch.float32):
                    chosen = options | {"positives": positives}
                    ranks = over_ranks(step(inputs, own, own_options(chosen, own), dtype, frozen, group))
                    whole = step(inputs, slice(0, N), chosen, dtype, frozen, None)
                    results[kind, positives, frozen, str(dtype)] = ranks, whole
    text = torch.ones(3, D)
    try:
        sigmoid_loss(text, text, torch.ones(5 + rank, D), logit_scale=1.0, group=group)
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
