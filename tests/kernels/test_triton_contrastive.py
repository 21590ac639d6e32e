"""The Triton kernels of `contrastive_loss` against its fp64 reference: on a GPU, else in Triton's interpreter."""

from __future__ import annotations

import dataclasses
import math
import os
import subprocess
import sys
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from efficientclip.kernels import contrastive, contrastive_loss, explain, paths
from efficientclip.kernels.contract import ContrastiveGrads, ContrastiveKept, Options
from tests.kernels.calls import Held
from tests.kernels.test_contrastive import check as check_against_plain
from tests.kernels.test_contrastive import everything, features, run, unit

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda")
runs_kernels = pytest.mark.skipif(
    DEVICE.type == "cpu" and not INTERPRETED, reason="runs in a process of its own, see test_in_the_interpreter"
)


@pytest.mark.skipif(DEVICE.type == "cuda" or INTERPRETED, reason="the kernels run here")
def test_in_the_interpreter() -> None:
    """Triton decides at import whether it interprets: all tests below, in one process where it does."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-header", "--tb=short", __file__]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@pytest.fixture(autouse=True)
def kernels_on_poisoned_memory(monkeypatch: pytest.MonkeyPatch, poisoned_memory: None) -> None:
    """The kernels on CPU tensors too; in the interpreter, tiles so small that there are many."""
    monkeypatch.setattr(paths, "KERNELS_ON_CPU", True)
    if INTERPRETED:
        use_tiles(monkeypatch, descriptors=True)


def use_tiles(
    monkeypatch: pytest.MonkeyPatch,
    descriptors: bool,
    kept: int = 8,
    products: Literal["triton", "library"] = "triton",
    rows: int = 32,
) -> None:
    from efficientclip.kernels.triton import tuning

    tile = tuning.Launch(rows, rows // 2, 32, 4, 2)
    config = tuning.Config(
        tile, tile, tile, tuning.Launch(16, 32, 32, 4, 2), descriptors=descriptors, kept=kept, programs=3,
        chunk=(64, 48), processors=8, products=products, panel=64,
    )  # fmt: skip
    # Tiles that hold masked cells are half as wide and half as high.
    tile = tuning.Launch(rows // 2, rows // 4, 32, 4, 2)
    narrow = dataclasses.replace(config, forward=tile, rescue=tile, gradient=tile, kept=min(kept, 8))

    def chosen(text_MD: Tensor, columns: torch.dtype, burden: int) -> tuning.Config:
        return narrow if burden else config

    monkeypatch.setattr(tuning, "tile_config", chosen)


def on_device(value: Any) -> Any:
    if isinstance(value, tuple | list) and value and isinstance(value[0], Tensor):
        return tuple(part.to(DEVICE) for part in value)
    return value.to(DEVICE) if isinstance(value, Tensor) else value


def check(data: dict[str, Any], dtype: torch.dtype, scale: float, **options: Any) -> None:
    data, options = ({name: on_device(value) for name, value in given.items()} for given in (data, options))
    few = len(data["text"]) < 10 and dtype != torch.float32
    # Logit gradients are rounded to the dtype: over so few of them that error does not average out.
    slack = torch.finfo(dtype).eps / 2 * abs(scale) / math.sqrt(data["text"].shape[1]) if few else 0.0
    check_against_plain(data, dtype, scale, slack=slack, **options)


OPTIONS: dict[str, list[str]] = {
    "plain": [],
    "ids": ["image_ids"],
    "bank ids, excluded": ["image_ids", "bank_ids", "excluded"],
    "both ids, smoothing": ["image_ids", "caption_ids", "label_smoothing"],
    "excluded, weights": ["excluded", "pair_weights", "direction_weights"],
    "smoothing": ["label_smoothing"],
}
HALVES = [torch.float32, torch.bfloat16, torch.float16]


@runs_kernels
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(("M", "Q", "D"), [(1, 0, 1), (1, 3, 24), (3, 5, 100), (63, 0, 64), (100, 9, 24)])
def test_ragged_shapes(rng: torch.Generator, dtype: torch.dtype, M: int, Q: int, D: int) -> None:
    check(features(rng, M, Q, D, hard=M > 30), dtype, 14)
    check(features(rng, M, Q, D, hard=M > 30), dtype, 14, **everything(rng, M, Q))


@runs_kernels
@pytest.mark.parametrize("scale", [0.01, 1, 14, 100, 200, -30, 0])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_scales(rng: torch.Generator, dtype: torch.dtype, scale: float) -> None:
    check(features(rng, 41, 18, 24, hard=True), dtype, scale, units=0 if scale in (1, 14, 100) else 8)


@runs_kernels
@pytest.mark.parametrize(("D", "dtype"), [(512, torch.bfloat16), (1000, torch.float16), (1024, torch.float32)], ids=str)
def test_wide_features(rng: torch.Generator, D: int, dtype: torch.dtype) -> None:
    """Many steps over D; 1,000 is no multiple of any block."""
    check(features(rng, 35, 7, D, hard=True), dtype, 100, **everything(rng, 35, 7))


@runs_kernels
@pytest.mark.parametrize("names", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("positives", ["pair", "ids"])
def test_options(rng: torch.Generator, positives: str, names: list[str]) -> None:
    options = everything(rng, 41, 18)
    check(features(rng, 41, 18, 8), torch.float32, 14, positives=positives, **{name: options[name] for name in names})


@runs_kernels
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_pointers_and_full_column_sums(
    rng: torch.Generator, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """The other way of each choice that architectures differ in."""
    if INTERPRETED:
        use_tiles(monkeypatch, descriptors=False, kept=1)
    check(features(rng, 50, 18, 25, hard=True), dtype, 100)
    check(features(rng, 41, 18, 25, hard=True), dtype, 14, positives="ids", **everything(rng, 41, 18))


@runs_kernels
@pytest.mark.parametrize("rescued", [True, False])
def test_weak_columns(rng: torch.Generator, monkeypatch: pytest.MonkeyPatch, rescued: bool) -> None:
    """Half of the images are opposite to all texts and one text is its neighbour's image: sums lie e^300 apart."""
    data = features(rng, 60, 0, 8)
    data["text"] = torch.nn.functional.normalize(0.05 * data["text"] + data["text"][0])
    data["image"][::2] = -data["text"][::2]
    data["image"][1::2] = data["text"][1::2]
    if rescued:
        check(data, torch.float32, 150)
        return
    from efficientclip.kernels.triton import contrastive as fused

    class Skipped:
        def __getitem__(self, grid: Any) -> Any:
            return lambda **_: None

    monkeypatch.setattr(fused, "rescue_kernel", Skipped())
    text, image = (data[name].float().to(DEVICE) for name in ("text", "image"))
    sums = tiles(text, image, None, 150.0).forward()
    assert (sums.col_lse_N == -math.inf).any()


