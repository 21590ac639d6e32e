"""What losses and scores are given and return, and what they refuse. Every other file here imports from this one.

Shapes, in all files: M this rank's pairs (or queries), N pairs of all ranks, Q bank rows, D width, E listed cells or
positives, K kinds of ids, R x C one tile, W ranks. Cells are (text, column); columns are the N images of all ranks in
rank order, then the Q bank rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

Positives = Literal["pair", "ids"]
Exchange = Literal["gather", "ring"]
FINITE_CELLS = 1 << 15
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def accumulated(dtype: torch.dtype) -> torch.dtype:
    """What products of such features are added up in, and what is returned of them."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def may_read(tensor: Tensor) -> bool:
    """Whether the host may look at values: not while torch.compile traces or a CUDA graph is captured."""
    return not torch.compiler.is_compiling() and not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


# Outputs


class ContrastiveOutput(NamedTuple):
    """What both losses return: fp32, or fp64 for fp64 features."""

    loss: Tensor
    """0-dim, differentiable, the same value on every rank."""
    per_pair_loss_M: Tensor
    """Unweighted loss of this rank's pairs, of `contrastive_loss` both directions combined; detached."""
    positive_logit_M: Tensor
    """logit_scale * <text_i, image_i> + logit_bias of this rank's pairs; detached."""


def weighted_mean(losses: Tensor, weights: Tensor) -> Tensor:
    """0 where all weights are."""
    total = weights.sum()
    return (weights * losses).sum() / torch.where(total > 0, total, 1)


# What operators are told


class Options(NamedTuple):
    """What the operators are told beside features and scalars, in their order; `bank_ids_Q` goes with `ids_KM[0]`."""

    ids_KM: Tensor | None
    ids_KN: Tensor | None
    bank_ids_Q: Tensor | None
    excluded_2E: Tensor | None
    """Rows and columns."""
    offset: int
    """Row i's own image is `offset` + i, or none of these."""
    as_positives: bool
    """Whether cells of equal ids are positives, else they are masked."""
    smooth: bool
    """Whether sums of all logits are asked for; never by the sigmoid loss."""
    one_way: bool = False
    """Whether columns' log-sum-exps are left out, as the loss from image to text has no weight."""
    made_in_forward: int = 0
    """Of which columns forward makes what they add to d text: 0 none, 1 the bank's, 2 all. They must have no other
    slopes: no loss of their own, no gradient, neither `as_positives` nor `smooth`. For the sigmoid loss, of which
    features forward makes the gradients, and the scalars': 0 none, 1 the texts, 2 the images, 3 both."""

    def of_block(self, columns: slice, total: int, own: bool) -> Options:
        """The same for `columns` of the batch alone, and the bank behind them if it is this rank's own block."""
        if columns == slice(0, total):
            return self
        excluded_2E = self.excluded_2E
        if excluded_2E is not None:
            col_E = excluded_2E[1]
            here_E = (col_E >= columns.start) & (col_E < columns.stop)
            moved_E = col_E - columns.start
            if own:
                here_E |= col_E >= total
                moved_E = torch.where(col_E >= total, col_E - total + columns.stop - columns.start, moved_E)
            excluded_2E = torch.stack([excluded_2E[0], moved_E])[:, here_E]
        return self._replace(
            ids_KN=None if self.ids_KN is None else self.ids_KN[:, columns],
            bank_ids_Q=self.bank_ids_Q if own else None,
            excluded_2E=excluded_2E,
            offset=self.offset - columns.start,
            made_in_forward=self.made_in_forward if own or self.made_in_forward == 2 else 0,
        )


class ContrastiveSums(NamedTuple):
    """What one pass over the tiles yields; all fp64, column vectors over this rank's texts only.

    All leave out the diagonal. `extra` sums the logits of positives, `logits` those of all unmasked cells;
    both are None where unused. `masked` and `extras` count masked cells and positives.
    """

    positive_M: Tensor
    row_lse_M: Tensor
    col_lse_N: Tensor
    row_extra_M: Tensor | None
    col_extra_N: Tensor | None
    row_logits_M: Tensor | None
    col_logits_N: Tensor | None
    row_masked_M: Tensor
    col_masked_N: Tensor
    row_extras_M: Tensor
    col_extras_N: Tensor
    row_mean_MD: Tensor | None = None
    """Of the columns that are made in forward, sums weighted by the softmax of the row; as products are added up."""


