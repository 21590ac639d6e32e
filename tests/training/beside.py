"""Worker: trains as usual, but the files of a checkpoint wait until training is LATER steps further on.

On rank FULL the disk is full then; before the step KILLED_BEFORE the rank kills itself.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
from typing import Any

from efficientclip import train
from efficientclip.data.batches import Batch
from efficientclip.training import checkpoint
from efficientclip.training.trainer import Trainer

step, write = Trainer.train_step, checkpoint._write
under_way: list[Trainer] = []


def stepped(self: Trainer, batch: Batch) -> None:
    under_way[:] = [self]
    if str(self.step) == os.environ.get("KILLED_BEFORE"):
        os.kill(os.getpid(), signal.SIGKILL)
    step(self, batch)


def later(*given: Any) -> Any:
    trainer = under_way[0]
    wanted, deadline = trainer.step + int(os.environ["LATER"]), time.monotonic() + 30
    while trainer.step < min(wanted, trainer.total_steps):
        if time.monotonic() > deadline:
            raise TimeoutError("training waits for its checkpoint")
        time.sleep(0.001)
    if str(trainer.rank) == os.environ.get("FULL"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return write(*given)


Trainer.train_step = stepped  # type: ignore[method-assign]
checkpoint._write = later
train.main(sys.argv[1:])