@runs_kernels
def test_merging_of_many_strips(rng: torch.Generator) -> None:
    from efficientclip.kernels.triton.contrastive import merge_kernel

    P, N, width, block = 37, 40, 48, 16
    tops, sums = 60 * torch.randn(3, P, generator=rng), torch.rand(P, width, generator=rng)
    given = [part.to(DEVICE) for part in (tops, sums)]
    highest, total = (torch.full((N,), math.nan, dtype=torch.float64, device=DEVICE) for _ in "12")
    merge_kernel[3,](*given, P, None, None, None, highest, total, 0, N, width, BLOCK_P=16, BLOCK_N=block, WIDE_N=block)
    terms = sums[:, :N].double().log2() + tops.T.repeat_interleave(block, 1)[:, :N].double()
    torch.testing.assert_close((total.log2() + highest).cpu(), torch.logsumexp(terms * math.log(2), 0) / math.log(2))


def tiles(text_MD: Tensor, image_ND: Tensor, bank_QD: Tensor | None, scale: float, first: int = 0, **more: Any) -> Any:
    """What walks the tiles of texts whose images start at `first`; in fp64 the chunked path."""
    given = dict.fromkeys(Options._fields[:4]) | {"as_positives": False, "smooth": False, "offset": first}
    options = Options(**given | more)
    return contrastive.walk(text_MD, image_ND, bank_QD, torch.tensor(scale, device=text_MD.device), options)


