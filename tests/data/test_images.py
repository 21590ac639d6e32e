"""The image loader's order, and what may interrupt it."""

from __future__ import annotations

import gc
import json
import math
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from efficientclip.data.images import ImageBatch
from efficientclip.errors import UserError
from tests.data.tars import SEED, encode, jpegs, loader, numbers, photograph, write_tar
from tests.forks import exit_code_of_fork

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def kept(batches: Iterable[ImageBatch]) -> list[tuple[list[str], torch.Tensor]]:
    return [(batch.keys, batch.images.clone()) for batch in batches]


def assert_same(one: list[tuple[list[str], torch.Tensor]], other: list[tuple[list[str], torch.Tensor]]) -> None:
    for (keys, images), (other_keys, other_images) in zip(one, other, strict=True):
        assert keys == other_keys
        assert torch.equal(images, other_images)


def tasks() -> int:
    return len(os.listdir("/proc/self/task"))


# Order


def test_batches_are_the_same_for_any_number_of_threads(shards: Path) -> None:
    whole = kept(loader(shards, threads=1))
    assert sorted(numbers(loader(shards))) == list(range(150))
    for threads in (2, 4):
        assert_same(kept(loader(shards, threads=threads, prefetch=1 + threads)), whole)


def test_each_epoch_has_an_order_of_its_own(shards: Path) -> None:
    with loader(shards) as batches:
        first, second = numbers(batches), numbers(batches)
        assert batches.epoch == 2
        batches.epoch = 0
        assert numbers(batches) == first
    assert sorted(first) == sorted(second) == list(range(150)) and first != second
    assert numbers(loader(shards, epoch=1)) == second
    assert numbers(loader(shards, seed=SEED + 1)) != first
    # Neighbours in a shard are apart: 29 of 30 would be by chance.
    assert np.mean(np.abs(np.diff(first)) == 1) < 0.15
    assert numbers(loader(shards, train=False)) == list(range(150))


@pytest.mark.parametrize("world_size", [2, 3, 5, 8])
@pytest.mark.parametrize("train", [True, False])
def test_ranks_share_all_samples_out(shards: Path, world_size: int, train: bool) -> None:
    ranks = [numbers(loader(shards, rank=rank, world_size=world_size, train=train)) for rank in range(world_size)]
    assert all(ranks)
    assert sorted(number for rank in ranks for number in rank) == list(range(150))


