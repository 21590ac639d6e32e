"""`prepare` with a frozen tower of no cost: time a pair, peak memory, ranks, and one shard of twenty that changes.

    python -m benchmarks.prepare [--pairs 200000,1000000] [--base CHECKOUT] [--rounds 1] [--folder F]
    python -m benchmarks.prepare --tower vit-b-32 --pairs 6000

Tars hold JPEGs of 32 x 32 pixels, all different, and captions of 12 characters and a number. The tower's features, 512
wide, are there before it is asked. `--base` is another checkout, whose code takes turns with ours. One rank has two
cores; beside two ranks of a core each it has one. Times hold the start of Python and torch; CPU time is that of all
processes, peak memory that of the largest.

`--tower vit-b-32`: one of random weights, in bfloat16, encodes JPEGs of 640 x 480, beside its rate on noise.
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image
from transformers import CLIPVisionConfig, ResNetConfig

from benchmarks.measuring import RESULTS, Neighbours, Row, hardware, require_green, show_and_record
from efficientclip.config import load_config
from efficientclip.launchers import free_port
from efficientclip.model.efficientclip import EfficientCLIP, EfficientCLIPConfig
from efficientclip.model.frozen import PICTURES_AT_ONCE, FrozenImages

ROOT = Path(__file__).parents[1]
SHARDS, WIDTH = 20, 512
# Pixels of a picture, and of the tower's.
SIZES = {"none": ((32, 32), 32), "vit-b-32": ((640, 480), 224)}
ALONE = "the tower alone"
REPLACED = f"one shard of {SHARDS} replaced"
CHARACTERS = [chr(0x4E00 + number) for number in range(3000)]
COLUMNS = (
    "date", "hardware", "torch", "tower", "pairs", "case", "code", "ranks", "cores", "ms_a_pair", "cpu_ms_a_pair",
    "peak_gib", "to_one_rank", "encoded", "rounds",
)  # fmt: skip
KEY = ("date", "hardware", "torch", "tower", "pairs", "case", "code")
# `efficientclip` of the checkout in which it runs.
COMMAND = f"""
import sys
from benchmarks.checkout import register
register()
import numpy as np
from efficientclip import cli
from efficientclip.model.frozen import FrozenImages
rows = np.random.default_rng(0).standard_normal((256, {WIDTH})).astype(np.float32)
tower, own, encoded = sys.argv.pop(1), FrozenImages.encode_pixels, 0
def encode(self, pixels):
    global encoded
    encoded += len(pixels)
    return rows[: len(pixels)] if tower == "none" else own(self, pixels)
FrozenImages.encode_pixels = encode
try:
    sys.exit(cli.main(sys.argv[1:]))
finally:
    print("encoded", encoded)
