from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from efficientclip.config import load_config, save_config
from efficientclip.errors import UserError

CONFIGS = sorted(Path(__file__).parent.parent.joinpath("configs").glob("*.yaml"))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"run": "runs/x", "training": {"pair_visits": 10, "batch_size": 2}}))
    return path


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_shipped_recipes_are_valid(path: Path) -> None:
    load_config(path)


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("optimizer.learning_rate=1", ["optimizer.learning_rate", "unknown key", "lr"]),
        ("optimiser.lr=1", ["optimiser", "did you mean `optimizer`?"]),
        ("optimizer.name=adam", ["optimizer.name", "'adamw'", "got 'adam'"]),
        ("optimizer.lr=fast", ["optimizer.lr", "valid number", "got 'fast'"]),
        ("training.batch_size=0", ["training.batch_size", "greater than or equal to 1"]),
        ("model.text_tower.pooling=cls", ["model.text_tower", "exactly one of `pretrained` and `architecture`"]),
        ("confidence.score=log-probability objective.contrastive_weight=0", ["contrastive loss's: set"]),
        ("batch_size", ["section.key=value"]),
    ],
)
def test_mistakes_name_key_and_remedy(file: Path, override: str, parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        load_config(file, override.split(" "))
    for part in parts:
        assert part in str(caught.value)


def test_missing_file_and_broken_yaml(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        load_config(tmp_path / "none.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("run: [")
    with pytest.raises(UserError, match="not readable as YAML"):
        load_config(broken)


def test_overrides_and_saved_config_round_trip(file: Path, tmp_path: Path) -> None:
    config = load_config(file, ["optimizer.lr=0.5", "data.validation={a: b}", "training.micro_batch_size=1"])
    assert config.optimizer.lr == 0.5 and config.data.validation == {"a": Path("b")}
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config
