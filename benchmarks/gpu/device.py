"""All that differs between a card and its rehearsal on a CPU: clock, graphs, shapes, and what only CUDA has.

Everything above this file is one program; what a card alone runs is here.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Call = Callable[[], Any]
# Pairs, bank rows, width. The second is as aligned as the large ones, for which its kernels are compiled.
Shapes = tuple[tuple[int, int, int], ...]


class Cuda:
    type = "cuda"
    processes = 16
    # Of the time that each part has.
    patience = 1
    width = 512
    launches = 10
    shapes: Shapes = ((1000, 300, 100), (2048, 1024, 512), (511, 5000, 1024))
    # FLOP and bytes a second that an H200 has shown, until this run's ceilings are known.
    rates = 7.9e14, 4.3e12
    # Seconds for the samples of a call, and how many these may be.
    budget, rounds = 0.3, (3, 30)
    environment: dict[str, str] = {}
    # Of the training step: BERT-base as it comes.
    tower: dict[str, int] = {}

    def refusal(self) -> str | None:
        if torch.cuda.is_available():
            return None
        return "no CUDA device: nothing to measure here; `make gpu-rehearsal` runs the same program on the CPU"

    def name(self) -> str:
        return torch.cuda.get_device_name()

    def prepare(self) -> None:
        """Once in each process that computes."""

    def size(self, rows: int) -> int:
        return rows

    def unit(self, rows: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
        rng = torch.Generator(self.type).manual_seed(rows + seed)
        return F.normalize(torch.randn(rows, self.width, generator=rng, device=self.type), dim=1).to(dtype)

    def scalar(self, value: float) -> Tensor:
        return torch.tensor(value, device=self.type, requires_grad=True)

    def sample(self, call: Call) -> float:
        """Seconds of one call on the device."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in "12")
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000

    def wait(self) -> None:
        torch.cuda.synchronize()

    def graph(self, call: Call, times: int = 1) -> Call:
        """The call, captured `times` over."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call()
            call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(times):
                call()
        return graph.replay

    def peak(self, call: Call) -> int:
        """Bytes that the call takes beside what is held before it."""
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - held

    def compiled(self, loss: Callable[..., Any]) -> Callable[..., Any]:
        return torch.compile(loss, dynamic=False)

    def usage(self, launched: Any) -> str:
        """What a launched kernel takes of a thread's registers."""
        return f"{launched.n_regs} registers, {launched.n_spills} spills"

    def profiler(self) -> list[str] | None:
        """The command that a profiled one is appended to."""
        return [path] if (path := shutil.which("ncu")) else None


# What `ncu` prints of a kernel, after what the profiled command prints.
_NCU = """
import subprocess, sys
at = sys.argv.index(sys.executable)
subprocess.run(sys.argv[at:], check=True)
print('"ID","Kernel Name","lts__throughput.avg.pct_of_peak_sustained_elapsed","launch__registers_per_thread"')
print('"","","%","register/thread"')
print('"0","forward_kernel","1,234.5","242"')
"""


class Cpu(Cuda):
    """The rehearsal: tiny shapes in Triton's interpreter, tiles as on an H200."""

    type = "cpu"
    processes = 2
    patience = 4
    width = 32
    launches = 1
    shapes: Shapes = ((45, 20, 24),)
    rates = 1e10, 1e10
    budget, rounds = 0.0, (1, 1)
    environment = {"TRITON_INTERPRET": "1"}
    tower = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}

    def refusal(self) -> str | None:
        return None

    def name(self) -> str:
        return "rehearsal on a CPU"

    def prepare(self) -> None:
        from efficientclip.kernels import paths

        paths.KERNELS_ON_CPU = True
        torch.cuda.get_device_capability = lambda device=None: (9, 0)
        torch.set_num_threads(1)

    def size(self, rows: int) -> int:
        return max(rows // 512, 4)

    def sample(self, call: Call) -> float:
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin

    def wait(self) -> None:
        """Nothing runs beside the program."""

    def graph(self, call: Call, times: int = 1) -> Call:
        def replay() -> None:
            for _ in range(times):
                call()

        return replay

    def peak(self, call: Call) -> int:
        call()
        return 0

    def compiled(self, loss: Callable[..., Any]) -> Callable[..., Any]:
        return torch.compile(loss, dynamic=False, backend="eager")

    def usage(self, launched: Any) -> str:
        return "" if launched is None else super().usage(launched)

    def profiler(self) -> list[str] | None:
        return [sys.executable, "-c", _NCU]


DEVICES: dict[str, Cuda] = {"cuda": Cuda(), "cpu": Cpu()}
