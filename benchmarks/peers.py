"""The losses of several packages on the same features, and what each of them refuses.

Shapes: N pairs, Q frozen rows of a bank, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from efficientclip.kernels import contrastive_loss, sigmoid_loss

MIB = 2**20
PASSES = ("forward", "forward+backward")


@dataclass(frozen=True)
class Case:
    N: int
    D: int = 512
    bank: int = 0
    dtype: torch.dtype = torch.float32
    frozen: bool = False
    device: str = "cpu"
    frozen_dtype: torch.dtype | None = None
    """Of frozen images and the bank, where it is not the texts'."""
    one_way: bool = False
    """From text to image alone."""
    sigmoid: bool = False
    """Not the softmax's."""

    def __post_init__(self) -> None:
        if self.frozen_dtype and not self.frozen:
            raise ValueError("frozen_dtype is of frozen images: pass frozen=True")
        if self.sigmoid and (self.bank or self.one_way):
            raise ValueError("the sigmoid loss is compared without bank, both ways at once")

    def __str__(self) -> str:
        bank = f"bank={self.bank}-" if self.bank else ""
        frozen = f"-{_name(self.frozen_dtype)}" if self.frozen_dtype else ""
        ways = f"{'-one way' if self.one_way else ''}{'-sigmoid' if self.sigmoid else ''}"
        side = f"{'frozen' if self.frozen else 'trainable'}{frozen}{ways}"
        return f"{bank}N={self.N}-D={self.D}-{self.dtype_name}-{side}"

    @property
    def dtype_name(self) -> str:
        return _name(self.dtype)

    @property
    def key(self) -> dict[str, Any]:
        """As rows of the CSV name it."""
        return {
            "N": self.N, "D": self.D, "bank": self.bank, "dtype": self.dtype_name, "frozen": self.frozen,
            "frozen_dtype": _name(self.frozen_dtype) if self.frozen_dtype else "", "one_way": self.one_way,
            "loss": "sigmoid" if self.sigmoid else "contrastive", "device": self.device,
        }  # fmt: skip

    @property
    def gradient_bytes(self) -> int:
        return self.N * self.D * self.dtype.itemsize * (1 if self.frozen else 2)

    @property
    def wide(self) -> Case:
        """The same in fp32."""
        return replace(self, dtype=torch.float32, frozen_dtype=None)

    @property
    def small(self) -> Case:
        return replace(self, N=min(self.N, 512), bank=min(self.bank, 512))

    def flop(self, pass_: str) -> int:
        """Of the products needed: one forward; backward the logits again, d text, and d image unless frozen.

        Columns that have no slopes of their own need no second logits: forward can make their share of d text.
        """
        own = (2 if self.one_way else 3) if self.frozen else 4
        batch, bank = (1, 1) if pass_ == "forward" else (own, 2)
        return 2 * self.N * (batch * self.N + bank * self.bank) * self.D


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass
class Inputs:
    text: Tensor
    image: Tensor
    bank: Tensor | None
    scale: Tensor
    bias: Tensor
    one_way: bool = False
    sigmoid: bool = False

    @property
    def leaves(self) -> dict[str, Tensor]:
        leaves = {"text": self.text, "image": self.image, "scale": self.scale}
        return leaves | ({"bias": self.bias} if self.sigmoid else {})

    @property
    def trained(self) -> list[Tensor]:
        return [leaf for leaf in self.leaves.values() if leaf.requires_grad]

    def float(self) -> Inputs:
        """The same values as leaves in fp32."""
        text, image = (part.detach().float().requires_grad_(part.requires_grad) for part in (self.text, self.image))
        bank = None if self.bank is None else self.bank.float()
        scale, bias = (part.detach().clone().requires_grad_() for part in (self.scale, self.bias))
        return Inputs(text, image, bank, scale, bias, self.one_way, self.sigmoid)


def inputs(case: Case) -> Inputs:
    rng = torch.Generator(case.device).manual_seed(0)
    other = case.frozen_dtype or case.dtype

    def unit(rows: int, dtype: torch.dtype) -> Tensor:
        return F.normalize(torch.randn(rows, case.D, generator=rng, device=case.device), dim=1).to(dtype)

    scale, bias = (torch.tensor(value, device=case.device, requires_grad=True) for value in (14.3, -10.0))
    return Inputs(
        unit(case.N, case.dtype).requires_grad_(),
        unit(case.N, other).requires_grad_(not case.frozen),
        unit(case.bank, other) if case.bank else None,
        scale,
        bias,
        case.one_way,
        case.sigmoid,
    )


# Implementations


def ours(data: Inputs) -> Tensor:
    if data.sigmoid:
        return sigmoid_loss(data.text, data.image, logit_scale=data.scale, logit_bias=data.bias).loss
    ways = (1.0, 0.0) if data.one_way else (0.5, 0.5)
    return contrastive_loss(data.text, data.image, data.bank, logit_scale=data.scale, direction_weights=ways).loss


