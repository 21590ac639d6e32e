"""What all tests share: a cache folder of their own, and trackers that ask no network."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

CACHE = Path(__file__).parent.parent / ".cache" / "tests"
# DeepSpeed imports MLflow wherever it is installed, and MLflow's import reports itself.
OFFLINE = {"WANDB_MODE": "offline", "WANDB_ERROR_REPORTING": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
WANDB_FOLDERS = ("CACHE", "CONFIG", "DATA")


def pytest_configure(config: pytest.Config) -> None:
    # Digests of stores that tests make would pile up in the user's own.
    os.environ["XDG_CACHE_HOME"] = str(CACHE)
    os.environ.update(OFFLINE, **{f"WANDB_{name}_DIR": str(CACHE / "wandb") for name in WANDB_FOLDERS})
    for name in ("WANDB_API_KEY", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"):
        os.environ.pop(name, None)
    if not hasattr(config, "workerinput"):
        shutil.rmtree(CACHE / "efficientclip", ignore_errors=True)