def test_loaders_share_an_order_in_runs(shards: Path) -> None:
    whole = dict(zip(numbers(loader(shards)), torch.cat([images for _, images in kept(loader(shards))]), strict=True))
    order = list(whole)

    def dealt(left: list[int], skip: int, block: int, number: int, of: int) -> list[int]:
        return [sample for place, sample in enumerate(left[skip:]) if place // block % of == number]

    for number in range(3):
        first, second = (16, 4, number, 3), (8, 2, 1, 2)
        once, twice = dealt(order, *first), dealt(dealt(order, *first), *second)
        assert numbers(loader(shards, shares=[first])) == once
        with loader(shards, shares=[first, second], batch_size=4) as batches:
            found = [next(batches), next(batches)]
            state = batches.state()
        with loader(shards, shares=[first, second], batch_size=4) as batches:
            batches.restore(state)
            found += list(batches)
        assert numbers(found) == twice
        for batch in found:
            assert all(torch.equal(image, whole[int(key)]) for key, image in zip(batch.keys, batch.images, strict=True))
    with pytest.raises(UserError, match="loader state: shards"):
        loader(shards).restore(state)


def counted(sources: list[Path], weights: list[float], **options: Any) -> Counter[int]:
    with loader(sources, weights=weights, **options) as batches:
        return Counter(numbers(batches))


def test_sources_are_visited_as_often_as_they_weigh(shards: Path) -> None:
    sources = [shards / "1.tar", shards / "3.tar"]
    assert_same(kept(loader(sources, weights=[1, 1.0])), kept(loader(sources)))
    for weights in ([1, 2], [0.5, 1], [2.5, 0.25]):
        epochs = [counted(sources, weights, epoch=epoch) for epoch in range(20)]
        assert epochs[0] == counted(sources, weights)
        # Each epoch draws anew.
        assert len({tuple(sorted(seen.items())) for seen in epochs}) == (1 if weights == [1, 2] else 20)
        for weight, (first, end) in zip(weights, [(20, 60), (65, 125)], strict=True):
            whole, fraction = divmod(weight, 1)
            times = np.array([[seen[number] for number in range(first, end)] for seen in epochs])
            assert set(np.unique(times)) == ({whole, whole + 1} if fraction else {whole})
            # Five deviations of a mean of so many draws.
            error = 5 * math.sqrt(fraction * (1 - fraction) / times.size)
            assert times.mean() == pytest.approx(weight, abs=error + 1e-9)
        for world_size in (2, 3):
            of_ranks = [counted(sources, weights, rank=rank, world_size=world_size) for rank in range(world_size)]
            assert sum(of_ranks, Counter()) == epochs[0]


def test_a_sample_tells_its_source_and_visit_and_each_visit_is_cut_anew(shards: Path) -> None:
    sources, of = [shards / "0.tar", shards / "4.tar"], {}
    with loader(sources, weights=[1, 2.5]) as batches:
        for batch in batches:
            for key, origin, visit, image in zip(batch.keys, batch.origins, batch.visits, batch.images, strict=True):
                of[int(key), origin, visit] = image.clone()
    assert {(origin, visit) for _, origin, visit in of} == {(0, 0), (1, 0), (1, 1), (1, 2)}
    assert {number for number, origin, _ in of if origin == 0} == set(range(20))
    assert any(not torch.equal(of[number, 1, 0], of[number, 1, 1]) for number in range(125, 150))


def test_a_weighted_order_goes_on_behind_any_sample(shards: Path) -> None:
    options: dict[str, Any] = {"weights": [0.5, 2.5], "batch_size": 4}
    sources = [shards / "1.tar", shards / "2.tar"]
    with loader(sources, **options) as batches:
        whole = list(batches)
        state = batches.state()
    keys = [key for batch in whole for key in batch.keys]
    consumed = [place for batch in whole for place in batch.consumed]
    for place in (0, 5, len(keys) - 1):
        with loader(sources, **options) as batches:
            batches.restore({**state, "epoch": 0, "consumed": consumed[place], "bad": {}})
            assert [key for batch in batches for key in batch.keys] == keys[place + 1 :]
    for other in ([0.5, 2.25], [0.5, 1.5], [0.75, 2.5]):
        with pytest.raises(UserError, match="loader state: shards"):
            loader(sources, weights=other).restore(state)


@pytest.mark.parametrize("weights", [[1], [0, 1], [-1, 1], [math.inf, 1], [math.nan, 1]])
def test_weights_that_are_none_are_refused(shards: Path, weights: list[float]) -> None:
    with pytest.raises(UserError, match=r"weights: .* of 2 sources; give each one above 0, and 100 at most"):
        loader([shards / "0.tar", shards / "1.tar"], weights=weights)


def test_a_picture_is_cut_the_same_way_on_every_rank(shards: Path) -> None:
    def images(**options: Any) -> dict[str, torch.Tensor]:
        return {key: image for keys, images in kept(loader(shards, **options)) for key, image in zip(keys, images)}  # noqa: B905

    whole = images()
    for rank in range(3):
        for key, image in images(rank=rank, world_size=3).items():
            assert torch.equal(image, whole[key])


def test_the_last_batch_may_be_left_out(shards: Path) -> None:
    assert [len(batch) for batch in loader(shards)] == [16] * 9 + [6]
    assert [len(batch) for batch in loader(shards, drop_last=True)] == [16] * 9


# Going on


def test_state_is_the_last_batch_that_was_consumed(shards: Path, tmp_path: Path) -> None:
    damaged = write_tar(tmp_path / "9.tar", [("a.jpg", b"x"), ("a.txt", b"x")])
    sources = [shards, damaged]
    with loader(sources) as batches:
        whole = kept(batches) + kept(batches)
        counts = batches.bad_counts
    assert counts == {"undecodable image": 1}
    for taken in sorted(random.Random(SEED).sample(range(len(whole)), 4)):
        with loader(sources) as batches:
            parts: list[ImageBatch] = []
            while len(parts) < taken:
                parts += (batch for _, batch in zip(range(taken - len(parts)), batches, strict=False))
            time.sleep(0.05)  # what is made ahead must not count
            state = pickle.loads(pickle.dumps(batches.state()))
        with loader(sources, threads=1) as batches:
            batches.restore(state)
            rest = kept(batches)
            if batches.epoch < 2:
                rest += kept(batches)
            assert batches.bad_counts == counts
        assert_same([(batch.keys, batch.images) for batch in parts] + rest, whole)


def test_a_broken_loop_goes_on_where_it_stopped(shards: Path) -> None:
    whole = numbers(loader(shards))
    with loader(shards) as batches:
        found = []
        for batch in batches:
            found += numbers([batch])
            if len(found) > 50:
                break
        found += numbers(batches)
    assert found == whole
    assert batches.waited_seconds > 0 and batches.images_per_second > 0


CONSUMER = """
import json, os, sys
from pathlib import Path
from efficientclip import ImageLoader
folder, state, log = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
with ImageLoader(folder, batch_size=4, size=32, threads=2, seed=int(sys.argv[4]), shuffle_buffer=30) as batches:
    if state.exists():
        batches.restore(json.loads(state.read_text()))
    with log.open("a") as lines:
        for batch in batches:
            # The keys and the state reach the disk together: a line is whole or is not there.
            lines.write(json.dumps([batch.keys, batches.state()]) + "\\n")
            lines.flush()
            print(flush=True)
"""


def test_killed_and_restored_no_sample_is_seen_twice_or_lost(shards: Path, tmp_path: Path) -> None:
    rng, log, state = random.Random(SEED), tmp_path / "log", tmp_path / "state"
    command = [sys.executable, "-c", CONSUMER, str(shards), str(state), str(log), str(SEED)]
    for _ in range(2):
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=ENVIRONMENT) as process:
            assert process.stdout is not None
            for _ in range(rng.randint(1, 12)):
                process.stdout.readline()
            process.send_signal(signal.SIGKILL)
        whole = [line for line in log.read_text().splitlines(keepends=True) if line.endswith("\n")]
        log.write_text("".join(whole))
        state.write_text(json.dumps(json.loads(whole[-1])[1]))
    subprocess.run(command, check=True, capture_output=True, env=ENVIRONMENT)
    seen = [int(key) for line in log.read_text().splitlines() for key in json.loads(line)[0]]
    assert seen == numbers(loader(shards))


