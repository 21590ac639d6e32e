"""What ranks tell each other of a step: one small gather, begun with the next step and read when that is under way.

So the host waits for no step that it has just issued. What a step leaves stays on the device until then; with it
travels what must be known of the next one: its masked positions, whether a rank is told to stop or has no batch left,
and whether all have written the checkpoint under way.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from ..data.batches import Batch, moved
from .ranks import all_rows

FIGURES = ("cosine", "mlm", "regression", "contrastive", "logit_scale", "grad_norm")


@dataclass
class Issued:
    """A step that was issued, and what is needed of its batch when its figures come."""

    step: int  # counted from 0
    batch: Batch
    cosine_M: torch.Tensor
    figures: torch.Tensor  # fp64 [M + FIGURES], this rank's: scores, then sums and values
    values: dict[str, float]  # what the host knew at once


@dataclass
class Arrived:
    """One gather on the host: flags of the step under way, and figures fp64 [W, M + FIGURES] of the one before it."""

    stop: int
    ended: bool
    written: bool
    issued: Issued | None
    figures_W: npt.NDArray[np.float64]


class Tally:
    """The step that was issued last, `under_way`, and the gather that travels. All ranks must call alike."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.under_way: Issued | None = None
        self._travels: tuple[Issued | None, torch.Tensor, torch.cuda.Event | None] | None = None

    def exchange(self, masked: int, stop: int, ended: bool, written: bool) -> torch.Tensor:
        """Begin a gather of these and of the step under way, if any; `masked` of all ranks, on the device."""
        mine = moved(torch.tensor([masked, stop, ended, written], dtype=torch.float64), self.device)
        issued, self.under_way = self.under_way, None
        if issued is not None:
            mine = torch.cat([mine, issued.figures])
        everywhere = all_rows(mine[None])
        host, ready = everywhere, None
        if everywhere.is_cuda:
            host = torch.empty(everywhere.shape, dtype=everywhere.dtype, pin_memory=True)
            host.copy_(everywhere, non_blocking=True)
            ready = torch.cuda.Event()
            ready.record()
        self._travels = issued, host, ready
        return everywhere[:, 0].sum()

    def read(self) -> Arrived:
        """What the last gather brings; waits for what was issued before it, and no longer."""
        if self._travels is None:
            raise RuntimeError("no gather was begun")
        (issued, host, ready), self._travels = self._travels, None
        if ready is not None:
            ready.synchronize()
        flags_W, figures_W = np.split(host.numpy(), [4], axis=1)
        _, stop_W, ended_W, written_W = flags_W.T
        return Arrived(int(stop_W.max()), bool(ended_W.any()), bool(written_W.all()), issued, figures_W)


def of_all(column_W: npt.NDArray[np.float64]) -> float:
    """A figure that all ranks have alike; one that is not finite, where any has such."""
    wrong = column_W[~np.isfinite(column_W)]
    return float(wrong[0] if len(wrong) else column_W[0])
