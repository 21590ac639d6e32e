"""The recipes that ship: YAML run files and the DeepSpeed JSON that they name, inside an installed package, too."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path

from .errors import UserError, writing
from .files.atomic import write_atomically


def shipped() -> dict[str, Path]:
    """Files by the name that they are asked for by: a recipe's without its ending."""
    here = Path(__file__).resolve().parent
    # A checkout has them beside this package.
    folder = next(folder for folder in (here / "configs", here.parent / "configs") if folder.is_dir())
    files = (*sorted(folder.glob("*.yaml")), *sorted(folder.glob("*/*.json")))
    return {file.relative_to(folder).as_posix().removesuffix(".yaml"): file for file in files}


def described(file: Path) -> str:
    """A line on what a shipped file is: its first comment, or all that its JSON says."""
    text = file.read_text(encoding="utf-8")
    return text.partition("\n")[0].removeprefix("# ") if file.suffix == ".yaml" else " ".join(text.split())


def recipe(name: str) -> str:
    """What the shipped file of that name says; UserError naming the nearest."""
    known = shipped()
    wanted = name.removeprefix("configs/").removesuffix(".yaml")
    if wanted not in known:
        near = difflib.get_close_matches(wanted, known, n=1)
        hint = f"did you mean `{near[0]}`? " if near else ""
        raise UserError(f"recipe {name}: there is none; {hint}`efficientclip recipes` lists them")
    return known[wanted].read_text(encoding="utf-8")


def write_recipe(text: str, file: Path) -> None:
    """Write `text` to `file`, which must not be there yet."""
    if os.path.lexists(file):
        raise UserError(f"{file}: exists, and stays as it is; name another file")
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, text.encode())


def named_in(text: str) -> dict[Path, str]:
    """The shipped files that a recipe names by paths, which start at the working directory, and their own names."""
    known = shipped()
    return {Path(f"configs/{name}"): name for name in re.findall(r"^\w+: configs/(\S+)", text, re.M) if name in known}