class ContrastiveKept(NamedTuple):
    """What backward needs of `ContrastiveSums`; those of the rows may cover more columns than are walked."""

    row_lse_M: Tensor
    col_lse_N: Tensor
    row_mean_MD: Tensor | None = None


class ContrastiveGrads(NamedTuple):
    """The gradient of every differentiable field of `ContrastiveSums`, in the same order."""

    positive_M: Tensor
    row_lse_M: Tensor
    col_lse_N: Tensor
    row_extra_M: Tensor | None
    col_extra_N: Tensor | None
    row_logits_M: Tensor | None
    col_logits_N: Tensor | None


class SigmoidSums(NamedTuple):
    """What one pass over the tiles yields; where these columns hold no own cells they are left out, and 0.

    All fp64, but what is made of features as products are added up; gradients that are not made are None.
    """

    loss: Tensor
    """Of the pairs' losses, weighted by each pair's share."""
    loss_M: Tensor
    positive_M: Tensor
    d_text_MD: Tensor | None = None
    d_image_ND: Tensor | None = None
    d_scale: Tensor | None = None
    d_bias: Tensor | None = None


class SigmoidKept(NamedTuple):
    """What backward needs of `SigmoidSums`."""

    d_text_MD: Tensor | None = None
    d_image_ND: Tensor | None = None
    d_scale: Tensor | None = None
    d_bias: Tensor | None = None


class SigmoidGrads(NamedTuple):
    """The gradient of the differentiable field of `SigmoidSums`."""

    loss: Tensor


# Arguments