@runs_kernels
@pytest.mark.parametrize(("first", "Q"), [(40, 21), (90, 0), (-37, 0)], ids=["own columns", "beyond", "before"])
@pytest.mark.parametrize("as_positives", [True, False])
def test_one_rank_of_several(rng: torch.Generator, as_positives: bool, first: int, Q: int) -> None:
    """All sums and gradients equal those of the chunked path in fp64."""
    M, N, D = 37, 90, 24
    # Near one direction: products are positive, and so d scale, the sum of all slopes times theirs, does not cancel.
    near = unit(rng, 1, D)
    text, image, bank = (
        torch.nn.functional.normalize(unit(rng, size, D) + near).float().to(DEVICE) for size in (M, N, Q)
    )
    ids_KN = torch.randint(0, 20, (2, N), generator=rng).to(DEVICE)
    more = {
        "ids_KM": ids_KN[:, 40 : 40 + M],
        "ids_KN": ids_KN,
        "bank_ids_Q": torch.randint(0, 20, (Q,), generator=rng).to(DEVICE) if Q else None,
        "excluded_2E": torch.stack([torch.randint(0, high, (200,), generator=rng) for high in (M, N + Q)]).to(DEVICE),
        "as_positives": as_positives,
        "smooth": True,
    }
    ours = tiles(text, image, bank, 10.0, first, **more)
    chunked = tiles(text.double(), image.double(), bank.double(), 10.0, first, **more)
    assert (type(ours).__name__, type(chunked).__name__) == ("TritonContrastive", "ChunkedContrastive")
    sums, truth = ours.forward(), chunked.forward()
    for name, value in truth._asdict().items():
        if value is not None:
            torch.testing.assert_close(getattr(sums, name), value, rtol=2e-6, atol=2e-5, msg=name)
    fields = ContrastiveGrads._fields
    values = (getattr(truth, name) for name in fields)
    grads = ContrastiveGrads(*(None if v is None else torch.rand_like(v) / 1e6 for v in values))
    kept, true = (ContrastiveKept(of.row_lse_M, of.col_lse_N) for of in (sums, truth))
    for one, other in zip(
        ours.backward(kept, grads, True, True), chunked.backward(true, grads, True, True), strict=True
    ):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5 * float(other.abs().max()))


@runs_kernels
@pytest.mark.parametrize("where", ["few tiles", "all tiles", "borders", "one column", "none in the batch"])
@pytest.mark.parametrize("positives", ["pair", "ids"])
def test_excluded_cells_by_tiles(rng: torch.Generator, positives: str, where: str) -> None:
    M, Q = 44, 21
    edges = torch.tensor([0, 15, 16, 31, 32, 43])
    across = torch.cat([edges, torch.tensor([7, 8, 44, 59, 60, 64])])
    chosen = {
        "few tiles": torch.tensor([[3, 3, 40, 33], [5, 60, 34, 64]]),
        "all tiles": torch.cartesian_prod(torch.arange(0, M, 15), torch.arange(0, M + Q, 7)).T,
        "borders": torch.cartesian_prod(edges, across).T,
        "one column": torch.stack([torch.arange(M), torch.full((M,), 33)]),
        "none in the batch": torch.stack([torch.arange(M), torch.arange(M) % Q + M]),
    }[where]
    options: dict[str, Any] = {"excluded": (chosen[0], chosen[1]), "positives": positives}
    if positives == "ids":
        options |= {name: everything(rng, M, Q)[name] for name in ("image_ids", "label_smoothing")}
    check(features(rng, M, Q, 8, hard=True), torch.float32, 14, **options)


@runs_kernels
def test_rescued_columns_leave_out_excluded_cells(rng: torch.Generator) -> None:
    data = features(rng, 60, 0, 8)
    data["text"] = torch.nn.functional.normalize(0.05 * data["text"] + data["text"][0])
    data["image"][::2] = -data["text"][::2]
    data["image"][1::2] = data["text"][1::2]
    chosen = torch.cartesian_prod(torch.arange(0, 60, 7), torch.arange(0, 60, 4)).T
    check(data, torch.float32, 150, excluded=(chosen[0], chosen[1]))


