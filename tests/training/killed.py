"""Worker: trains as usual, but sends itself the signal KILLED_BY, or kills itself, before the step that KILLED_BEFORE
names, counted from 0; the checkpoint under way is there by then."""

from __future__ import annotations

import os
import signal
import sys
import time

from efficientclip import stopping, train
from efficientclip.data.batches import Batch
from efficientclip.training.trainer import Trainer

step = Trainer.train_step


def killed(self: Trainer, batch: Batch) -> None:
    if self.step == int(os.environ["KILLED_BEFORE"]):
        self.checkpoints.finish()
        os.kill(os.getpid(), int(os.environ.get("KILLED_BY", signal.SIGKILL)))
        while stopping.requested() is None:
            time.sleep(0.001)
    step(self, batch)


Trainer.train_step = killed  # type: ignore[method-assign]
train.main(sys.argv[1:])