@dataclass(frozen=True)
class LossArguments:
    """What both losses take, by its public name."""

    text_MD: Tensor
    """[M, D] fp16, bf16, fp32 or fp64, D up to 1024; this rank's texts. M may differ between ranks or be 0."""
    image_MD: Tensor
    """[M, D], fp64 where the texts are, else of any dtype below: frozen rows are read as they are; image i belongs to
    text i. Without `requires_grad` its gradient, and the exchange that it needs, are skipped."""
    bank_QD: Tensor | None
    """[Q, D], likewise, constant, the same rows on every rank: more negatives from text to image."""
    logit_scale: Tensor | float
    """The multiplier itself, not its logarithm: a number or a tensor of shape () or (1,)."""
    logit_bias: Tensor | float | None = None
    """Added to every logit, likewise."""
    pair_weights: Tensor | None = None
    """[M] floats >= 0, constants. A pair of weight 0 costs nothing and still is a negative of others; if all weights
    are 0, so are the loss and all gradients."""
    positives: Positives = "pair"
    """"pair": a pair's one positive is its own cell, and cells of equal ids are masked. "ids": cells of equal ids are
    positives too, those of the bank as well."""
    image_ids: Tensor | None = None
    """[M] int64; a cell has equal ids when the image ids of its row and its column agree,"""
    caption_ids: Tensor | None = None
    """[M] int64; or when their caption ids agree."""
    bank_ids: Tensor | None = None
    """[Q] int64, image ids of the bank; needs `image_ids`. Without it no bank cell has equal ids."""
    excluded: tuple[Tensor, Tensor] | None = None
    """(rows, columns), two int64 tensors [E]; row in [0, M), column in [0, N + Q). These cells are masked in both
    directions, except where they are positives."""
    trusted: bool = field(default=False, kw_only=True)
    """Whether the caller vouches for what only values and other ranks tell: weights are finite and >= 0, `excluded` is
    in range, and all ranks have as many pairs and the same options. Then nothing is read, nor waited for."""

    @property
    def bank_rows(self) -> int:
        return 0 if self.bank_QD is None else len(self.bank_QD)

    def check(self) -> None:
        """Raises TypeError or ValueError for what the losses refuse on one rank."""
        _require_loss_features(self.text_MD, self.image_MD, self.bank_QD)
        M, text_MD = len(self.text_MD), self.text_MD
        _require_scalar("logit_scale", self.logit_scale, text_MD)
        if self.logit_bias is not None:
            _require_scalar("logit_bias", self.logit_bias, text_MD)
        _require_ids("image_ids", self.image_ids, text_MD, M, "one id a pair")
        _require_ids("caption_ids", self.caption_ids, text_MD, M, "one id a pair")
        if self.bank_ids is not None and self.bank_QD is None:
            raise ValueError("bank_ids is given without bank_QD, whose rows it names: pass both")
        _require_ids("bank_ids", self.bank_ids, text_MD, self.bank_rows, "one id a bank row")
        if self.bank_ids is not None and self.image_ids is None:
            raise ValueError("bank_ids is given without image_ids, which it is compared with: pass both")
        _require_excluded(self.excluded, text_MD)
        if self.positives not in ("pair", "ids"):
            raise ValueError(f"positives is {self.positives!r}, expected 'pair' or 'ids'")
        _require_weights(self.pair_weights, text_MD, read=not self.trusted)

    def check_excluded_range(self, columns: int) -> None:
        """The same for cells beyond these columns of all ranks, which only the ranks together can tell."""
        if self.trusted or self.excluded is None or not len(self.excluded[0]) or not may_read(self.excluded[0]):
            return
        stops = len(self.text_MD), columns + self.bank_rows
        for name, part, stop in zip(("[0] (rows)", "[1] (columns)"), self.excluded, stops, strict=True):
            low, high = (int(end) for end in part.aminmax())
            if low < 0 or high >= stop:
                raise ValueError(f"excluded{name} spans {low} to {high}, expected 0 to {stop - 1}")

    def agreed(self) -> dict[str, float]:
        """What all ranks must agree on, by its description."""
        rows = {"text_MD": self.text_MD, "image_MD": self.image_MD, "bank_QD": self.bank_QD}
        return {
            "the width D of text_MD": self.text_MD.shape[1],
            **{
                f"the dtype of {name} (its index)": -1 if features is None else DTYPES.index(features.dtype)
                for name, features in rows.items()
            },
            "whether image_MD requires grad": self.image_MD.requires_grad,
            "the number Q of bank rows": self.bank_rows,
            "whether image_ids is given": self.image_ids is not None,
            "whether caption_ids is given": self.caption_ids is not None,
            "whether positives is 'ids'": self.positives == "ids",
        }

    def as_scalar(self, value: Tensor | float) -> Tensor:
        if isinstance(value, Tensor):
            return value
        return torch.full((), value, dtype=torch.float64, device=self.text_MD.device)

    def weights(self, dtype: torch.dtype) -> Tensor:
        """`pair_weights` [M], or ones."""
        if self.pair_weights is not None:
            return self.pair_weights.detach().to(dtype)
        return torch.ones(len(self.text_MD), dtype=dtype, device=self.text_MD.device)

    def whole_matrix(self) -> tuple[Tensor, Tensor, Tensor]:
        """The definition on one rank: all logits [M, M + Q], and as bool which are positives and which are masked."""
        M, dtype = len(self.text_MD), accumulated(self.text_MD.dtype)
        columns = self.image_MD if self.bank_QD is None else torch.cat([self.image_MD, self.bank_QD])
        bias = 0.0 if self.logit_bias is None else self.logit_bias
        logits = self.logit_scale * (self.text_MD.to(dtype) @ columns.to(dtype).T) + bias
        own = torch.eye(*logits.shape, dtype=torch.bool, device=logits.device)
        same = own.clone()
        if self.image_ids is not None:
            same[:, :M] |= self.image_ids[:, None] == self.image_ids
            if self.bank_ids is not None:
                same[:, M:] |= self.image_ids[:, None] == self.bank_ids
        if self.caption_ids is not None:
            same[:, :M] |= self.caption_ids[:, None] == self.caption_ids
        positive = same if self.positives == "ids" else own
        masked = torch.zeros_like(own) if self.positives == "ids" else same
        if self.excluded is not None:
            masked = masked.index_put(self.excluded, torch.tensor(True, device=logits.device))
        return logits, positive, masked & ~positive