@pytest.mark.parametrize(
    ("changed", "named"),
    [({"seed": SEED + 1}, "seed"), ({"rank": 1, "world_size": 2}, "rank"), ({"shuffle_buffer": 9}, "shards")],
)
def test_a_state_of_other_settings_is_refused(shards: Path, changed: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=f"loader state: {named}"):
        loader(shards, **changed).restore(loader(shards).state())


# Life


def test_batches_stay_as_they_are_while_they_are_held(shards: Path) -> None:
    with loader(shards, batch_size=8, prefetch=1) as batches:
        held = list(batches)
        copies = kept(held)
        rows = [batch.images[3:5].view(-1) for batch in held]
        del held
        numbers(batches)
    for row, (_, images) in zip(rows, copies, strict=True):
        assert torch.equal(row, images[3:5].view(-1))


def test_memory_returns_to_the_loader(shards: Path) -> None:
    with loader(shards, batch_size=8, prefetch=1) as batches:
        places = {batch.images.data_ptr() for batch in batches}
    assert len(places) <= 4


def test_no_thread_is_left_behind(shards: Path) -> None:
    before = tasks()
    batches = loader(shards, threads=4)
    assert tasks() == before, "threads start with the first batch"
    next(batches)
    assert tasks() > before
    batches.close()
    assert tasks() == before
    with pytest.raises(RuntimeError, match="closed"):
        next(batches)
    with pytest.raises(ZeroDivisionError), loader(shards) as batches:
        for _ in batches:
            raise ZeroDivisionError
    assert tasks() == before
    for taken in range(6):
        batches = loader(shards)
        for _ in range(taken):
            next(batches)
    cycle: list[Any] = [batches]
    cycle.append(cycle)
    del batches, cycle
    gc.collect()
    assert tasks() == before


