"""What a run notes of its machine: an entry for each change, and what an undone part of the run noted is gone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from efficientclip import hardware
from efficientclip.errors import UserError
from efficientclip.hardware import in_words, read_hardware, record_hardware


def test_starts_on_another_machine_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "hardware.json"
    assert in_words(read_hardware(file)) == "not recorded"
    record_hardware(file, 0, 2)
    record_hardware(file, 5, 2)
    (first,) = read_hardware(file)
    assert (first["from_step"], first["world_size"]) == (0, 2)
    assert first["versions"]["torch"] == torch.__version__
    monkeypatch.setattr(hardware, "machine_name", lambda: "another")
    record_hardware(file, 8, 4)
    assert [entry["from_step"] for entry in read_hardware(file)] == [0, 8]
    assert in_words(read_hardware(file)).endswith("; then 4 ranks on another")
    record_hardware(file, 7, 8)
    assert [entry["from_step"] for entry in read_hardware(file)] == [0, 7]


@pytest.mark.parametrize("content", ["", "{", "7", '["a"]', '[{"from_step": "0", "world_size": 1, "machine": "m"}]'])
def test_a_broken_record_is_one_message(tmp_path: Path, content: str) -> None:
    (tmp_path / "hardware.json").write_text(content)
    with pytest.raises(UserError, match=rf"hardware {tmp_path}/hardware\.json: broken .*; restore it"):
        read_hardware(tmp_path / "hardware.json")
