from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest
from tensorboard.summary.writer.record_writer import RecordWriter

from efficientclip.errors import UserError
from efficientclip.training.records import Metrics
from efficientclip.training.trackers import TensorBoard


def test_a_full_disk_under_tensorboard_is_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(threading, "excepthook", threading.__excepthook__)
    metrics = Metrics(tmp_path, 0, [TensorBoard(tmp_path, 0)])
    monkeypatch.setattr(RecordWriter, "write", full)
    with pytest.raises(UserError, match=r"tensorboard: No space left on device: free space and run the same command"):
        for step in range(100):
            metrics.validation(step, step, 0, {"held": {way: {"R@10": 0.5} for way in ("t2i", "i2t")}})
            threading.Event().wait(0.01)
    assert "Traceback" not in capfd.readouterr().err
