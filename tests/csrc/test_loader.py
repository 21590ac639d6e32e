"""The C++ loader against numpy one-liners, and its core under the sanitizers."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from efficientclip._loader import gather_rows, linked_pairs, pack_tokens

from .sanitized import ROOT, compile_sanitized, output

TOKEN_DTYPES = (np.uint16, np.int32)


def int64(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def ragged(rng: np.random.Generator, lengths: np.ndarray, dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return rng.integers(0, np.iinfo(np.uint16).max, offsets[-1], endpoint=True).astype(dtype), offsets


def packed(tokens: np.ndarray, offsets: np.ndarray, ids: np.ndarray, max_length: int) -> tuple[np.ndarray, ...]:
    texts = [tokens[offsets[i] : offsets[i + 1]] for i in ids]
    cut = [t if len(t) <= max_length else np.append(t[: max_length - 1], t[-1]) for t in texts]
    return (
        np.concatenate([[], *cut]).astype(np.int64),
        np.concatenate([[], *(np.arange(len(t)) for t in cut)]).astype(np.int64),
        np.cumsum([0, *map(len, cut)]).astype(np.int32),
    )


def linked(adjacency: np.ndarray, left_ids: np.ndarray, columns: np.ndarray, diagonal: int) -> tuple[np.ndarray, ...]:
    edges = adjacency[np.ix_(left_ids, columns)] & (columns >= 0)
    rows, cols = np.indices(edges.shape)
    return np.nonzero(edges & (cols != rows + diagonal))


def csr(adjacency: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    indptr = np.concatenate([[0], np.cumsum(adjacency.sum(axis=1))]).astype(np.int64)
    return indptr, np.nonzero(adjacency)[1].astype(np.int32)


def assert_same(found: tuple[np.ndarray, ...], expected: tuple[np.ndarray, ...]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("dtype", TOKEN_DTYPES)
@pytest.mark.parametrize("max_length", [1, 2, 7, 40, 2**62])
def test_pack_tokens_equals_numpy(dtype: Any, max_length: int) -> None:
    rng = np.random.default_rng(max_length % 97)
    tokens, offsets = ragged(rng, rng.integers(0, 60, 300), dtype)
    ids = rng.integers(0, 300, 500)
    assert_same(pack_tokens(tokens, offsets, ids, max_length), packed(tokens, offsets, ids, max_length))


def test_pack_tokens_keeps_the_last_token_of_a_cut_text() -> None:
    input_ids, position_ids, cu_seqlens = pack_tokens(
        np.array([1, 2, 3, 4, 9, 5], np.uint16), int64(0, 5, 6), int64(0, 1), 3
    )
    assert input_ids.tolist() == [1, 2, 9, 5]
    assert position_ids.tolist() == [0, 1, 2, 0]
    assert cu_seqlens.tolist() == [0, 3, 4]


@pytest.mark.parametrize("dtype", TOKEN_DTYPES)
def test_pack_tokens_of_nothing(dtype: Any) -> None:
    tokens = np.empty(0, dtype)
    for offsets, ids in [(int64(0), int64()), (int64(0, 0, 0), int64(1, 0, 1))]:
        assert_same(pack_tokens(tokens, offsets, ids, 5), packed(tokens, offsets, ids, 5))


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", "u1", ">i4", "m8[s]"])
@pytest.mark.parametrize("threads", [1, 2, 7])
def test_gather_rows_equals_numpy(dtype: str, threads: int) -> None:
    rng = np.random.default_rng(threads)
    table = rng.integers(0, 100, (1000, 129)).astype(dtype)
    # Enough rows for several blocks, so that the threads really share them.
    rows = rng.integers(0, 1000, 9000)
    found = gather_rows(table, rows, threads=threads)
    assert found.dtype == table.dtype
    np.testing.assert_array_equal(found, table[rows])


def test_gather_rows_of_rows_wider_than_a_block() -> None:
    table = np.arange(6 * 100_000, dtype=np.float64).reshape(6, -1)
    np.testing.assert_array_equal(gather_rows(table, int64(5, 0, 5, 3), threads=4), table[[5, 0, 5, 3]])


@pytest.mark.parametrize(("shape", "count"), [((5, 8), 0), ((0, 8), 0), ((5, 0), 3)])
def test_gather_rows_of_nothing(shape: tuple[int, int], count: int) -> None:
    assert gather_rows(np.ones(shape, np.float16), np.zeros(count, np.int64)).shape == (count, shape[1])


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("nodes", [(5, 5), (40, 400), (400, 40)])
def test_linked_pairs_equals_numpy(seed: int, nodes: tuple[int, int]) -> None:
    rng = np.random.default_rng(seed)
    adjacency = rng.random(nodes) < rng.random((nodes[0], 1)) ** 3
    # -1 marks an empty place; ids repeat because both lists are drawn with replacement.
    left_ids, columns = rng.integers(0, nodes[0], 50), rng.integers(-1, nodes[1], rng.integers(1, 90))
    for diagonal in (0, 3, -7, 10**6):
        found = linked_pairs(*csr(adjacency), left_ids, columns, diagonal)
        assert_same(found, linked(adjacency, left_ids, columns, diagonal))


def test_linked_pairs_searches_long_rows() -> None:
    adjacency = np.random.default_rng(0).random((3, 5000)) < 0.5
    left_ids, columns = int64(2, 0, 2, 1), int64(4999, 17, -1, 0, 17, 2500)
    assert_same(linked_pairs(*csr(adjacency), left_ids, columns, 1), linked(adjacency, left_ids, columns, 1))


def test_linked_pairs_gives_a_repeated_edge_once() -> None:
    for columns in (int64(4, 4), np.repeat(int64(4), 100)):
        rows, cols = linked_pairs(int64(0, 4), np.array([4, 4, 4, 6], np.int32), int64(0), columns, -1)
        assert rows.tolist() == [0] * len(columns)
        assert cols.tolist() == list(range(len(columns)))


def test_linked_pairs_of_nothing() -> None:
    one_edge = int64(0, 1), np.zeros(1, np.int32)
    for graph, left_ids, columns in [
        (one_edge, int64(), int64(0)),
        (one_edge, int64(0), int64()),
        (one_edge, int64(0), int64(0)),
        ((int64(0, 0), np.empty(0, np.int32)), int64(0), int64(0, 5)),
    ]:
        assert_same(linked_pairs(*graph, left_ids, columns, 0), (int64(), int64()))


@pytest.mark.parametrize("dtype", TOKEN_DTYPES)
def test_read_only_memory_maps_are_read_in_place(tmp_path: Path, dtype: Any) -> None:
    rng = np.random.default_rng(0)

    def mapped(name: str, values: np.ndarray) -> np.ndarray:
        values.tofile(tmp_path / name)
        return np.memmap(tmp_path / name, values.dtype, "r", shape=values.shape)

    tokens, offsets = ragged(rng, rng.integers(0, 30, 50), dtype)
    table, rows = rng.random((50, 16)).astype(np.float16), rng.integers(0, 50, 70)
    adjacency = rng.random((50, 50)) < 0.2
    indptr, indices = csr(adjacency)
    mapped_rows = mapped("rows", rows)

    found = pack_tokens(mapped("tokens", tokens), mapped("offsets", offsets), mapped_rows, 9)
    assert_same(found, packed(tokens, offsets, rows, 9))
    gathered = gather_rows(mapped("table", table), mapped_rows)
    np.testing.assert_array_equal(gathered, table[rows])
    edges = linked_pairs(mapped("indptr", indptr), mapped("indices", indices), mapped_rows, mapped_rows, 0)
    assert_same(edges, linked(adjacency, rows, rows, 0))
    assert all(array.flags.writeable for array in (*found, gathered, *edges))


GOOD: dict[Callable[..., Any], dict[str, Any]] = {
    pack_tokens: {
        "tokens": np.zeros(6, np.uint16),
        "offsets": int64(0, 2, 6),
        "ids": int64(0, 1),
        "max_length": 4,
    },
    gather_rows: {"table": np.zeros((3, 2), np.float16), "rows": int64(0, 2), "threads": 1},
    linked_pairs: {
        "indptr": int64(0, 2, 3),
        "indices": np.array([0, 1, 0], np.int32),
        "left_ids": int64(0, 1),
        "columns": int64(0, 1),
        "diagonal": 0,
    },
}


def test_the_good_arguments_are_good() -> None:
    for function, arguments in GOOD.items():
        function(**arguments)


@pytest.mark.parametrize(
    ("function", "argument", "value", "error"),
    [
        (pack_tokens, "ids", int64(0, 2), IndexError),
        (pack_tokens, "ids", int64(-1), IndexError),
        (pack_tokens, "offsets", int64(0), IndexError),
        (pack_tokens, "offsets", int64(), ValueError),
        (pack_tokens, "offsets", int64(0, 2, 7), ValueError),
        (pack_tokens, "offsets", int64(0, 4, 2), ValueError),
        (pack_tokens, "offsets", int64(-1, 2, 6), ValueError),
        (pack_tokens, "max_length", 0, ValueError),
        (gather_rows, "rows", int64(0, 3), IndexError),
        (gather_rows, "rows", int64(-1), IndexError),
        (gather_rows, "table", np.empty((0, 2)), IndexError),
        (gather_rows, "threads", 0, ValueError),
        (linked_pairs, "left_ids", int64(2), IndexError),
        (linked_pairs, "left_ids", int64(-1), IndexError),
        (linked_pairs, "indptr", int64(), ValueError),
        (linked_pairs, "indptr", int64(0, 2, 4), ValueError),
        (linked_pairs, "indptr", int64(0, 2, 1), ValueError),
        (linked_pairs, "indptr", int64(-1, 2, 3), ValueError),
        (linked_pairs, "indices", np.array([1, 0, 0], np.int32), ValueError),
    ],
)
def test_a_bad_value_is_an_error_naming_the_argument(
    function: Callable[..., Any], argument: str, value: Any, error: type[Exception]
) -> None:
    with pytest.raises(error, match=argument):
        function(**{**GOOD[function], argument: value})


def test_more_tokens_than_int32_counts_are_an_error() -> None:
    tokens = np.zeros(2**20, np.uint16)
    with pytest.raises(ValueError, match="ids"):
        pack_tokens(tokens, int64(0, 2**20), np.zeros(2**11, np.int64), 2**20)


@pytest.mark.parametrize(
    ("function", "argument"),
    [(function, name) for function, given in GOOD.items() for name in given if isinstance(given[name], np.ndarray)],
)
def test_an_array_of_another_kind_is_a_type_error(function: Callable[..., Any], argument: str) -> None:
    good = GOOD[function][argument]
    raw = np.zeros(good.nbytes + 1, np.uint8)
    bad = {
        "dtype": good.astype(object),
        "dimensions": good[np.newaxis],
        "layout": np.repeat(good, 2, axis=-1)[..., ::2],
        "alignment": raw[1:].view(good.dtype).reshape(good.shape),
        "no array": good.tolist(),
    }
    if function is gather_rows and argument == "table":
        # Rows are copied as bytes.
        del bad["alignment"]
    for value in bad.values():
        with pytest.raises(TypeError, match=argument):
            function(**{**GOOD[function], argument: value})


def test_the_remedy_that_a_type_error_names_works() -> None:
    ids = np.zeros(17, np.uint8)[1:].view(np.int64)
    with pytest.raises(TypeError, match=r'np\.require\(ids, np\.int64, "CA"\)'):
        pack_tokens(**{**GOOD[pack_tokens], "ids": ids})
    pack_tokens(**{**GOOD[pack_tokens], "ids": np.require(ids, np.int64, "CA")})


def test_other_threads_run_meanwhile() -> None:
    turns, stop = 0, threading.Event()

    def count() -> None:
        nonlocal turns
        while not stop.is_set():
            turns += 1
            time.sleep(0)

    counter = threading.Thread(target=count)
    counter.start()
    try:
        before = turns
        gather_rows(np.zeros((1, 2**22), np.uint8), np.zeros(60, np.int64))
        during = turns - before
    finally:
        stop.set()
        counter.join()
    # A call that held the lock would let the counter in for a turn or two around it.
    assert during > 10


@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
@pytest.mark.parametrize(
    ("test", "parts"),
    [("batch_test", ["batch"]), ("pair_test", ["batch", "order", "mask", "pair_loader"])],
    ids=["batch", "pairs"],
)
def test_the_core_runs_clean_under_the_sanitizers(test: str, parts: list[str], sanitizers: str, tmp_path: Path) -> None:
    sources = [*(ROOT / f"csrc/{part}.cpp" for part in parts), ROOT / f"tests/csrc/{test}.cpp"]
    compile_sanitized(sanitizers, *sources, "-o", tmp_path / test)
    assert output(tmp_path / test) == "all passed\n"