def plain(data: Inputs) -> Tensor:
    """One matrix of logits, which autograd keeps: no recompute."""
    dtype, target = data.text.dtype, torch.arange(len(data.text), device=data.text.device)
    text = data.scale * data.text
    logits = text @ data.image.to(dtype).T
    if data.sigmoid:
        logits = logits + data.bias
        return (F.softplus(logits).sum() - logits.diagonal().sum()) / len(text)
    rows = logits if data.bank is None else torch.cat([logits, text @ data.bank.to(dtype).T], 1)
    to_image = F.cross_entropy(rows, target)
    return to_image if data.one_way else (to_image + F.cross_entropy(logits.T, target)) / 2


compiled = torch.compile(plain, dynamic=False)


@cache
def _open_clip(name: str) -> Any:
    from open_clip import loss

    return getattr(loss, name)()


def open_clip(data: Inputs) -> Tensor:
    image = data.image.to(data.text.dtype)
    if data.sigmoid:
        return _open_clip("SigLipLoss")(image, data.text, data.scale, data.bias)
    loss = _open_clip("ClipLoss")
    if not data.one_way:
        return loss(image, data.text, data.scale)
    _, to_image = loss.get_logits(image, data.text, data.scale)
    return F.cross_entropy(to_image, loss.get_ground_truth(image.device, len(image)))


def linear_cross_entropy(data: Inputs) -> Tensor:
    """torch's own, in chunks, which makes its gradients in forward; a call for each way."""
    options, target = torch.nn.LinearCrossEntropyOptions(), torch.arange(len(data.text), device=data.text.device)

    def one(rows: Tensor, columns: Tensor) -> Tensor:
        return F.linear_cross_entropy(data.scale * rows, columns, target, options=options)

    image = data.image.to(data.text.dtype)
    columns = image if data.bank is None else torch.cat([image, data.bank.to(image.dtype)])
    to_image = one(data.text, columns)
    return to_image if data.one_way else (to_image + one(image, data.text)) / 2


def inf_cl(data: Inputs) -> Tensor:
    from inf_cl import cal_flash_loss

    pairs = (data.text, data.image), (data.image, data.text)
    means = [cal_flash_loss(*pair, scale=data.scale).mean() for pair in pairs[: 1 if data.one_way else 2]]
    return sum(means) / len(means)


def siglip_kernel(data: Inputs) -> Tensor:
    from siglip_kernel import fused_siglip_loss

    return fused_siglip_loss(data.image, data.text, data.scale.log(), data.bias)


def _missing(module: str, package: str) -> str | None:
    return None if find_spec(module) else f"not installed: pip install {package}"


def _open_clip_refuses(case: Case) -> str | None:
    return "has no bank" if case.bank else _missing("open_clip", "open_clip_torch")


def _compiled_refuses(case: Case) -> str | None:
    slow = case.device == "cpu" and (case.N > 4096 or case.D != 512 or case.frozen or case.bank or case.sigmoid)
    return "on CPUs compiled at D = 512 and N up to 4,096 only: compiling takes long" if slow else None


def _linear_cross_entropy_refuses(case: Case) -> str | None:
    if case.sigmoid:
        return "is a softmax"
    return None if hasattr(F, "linear_cross_entropy") else f"needs torch 2.13, this is {torch.__version__}"


def _inf_cl_refuses(case: Case) -> str | None:
    if case.device == "cpu":
        return "needs CUDA"
    if case.bank or case.sigmoid:
        return "is a softmax" if case.sigmoid else "has no bank"
    if case.frozen_dtype:
        return "takes features of one dtype"
    if case.N % 64 or case.D % 256:
        return "wrong unless 64 divides N and 256 divides D"
    return _missing("inf_cl", "inf-cl")


def _siglip_kernel_refuses(case: Case) -> str | None:
    if case.device == "cpu":
        return "needs CUDA"
    if not case.sigmoid:
        return "is a sigmoid loss"
    if case.frozen_dtype:
        return "takes features of one dtype"
    return _missing("siglip_kernel", "siglip-kernel")


@dataclass(frozen=True)
class Implementation:
    name: str
    loss: Callable[[Inputs], Tensor]
    matrices: int
    """Matrices of logits that it holds at once, to estimate its memory."""
    refuses: Callable[[Case], str | None] = lambda case: None

    def estimate(self, case: Case) -> int:
        """Bytes beside inputs and gradients."""
        linear = 6 * 4 * case.N * case.D + 256 * MIB
        if case.frozen_dtype and self.matrices:
            # Who takes one dtype widens the frozen rows.
            linear += (case.N + case.bank) * case.D * case.dtype.itemsize
        return self.matrices * case.N * (case.N + case.bank) * case.dtype.itemsize + linear


IMPLEMENTATIONS = (
    Implementation("plain", plain, 5),
    Implementation("ours", ours, 0),
    Implementation("open_clip", open_clip, 4, _open_clip_refuses),
    Implementation("compiled", compiled, 2, _compiled_refuses),
    Implementation("linear_cross_entropy", linear_cross_entropy, 1, _linear_cross_entropy_refuses),
    Implementation("inf-cl", inf_cl, 0, _inf_cl_refuses),
    Implementation("siglip-kernel", siglip_kernel, 0, _siglip_kernel_refuses),
)
