"""What TensorBoard, W&B and MLflow hold of a run, read back by what each of them writes."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any
from unittest.mock import patch

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto.wandb_internal_pb2 import Record

Scalars = dict[tuple[str, int], float]
# W&B's files are in LevelDB's log format.
BLOCK, HEADER, WHOLE, LAST = 32768, 7, 1, 4


def in_tensorboard(run: Path) -> Scalars:
    """The last value of each name and step."""
    events = EventAccumulator(str(run / "tensorboard"), {"scalars": 0})
    events.Reload()
    return {(name, event.step): event.value for name in events.Tags()["scalars"] for event in events.Scalars(name)}


def in_mlflow(run: Path) -> tuple[Scalars, Any]:
    """The last value of each name and step, and MLflow's own account of the run."""
    with patch.dict(os.environ, {"MLFLOW_ALLOW_FILE_STORE": "true"}):
        from mlflow import MlflowClient

        client = MlflowClient((run / "mlflow").as_uri())
        found = client.get_run(json.loads((run / "trackers.json").read_text())["mlflow"])
        names = found.data.metrics
        metrics = [metric for name in names for metric in client.get_metric_history(found.info.run_id, name)]
    return {(metric.key, metric.step): metric.value for metric in metrics}, found


def in_wandb(run: Path) -> tuple[Scalars, dict[str, Any], set[str]]:
    """Scalars, the config, and the ids of all that W&B's offline files hold of the run."""
    scalars: Scalars = {}
    config: dict[str, Any] = {}
    names: set[str] = set()
    for file in sorted((run / "wandb").glob("offline-run-*/*.wandb")):
        for record in _records(file):
            if record.HasField("run"):
                names.add(record.run.run_id)
                config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            scalars |= {(name, row["step"]): value for name, value in row.items() if name[0] != "_" and name != "step"}
    return scalars, config, names


def _records(file: Path) -> list[Record]:
    """Records in parts, none of which crosses the end of a block."""
    content, place, parts, found = file.read_bytes(), HEADER, b"", []
    while place + HEADER <= len(content):
        if BLOCK - place % BLOCK < HEADER:
            place += BLOCK - place % BLOCK
            continue
        length, kind = struct.unpack_from("<HB", content, place + 4)
        parts += content[place + HEADER : place + HEADER + length]
        place += HEADER + length
        if kind in (WHOLE, LAST):
            found.append(Record.FromString(parts))
            parts = b""
    return found
