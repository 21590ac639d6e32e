"""The pair loader: what its batches hold, that nothing is lost or seen twice, and how it behaves as an iterable."""

from __future__ import annotations

import gc
import json
import math
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from efficientclip.config import Augmentation, ImageTower
from efficientclip.data.batches import Batch, pack
from efficientclip.data.pairs import CaptionPairs, MaskedTexts, PairLoader, PairSource
from efficientclip.data.pixels import PicturePairs, load_pictures
from efficientclip.data.sources import open_source
from efficientclip.data.store import EARLIER, FORMAT, Store, TextStore
from efficientclip.errors import UserError
from tests import tiny
from tests.data.tars import encode, photograph, write_tar
from tests.forks import exit_code_of_fork

SEED = int(np.random.SeedSequence().generate_state(1)[0])
print(f"seed {SEED}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pairs")
    tiny.pair_store(path / "store", pairs=500, images=120)
    tiny.text_store(path / "texts")
    return path


@pytest.fixture(scope="module")
def store(folder: Path) -> Store:
    return Store(folder / "store")


@pytest.fixture(scope="module")
def texts(folder: Path) -> TextStore:
    return TextStore(folder / "texts")


def random_mask(n: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    return np.random.default_rng(SEED).random(n) < 0.7


def threads() -> int:
    return len(os.listdir("/proc/self/task"))


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def rows_of(batches: list[Batch], weight: int) -> list[int]:
    return [int(row) for batch in batches for row in batch.rows_N[batch.weights_N == weight]]


def assert_same(one: Batch, other: Batch) -> None:
    np.testing.assert_array_equal(one.rows_N, other.rows_N)
    assert torch.equal(one.frozen_MD, other.frozen_MD)
    for mine, theirs in zip(one.inputs, other.inputs, strict=True):
        assert mine.keys() == theirs.keys()
        assert torch.equal(mine["segments"].cu_seqlens, theirs["segments"].cu_seqlens)
        assert all(torch.equal(mine[name], theirs[name]) for name in mine if name != "segments")


def test_an_epoch_visits_kept_pairs_once_and_auditions_dropped_ones_at_weight_zero(store: Store) -> None:
    kept = random_mask(500)
    with PairLoader(store, batch_size=20, kept=kept, reaudition_share=0.1, seed=SEED) as loader:
        first, second = list(loader), list(loader)
    trained, again = rows_of(first, 1), rows_of(first, 0)
    assert len(first) == loader.steps == kept.sum() // 18
    assert len(set(trained)) == len(trained) == 18 * len(first) and kept[trained].all()
    assert len(again) == 2 * len(first) and not kept[again].any()
    assert max(again.count(row) for row in again) <= -(-len(again) // int((~kept).sum()))
    assert rows_of(second, 1) != trained and (loader.epoch, loader.epoch_step) == (2, 0)


@pytest.fixture(scope="module")
def mixed(folder: Path) -> Store:
    """Pairs of three sources in turns."""
    return Store(tiny.pair_store(folder / "mixed", pairs=600, images=150, sources=["a", "b", "c"]))


def times_of(batches: list[Batch]) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.bincount(rows_of(batches, 1), minlength=600)


@pytest.mark.parametrize("weights", [{"b": 0.5}, {"a": 1, "b": 2.5, "c": 0.25}, {"c": 3}], ids=str)
def test_pairs_come_as_often_as_their_source_weighs(mixed: Store, weights: dict[str, float]) -> None:
    kept = np.random.default_rng(SEED).random(600) < 0.8
    source = CaptionPairs(mixed, weights=weights)
    with PairLoader(source, batch_size=1, kept=kept, seed=SEED) as loader:
        epochs = [times_of(list(loader)) for _ in range(8)]
    for number, name in enumerate("abc"):
        times, weight = np.array([times[number::3] for times in epochs]), weights.get(name, 1)
        assert (times[:, ~kept[number::3]] == 0).all()
        chosen = times[:, kept[number::3]]
        assert {*chosen.flat} == {math.floor(weight), math.ceil(weight)}
        # Five deviations of the mean of so many draws.
        assert chosen.mean() == pytest.approx(weight, abs=5 * 0.5 / chosen.size**0.5 if weight % 1 else 0)
    assert len({times.tobytes() for times in epochs}) == (1 if weights == {"c": 3} else 8)


def test_weighted_batches_are_the_same_for_any_threads_and_ranks_and_go_on_anywhere(mixed: Store) -> None:
    common: dict[str, Any] = {"batch_size": 24, "kept": np.arange(600) % 7 > 0, "reaudition_share": 0.1, "seed": SEED}
    source = CaptionPairs(mixed, weights={"a": 0.5, "b": 2.5})
    with PairLoader(source, **common) as loader:
        alone = [batch for _ in range(2) for batch in loader]
        other = loader.state()
    with PairLoader(source, **common, threads=3, prefetch=7) as loader:
        for one, two in zip(alone, [batch for _ in range(2) for batch in loader], strict=True):
            assert_same(one, two)
    for at in (1, len(alone) // 2 - 1, len(alone) // 2, len(alone) - 2):
        with PairLoader(source, **common) as loader:
            taken = 0
            while taken < at:
                for _ in loader:
                    taken += 1
                    if taken == at:
                        break
            state = loader.state()
        halves = [PairLoader(source, **common, rank=rank, world_size=2) for rank in range(2)]
        for half in halves:
            half.restore(state)
            if half.ended:
                half.next_epoch()
        parts = [next(half) for half in halves]
        for half in halves:
            half.close()
        np.testing.assert_array_equal(parts[0].rows_N, alone[at].rows_N)
        assert torch.equal(torch.cat([part.frozen_MD for part in parts]), alone[at].frozen_MD)
    for weights in ({}, {"a": 0.5, "b": 2}, {"a": 2.5, "b": 0.5}):
        with PairLoader(CaptionPairs(mixed, weights=weights), **common) as loader, pytest.raises(UserError) as caught:
            loader.restore(other)
        assert "loader state: other weights of its sources" in str(caught.value)


def test_weight_1_is_no_weight(mixed: Store) -> None:
    with (
        PairLoader(CaptionPairs(mixed, weights={"a": 1.0, "c": 1}), batch_size=20, seed=SEED) as weighted,
        PairLoader(mixed, batch_size=20, seed=SEED) as plain,
    ):
        for one, other in zip(weighted, plain, strict=True):
            assert_same(one, other)
        assert weighted.state().keys() == plain.state().keys()


@pytest.mark.parametrize("weights", [{}, {"a": 2.0, "b": 1.5}], ids=["once", "weighted"])
def test_what_a_person_found_wrong_is_never_visited(mixed: Store, weights: dict[str, float]) -> None:
    by_hand, kept = np.zeros(600, np.int8), np.arange(600) % 7 > 0
    by_hand[::5], by_hand[1::5] = -1, 1
    common: dict[str, Any] = {"batch_size": 20, "reaudition_share": 0.2, "seed": SEED}
    for rows in (None, np.arange(50, 450)):
        source, of = CaptionPairs(mixed, rows=rows, weights=weights, by_hand=by_hand), np.arange(600)[rows]
        of = of.ravel()
        with PairLoader(source, **common) as loader:
            assert loader.kept_share == pytest.approx(0.8) and not loader.kept[by_hand[of] < 0].any()
            loader.kept = kept[of]
            batches = [batch for _ in range(6) for batch in loader]
            trained, again = (set(of[rows_of(batches, weight)]) for weight in (1, 0))
            assert loader.kept_count == (kept[of] & (by_hand[of] >= 0)).sum()
            state = loader.state()
        assert trained == set(np.flatnonzero(kept & (by_hand >= 0))) & set(of)
        assert again == set(np.flatnonzero(~kept & (by_hand >= 0))) & set(of)
        with PairLoader(source, **common) as other:
            other.restore(state)
            np.testing.assert_array_equal(other.kept, loader.kept)


def test_an_image_tower_sees_pictures_as_often_as_their_source_weighs(tmp_path: Path) -> None:
    sources = []
    for number, count in enumerate((20, 40)):
        samples = [(f"{number}-{at:02d}", encode(photograph(24, 24, at), "PNG")) for at in range(count)]
        english = json.dumps({"captions_en": ["a cat"]}).encode()
        files = [file for key, png in samples for file in ((f"{key}.png", png), (f"{key}.json", english))]
        sources.append(open_source(write_tar(tmp_path / f"{number}.tar", files)))
    pictures = load_pictures(sources, 16)
    assert pictures.origins == [0] * 20 + [1] * 40
    tower = ImageTower(pretrained="none", size=16)

    def made(weights: list[float]) -> PicturePairs:
        rows = np.ones((1, 4), np.float32)
        return PicturePairs(pictures, lambda texts: rows, tower, Augmentation(), SEED, weights)

    with PairLoader(made([2, 0.5]), batch_size=1, seed=SEED) as loader:
        times = np.bincount(rows_of(list(loader), 1), minlength=60)
    assert (times[:20] == 2).all() and {*times[20:]} == {0, 1}
    assert made([1, 1]).weights is None


def test_a_source_that_the_store_lacks_is_refused(mixed: Store) -> None:
    with pytest.raises(UserError) as caught:
        CaptionPairs(mixed, weights={"a": 2, "d": 2})
    assert str(caught.value) == f"data.sources.d: store {mixed.path} has no such source; it has 'a', 'b', 'c'"
    half = CaptionPairs(mixed, rows=np.arange(300), weights={"b": 2})
    with PairLoader(half, batch_size=400, seed=SEED) as loader:
        assert loader.steps == 1
    with pytest.raises(UserError, match=r"training\.batch_size: 401 pairs, but only 400 are left"):
        PairLoader(half, batch_size=401, seed=SEED)


def test_a_batch_holds_the_rows_that_its_numbers_name(store: Store, texts: TextStore) -> None:
    source = CaptionPairs(store, MaskedTexts(texts, 7))
    with PairLoader(source, batch_size=30, max_tokens=7, seed=SEED, micro_batch_size=10) as loader:
        batches = list(loader)
    for batch in batches:
        np.testing.assert_array_equal(batch.frozen_ids_N, store.image_ids[batch.rows_N])
        np.testing.assert_array_equal(batch.frozen_MD.numpy(), store.features[batch.frozen_ids_N])
        np.testing.assert_array_equal(batch.trained_ids_M, store.caption_ids[batch.rows_N])
        for number, arguments in enumerate(batch.inputs):
            ids = batch.trained_ids_M[number * 10 : number * 10 + 10]
            expected, n = pack(store, ids, 7), len(ids)
            np.testing.assert_array_equal(arguments["texts"].numpy(), expected.order)
            np.testing.assert_array_equal(arguments["segments"].cu_seqlens[: n + 1].numpy(), expected.cu_seqlens)
            captions = len(expected.input_ids)
            assert torch.equal(arguments["input_ids"][:captions], expected.input_ids)
            assert torch.equal(arguments["position_ids"][:captions], expected.position_ids)
            assert len(arguments["segments"].cu_seqlens) - 1 - n == (7 if number == 0 else 0)
            assert ("masked_labels" in arguments) == (number == 0)
    assert {id for batch in batches for id in batch.frozen_ids_N} <= set(range(120))


@pytest.mark.parametrize("split", [{}, {"micro_batch_size": 4}, {"tokens_per_micro_batch": 160}], ids=str)
def test_threads_and_ranks_change_nothing(store: Store, texts: TextStore, split: dict[str, int]) -> None:
    source = CaptionPairs(store, MaskedTexts(texts, 3, max_tokens=40))
    common = {"batch_size": 24, "kept": random_mask(500), "reaudition_share": 0.1, "seed": SEED, "max_tokens": 40}
    with PairLoader(source, **common, **split) as loader:
        alone = list(loader)
    with PairLoader(source, **common, **split, threads=3, prefetch=7) as loader:
        for one, other in zip(alone, loader, strict=True):
            assert_same(one, other)
    with (
        PairLoader(source, **common, **split, rank=0, world_size=2) as zero,
        PairLoader(source, **common, **split, rank=1, world_size=2) as one,
    ):
        for whole, *parts in zip(alone, zero, one, strict=True):
            for part in parts:
                np.testing.assert_array_equal(part.rows_N, whole.rows_N)
            assert torch.equal(torch.cat([part.frozen_MD for part in parts]), whole.frozen_MD)
            assert len(parts[0].inputs) == len(parts[1].inputs)
            labels = [part.inputs[0]["masked_labels"] for part in parts]
            assert torch.equal(torch.cat(labels).sort().values, whole.inputs[0]["masked_labels"].sort().values)
            assert sum(part.masked for part in parts) == whole.masked
            assert sum(part.tokens for part in parts) == whole.tokens
    if "tokens_per_micro_batch" in split:
        assert max(len(batch.inputs) for batch in alone) > 1
        assert all(len(i["input_ids"]) <= 160 for batch in alone for i in batch.inputs)


def test_masks_choose_ordinary_tokens_and_follow_the_text(texts: TextStore, store: Store) -> None:
    masked_by_seed = []
    for seed in (SEED, SEED, SEED + 1):
        source = CaptionPairs(store, MaskedTexts(texts, 60, max_tokens=40))
        with PairLoader(source, batch_size=20, seed=seed) as loader:
            arguments = next(loader).inputs[0]
        labels, positions = arguments["masked_labels"], arguments["masked_positions"]
        assert not np.isin(labels.numpy(), texts.manifest["special_tokens"]).any()
        ordinary = ~np.isin(texts.tokens, texts.manifest["special_tokens"])
        expected = sum(
            max(1, round(0.15 * ordinary[a:b].sum())) for a, b in zip(texts.offsets, texts.offsets[1:], strict=False)
        )
        assert len(labels) == len(set(positions.tolist())) == expected
        hidden = arguments["input_ids"][positions] == texts.manifest["mask_token"]
        assert 0.6 < hidden.float().mean() < 0.95
        masked_by_seed.append(positions.tolist())
    assert masked_by_seed[0] == masked_by_seed[1] != masked_by_seed[2]


def test_whole_words_are_masked_together(tmp_path: Path, store: Store, texts: TextStore) -> None:
    with pytest.raises(UserError, match=r"mlm\.whole_word: no token .* by ##"):
        PairLoader(CaptionPairs(store, MaskedTexts(texts, 7, whole_words=True)), batch_size=20)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *tiny.CHARACTERS]
    (tmp_path / "vocab.txt").write_text("\n".join([*words, *(f"##{c}" for c in "abcdef")]) + "\n")
    texts = TextStore(tiny.text_store(tmp_path / "texts"))
    # Half of the characters' tokens are now read as pieces.
    pieces = np.arange(len(words), len(words) + 6)
    tokens = np.array(texts.tokens)
    swapped = (tokens >= 5) & (np.arange(len(tokens)) % 2 == 1)
    tokens[swapped] = np.random.default_rng(SEED).choice(pieces, int(swapped.sum()))
    texts.tokens = tokens
    masked = MaskedTexts(texts, 60, max_tokens=40, whole_words=True)
    with PairLoader(CaptionPairs(store, masked), batch_size=20, seed=SEED) as loader:
        arguments = next(loader).inputs[0]
    original, chosen = arguments["input_ids"].clone(), arguments["masked_positions"]
    original[chosen] = arguments["masked_labels"]
    inside = set(chosen.tolist())
    starts = int(arguments["segments"].cu_seqlens[20])
    continuing = [at for at in range(starts + 1, len(original)) if original[at] in pieces and original[at - 1] >= 5]
    assert len(continuing) > 100 and inside
    assert all((at in inside) == (at - 1 in inside) for at in continuing)


def test_batches_are_views_that_are_used_again_only_when_nobody_holds_them(store: Store) -> None:
    with PairLoader(store, batch_size=20, seed=SEED, micro_batch_size=10) as loader:
        held = list(loader)
        copies = [(batch.rows_N.copy(), batch.frozen_MD.clone()) for batch in held]
        addresses = {batch.frozen_MD.data_ptr() for batch in held}
        assert len(addresses) == len(held) == 25
        again = {batch.frozen_MD.data_ptr() for batch in loader}
        assert not addresses & again
        for batch, (rows, features) in zip(held, copies, strict=True):
            np.testing.assert_array_equal(batch.rows_N, rows)
            assert torch.equal(batch.frozen_MD, features)
        one, two = (part["input_ids"] for part in held[0].inputs)
        assert one.data_ptr() + one.nbytes == two.data_ptr()
        assert len({batch.frozen_MD.data_ptr() for batch in loader}) < 12
    held[0].frozen_MD.zero_()


def test_kept_pairs_change_between_epochs_only(store: Store) -> None:
    kept = random_mask(500)
    with PairLoader(store, batch_size=20, seed=SEED) as loader:
        next(loader)
        with pytest.raises(ValueError, match="between epochs only, and 1 batches are consumed"):
            loader.kept = kept
        list(loader)
        loader.kept = kept
        np.testing.assert_array_equal(loader.kept, kept)
        assert kept[rows_of(list(loader), 1)].all()
        with pytest.raises(ValueError, match=r"kept must be bool \[500\]"):
            loader.kept = kept[1:]
        with pytest.raises(UserError, match=r"training\.batch_size: 20 pairs, but only 5 are left"):
            loader.kept = np.arange(500) < 5


def test_a_restored_loader_goes_on_behind_the_last_consumed_batch(store: Store) -> None:
    kept = random_mask(500)
    settings = {"batch_size": 20, "reaudition_share": 0.1, "seed": SEED}
    with PairLoader(store, kept=kept, **settings) as loader:
        stop = int(np.random.default_rng(SEED).integers(1, 2 * loader.steps))
        whole = [batch for _ in range(3) for batch in loader]
    with PairLoader(store, kept=kept, **settings, prefetch=9) as loader:
        before: list[Batch] = []
        while len(before) < stop:
            before += [batch for _, batch in zip(range(stop - len(before)), loader, strict=False)]
        state = loader.state()
    with PairLoader(store, **settings, threads=2) as again:
        again.restore(state)
        rest: list[Batch] = []
        while again.epoch < 3:
            rest += list(again)
    assert len(before) == stop
    for one, other in zip([*before, *rest], whole, strict=True):
        assert_same(one, other)
    with PairLoader(store, batch_size=10) as other_settings, pytest.raises(UserError, match=r"loader state: .*500, 20"):
        other_settings.restore(state)


WORKER = """
import pickle, sys, time
from pathlib import Path
from efficientclip.data.pairs import PairLoader
from efficientclip.data.store import Store
from efficientclip.files.atomic import write_atomically
folder, log, seed = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
seen = pickle.loads(log.read_bytes()) if log.exists() else {"state": None, "rows": []}
with PairLoader(Store(folder / "store"), batch_size=5, seed=seed, threads=2, prefetch=8) as loader:
    if seen["state"] is not None:
        loader.restore(seen["state"])
    if loader.epoch == 0:
        for batch in loader:
            seen["rows"] += batch.rows_N.tolist()
            seen["state"] = loader.state()
            write_atomically(log, pickle.dumps(seen))
            time.sleep(0.002)
print("done")
"""


def test_killed_at_any_batch_each_pair_is_seen_once(folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", WORKER, str(folder), str(tmp_path / "log"), str(SEED)]
    random = np.random.default_rng(SEED)
    for kills in sorted(random.integers(1, 95, 2)):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and process.poll() is None:
            log = tmp_path / "log"
            if log.exists() and len(pickle.loads(log.read_bytes())["rows"]) >= 5 * kills:
                process.kill()
            time.sleep(0.002)
        assert process.wait(10) in (0, -signal.SIGKILL)
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout == "done\n", done.stderr
    rows = pickle.loads((tmp_path / "log").read_bytes())["rows"]
    assert sorted(rows) == list(range(500))


def test_no_thread_is_left(store: Store) -> None:
    before = threads()
    loader = PairLoader(store, batch_size=20, threads=3)
    batch = next(loader)
    assert threads() == before + 3
    del loader
    assert threads() == before
    assert batch.frozen_MD.isfinite().all()
    with pytest.raises(ZeroDivisionError), PairLoader(store, batch_size=20, threads=3) as loader:
        for _ in loader:
            assert threads() == before + 3
            raise ZeroDivisionError
    assert threads() == before
    with pytest.raises(RuntimeError, match="closed"):
        next(loader)
    for round in range(20):
        loader = PairLoader(store, batch_size=20, threads=2)
        for _ in range(round % 3):
            next(loader)
    cycle: Any = [loader]
    cycle.append(cycle)
    del loader, cycle
    gc.collect()
    assert threads() == before


def test_a_broken_loop_goes_on_where_it_stopped(store: Store) -> None:
    with PairLoader(store, batch_size=20, seed=SEED) as loader:
        whole = list(loader)
    with PairLoader(store, batch_size=20, seed=SEED) as loader:
        parts: list[Batch] = []
        for batch in loader:
            parts.append(batch)
            if len(parts) == 7:
                break
        parts += loader
    for one, other in zip(parts, whole, strict=True):
        assert_same(one, other)
    assert loader.waited_seconds > 0


def test_a_forked_child_gets_an_error_and_ends(store: Store) -> None:
    loader: Any = PairLoader(store, batch_size=20, threads=2)
    next(loader)

    def child() -> int:
        nonlocal loader
        refused = False
        try:
            next(loader)
        except RuntimeError as error:
            refused = "after the fork" in str(error)
        # Its threads are the parent's: to end it must not wait for them.
        loader = None
        gc.collect()
        return 0 if refused else 2

    assert exit_code_of_fork(child) == 0
    next(loader)


WAITER = """
import os, signal, sys, threading
from pathlib import Path
import numpy as np
from efficientclip.data.pairs import PairLoader, PairSource
from efficientclip.data.store import Store
store = Store(Path(sys.argv[1]) / "store")
n = 400_000
source = PairSource(trained_ids=np.resize(store.caption_ids, n), frozen_ids=np.resize(store.image_ids, n),
                    features=store.features, edges=store.caption_edges)
source.captions = store
tasks = lambda: len(os.listdir("/proc/self/task"))
before = tasks()
# Whoever starts the tests in a shell's background has the signal ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
timer.start()
try:
    with PairLoader(source, batch_size=n) as loader:
        while True:
            for batch in loader:
                pass
except KeyboardInterrupt:
    timer.join()
    print("interrupted", tasks() - before)
"""


def test_ctrl_c_ends_the_waiting(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WAITER, str(folder)],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.stdout.split() == ["interrupted", "0"], done.stderr
    assert done.returncode == 0


def test_a_store_is_opened_without_reading_it(folder: Path) -> None:
    store = Store(folder / "store")
    arrays = [store.tokens, store.offsets, store.features, store.image_ids, store.caption_ids, *store.caption_edges]
    assert all(isinstance(array, np.memmap) for array in arrays)
    table = store.pairs()
    np.testing.assert_array_equal(store.image_ids, table["image_id"])
    np.testing.assert_array_equal(store.caption_ids, table["caption_id"])
    indptr, images = store.caption_edges
    for caption in range(len(store.offsets) - 1):
        expected = sorted(store.image_ids[store.caption_ids == caption])
        assert images[indptr[caption] : indptr[caption + 1]].tolist() == expected
    source = CaptionPairs(store)
    assert isinstance(source.trained_ids, np.memmap) and isinstance(source.frozen_ids, np.memmap)


def test_an_epochs_order_takes_a_bit_a_pair() -> None:
    n = 64_000_000
    ids = np.zeros(n, np.int32)  # never written, so not resident
    source = PairSource(
        trained_ids=ids, frozen_ids=ids, features=np.ones((1, 4), np.float16), edges=(np.array([0, 1]), ids[:1])
    )
    source.inputs = lambda trained_ids_M, step, rank, world_size: {}  # type: ignore[method-assign]
    before = resident()
    with PairLoader(source, batch_size=64, seed=SEED, prefetch=1) as loader:
        rows = np.concatenate([next(loader).rows_N for _ in range(50)])
        taken = resident() - before
    assert len(set(rows.tolist())) == len(rows) and rows.max() > n / 2
    assert taken < n / 8 + 2**24


def test_a_store_that_contradicts_itself_is_a_users_error(tmp_path: Path) -> None:
    path = tiny.pair_store(tmp_path / "store")
    offsets = np.fromfile(path / "offsets.bin", np.int64)
    offsets[-1] += 1000
    offsets.tofile(path / "offsets.bin")
    with pytest.raises(UserError, match=r"pairs of epoch 0, step \d+: offsets\[.*rebuild the store"):
        list(PairLoader(Store(path), batch_size=20))


def test_a_store_of_an_older_format_is_refused_with_the_remedy(tmp_path: Path) -> None:
    path = tiny.pair_store(tmp_path / "store")
    manifest = path / "manifest.json"
    manifest.write_text(manifest.read_text().replace(f'"format": {FORMAT}', '"format": 1'))
    with pytest.raises(UserError, match=f"format 1, this version reads {EARLIER} and {FORMAT}; prepare it anew"):
        Store(path)
