"""How fast this machine is at a config's own work, measured by as many processes as will do it: `trial_rank`."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.tables import Columns
from ..errors import UserError
from ..files.places import Location
from ..launchers import free_port
from .stages import Stage, environment


@dataclass(frozen=True)
class Rates:
    """`start`: seconds until a process has imported all; pictures and pairs a second of the whole machine; `step`:
    seconds of a step beside its pairs; `text`: how many pairs' time an unpaired text takes."""

    start: float
    pictures: float
    pairs: float
    step: float
    text: float


def measure(
    config: Path,
    source: Location,
    images: Location | None,
    columns: Columns,
    pairs: int | None,
    pictures: int | None,
    ranks: int,
) -> Rates:
    """Rates of the config at `config` on the first pictures of `source`, on as many `ranks` as will train; UserError
    where these cannot be read. `pairs` and `pictures`: how many it has, if that is known."""
    asked: dict[str, Any] = {"source": str(source), "images": images and str(images), "columns": vars(columns)}
    asked |= {"pairs": pairs, "pictures": pictures}
    words = [sys.executable, "-m", "efficientclip.fitting.trial_rank", str(config), json.dumps(asked)]
    shared = environment(Stage("", (), ranks=ranks))
    shared |= {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with ExitStack() as stack:
        said = stack.enter_context(tempfile.TemporaryFile("w+"))

        def begun(rank: int) -> subprocess.Popen[str]:
            out, own = subprocess.DEVNULL if rank else subprocess.PIPE, {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            return stack.enter_context(subprocess.Popen(words, stdout=out, stderr=said, text=True, env=shared | own))

        started = time.monotonic()
        processes = [begun(rank) for rank in range(ranks)]
        lines = iter(processes[0].stdout or ())
        next(lines, "")
        start = time.monotonic() - started
        told = [*lines][-1:]
        codes = [process.wait() for process in processes]
        said.seek(0)
        printed = ["the trial said nothing", *said.read().strip().splitlines()]
    if any(codes):
        errors = [line.removeprefix("error: ") for line in printed if line.startswith("error: ")]
        raise UserError([*errors, printed[-1]][0])
    return Rates(start, **json.loads(told[0]))