"""


@dataclass(frozen=True)
class Spent:
    seconds: float
    cpu_seconds: float
    peak_bytes: float
    encoded: int


def write_shards(folder: Path, pairs: int, size: tuple[int, int], *, first: int = 0, shards: int = SHARDS) -> Path:
    """Tars of `pairs` pictures of `size` with captions in all, numbered from `first` on."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(first)
    buffer = io.BytesIO()
    coarse = random.integers(0, 256, (max(4, size[1] // 6), max(4, size[0] // 6), 3), np.uint8)
    Image.fromarray(coarse).resize(size).save(buffer, "JPEG", quality=80)
    jpeg = buffer.getvalue()
    for shard in range(shards):
        words = random.integers(0, len(CHARACTERS), (pairs // shards, 12))
        with (folder / f"{shard:05d}.tar").open("wb") as tar:
            for at, chosen in enumerate(words):
                number = first + shard * len(words) + at
                caption = "".join(CHARACTERS[word] for word in chosen) + str(number)
                # A comment makes it another file.
                told = b"\xff\xfe" + (2 + 8).to_bytes(2, "big") + f"{number:08d}".encode()
                for suffix, content in (("jpg", jpeg[:2] + told + jpeg[2:]), ("txt", caption.encode())):
                    member = tarfile.TarInfo(f"{number:08d}.{suffix}")
                    member.size = len(content)
                    tar.write(member.tobuf(tarfile.USTAR_FORMAT) + content + bytes(-len(content) % 512))
            tar.write(bytes(1024))
    return folder


def write_config(folder: Path, kind: str) -> Path:
    """A config with a tower and a tokenizer, which lie beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = [*special, *map(str, range(10)), *(f"##{digit}" for digit in range(10)), *CHARACTERS]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    size = SIZES[kind][1]
    tower = (
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
        if kind == "none"
        else CLIPVisionConfig(image_size=size)
    )
    model = EfficientCLIP(EfficientCLIPConfig(image={**tower.to_dict(), "image_size": size}, width=WIDTH))
    model.save_pretrained(folder / "image-run" / "model")
    bert = {"model_type": "bert", "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1}
    tree = {
        "run": str(folder / "run"),
        "data": {"tokenizer": str(folder / "vocab.txt"), "store": str(folder / "store")},
        "model": {
            "width": WIDTH,
            "image_tower": {"pretrained": str(folder / "image-run"), "size": size},
            "text_tower": {"architecture": bert},
        },
        "optimizer": {"lr": 1e-3},
        "training": {"pair_visits": 1, "batch_size": 1, "precision": "fp32" if kind == "none" else "bf16"},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    return folder / "config.yaml"


def spent(checkout: Path, arguments: Sequence[str], log: Path, *, ranks: int = 1, cores: Sequence[int]) -> Spent:
    """By COMMAND with `arguments` of `checkout` on so many ranks, which share the cores out."""
    port = str(free_port())
    log.unlink(missing_ok=True)
    started, processes = time.perf_counter(), []
    for rank in range(ranks):
        among = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = {**os.environ, "PYTHONPATH": str(checkout), "DS_ACCELERATOR": "cpu"}
        environment["OMP_NUM_THREADS"] = str(len(cores) // ranks)
        environment |= {name: str(value) for name, value in among.items()} if ranks > 1 else {}
        mine = ",".join(map(str, cores[rank::ranks]))
        with log.open("ab") as file:
            processes.append(
                subprocess.Popen(
                    ["taskset", "-c", mine, sys.executable, "-c", COMMAND, *arguments],
                    cwd=checkout, env=environment, stdout=file, stderr=file,
                )
            )  # fmt: skip
    ended = [os.wait4(process.pid, 0) for process in processes]
    if any(status for _, status, _ in ended):
        raise RuntimeError(f"{' '.join(arguments)}: exit codes {[status for _, status, _ in ended]}, see {log}")
    usages = [usage for *_, usage in ended]
    cpu = sum(usage.ru_utime + usage.ru_stime for usage in usages)
    seconds, peak = time.perf_counter() - started, 1024 * max(usage.ru_maxrss for usage in usages)
    encoded = sum(int(line.split()[1]) for line in log.read_text().splitlines() if line.startswith("encoded "))
    return Spent(seconds, cpu, peak, encoded)


def seconds_alone(config: Path) -> float:
    """Of a picture by the config's tower, in this process; the median of 8 batches, once one is encoded."""
    frozen, spent = FrozenImages(load_config(config)), list[float]()
    pixels = torch.randn(PICTURES_AT_ONCE, 3, frozen.tower.size, frozen.tower.size)
    for _ in range(9):
        started = time.perf_counter()
        frozen.encode_pixels(pixels)
        spent.append(time.perf_counter() - started)
    return statistics.median(spent[1:]) / len(pixels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", default="200000,1000000")
    parser.add_argument("--tower", default="none", choices=SIZES)
    parser.add_argument("--base", type=Path, help="another checkout, with its loader built")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="where tars and stores go, 6 GB a million pairs")
    given = parser.parse_args()
    require_green(ROOT, "tests/prepare/test_prepare.py")
    cores = sorted(os.sched_getaffinity(0))[:2]
    codes = {"ours": ROOT, **({"base": given.base.resolve()} if given.base else {})}
    with tempfile.TemporaryDirectory(dir=given.folder) as scratch:
        here = Path(scratch)
        config = write_config(here / "config", given.tower)
        for pairs in map(int, given.pairs.split(",")):
            shards = write_shards(here / f"shards-{pairs}", pairs, SIZES[given.tower][0])
            measure(given.tower, shards, pairs, here, config, codes, cores, given.rounds)
            shutil.rmtree(shards)


def measure(
    tower: str,
    shards: Path,
    pairs: int,
    here: Path,
    config: Path,
    codes: dict[str, Path],
    cores: list[int],
    rounds: int,
) -> None:
    neighbours = Neighbours()
    cases = {("one rank", code, 1, tuple(cores)): root for code, root in codes.items()}
    cases |= {
        ("one rank, a core", "ours", 1, (cores[0],)): ROOT,
        ("two ranks, a core each", "ours", 2, tuple(cores)): ROOT,
        (REPLACED, "ours", 1, tuple(cores)): ROOT,
    }
    found: dict[tuple[str, str, int, tuple[int, ...]], list[Spent]] = {case: [] for case in cases}
    size, store = SIZES[tower][0], here / "store"
    other = write_shards(here / "other", pairs // SHARDS, size, first=pairs, shards=1) / "00000.tar"
    command = [tower, "prepare", str(shards), str(store), "--config", str(config)]
    for _ in range(rounds):
        for case, root in cases.items():
            _, _, ranks, held = case
            if case[0] != REPLACED:
                shutil.rmtree(store, ignore_errors=True)
                found[case].append(spent(root, command, here / "log", ranks=ranks, cores=held))
                continue
            # It comes and goes, whichever round this is.
            first = shards / "00000.tar"
            for tar, aside in ((other, here / "aside.tar"), (here / "aside.tar", other)):
                first.rename(here / "old.tar")
                tar.rename(first)
                (here / "old.tar").rename(aside)
                last = spent(root, [*command, "--replace"], here / "log", cores=held)
            found[case].append(last)
    shutil.rmtree(store)
    shutil.rmtree(here / "other")
    busy = neighbours.busy(
        len(cores), {" ".join(case[:2]): [one.seconds for one in all_] for case, all_ in found.items()}
    )
    common = {"date": date.today().isoformat(), "hardware": hardware("cpu"), "torch": torch.__version__}
    common |= {"tower": tower, "pairs": pairs, "rounds": rounds}
    rows: list[Row] = []
    if tower != "none":
        with multiprocessing.get_context("spawn").Pool(1) as process:
            alone_s = process.apply(seconds_alone, (config,))
        rows.append(common | {"case": ALONE, "code": "ours", "cores": len(cores), "ms_a_pair": f"{1e3 * alone_s:.3f}"})
    for (case, code, ranks, held), all_ in found.items():
        seconds = statistics.median(one.seconds for one in all_)
        alone = found["one rank, a core", "ours", 1, (cores[0],)]
        rows.append(
            common
            | {
                "case": case,
                "code": code,
                "ranks": ranks,
                "cores": len(held),
                "ms_a_pair": f"{1e3 * seconds / pairs:.3f}",
                "cpu_ms_a_pair": f"{1e3 * statistics.median(one.cpu_seconds for one in all_) / pairs:.3f}",
                "peak_gib": f"{max(one.peak_bytes for one in all_) / 2**30:.2f}",
                "to_one_rank": f"{statistics.median(one.seconds for one in alone) / seconds:.2f}" if ranks > 1 else "",
                "encoded": all_[0].encoded,
            }
        )
    shown = ("pairs", "case", "code", "ms_a_pair", "cpu_ms_a_pair", "peak_gib", "to_one_rank", "encoded")
    show_and_record(rows, shown, f"prepare, tower: {tower}", busy, RESULTS / "prepare.csv", KEY, COLUMNS)


if __name__ == "__main__":
    main()
