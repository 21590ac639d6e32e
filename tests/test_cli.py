from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from efficientclip.cli import main
from efficientclip.errors import reported
from tests import tiny


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "{folder}/none.yaml"], "none.yaml: no such file"),
        (["train", "{config}", "optimiser.lr=1"], "did you mean `optimizer`?"),
        (["train", "{config}", "fast"], "section.key=value"),
        (["prepare", "{folder}/none.tar", "{folder}/s", "--config", "{config}"], "none.tar: no such file"),
        (["prepare", "a.tar", "{folder}/s", "--config", "{config}", "optimiser.lr=1"], "did you mean `optimizer`?"),
        (["prepare", "a.tar", "{folder}/s", "optimiser.lr=1", "--config", "{config}"], "did you mean `optimizer`?"),
        (["demo-data", "{folder}", "--config", "{folder}/none.yaml"], "none.yaml: no such file"),
        (["evaluate", "{folder}/none", "{folder}/a.tar"], "none: no config.yaml"),
        (["evaluate", "{folder}", "a.tar", "--json", "{folder}/none/x.json"], "none does not exist"),
        (["evaluate", "{folder}"], "either DATA (pictures) or --text-train"),
        (["evaluate", "{folder}", "a.tar", "--text-train", "a.csv"], "either DATA (pictures) or --text-train"),
        (["evaluate", "{folder}", "a.tar", "--text-test", "a.csv"], "--text-test: needs --text-train"),
        (["evaluate", "{folder}", "--text-train", "a.csv", "--classes", "b"], "need DATA, not --text-train"),
        (["search", "{folder}/none", "猫"], "none: no config.yaml"),
        (["search", "{folder}", "猫", "--top", "0"], "at least one picture"),
        (["report", "{folder}/none"], "none: no config.yaml"),
        (["train", "{folder}"], "no such file"),
        (["prepare", "{config}/x.txt", "{folder}/s", "--config", "{config}"], "no such file"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    names = {"folder": str(tmp_path), "config": str(tiny.config(tmp_path))}
    (tmp_path / "config.yaml").rename(tmp_path / "recipe.yaml")
    names["config"] = str(tmp_path / "recipe.yaml")
    assert main([argument.format(**names) for argument in arguments]) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.count("error:") == 1
    assert "Traceback" not in printed.err and printed.out == ""


@pytest.mark.parametrize("arguments", [[], ["fly"], ["evaluate", "a", "b", "c=d"], ["train", "a.yaml", "--fast"]])
def test_wrong_usage_exits_with_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 2


def test_a_folder_in_place_of_a_file_is_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert reported(lambda: tmp_path.write_text("")) == 2  # type: ignore[arg-type,return-value]
    assert f"error: {tmp_path}: Is a directory: a file is wanted here" in capsys.readouterr().err


def test_train_gets_the_config_with_its_overrides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setitem(sys.modules, "efficientclip.train", SimpleNamespace(main=seen.append))
    config = str(tiny.config(tmp_path))
    assert main(["train", config, "optimizer.lr=0.5"]) == 0
    assert seen == [[config, "optimizer.lr=0.5"]]


def test_features_is_another_name_of_prepare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    stage = SimpleNamespace(prepare=lambda *given, **_: seen.append(given) or {})
    monkeypatch.setitem(sys.modules, "efficientclip.prepare.build", stage)
    config = str(tiny.config(tmp_path))
    for name in ("prepare", "features"):
        assert main([name, "a.csv", "s", "--images", "d", "--config", config, "seed=3"]) == 0
    assert [(*given[:2], given[2].seed, given[3]) for given in seen] == [(Path("a.csv"), Path("s"), 3, Path("d"))] * 2


WAITING = """
import signal, sys, time
from efficientclip import cli

# Under nohup the tests, and so this, would ignore it.
signal.signal(signal.SIGHUP, signal.SIG_DFL)

def wait(given):
    print("at it", flush=True)
    time.sleep(60)

cli._prepare = wait
sys.exit(cli.main())
"""


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_any_command_with_its_code(signum: signal.Signals) -> None:
    command = [sys.executable, "-c", WAITING, "prepare", "a.tar", "s", "--config", "c"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "at it\n"
        process.send_signal(signum)
        _, told = process.communicate(timeout=5)
    assert process.returncode == 128 + signum
    assert told == f"stopped by {signum.name}; the same command goes on\n"


def test_help_and_version_load_no_torch() -> None:
    code = "import sys, atexit; from efficientclip.cli import main\n"
    code += "atexit.register(lambda: print(sorted({'torch', 'transformers'} & sys.modules.keys())))\n"
    for option, expected in (("--help", "evaluate"), ("--version", "efficientclip 0")):
        command = [sys.executable, "-c", f"{code}main([{option!r}])"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert expected in done.stdout and done.stdout.endswith("[]\n")
