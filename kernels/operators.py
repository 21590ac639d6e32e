"""The losses as operators of torch: one flat schema, fakes for torch.compile, and the gradients of one rank.

An operator takes no process group: exchange over ranks stands above, in `ranks`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from .contract import Options, accumulated

FEATURES = "Tensor text_MD, Tensor image_ND, Tensor? bank_QD"
# The fields of `Options`.
OPTIONS = (
    "Tensor? ids_KM, Tensor? ids_KN, Tensor? bank_ids_Q, Tensor? excluded_2E, SymInt offset, bool as_positives, "
    "bool smooth, bool one_way, int made_in_forward"
)
# Features, and of the options ids and excluded cells; the rest are no tensors.
FEATURE_ARGUMENTS, TENSOR_OPTIONS = 3, 4


class Walk(Protocol):
    """What walks over the tiles of a loss, by whichever path."""

    def forward(self) -> Sequence[Tensor | None]:
        """The sums' fields; None where the options ask for none."""

    def backward(self, kept: Any, grads: Any, need_text: bool, need_image: bool) -> Sequence[Tensor | None]:
        """d text_MD and d image_ND, None where not needed, and each scalar's in fp64; the first needs d text."""


class Operators:
    """A loss's two operators, torch.ops.efficientclip.NAME_sums and NAME_gradients.

    `sums(text_MD, image_ND, bank_QD, *scalars, *constants, *options)` returns the fields of `Sums`, those that end in
    _N by column, in fp64 (in _MD and _ND: as products are added up); a field that the options do not ask for is empty.
    `gradients` is told beside the same arguments the fields of `Kept`, a list of the gradients of the first fields,
    those of `Grads`, and whether d text (which the first scalar's comes with) and d image are needed; it returns them
    in fp32 (fp64 for fp64 features), empty where not needed, and every scalar's in fp64. Constants are tensors that
    have no gradient. Arguments are as `contract` describes and checks them.
    """

    def __init__(
        self,
        name: str,
        walk: Callable[..., Walk],
        scalars: Sequence[str],
        Sums: Any,
        Kept: Any,
        Grads: Any,
        absent: Callable[[Options], Sequence[str]] = lambda options: (),
        constants: Sequence[str] = (),
    ) -> None:
        self.walk, self.scalars, self.absent = walk, len(scalars), absent
        # How many arguments stand before the options, and how many are tensors.
        self.leading = FEATURE_ARGUMENTS + len(scalars) + len(constants)
        self.tensors = self.leading + TENSOR_OPTIONS
        self.Kept, self.Grads = Kept, Grads
        self.fields: tuple[str, ...] = Sums._fields
        self.kept: tuple[str, ...] = Kept._fields
        self.differentiable = len(Grads._fields)
        self.given = self.leading + len(Options._fields)
        shared = ", ".join([FEATURES, *(f"Tensor {name}" for name in (*scalars, *constants)), OPTIONS])
        more = ", ".join(f"Tensor {field}" for field in self.kept) + ", Tensor[] grads, bool need_text, bool need_image"
        self.sums, self.gradients = (
            torch.library.custom_op(f"efficientclip::{name}_{which}", compute, mutates_args=(), schema=schema)
            for which, compute, schema in (
                ("sums", self._sums, f"({shared}) -> Tensor[]"),
                ("gradients", self._gradients, f"({shared}, {more}) -> Tensor[]"),
            )
        )
        self.sums.register_fake(self._fake_sums)
        self.gradients.register_fake(self._fake_gradients)
        self.sums.register_autograd(self._backward, setup_context=self._save)

    def keep(self, sums: Sequence[Tensor]) -> list[Tensor]:
        """What backward needs of them."""
        return [part for name, part in zip(self.fields, sums, strict=True) if name in self.kept]

    def used(self, options: Options, names: Sequence[str], parts: Sequence[Tensor]) -> list[Any]:
        """Fields as they came through an operator, None for those that the options do not ask for.

        What forward made of the rows goes with one block of columns: the others get an empty vector.
        """
        absent = self.absent(options)
        return [
            None if name in absent or (name.endswith("_MD") and part.dim() < 2) else part
            for name, part in zip(names, parts, strict=True)
        ]

    def of_scalars(
        self, grads: Sequence[Tensor], scalars: Sequence[Tensor], needed: Sequence[bool]
    ) -> list[Tensor | None]:
        """Gradients of scalars as autograd wants them."""
        return [
            grad.to(scalar.dtype).reshape(scalar.shape) if need else None
            for grad, scalar, need in zip(grads, scalars, needed, strict=True)
        ]

    def _walk(self, *given: Any) -> Walk:
        return self.walk(*given[: self.leading], Options(*given[self.leading :]))

    def _sums(self, *given: Any) -> list[Tensor]:
        with torch.cuda.device_of(given[0]):
            return _tensors(self._walk(*given).forward())

    def _fake_sums(self, text_MD: Tensor, image_ND: Tensor, *more: Any) -> list[Tensor]:
        kinds = {"M": (text_MD.shape[:1], torch.float64), "N": (image_ND.shape[:1], torch.float64)}
        kinds |= {f"{n}D": (rows.shape, accumulated(text_MD.dtype)) for n, rows in (("M", text_MD), ("N", image_ND))}
        scalar, nothing = ((torch.Size(shape), torch.float64) for shape in ([], [0]))
        absent = self.absent(Options(*more[-len(Options._fields) :]))
        found = [nothing if name in absent else kinds.get(name.rpartition("_")[2], scalar) for name in self.fields]
        return [text_MD.new_empty(shape, dtype=dtype) for shape, dtype in found]

    def _gradients(self, *given: Any) -> list[Tensor]:
        arguments = given[: self.given]
        grads, need_text, need_image = given[-3:]
        options = Options(*arguments[-len(Options._fields) :])
        used = self.used(options, self.Grads._fields, grads)
        kept = self.used(options, self.kept, given[self.given : -3])
        with torch.cuda.device_of(given[0]):
            parts = self._walk(*arguments).backward(self.Kept(*kept), self.Grads(*used), need_text, need_image)
        return _tensors(parts)

    def _fake_gradients(self, text_MD: Tensor, image_ND: Tensor, *more: Any) -> list[Tensor]:
        parts = [
            features.new_empty(features.shape, dtype=accumulated(text_MD.dtype))
            if need
            else text_MD.new_empty(0, dtype=torch.float64)
            for features, need in zip((text_MD, image_ND), more[-2:], strict=True)
        ]
        return [*parts, *(text_MD.new_empty((), dtype=torch.float64) for _ in range(self.scalars))]

    def _save(self, ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
        ctx.save_for_backward(*inputs[: self.tensors], *self.keep(output))
        ctx.options = inputs[self.tensors :]

    def _backward(self, ctx: Any, grads: list[Tensor]) -> tuple[Tensor | None, ...]:
        scalars = slice(FEATURE_ARGUMENTS, FEATURE_ARGUMENTS + self.scalars)
        given, kept = ctx.saved_tensors[: self.tensors], ctx.saved_tensors[self.tensors :]
        need_text, need_image = ctx.needs_input_grad[:2]
        need_scalars = ctx.needs_input_grad[scalars]
        d_text_MD, d_image_ND, *d_scalars = self.gradients(
            *given, *ctx.options, *kept, grads[: self.differentiable], need_text or need_scalars[0], need_image
        )
        return (
            d_text_MD.to(given[0].dtype) if need_text else None,
            d_image_ND.to(given[1].dtype) if need_image else None,
            None,
            *self.of_scalars(d_scalars, given[scalars], need_scalars),
            *[None] * (self.given - scalars.stop),
        )


def _tensors(parts: Sequence[Tensor | None]) -> list[Tensor]:
    """An operator returns tensors only, an empty one for None; rows without gaps, as the exchanges want them."""
    like = next(part for part in parts if part is not None)
    return [like.new_empty(0, dtype=torch.float64) if part is None else part.contiguous() for part in parts]
