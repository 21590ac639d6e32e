"""`contrastive_loss` against its naive reference: values and every gradient, wherever the arithmetic is hard."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from efficientclip.kernels import ContrastiveOutput, chunked, contrastive_loss, contrastive_loss_naive, explain, paths
from tests.kernels.calls import Calls

Loss = Callable[..., ContrastiveOutput]


pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "TILE_ROWS", 61)
    monkeypatch.setattr(chunked, "TILE_LOGITS", 61 * 97)


def unit(rng: torch.Generator, *shape: int) -> Tensor:
    return F.normalize(torch.randn(shape, generator=rng, dtype=torch.float64), dim=-1)


def features(rng: torch.Generator, M: int, Q: int, D: int, hard: bool = False) -> dict[str, Any]:
    text, image, bank = unit(rng, M, D), unit(rng, M, D), unit(rng, Q, D) if Q else None
    if hard:
        # Sure pairs, a negative equal to the text, its opposite, a repeated image, features of length 0.
        image[:20] = text[:20]
        image[21], image[22], image[24] = text[20], -text[20], image[23]
        text[25] = image[26] = 0
        if bank is not None:
            bank[0], bank[1] = text[27], -text[27]
    return {"text": text, "image": image, "bank": bank}


def everything(rng: torch.Generator, M: int, Q: int) -> dict[str, Any]:
    """All options at once: ids that repeat, cells excluded twice and on the diagonal, weights with zeros."""

    def draw(high: int, size: int) -> Tensor:
        return torch.randint(0, max(high, 1), (size,), generator=rng)

    rows, columns = draw(M, 3 * M), draw(M + Q, 3 * M)
    weights = torch.rand(M, generator=rng)
    return {
        "image_ids": draw(M // 2, M),
        "caption_ids": draw(M // 2, M),
        "bank_ids": draw(M // 2, Q) if Q else None,
        "excluded": (torch.cat([rows, rows[:9], draw(M, 9)]), torch.cat([columns, columns[:9], draw(M, 9)])),
        "pair_weights": weights * (weights > 0.3),
        "label_smoothing": 0.1,
        "direction_weights": (0.3, 0.9),
    }


def run(
    loss: Loss,
    data: dict[str, Any],
    dtype: torch.dtype,
    scale: float,
    frozen: torch.dtype | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """Values and gradients, in fp64; the features are rounded to `dtype` first, or images and bank to `frozen`."""
    scalar = torch.float64 if dtype == torch.float64 else torch.float32
    text = data["text"].to(dtype, copy=True).requires_grad_()
    image = data["image"].to(frozen or dtype, copy=True).requires_grad_(frozen is None)
    bank = None if data["bank"] is None else data["bank"].to(frozen or dtype)
    logit_scale = torch.tensor([scale], dtype=scalar, device=text.device, requires_grad=True)
    logit_bias = torch.tensor(-3.0, dtype=scalar, device=text.device, requires_grad=True)
    out = loss(text, image, bank, logit_scale=logit_scale, logit_bias=logit_bias, **options)
    out.loss.backward()
    named = {
        "loss": out.loss,
        "per_pair_loss": out.per_pair_loss_M,
        "positive_logit": out.positive_logit_M,
        "d_text": text.grad,
        "d_image": image.grad,
        "d_scale": logit_scale.grad,
        "d_bias": logit_bias.grad,
    }
    return {name: value.detach().double() for name, value in named.items() if value is not None}


def rms(value: Tensor) -> float:
    return float(value.square().mean().sqrt())


def check(
    data: dict[str, Any],
    dtype: torch.dtype,
    scale: float,
    *,
    frozen: torch.dtype | None = None,
    units: float = 8,
    slack: float = 0,
    **options: Any,
) -> None:
    """Error against fp64 at most twice that of plain torch, or a unit in the last place of the value itself.

    Plain torch widens 16-bit features to fp32 first: were its products rounded to 16 bits, the bound would be a
    thousand times as wide. `units` in a logit's last place are allowed besides, where plain torch may have none by luck
    since logits cancel or are all alike, or where it is the fp64 reference itself, which errs by as many units in the
    last place of the value; `slack` for features' gradients.
    """
    to = {"text": dtype, "image": frozen or dtype, "bank": frozen or dtype}
    rounded = {name: None if value is None else value.to(to[name]).double() for name, value in data.items()}
    exact = None if frozen is None else torch.float64
    truth = run(contrastive_loss_naive, rounded, torch.float64, scale, exact, **options)
    plain = run(contrastive_loss_naive, data, dtype, scale, frozen, **options)
    ours = run(contrastive_loss, data, dtype, scale, frozen, **options)
    M = len(data["text"])
    unit = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    size = {"d_text": abs(scale) / M, "d_image": abs(scale) / M}
    for name, value in truth.items():
        assert ours[name].isfinite().all(), name
        error = rms(ours[name] - value)
        allowed = 2 * rms(plain[name] - value) + unit * rms(value)
        itself = rms(value) if dtype == torch.float64 else 0.0
        allowed += units * unit * (1 + abs(scale)) * (size.get(name, 1.0) + itself) + slack * (name in size)
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}, of {rms(value):.2e}"


# The reference


def test_reference_is_clip(rng: torch.Generator) -> None:
    data = features(rng, 40, 0, 16)
    logits, target = 14 * data["text"] @ data["image"].T, torch.arange(40)
    for smoothing in (0.0, 0.2):
        ours = contrastive_loss_naive(
            data["text"], data["image"], logit_scale=14, label_smoothing=smoothing, logit_bias=-5
        )
        both = [F.cross_entropy(z, target, label_smoothing=smoothing) for z in (logits, logits.T)]
        torch.testing.assert_close(ours.loss, sum(both) / 2)


def test_reference_is_supcon(rng: torch.Generator) -> None:
    data = features(rng, 12, 5, 8)
    ids, bank_ids = torch.arange(12) // 3, torch.arange(5)
    columns, column_ids = torch.cat([data["image"], data["bank"]]), torch.cat([ids, bank_ids])
    p = torch.softmax(7 * data["text"] @ columns.T, 1)
    expected = [-sum(p[i, j].log() for j in range(17) if column_ids[j] == ids[i]) / 4 for i in range(12)]
    ours = contrastive_loss_naive(
        data["text"], data["image"], data["bank"], logit_scale=7, positives="ids", image_ids=ids,
        bank_ids=bank_ids, direction_weights=(1, 0),
    )  # fmt: skip
    torch.testing.assert_close(ours.per_pair_loss_M, torch.stack(expected))


# Values and gradients


@pytest.mark.parametrize("D", [1, 63, 512])
@pytest.mark.parametrize("Q", [0, 5, 130])
@pytest.mark.parametrize("M", [1, 63, 257, 1000])
def test_ragged_shapes(rng: torch.Generator, small_tiles: None, M: int, Q: int, D: int) -> None:
    dtype = (torch.float64, torch.float32)[(M + Q + D) % 2]
    check(features(rng, M, Q, D), dtype, 14, **(everything(rng, M, Q) if D == 63 else {}))


@pytest.mark.parametrize("scale", [0.01, 1, 14, 100, 200])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_scales(rng: torch.Generator, small_tiles: None, dtype: torch.dtype, scale: float) -> None:
    data = features(rng, 257, 130, 63, hard=True)
    units = 8 if dtype == torch.float64 else 0
    check(data, dtype, scale, units=units)
    check(data, dtype, scale, units=units, **everything(rng, 257, 130))


FROZEN = [
    (torch.float32, torch.float16),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.float16),
    (torch.float16, torch.float32),
    (torch.float32, torch.float32),
    (torch.float64, torch.float64),
]


@pytest.mark.parametrize("directions", [(0.5, 0.5), (1.0, 0.0)], ids=["both ways", "one way"])
@pytest.mark.parametrize("scale", [1, 14, 100])
@pytest.mark.parametrize(("dtype", "frozen"), FROZEN, ids=str)
def test_frozen_rows_of_any_dtype(
    rng: torch.Generator,
    small_tiles: None,
    dtype: torch.dtype,
    frozen: torch.dtype,
    scale: float,
    directions: tuple[float, float],
) -> None:
    """As they are, and no worse than plain torch on the same rows; what forward makes of d text, too."""
    data = features(rng, 257, 130, 63, hard=True)
    units = 8 if dtype == torch.float64 else 2
    check(data, dtype, scale, frozen=frozen, units=units, direction_weights=directions)
    options = everything(rng, 257, 130) | {"direction_weights": directions}
    check(data, dtype, scale, frozen=frozen, units=units, **options)
    del options["label_smoothing"]
    check(data, dtype, scale, frozen=frozen, units=units, **options)
    check(data, dtype, scale, frozen=frozen, units=units, positives="ids", **options)


@pytest.mark.parametrize("forced", ["one", "two"])
@pytest.mark.parametrize("positives", ["pair", "ids"])
def test_paths_of_a_tile(
    rng: torch.Generator, monkeypatch: pytest.MonkeyPatch, small_tiles: None, positives: str, forced: str
) -> None:
    """Few logits far apart take two exponentials; here every tile takes the one path or the other."""

    def refuse(*_: Any) -> None:
        raise RuntimeError("the other path was taken")

    if forced == "one":
        monkeypatch.setattr(chunked.ChunkedContrastive, "two_exponentials", refuse)
        check(features(rng, 200, 70, 32), torch.float32, 14, positives=positives)
    else:
        monkeypatch.setattr(chunked, "SUM_RANGE", (1.0, 0.0))
        monkeypatch.setattr(chunked, "SHIFT_REACH", -math.inf)
        check(features(rng, 200, 70, 32), torch.float32, 14, positives=positives, **everything(rng, 200, 70))


@pytest.mark.parametrize("scale", [60, 150, -150])
def test_all_logits_far_from_zero(rng: torch.Generator, small_tiles: None, scale: float) -> None:
    """Features near one direction: every tile needs a shift."""
    data = {name: F.normalize(value + 0.3 * unit(rng, 1, 32)) for name, value in features(rng, 150, 70, 32).items()}
    near = {name: F.normalize(0.05 * value + data["text"][0]) for name, value in data.items()}
    check(near, torch.float32, scale)


OPTIONS: dict[str, list[str]] = {
    "image ids": ["image_ids"],
    "bank ids": ["image_ids", "bank_ids"],
    "caption ids": ["caption_ids"],
    "both ids": ["image_ids", "caption_ids", "bank_ids"],
    "excluded": ["excluded"],
    "weights": ["pair_weights"],
    "smoothing": ["label_smoothing"],
    "directions": ["direction_weights"],
    "ids, excluded": ["image_ids", "bank_ids", "excluded"],
    "excluded, smoothing": ["excluded", "label_smoothing"],
}


@pytest.mark.parametrize("names", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("positives", ["pair", "ids"])
def test_options(rng: torch.Generator, small_tiles: None, positives: str, names: list[str]) -> None:
    options = everything(rng, 131, 70)
    check(features(rng, 131, 70, 32), torch.float64, 14, positives=positives, **{name: options[name] for name in names})


@pytest.mark.parametrize("directions", [(1.0, 0.0), (0.0, 1.0), (1, 1)])
def test_one_direction(rng: torch.Generator, small_tiles: None, directions: tuple[float, float]) -> None:
    check(features(rng, 131, 70, 32, hard=True), torch.float64, 100, direction_weights=directions)


def test_default_tiles(rng: torch.Generator) -> None:
    """Several rows of real tiles, with half-precision features in shared buffers."""
    for dtype in (torch.float32, torch.bfloat16):
        check(features(rng, 1100, 77, 64, hard=True), dtype, 50, image_ids=torch.arange(1100) // 2)


def test_gradcheck(rng: torch.Generator, small_tiles: None) -> None:
    data = features(rng, 7, 4, 3)
    scale, options = torch.tensor(5.0, dtype=torch.float64, requires_grad=True), everything(rng, 7, 4)
    for positives in ("pair", "ids"):

        def loss(text: Tensor, image: Tensor, scale: Tensor, positives: Any = positives) -> Tensor:
            return contrastive_loss(text, image, data["bank"], logit_scale=scale, positives=positives, **options).loss

        inputs = (data["text"].clone().requires_grad_(), data["image"].clone().requires_grad_(), scale)
        assert torch.autograd.gradcheck(loss, inputs)


def test_small_losses_are_exact() -> None:
    """Where p - 1 would cancel in fp32: loss log(1 + e^-30), slopes 1 / (1 + e^30)."""
    text, image = torch.eye(2).requires_grad_(), torch.eye(2)
    out = contrastive_loss(text, image, logit_scale=30.0)
    out.loss.backward()
    slope = 1 / (1 + math.exp(30))
    expected = 30 * slope / 2 * torch.tensor([[-1.0, 1.0], [1.0, -1.0]])
    torch.testing.assert_close(out.loss, torch.tensor(math.log1p(math.exp(-30))), rtol=1e-6, atol=0)
    torch.testing.assert_close(text.grad, expected, rtol=1e-6, atol=0)


def test_strides_do_not_matter(rng: torch.Generator) -> None:
    data = features(rng, 90, 30, 24)
    options = {"pair_weights": torch.rand(90, generator=rng), "image_ids": torch.arange(90) // 2}
    strided = {
        "text": data["text"].T.contiguous().T,
        "image": torch.stack([data["image"], -data["image"]], 1)[:, 0],
        "bank": torch.cat([data["bank"], data["bank"]], 1)[:, :24],
    }
    assert not any(value.is_contiguous() for value in strided.values())
    options_strided = {name: value.repeat_interleave(2)[::2] for name, value in options.items()}
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        one, other = run(contrastive_loss, data, dtype, 14, **options), {}
        text, image = (strided[n].to(dtype).detach().requires_grad_() for n in ("text", "image"))
        out = contrastive_loss(
            text, image, strided["bank"].to(dtype), logit_scale=14.0, logit_bias=-3.0, **options_strided
        )
        text_grad, image_grad = torch.autograd.grad(out.loss, (text, image))
        other = {"loss": out.loss.detach(), "d_text": text_grad, "d_image": image_grad}
        for name, value in other.items():
            torch.testing.assert_close(value.double(), one[name], rtol=1e-5, atol=1e-7)


def test_twice_gives_the_same_bits(rng: torch.Generator) -> None:
    data, options = features(rng, 700, 130, 64, hard=True), everything(rng, 700, 130)
    for positives in ("pair", "ids"):
        one, other = (run(contrastive_loss, data, torch.float32, 100, positives=positives, **options) for _ in "12")
        for name, value in one.items():
            assert torch.equal(value, other[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_autocast_does_not_round_logits(rng: torch.Generator, dtype: torch.dtype) -> None:
    data, options = features(rng, 70, 30, 32), everything(rng, 70, 30)
    plain = run(contrastive_loss, data, dtype, 100, **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = run(contrastive_loss, data, dtype, 100, **options)
    for name, value in plain.items():
        assert torch.equal(value, under[name]), name


# Rows and columns without negatives, weights of zero


@pytest.mark.parametrize("positives", ["pair", "ids"])
@pytest.mark.parametrize("reason", ["alone", "equal ids", "excluded", "weights"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_nothing_to_contrast_with(rng: torch.Generator, positives: str, reason: str, smoothing: float) -> None:
    M = 1 if reason == "alone" else 9
    options: dict[str, Any] = {
        "alone": {},
        "equal ids": {"image_ids": torch.zeros(M, dtype=torch.int64)},
        "excluded": {"excluded": tuple(torch.cartesian_prod(torch.arange(M), torch.arange(M)).T)},
        "weights": {"pair_weights": torch.zeros(M)},
    }[reason]
    out = run(
        contrastive_loss, features(rng, M, 0, 8), torch.float32, 100, positives=positives,
        label_smoothing=smoothing, **options,
    )  # fmt: skip
    for name in ("loss", "d_text", "d_image", "d_scale", "d_bias"):
        assert not out[name].any(), name
    assert out["per_pair_loss"].isfinite().all()
    assert reason == "weights" or not out["per_pair_loss"].any()


def test_no_pairs() -> None:
    text = torch.zeros(0, 8, requires_grad=True)
    out = contrastive_loss(text, torch.zeros(0, 8), torch.ones(5, 8), logit_scale=10.0)
    out.loss.backward()
    assert float(out.loss.detach()) == 0
    assert text.grad is not None and text.grad.shape == (0, 8)


def test_weight_zero_still_is_a_negative(rng: torch.Generator) -> None:
    data = features(rng, 30, 0, 8)
    kept = torch.arange(30) < 20
    out = run(contrastive_loss, data, torch.float64, 5, pair_weights=kept.double())
    assert out["d_text"][20:].norm() > 0 and out["per_pair_loss"][20:].min() > 0
    torch.testing.assert_close(out["loss"], out["per_pair_loss"][:20].mean())


def test_nan_stays_visible(rng: torch.Generator) -> None:
    data = features(rng, 70, 30, 16)
    data["text"][33, 2] = math.nan
    out = run(contrastive_loss, data, torch.float32, 10)
    assert out["loss"].isnan()
    assert out["positive_logit"].isnan().nonzero().flatten().tolist() == [33]


# Cost


@pytest.mark.parametrize("frozen", [True, False])
def test_memory_and_products(rng: torch.Generator, frozen: bool) -> None:
    """No M x N matrix; 4 products of M x N x D in all, 3 with frozen images, and 2 with the bank."""
    M, Q, D = 3000, 1500, 16
    text = unit(rng, M, D).float().requires_grad_()
    image = unit(rng, M, D).float().requires_grad_(not frozen)
    ids = torch.arange(M) // 2
    batch, bank = 3 * 6, 3 * 3
    with Calls() as calls:
        loss = contrastive_loss(text, image, unit(rng, Q, D).float(), logit_scale=14.0, image_ids=ids).loss
        assert calls.products == batch + 2 * bank
        loss.backward()
    assert calls.largest <= 4 * chunked.TILE_LOGITS < 4 * M * M
    assert calls.products == (3 if frozen else 4) * batch + 2 * bank
    assert (image.grad is None) == frozen


def test_one_way_takes_two_products(rng: torch.Generator) -> None:
    """With frozen images, which are read as they are: no copy of the bank in fp32."""
    M, Q, D = 3000, 30_000, 32
    text, image, bank = unit(rng, M, D).float().requires_grad_(), unit(rng, M, D).half(), unit(rng, Q, D).half()
    with Calls() as calls:
        contrastive_loss(text, image, bank, logit_scale=14.0, direction_weights=(1.0, 0.0)).loss.backward()
    assert calls.products == 2 * 3 * (6 + 59)
    assert calls.largest <= 4 * chunked.TILE_LOGITS < 4 * Q * D


def test_explain_names_the_path() -> None:
    assert explain(torch.zeros(1, 1)) == "chunked torch: CPU tensors"


def test_cards_without_kernels_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        text = torch.zeros(1, 1, device="cuda")
    monkeypatch.setattr(paths, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert explain(text) == "chunked torch: the fused kernels need compute capability 8.0, this GPU has 7.5"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert explain(text).startswith("fused Triton kernels")
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert explain(text) == "chunked torch: the fused kernels have no tuning table for ROCm"


# Wrong arguments

TEXT = torch.zeros(4, 8)
IDS = torch.zeros(4, dtype=torch.int64)
WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"text_MD": [1.0]}, TypeError, "text_MD is a list"),
    ({"text_MD": torch.zeros(4)}, ValueError, r"text_MD has shape \(4,\)"),
    ({"text_MD": torch.zeros(4, 1025)}, ValueError, r"text_MD has shape \(4, 1025\)"),
    ({"text_MD": torch.zeros(4, 8, dtype=torch.int64)}, TypeError, "text_MD is torch.int64"),
    ({"image_MD": torch.zeros(5, 8)}, ValueError, r"image_MD has shape \(5, 8\), expected \(4, 8\)"),
    ({"image_MD": IDS[:, None].expand(4, 8)}, TypeError, "image_MD is torch.int64"),
    ({"image_MD": TEXT.double()}, TypeError, "image_MD is torch.float64 and text_MD is torch.float32: float64 goes"),
    ({"image_MD": TEXT.to("meta")}, ValueError, "image_MD is on meta, expected cpu"),
    ({"bank_QD": torch.zeros(5, 7)}, ValueError, r"bank_QD has shape \(5, 7\), expected \(5, 8\)"),
    ({"bank_QD": torch.zeros(8)}, ValueError, r"bank_QD has shape \(8,\), expected \[Q, 8\]"),
    ({"bank_QD": [1.0]}, TypeError, r"bank_QD is a list, expected a tensor \[Q, 8\]"),
    ({"bank_QD": torch.zeros(5, 8, requires_grad=True)}, ValueError, "bank_QD requires grad"),
    ({"bank_QD": torch.zeros(5, 8).double()}, TypeError, "bank_QD is torch.float64"),
    ({"logit_scale": torch.ones(2)}, ValueError, r"logit_scale has shape \(2,\)"),
    ({"logit_scale": torch.ones(1, dtype=torch.int64)}, TypeError, "logit_scale is torch.int64"),
    ({"logit_scale": math.inf}, ValueError, "logit_scale is inf"),
    ({"logit_scale": "14"}, TypeError, "logit_scale is a str"),
    ({"logit_bias": torch.ones(1, 1)}, ValueError, r"logit_bias has shape \(1, 1\)"),
    ({"pair_weights": torch.ones(3)}, ValueError, r"pair_weights has shape \(3,\), expected \(4,\)"),
    ({"pair_weights": -torch.ones(4)}, ValueError, "pair_weights has negative"),
    ({"pair_weights": torch.full((4,), math.nan)}, ValueError, "pair_weights has negative or non-finite"),
    ({"pair_weights": IDS}, TypeError, "pair_weights is torch.int64"),
    ({"positives": "all"}, ValueError, "positives is 'all', expected 'pair' or 'ids'"),
    ({"image_ids": IDS[:3]}, ValueError, r"image_ids has shape \(3,\), expected \(4,\)"),
    ({"image_ids": IDS.int()}, TypeError, "image_ids is torch.int32, expected int64"),
    ({"caption_ids": [1, 2, 3, 4]}, TypeError, "caption_ids is a list"),
    ({"image_ids": IDS, "bank_ids": IDS}, ValueError, r"bank_ids has shape \(4,\), expected \(5,\)"),
    ({"bank_ids": torch.zeros(5, dtype=torch.int64)}, ValueError, "bank_ids is given without image_ids"),
    ({"excluded": IDS}, TypeError, "excluded is a Tensor"),
    ({"bank_QD": None, "bank_ids": IDS, "image_ids": IDS}, ValueError, "bank_ids is given without bank_QD"),
    ({"excluded": (None, IDS)}, TypeError, r"excluded\[0\] \(rows\) is a NoneType"),
    ({"excluded": (IDS, IDS[None])}, ValueError, r"excluded\[1\] \(columns\) has shape \(1, 4\), expected \[E\]"),
    ({"excluded": (IDS, IDS[:3])}, ValueError, r"excluded\[1\] has shape \(3,\), expected \(4,\)"),
    ({"excluded": (IDS + 4, IDS)}, ValueError, r"excluded\[0\] \(rows\) spans 4 to 4, expected 0 to 3"),
    ({"excluded": (IDS, IDS - 1)}, ValueError, r"excluded\[1\] \(columns\) spans -1 to -1, expected 0 to 8"),
    ({"excluded": (IDS, IDS + 9)}, ValueError, r"excluded\[1\] \(columns\) spans 9 to 9, expected 0 to 8"),
    ({"label_smoothing": 1.0}, ValueError, "label_smoothing is 1.0"),
    ({"label_smoothing": "0.1"}, TypeError, "label_smoothing is a str"),
    ({"direction_weights": (0.0, 0.0)}, ValueError, "direction_weights is"),
    ({"direction_weights": (1.0, -0.5)}, ValueError, "direction_weights is"),
    ({"direction_weights": (1.0,)}, TypeError, "direction_weights is"),
    ({"direction_weights": 0.5}, TypeError, "direction_weights is 0.5, expected two numbers"),
    ({"exchange": "mesh"}, ValueError, "exchange is 'mesh', expected 'gather' or 'ring'"),
    ({"group": "gloo"}, TypeError, "group is a str, expected a ProcessGroup"),
]


@pytest.mark.parametrize(("change", "error", "message"), WRONG, ids=[message for _, _, message in WRONG])
def test_wrong_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    right: dict[str, Any] = {"text_MD": TEXT, "image_MD": TEXT, "bank_QD": torch.zeros(5, 8), "logit_scale": 1.0}
    contrastive_loss(**right)
    with Calls() as calls, pytest.raises(error, match=message):
        contrastive_loss(**(right | change))
    assert calls.products == 0
