"""What a remote source costs: `ImageLoader` on tars in an S3 beside the same tars in the page cache, in turns.

    python -m benchmarks.remote

The S3 is a process of its own on this machine, which answers HEAD and ranged GET as S3 does, `--delay` seconds after
each request and to `--connections` at a time; moto, which the tests use, is Python that copies each object several
times. Its own CPU seconds are told: on a real cluster it runs elsewhere.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import multiprocessing
import os
import re
import statistics
import tempfile
import threading
import time
from datetime import date
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from benchmarks.measuring import MIB, RESULTS, Memory, Neighbours, Row, hardware, show_and_record
from efficientclip import ImageLoader
from tests.data.tars import write_tar

COLUMNS = (
    "date", "hardware", "torch", "source", "threads", "delay_s", "connections", "shards", "mean_bytes", "images_per_s",
    "over_page_cache", "from", "to", "peak_mib", "server_cpu_share", "rounds", "others_cores",
)  # fmt: skip
KEY = ("hardware", "torch", "source", "threads", "delay_s", "connections")
SHOWN = ("source", "images_per_s", "over_page_cache", "from", "to", "peak_mib", "server_cpu_share", "others_cores")


def write_shards(folder: Path, shards: int, each: int) -> float:
    """Tars of photographs of 640 x 480, cut at random; returns their mean bytes."""
    random, photographs = np.random.default_rng(0), [Image.fromarray(image) for image in load_sample_images().images]
    sizes = []
    for shard in range(shards):
        files = []
        for number in range(each):
            photograph = photographs[number % len(photographs)]
            left, top = (int(random.integers(0, side // 4)) for side in photograph.size)
            cut = photograph.crop((left, top, *photograph.size)).resize((640, 480))
            encoded = io.BytesIO()
            cut.save(encoded, "JPEG", quality=86)
            sizes.append(len(encoded.getvalue()))
            key = f"{shard * each + number:07}"
            files += [(f"{key}.jpg", encoded.getvalue()), (f"{key}.txt", b"a photograph")]
        write_tar(folder / f"{shard:05}.tar", files)
    return statistics.mean(sizes)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    folder: Path
    delay: float
    free: threading.Semaphore

    def log_message(self, *_: Any) -> None:
        """Nothing is printed."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        with self.free, (self.folder / Path(self.path).name).open("rb") as file:
            time.sleep(self.delay)
            size = os.fstat(file.fileno()).st_size
            asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"] or "")
            first, last = (int(asked[1]), min(int(asked[2]), size - 1)) if asked else (0, size - 1)
            self.send_response(206 if asked else 200)
            self.send_header("Content-Length", str(last + 1 - first))
            if asked:
                self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
            self.send_header("ETag", f'"{hashlib.md5(file.name.encode()).hexdigest()}"')
            self.send_header("Last-Modified", self.date_time_string(int(os.fstat(file.fileno()).st_mtime)))
            self.end_headers()
            self.wfile.flush()
            while self.command == "GET" and first <= last:
                first += os.sendfile(self.connection.fileno(), file.fileno(), first, last + 1 - first)


def serve(folder: Path, delay: float, connections: int, port: Any) -> None:
    Handler.folder, Handler.delay, Handler.free = folder, delay, threading.Semaphore(connections)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    port.send(server.server_address[1])
    server.serve_forever()


def one_pass(source: str, threads: int, epoch: int) -> tuple[int, float, float]:
    """Pictures, seconds, and the peak bytes beside what was held before."""
    memory, pictures = Memory("cpu"), 0
    with ImageLoader(source, batch_size=128, threads=threads, epoch=epoch) as loader:
        memory.start()
        started = time.perf_counter()
        for batch in loader:
            pictures += len(batch)
        return pictures, time.perf_counter() - started, memory.peak()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--delay", type=float, default=0.005)
    parser.add_argument("--connections", type=int, default=4)
    parser.add_argument("--shards", type=int, default=12)
    parser.add_argument("--each", type=int, default=300, help="pictures a shard")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        mean_bytes = write_shards(Path(name), given.shards, given.each)
        ours, theirs = multiprocessing.Pipe()
        context = multiprocessing.get_context("spawn")
        server = context.Process(target=serve, args=(Path(name), given.delay, given.connections, theirs), daemon=True)
        server.start()
        os.environ |= {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{ours.recv()}", "AWS_DEFAULT_REGION": "us-east-1"}
        os.environ |= {"AWS_ACCESS_KEY_ID": "benchmark", "AWS_SECRET_ACCESS_KEY": "benchmark"}
        numbers = f"{{00000..{given.shards - 1:05}}}.tar"
        places = {"page cache": f"{name}/{numbers}", "s3": f"s3://bucket/{numbers}"}
        process = psutil.Process(server.pid)
        rates: dict[str, list[float]] = {place: [] for place in places}
        peaks = dict.fromkeys(places, 0.0)
        served = seconds = 0.0
        for place in places.values():
            one_pass(place, given.threads, 0)
        neighbours = Neighbours()
        for number in range(given.rounds):
            for place, source in places.items():
                before = sum(process.cpu_times()[:2])
                pictures, took, peak = one_pass(source, given.threads, number + 1)
                rates[place].append(pictures / took)
                peaks[place] = max(peaks[place], peak)
                if place == "s3":
                    served, seconds = served + sum(process.cpu_times()[:2]) - before, seconds + took
        busy = neighbours.busy(given.threads, {place: [1 / rate for rate in found] for place, found in rates.items()})
        others = (neighbours._seconds() - neighbours.before) / (time.perf_counter() - neighbours.began)
        server.kill()
    rows: list[Row] = []
    for place, found in rates.items():
        ratios = sorted(rate / base for rate, base in zip(found, rates["page cache"], strict=True))
        rows.append(
            {
                "date": date.today().isoformat(),
                "hardware": hardware("cpu"),
                "torch": torch.__version__,
                "source": place,
                "threads": given.threads,
                "delay_s": given.delay,
                "connections": given.connections,
                "shards": given.shards,
                "mean_bytes": round(mean_bytes),
                "images_per_s": round(statistics.median(found)),
                "over_page_cache": f"{statistics.median(ratios):.2f}",
                "from": f"{ratios[0]:.2f}",
                "to": f"{ratios[-1]:.2f}",
                "peak_mib": round(peaks[place] / MIB),
                "server_cpu_share": f"{served / seconds:.2f}" if place == "s3" else "",
                "rounds": given.rounds,
                "others_cores": f"{others:.2f}",
            }
        )
    show_and_record(rows, SHOWN, "remote shards", busy, RESULTS / "remote.csv", KEY, COLUMNS)


if __name__ == "__main__":
    main()
