"""What all tests share: a cache folder of their own, trackers that ask no network, and `make check`'s minute."""

from __future__ import annotations

import os
import shutil
import time
from collections import Counter
from pathlib import Path

import pytest

CACHE = Path(__file__).parent.parent / ".cache" / "tests"
# Of packages that few users have, and what tests start does without.
ABSENT = str(Path(__file__).parent / "absent")
OFFLINE = {"WANDB_MODE": "offline", "WANDB_ERROR_REPORTING": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
WANDB_FOLDERS = ("CACHE", "CONFIG", "DATA")
# In pytest's cache.
DURATIONS = "efficientclip/durations"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--until", type=float, metavar="TIME", help="skip each test that would end after this Unix time")


class Durations:
    """What tests took when they were last run, and which would still end before `--until`."""

    def __init__(self, config: pytest.Config, cache: pytest.Cache) -> None:
        self.cache, self.until = cache, config.getoption("--until")
        self.known: dict[str, float] = cache.get(DURATIONS, {})
        self.took = Counter[str]()

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        if self.until is not None and time.time() + self.known.get(item.nodeid, 0) > self.until:
            pytest.skip("would not end in time: `make test` runs it")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.took[report.nodeid] += 0 if report.skipped else report.duration

    def pytest_sessionfinish(self) -> None:
        self.cache.set(DURATIONS, self.known | {name: took for name, took in self.took.items() if took})


@pytest.fixture(scope="session", autouse=True)
def processes_without() -> None:
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [ABSENT, os.environ.get("PYTHONPATH")]))


def pytest_configure(config: pytest.Config) -> None:
    # Digests of stores that tests make would pile up in the user's own.
    os.environ["XDG_CACHE_HOME"] = str(CACHE)
    os.environ.update(OFFLINE, **{f"WANDB_{name}_DIR": str(CACHE / "wandb") for name in WANDB_FOLDERS})
    for name in ("WANDB_API_KEY", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"):
        os.environ.pop(name, None)
    if not hasattr(config, "workerinput"):
        shutil.rmtree(CACHE / "efficientclip", ignore_errors=True)
        if (cache := getattr(config, "cache", None)) is not None:
            config.pluginmanager.register(Durations(config, cache))