@dataclass(frozen=True)
class ContrastiveArguments(LossArguments):
    """What `contrastive_loss` takes besides."""

    label_smoothing: float = 0.0
    """In [0, 1); this share of the target is spread evenly over unmasked cells, positives included."""
    direction_weights: tuple[float, float] = (0.5, 0.5)
    """(text to image, image to text), each >= 0; not divided by their sum."""

    def check(self) -> None:
        super().check()
        smoothing, directions = self.label_smoothing, self.direction_weights
        if not isinstance(smoothing, int | float):
            raise TypeError(f"label_smoothing is a {type(smoothing).__name__}, expected a number in [0, 1)")
        if not 0 <= smoothing < 1:
            raise ValueError(f"label_smoothing is {smoothing}, expected a number in [0, 1)")
        pair = isinstance(directions, tuple | list) and len(directions) == 2
        if not pair or not all(isinstance(part, int | float) for part in directions):
            raise TypeError(f"direction_weights is {directions!r}, expected two numbers (text->image, image->text)")
        if not (min(directions) >= 0 and 0 < sum(directions) < math.inf):
            raise ValueError(f"direction_weights is {directions!r}, expected numbers >= 0 with a positive sum")

    def agreed(self) -> dict[str, float]:
        return super().agreed() | {
            "label_smoothing": self.label_smoothing,
            "direction_weights[0]": self.direction_weights[0],
            "direction_weights[1]": self.direction_weights[1],
        }


# Checks of the losses


def _require_tensor(name: str, value: Any, like: Tensor, shape: tuple[int, ...], meaning: str) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}, expected a tensor of shape {shape}: {meaning}")
    if tuple(value.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(value.shape)}, expected {shape}: {meaning}")
    if value.device != like.device:
        raise ValueError(f"{name} is on {value.device}, expected {like.device}, where text_MD is")


def _require_dtype(name: str, features: Tensor) -> None:
    if features.dtype not in DTYPES:
        raise TypeError(f"{name} is {features.dtype}, expected float16, bfloat16, float32 or float64")


def _require_loss_features(text_MD: Tensor, image_MD: Tensor, bank_QD: Tensor | None) -> None:
    if not isinstance(text_MD, Tensor):
        raise TypeError(f"text_MD is a {type(text_MD).__name__}, expected a tensor [M, D]")
    if text_MD.dim() != 2 or not 1 <= text_MD.shape[1] <= 1024:
        raise ValueError(f"text_MD has shape {tuple(text_MD.shape)}, expected [M, D] with D from 1 to 1024")
    _require_dtype("text_MD", text_MD)
    M, D = text_MD.shape
    _require_tensor("image_MD", image_MD, text_MD, (M, D), "one image a text")
    if bank_QD is not None:
        if not isinstance(bank_QD, Tensor):
            raise TypeError(f"bank_QD is a {type(bank_QD).__name__}, expected a tensor [Q, {D}]")
        if bank_QD.dim() != 2:
            raise ValueError(f"bank_QD has shape {tuple(bank_QD.shape)}, expected [Q, {D}]")
        _require_tensor("bank_QD", bank_QD, text_MD, (len(bank_QD), D), "Q rows as wide as text_MD")
        if bank_QD.requires_grad:
            raise ValueError("bank_QD requires grad, expected constants: pass bank_QD.detach()")
    for name, features in (("image_MD", image_MD), ("bank_QD", bank_QD)):
        if features is not None:
            _require_dtype(name, features)
            # Rows in 16 and 32 bits go together; fp64 is for references, where nothing else belongs.
            if (features.dtype == torch.float64) != (text_MD.dtype == torch.float64):
                raise TypeError(
                    f"{name} is {features.dtype} and text_MD is {text_MD.dtype}: float64 goes with float64 alone"
                )


def _require_scalar(name: str, value: Any, like: Tensor) -> None:
    if isinstance(value, Tensor):
        if value.dim() > 1 or value.numel() != 1:
            raise ValueError(f"{name} has shape {tuple(value.shape)}, expected () or (1,)")
        if not value.is_floating_point():
            raise TypeError(f"{name} is {value.dtype}, expected a floating-point tensor")
        if value.device != like.device:
            raise ValueError(f"{name} is on {value.device}, expected {like.device}, where text_MD is")
    elif isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} is a {type(value).__name__}, expected a number or a 1-element tensor")
    elif not math.isfinite(value):
        raise ValueError(f"{name} is {value}, expected a finite number")


def _require_ids(name: str, ids: Tensor | None, like: Tensor, size: int, meaning: str) -> None:
    if ids is None:
        return
    _require_tensor(name, ids, like, (size,), meaning)
    if ids.dtype != torch.int64:
        raise TypeError(f"{name} is {ids.dtype}, expected int64: {meaning}")


