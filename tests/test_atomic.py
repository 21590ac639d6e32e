"""Files and folders appear whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from efficientclip.errors import UserError
from efficientclip.files.atomic import as_umask, put_in_place, recover, write_atomically, written_aside


def test_a_file_is_the_old_one_until_the_new_one_is_whole(tmp_path: Path) -> None:
    file = tmp_path / "file"
    write_atomically(file, b"old")
    with pytest.raises(ZeroDivisionError), written_aside(file) as aside:
        aside.write_bytes(b"ne")
        assert file.read_bytes() == b"old"
        print(1 / 0)
    assert file.read_bytes() == b"old" and list(tmp_path.iterdir()) == [file]
    write_atomically(file, b"new")
    assert file.read_bytes() == b"new" and list(tmp_path.iterdir()) == [file]
    with pytest.raises(UserError, match="absent/file: No such file or directory"):
        write_atomically(tmp_path / "absent" / "file", b"")


class Killed(BaseException):
    """Not caught on the way."""


@pytest.mark.parametrize("survived", [0, 1, 2])
def test_a_folder_is_the_old_one_or_the_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, survived: int) -> None:
    made, target, steps = tmp_path / "made", tmp_path / "target", 0

    def dying(real: Any) -> Any:
        def step(*given: Any) -> None:
            nonlocal steps
            if steps == survived:
                raise Killed
            steps += 1
            real(*given)

        return step

    for folder, content in ((made, "new"), (target, "old")):
        folder.mkdir()
        (folder / "file").write_text(content)
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", dying(os.replace))
        if survived < 2:
            with pytest.raises(Killed):
                put_in_place(made, target)
        else:
            put_in_place(made, target)
    recover(target)
    assert (target / "file").read_text() == ("old" if survived < 2 else "new")
    if survived < 2:
        put_in_place(made, target)
    assert (target / "file").read_text() == "new" and list(tmp_path.iterdir()) == [target]


def test_files_get_the_modes_of_new_ones(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for name in ("a", "deep/b"):
        (tmp_path / name).touch(0o600)
    before = os.umask(0o027)
    try:
        as_umask(tmp_path)
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)
    assert {(tmp_path / name).stat().st_mode & 0o777 for name in ("a", "deep/b")} == {0o640}
