"""`benchmarks.gpu` at its smallest in one process, without what a rented card's machine lacks.

python -m tests.gpu_rehearsal RESULTS.csv
"""

from __future__ import annotations

import os
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

ABSENT = (
    "deepspeed", "omegaconf", "rich", "matplotlib", "psutil", "cpuinfo", "pytest_benchmark", "efficientclip._loader",
)  # fmt: skip
NCU = 'print(\'==PROF== Connected\')\nprint(\'"ID","Kernel Name","launch__registers_per_thread","other"\')\n'
NCU += 'print(\'"","","register/thread",""\')\nprint(\'"0","forward_kernel","1,242","3"\')'


# A peer that is brought along.
OPEN_CLIP = """
from torch import arange
from torch.nn.functional import cross_entropy, logsigmoid

class ClipLoss:
    def get_ground_truth(self, device, pairs):
        return arange(pairs, device=device)

    def get_logits(self, image, text, scale):
        return scale * image @ text.T, scale * text @ image.T

    def __call__(self, image, text, scale):
        target = self.get_ground_truth(image.device, len(image))
        return sum(cross_entropy(logits, target) for logits in self.get_logits(image, text, scale)) / 2

class SigLipLoss:
    def __call__(self, image, text, scale, bias):
        logits = scale * image @ text.T + bias
        return -(logsigmoid(-logits).sum() + logits.diagonal().sum()) / len(image)
"""


def main(file: Path) -> None:
    with zipfile.ZipFile(file.with_name("open_clip-0.whl"), "w") as wheel:
        wheel.writestr("open_clip/__init__.py", "")
        wheel.writestr("open_clip/loss.py", OPEN_CLIP)
    # Python then says that they are not there.
    sys.modules |= dict.fromkeys(ABSENT)  # type: ignore[arg-type]
    os.environ["TRITON_INTERPRET"] = "1"
    from benchmarks import checkout
    from benchmarks.gpu import __main__ as gpu
    from benchmarks.gpu import ceilings
    from benchmarks.gpu.device import DEVICES, Cpu
    from benchmarks.gpu.lab import Lab, Results

    def here(lab: Lab, work: Callable[..., Any], given: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        return ((number, work(lab.device, *one)) for number, one in enumerate(given))

    mock.patch.object(Lab, "spread", here).start()
    mock.patch.object(Cpu, "profiler", lambda device: [sys.executable, "-c", NCU]).start()
    checkout.register()
    fewer: dict[str, dict[str, Callable[[Any], Any]]] = {
        "values": {"DTYPES": lambda all: all[-1:], "OPTIONS": lambda all: {"excluded": all["excluded"]}},
        "choices": {"FORWARD": ends, "BACKWARD": ends},
        "whole": {"SIZES": lambda all: all[:1], "TRAINER": lambda all: all[1:2]},
        "peers": {"cases": lambda all: lambda lab: [all(lab)[at] for at in (2, 6, 7)]},
    }
    for part in gpu.PARTS:
        results = Results(file, "a test", "a CPU")
        lab = Lab(DEVICES["cpu"], part, results, ceilings.rates(results.rows()) or (), file.parent)
        module = import_module(f"benchmarks.gpu.{part}")
        for name, cut in fewer.get(part, {}).items():
            setattr(module, name, cut(getattr(module, name)))
        with lab.attempt(f"part {part}"):
            module.run(lab)


def ends(choices: dict[str, Any]) -> dict[str, Any]:
    names = [*choices]
    return {name: choices[name] for name in (names[0], names[1], names[-1])}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