def _require_weights(pair_weights: Tensor | None, text_MD: Tensor, read: bool) -> None:
    if pair_weights is None:
        return
    _require_tensor("pair_weights", pair_weights, text_MD, (len(text_MD),), "one weight a pair")
    if not pair_weights.is_floating_point():
        raise TypeError(f"pair_weights is {pair_weights.dtype}, expected a floating-point tensor")
    if read and may_read(pair_weights) and not bool(((pair_weights >= 0) & (pair_weights < math.inf)).all()):
        raise ValueError("pair_weights has negative or non-finite entries, expected finite numbers >= 0")


def _require_excluded(excluded: Any, text_MD: Tensor) -> None:
    if excluded is None:
        return
    if not isinstance(excluded, tuple | list) or len(excluded) != 2:
        raise TypeError(f"excluded is a {type(excluded).__name__}, expected two int64 tensors (rows, columns)")
    for at, (name, part) in enumerate(zip(("rows", "columns"), excluded, strict=True)):
        if not isinstance(part, Tensor):
            raise TypeError(f"excluded[{at}] ({name}) is a {type(part).__name__}, expected an int64 tensor [E]")
        if part.dim() != 1:
            raise ValueError(f"excluded[{at}] ({name}) has shape {tuple(part.shape)}, expected [E]")
        _require_ids(f"excluded[{at}]", part, text_MD, len(excluded[0]), f"{name}, one a cell")


def require_group(group: Any, exchange: str) -> None:
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group is a {type(group).__name__}, expected a ProcessGroup that this rank belongs to")
    if exchange not in ("gather", "ring"):
        raise ValueError(f"exchange is {exchange!r}, expected 'gather' or 'ring'")


# Checks of the scores


def require_features(name: str, features: Any, like: Tensor | None = None, like_name: str = "") -> None:
    if not isinstance(features, Tensor):
        raise TypeError(f"{name} is a {type(features).__name__}, expected a tensor of features [rows, D]")
    if features.dim() != 2 or features.shape[1] < 1:
        raise ValueError(f"{name} has shape {tuple(features.shape)}, expected [rows, D] with D from 1")
    _require_dtype(name, features)
    if like is None:
        return
    if features.shape[1] != like.shape[1]:
        raise ValueError(f"{name} is {features.shape[1]} wide and {like_name} {like.shape[1]}: pass equal widths")
    if features.device != like.device:
        raise ValueError(f"{name} is on {features.device}, expected {like.device}, where {like_name} is")


def require_integers(name: str, values: Any, size: int | None, like: Tensor, meaning: str) -> None:
    if not isinstance(values, Tensor):
        raise TypeError(f"{name} is a {type(values).__name__}, expected an int64 tensor: {meaning}")
    if values.dim() != 1 or (size is not None and len(values) != size):
        expected = "[E]" if size is None else f"[{size}]"
        raise ValueError(f"{name} has shape {tuple(values.shape)}, expected {expected}: {meaning}")
    if values.dtype != torch.int64:
        raise TypeError(f"{name} is {values.dtype}, expected int64: {meaning}")
    if values.device != like.device:
        raise ValueError(f"{name} is on {values.device}, expected {like.device}, where the features are")


def require_range(name: str, rows: Tensor, bank_QD: Tensor) -> None:
    if len(rows):
        low, high = (int(end) for end in torch.stack(rows.aminmax()).tolist())
        if low < 0 or high >= len(bank_QD):
            raise ValueError(f"{name} spans {low} to {high}, expected 0 to {len(bank_QD) - 1}, the rows of bank_QD")


def require_finite(name: str, features: Tensor, first: int = 0) -> None:
    """`first` is the row of all that these begin with."""
    dtype = torch.promote_types(features.dtype, torch.float32)
    rows = 1 << 16 if features.is_cuda else max(1, FINITE_CELLS // max(features[:1].numel(), 1))
    for start in range(0, len(features), rows):
        part = features[start : start + rows]
        # On CPUs `isfinite` takes many times as long; a norm is infinite too where squares overflow.
        if math.isfinite(torch.linalg.vector_norm(part, dtype=dtype).item()):
            continue
        finite = part.isfinite().all(1)
        if not bool(finite.all()):
            row = first + start + int((~finite).nonzero()[0, 0])
            raise ValueError(f"{name} row {row} holds NaN or infinity, expected finite features")