def test_a_forked_child_gets_an_error_and_ends(shards: Path) -> None:
    batches: Any = loader(shards)
    next(batches)

    def child() -> int:
        nonlocal batches
        refused = False
        try:
            next(batches)
        except RuntimeError as error:
            refused = "after the fork" in str(error)
        # Its threads are the parent's: to end it must not wait for them.
        batches = None
        gc.collect()
        return 0 if refused else 2

    assert exit_code_of_fork(child) == 0
    next(batches)


WAITER = """
import os, signal, sys, threading
from efficientclip import ImageLoader
tasks = lambda: len(os.listdir("/proc/self/task"))
before = tasks()
# Whoever starts the tests in a shell's background has the signal ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
timer = threading.Timer(0.4, os.kill, (os.getpid(), signal.SIGINT))
timer.start()
try:
    with ImageLoader(sys.argv[1], batch_size=100_000, size=32, threads=2, captions=False) as batches:
        next(batches)
except KeyboardInterrupt:
    timer.join()
    print("interrupted", tasks() - before)
"""


def test_ctrl_c_ends_the_waiting(tmp_path: Path) -> None:
    # A shard that takes long, all of it one batch.
    picture = encode(photograph(900, 900), "JPEG")
    write_tar(tmp_path / "0.tar", [(f"{number}.jpg", picture) for number in range(300)])
    for shard in range(1, 30):
        (tmp_path / f"{shard}.tar").symlink_to(tmp_path / "0.tar")
    command = [sys.executable, "-c", WAITER, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=ENVIRONMENT)
    assert done.stdout.split() == ["interrupted", "0"], done.stderr


MEMORY = """
import sys
from efficientclip import ImageLoader
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
import torch
torch.zeros(1).numpy()
before = resident()
with ImageLoader(sys.argv[1], batch_size=8, size=224, threads=4, captions=False, shuffle_buffer=50) as batches:
    most = 0
    for epoch in range(2):
        for batch in batches:
            most = max(most, resident())
print(most - before)
"""


def test_memory_stays_in_bounds(tmp_path: Path) -> None:
    # 36 MB each when decoded as a whole.
    picture = encode(Image.effect_noise((4000, 3000), 20).convert("RGB"), "JPEG", quality=50)
    write_tar(tmp_path / "0.tar", [(f"{number}.jpg", picture) for number in range(12)])
    command = [sys.executable, "-c", MEMORY, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True, env=ENVIRONMENT)
    ring = 4 * 8 * 3 * 224 * 224 * 4
    buffer = 12 * len(picture)
    assert int(done.stdout) - ring - buffer < 100e6


def test_a_shard_that_is_cut_is_named_after_its_whole_samples(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", jpegs(20))
    whole = write_tar(tmp_path / "1.tar", jpegs(20, first=20)).read_bytes()
    (tmp_path / "1.tar").write_bytes(whole[: len(whole) // 2])
    found = []
    with loader(tmp_path, train=False) as batches:
        with pytest.raises(UserError, match=r"1\.tar: not a whole tar file .* download it again"):
            for batch in batches:
                found += numbers([batch])
        assert found == list(range(len(found))) and 20 < len(found) < 40
        # Put right, the rest follows.
        (tmp_path / "1.tar").write_bytes(whole)
        assert found + numbers(batches) == list(range(40))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"size": 0}, "size"),
        ({"threads": 0}, "threads"),
        ({"rank": 2, "world_size": 2}, "rank"),
        ({"shares": [(0, 4, 2, 2)]}, "shares"),
        ({"dtype": torch.float16}, "dtype"),
        ({"std": (0, 1, 1)}, "std"),
        ({"scale": (0.9, 0.1)}, "scale"),
        ({"ratio": (0, 1)}, "ratio"),
        ({"seed": -1}, "seed"),
        ({"epoch": -1}, "epoch"),
        ({"prefetch": 0}, "prefetch"),
        ({"shuffle_buffer": 0}, "shuffle_buffer"),
    ],
)
def test_mistakes_are_named(shards: Path, options: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        loader(shards, **options)


def test_absent_shards_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        loader(tmp_path / "absent.tar")
    with pytest.raises(UserError, match=r"holds no \.tar"):
        loader(tmp_path)