@runs_kernels
def test_flags_and_sorted_cells(rng: torch.Generator) -> None:
    """Each tile's bit, by a loop over the cells."""
    from efficientclip.kernels.triton.cells import masked

    shape, wide, narrow = (1500, 90), (16, 32), (16, 8)
    row, col = (torch.randint(0, high, (400,), generator=rng) for high in shape)
    chosen = torch.rand(400, generator=rng) < 0.7
    found = masked(row.to(DEVICE), col.to(DEVICE), chosen.to(DEVICE), shape, wide, narrow)
    expected = [0] * (3 * found.words)
    keys = []
    for i, j, real in zip(row.tolist(), col.tolist(), chosen.tolist(), strict=True):
        if real:
            expected[j // 32 * found.words + i // 16 // 32] |= 1 << (i // 16 % 32)
            keys.append((i // 16 * 12 + j // 8) * 128 + i % 16 * 8 + j % 8)
    assert found.words == 3 and [word % (1 << 32) for word in found.flags[:-1].tolist()] == expected
    assert found.cells.tolist()[: len(keys)] == sorted(keys)


@runs_kernels
def test_memory_of_a_list_at_a_million() -> None:
    """At M = N = 1M: under 64 MB at its height, beside what is given and kept."""
    from efficientclip.kernels.triton.cells import masked

    size, cells = 1 << 20, 1 << 18
    row, col = torch.arange(cells) * 4, (torch.arange(cells) * 7919) % size
    with Held() as held:
        found = masked(row, col, torch.ones(cells, dtype=torch.bool), (size, size), (128, 128), (128, 64))
    assert found.flags.nbytes < 9 << 20 and held.most < 64 << 20, held.most


# Texts, and frozen columns that are read as they are.
FROZEN = [
    (torch.float32, torch.float16),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.float16),
    (torch.float16, torch.bfloat16),
    (torch.float16, torch.float32),
]


@runs_kernels
@pytest.mark.parametrize("scale", [1, 14, 100])
@pytest.mark.parametrize(("dtype", "frozen"), FROZEN, ids=str)
def test_frozen_rows_of_any_dtype(
    rng: torch.Generator, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, frozen: torch.dtype, scale: float
) -> None:
    """No worse than plain torch in fp32 on the same rows, sure pairs and repeated columns among them."""
    if INTERPRETED:
        use_tiles(monkeypatch, descriptors=True, rows=64)
    data = {name: on_device(value) for name, value in features(rng, 89, 37, 40, hard=True).items()}
    check_against_plain(data, dtype, scale, frozen=frozen, units=2)
    options = {name: on_device(value) for name, value in everything(rng, 89, 37).items()}
    check_against_plain(data, dtype, scale, frozen=frozen, units=2, positives="ids", **options)


@runs_kernels
@pytest.mark.parametrize("length", [1e-6, 1e6])
@pytest.mark.parametrize("frozen", [torch.float16, torch.bfloat16], ids=str)
def test_texts_of_any_length_in_parts(rng: torch.Generator, frozen: torch.dtype, length: float) -> None:
    data = {name: on_device(value) for name, value in features(rng, 50, 20, 24, hard=True).items()}
    # Gradients reach an element 1/length times as far.
    out = run(contrastive_loss, data | {"text": data["text"] * length}, torch.float32, 14 / length, frozen)
    expected = run(contrastive_loss, data, torch.float32, 14, frozen)
    torch.testing.assert_close(out["per_pair_loss"], expected["per_pair_loss"], rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(out["d_text"] * length, expected["d_text"], rtol=1e-4, atol=1e-6)


@runs_kernels
@pytest.mark.parametrize("bank_dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("trained", [True, False], ids=["trained images", "frozen"])
def test_each_side_has_its_own_pairing(rng: torch.Generator, trained: bool, bank_dtype: torch.dtype) -> None:
    """Images of fp16 beside a bank of any dtype; where images are trained, their gradient is as fp32's."""
    M, N, Q, D = 37, 90, 29, 24
    text, image, bank = (unit(rng, size, D).float().to(DEVICE) for size in (M, N, Q))
    image, bank = image.half(), bank.to(bank_dtype)
    ours = tiles(text, image, bank, 10.0, 40)
    exact = tiles(text.double(), image.double(), bank.double(), 10.0, 40)
    sums, truth = ours.forward(), exact.forward()
    for name, value in truth._asdict().items():
        if value is not None:
            torch.testing.assert_close(getattr(sums, name), value, rtol=2e-6, atol=2e-5, msg=name)
    grads = ContrastiveGrads(*(None if v is None else torch.rand_like(v) for v in truth[:7]))
    kept, true = (ContrastiveKept(of.row_lse_M, of.col_lse_N) for of in (sums, truth))
    found, expected = ours.backward(kept, grads, True, trained), exact.backward(true, grads, True, trained)
    assert (found[1] is None) == (not trained)
    for one, other in zip(found, expected, strict=True):
        if other is not None:
            torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=2e-6 * float(other.abs().max()))


@runs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_nan_stays_where_it_is(rng: torch.Generator, dtype: torch.dtype) -> None:
    text, image = (unit(rng, 70, 8).float().to(DEVICE) for _ in "12")
    image = image.to(dtype)
    text[33, 2] = math.nan
    sums = tiles(text, image, None, 10.0).forward()
    assert sums.row_lse_M.isnan().nonzero().flatten().tolist() == [33]
    # Column 33 leaves out its own text, which is the NaN.
    assert sums.col_lse_N.isnan().logical_not().nonzero().flatten().tolist() == [33]


@runs_kernels
@pytest.mark.parametrize("positives", ["pair", "ids"])
def test_nothing_to_contrast_with(rng: torch.Generator, positives: str) -> None:
    every = torch.cartesian_prod(torch.arange(9), torch.arange(9)).T
    given: dict[str, dict[str, Any]] = {
        "equal ids": {"image_ids": torch.zeros(9, dtype=torch.int64)},
        "excluded": {"excluded": (every[0], every[1])},
        "weights": {"pair_weights": torch.zeros(9)},
    }
    data = {name: on_device(value) for name, value in features(rng, 9, 0, 8).items()}
    for options in given.values():
        out = run(
            contrastive_loss, data, torch.float16, 100, positives=positives, label_smoothing=0.1,
            **{name: on_device(value) for name, value in options.items()},
        )  # fmt: skip
        assert not any(out[name].any() for name in ("loss", "d_text", "d_image", "d_scale", "d_bias"))
        assert out["per_pair_loss"].isfinite().all()


@runs_kernels
def test_twice_gives_the_same_bits(rng: torch.Generator) -> None:
    data = {name: on_device(value) for name, value in features(rng, 70, 18, 24, hard=True).items()}
    options = {name: on_device(value) for name, value in everything(rng, 70, 18).items()}
    one, other = (run(contrastive_loss, data, torch.bfloat16, 100, positives="ids", **options) for _ in "12")
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


@runs_kernels
def test_strides_do_not_matter(rng: torch.Generator) -> None:
    text, image = (unit(rng, 41, 24).to(DEVICE, torch.bfloat16) for _ in "12")
    wide = torch.cat([text, image], 1)
    views = [
        (text.T.contiguous().T, torch.stack([image, -image], 1)[:, 0]),
        (wide[:, :24], wide[:, 24:]),
    ]
    expected = contrastive_loss(text, image, logit_scale=14.0)
    for views_of in views:
        given = [view.detach().requires_grad_() for view in views_of]
        out = contrastive_loss(*given, logit_scale=14.0)
        out.loss.backward()
        assert torch.equal(out.loss, expected.loss)
        assert all(view.grad is not None and view.grad.isfinite().all() for view in given)


@runs_kernels
def test_rows_far_apart_or_of_odd_widths_are_copied() -> None:
    from efficientclip.kernels.triton.tiles import addressable

    far = torch.empty_strided((3, 512), (1 << 31, 1), dtype=torch.bfloat16, device="meta")
    assert addressable(far).stride() == (512, 1)
    near = torch.empty_strided((3, 512), (1024, 1), dtype=torch.bfloat16, device="meta")
    assert addressable(near) is near
    odd = torch.ones(3, 1000, dtype=torch.bfloat16)
    assert addressable(odd).shape == (3, 1008) and addressable(odd).sum() == 3000


@runs_kernels
@pytest.mark.parametrize("frozen", [True, False])
def test_products_and_memory(rng: torch.Generator, monkeypatch: pytest.MonkeyPatch, frozen: bool) -> None:
    """Frozen images cost no product, and neither does the bank's share of d image."""
    from efficientclip.kernels.triton import contrastive as fused

    transposed = []
    product = fused.add_product

    def counted(*arguments: Any, **more: Any) -> None:
        transposed.append(arguments[3])
        product(*arguments, **more)

    monkeypatch.setattr(fused, "add_product", counted)
    text, image, bank = (unit(rng, size, 8).float().to(DEVICE) for size in (70, 70, 20))
    text.requires_grad_()
    image.requires_grad_(not frozen)
    contrastive_loss(text, image, bank, logit_scale=14.0).loss.backward()
    chunks = 2 * 2 if INTERPRETED else 1
    assert transposed.count(True) == (0 if frozen else chunks)
    assert transposed.count(False) == chunks + (2 if INTERPRETED else 1)
    assert (image.grad is None) == frozen


@runs_kernels
@pytest.mark.parametrize("frozen", [None, torch.float16], ids=["trained", "frozen"])
def test_products_by_the_library(
    rng: torch.Generator, monkeypatch: pytest.MonkeyPatch, frozen: torch.dtype | None
) -> None:
    from efficientclip.kernels.triton import tuning

    if INTERPRETED:
        use_tiles(monkeypatch, descriptors=True, products="library")
    else:
        config = tuning.tile_config
        monkeypatch.setattr(
            tuning, "tile_config", lambda *given: dataclasses.replace(config(*given), products="library")
        )
    data = {name: on_device(value) for name, value in features(rng, 70, 18, 24, hard=True).items()}
    for dtype in (torch.float32, torch.bfloat16) if frozen is None else (torch.float32,):
        check_against_plain(data, dtype, 14, frozen=frozen, units=2)


@runs_kernels
@pytest.mark.parametrize("parts", [1, 2])
def test_products_split_along_their_sums(rng: torch.Generator, parts: int) -> None:
    """Equal to one sum, and to the bit the second time; rows beyond the last are nobody's."""
    from efficientclip.kernels.triton.tiles import add_product
    from efficientclip.kernels.triton.tuning import Launch

    rows, K, D, step = 21, 300, 40, 32
    # Rows 16 bytes apart, as descriptors want them.
    chunk = torch.randn(parts * step, K + 4, generator=rng).half()
    features_KD = torch.randn(K, D, generator=rng).half()
    chunk, features_KD = chunk.to(DEVICE)[:, :K], features_KD.to(DEVICE)
    chunk = chunk[:rows] if parts == 1 else chunk
    expected = sum(part[:rows].double() for part in chunk.chunk(parts)) @ features_KD.double() + 1
    for descriptors in (True, False) if INTERPRETED else (False,):
        found = []
        for _ in range(2):
            out = torch.ones(rows, D, device=DEVICE)
            launch = Launch(16, 32, 32, 4, 2)
            add_product(out, chunk, features_KD, False, launch, descriptors, parts=parts, splits=7)
            found.append(out)
        assert torch.equal(*found)
        torch.testing.assert_close(found[0].double(), expected, rtol=1e-5, atol=1e-4)


@runs_kernels
def test_explain_names_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    text = torch.zeros(1, 1, device=DEVICE)
    assert explain(text) == f"fused Triton kernels: torch.float32 tensors on {text.device}"
    assert explain(text.double()).startswith("chunked torch: fp64")
    monkeypatch.setattr(paths, "find_spec", lambda name: None)
    assert explain(text).endswith("pip install triton")
