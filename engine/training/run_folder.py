"""The folder of a run: whose it is, which process is at it, and what makes it whole in itself.

RUN/config.yaml       as it was run, paths absolute
    identity.json     what the run was trained on, by digest: a store that has moved is known again by it
    tokenizer/        the store's, so that texts can be encoded without the store
    digests.json      of these, and, once the run is finished, of all but checkpoints/ and model/, which have their own
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..config import Config, differing_keys, load_config, save_config
from ..data.store import TextStore
from ..errors import UserError, reading, writing
from ..files import digests
from ..files.atomic import as_umask, put_in_place, write_atomically
from ..files.lock import NAME as LOCK
from ..files.lock import held
from ..files.ownership import LOGS, Kind, claim, kind_of, mark
from .ranks import assembled, gathered, told

SEEN_SECONDS = 6
RESTORE = "restore it from a copy, or run the run's own `train` command again"
ENDED = ("metrics.jsonl", "confidence.parquet", "hardware.json")


@contextmanager
def owned(folder: Path, kind: Kind, doing: str) -> Iterator[None]:
    """`folder` claimed, marked and locked by rank 0, and seen by every rank.

    UserError when it is not ours to write, another process is at it, or a rank sees another folder at that path.
    """
    if dist.get_rank() > 0:
        _see(folder, told(""))
        dist.barrier()
        yield
        return
    claim(folder, kind, beside=LOGS)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        # A run of an earlier version is ours without one, and would be asked for digests that it has not.
        if kind_of(folder) is None:
            mark(folder, kind)
    with held(folder, doing):
        told((folder / LOCK).read_text(encoding="utf-8"))
        dist.barrier()
        yield


def _see(folder: Path, lock: str) -> None:
    """A network file system may show what rank 0 wrote some seconds later; opening the folder has it ask anew."""
    file, deadline = folder / LOCK, time.monotonic() + SEEN_SECONDS
    while True:
        with suppress(OSError):
            os.listdir(folder.parent)
            if file.read_text(encoding="utf-8") == lock:
                return
        if time.monotonic() > deadline:
            raise UserError(
                f"{folder}: rank {dist.get_rank()} on {socket.gethostname()} does not see the folder that rank 0 writes"
                " there; all ranks need the same one: put it on a file system that all nodes share"
            )
        time.sleep(0.2)


def proven(stores: Mapping[str, TextStore]) -> dict[str, str]:
    """The identity of each store, by name, once every rank knows that it is whole where it looks.

    A node's first rank reads; the others take its word for files that are the very same.
    """
    known: digests.Known = {}
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    if first:
        for store in stores.values():
            known |= store.prove()
    assembled()
    host = socket.gethostname()
    for other, theirs in gathered((host, known)):
        known |= theirs if other == host else {}
    if not first:
        for store in stores.values():
            store.prove(known)
    return {name: store.identity for name, store in stores.items()}


def describe(config: Config, identity: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase | Path | None) -> None:
    """Make the run whole in itself, or, where it holds checkpoints, UserError unless they are of this config and data.

    Rank 0 alone.
    """
    run = config.run
    begun = any((run / "checkpoints").glob("step-*"))
    if begun:
        _same_run(config, identity)
    elif (run / "model").exists():
        raise UserError(
            f"run {run}: is finished, and its checkpoints are gone, so it cannot go on; choose another run folder to"
            " begin anew"
        )
    with writing(run):
        if not begun:
            save_config(config, run / "config.yaml")
            write_atomically(run / "identity.json", json.dumps(identity, indent=1).encode())
        if not begun and tokenizer is not None:
            aside = run / ".tokenizer.partial"
            shutil.rmtree(aside, ignore_errors=True)
            if isinstance(tokenizer, Path):
                shutil.copytree(tokenizer, aside)
            else:
                tokenizer.save_pretrained(aside)
            put_in_place(aside, run / "tokenizer")
        # Those of a finished run no longer hold once it goes on.
        own = ["config.yaml", "identity.json", *(f"tokenizer/{name}" for name in digests.files_in(run / "tokenizer"))]
        digests.write_digests(run, digests.described(run, own) if not begun else _told_before(run, own))


def finished(config: Config, identity: Mapping[str, Any]) -> bool:
    """Whether the run has come to its end; UserError where it is of another config or other data."""
    run = config.run
    if not (run / digests.NAME).is_file() or not {ENDED[0], "config.yaml"} <= digests.read_digests(run).keys():
        return False
    _same_run(config, identity)
    return True


def _same_run(config: Config, identity: Mapping[str, Any]) -> None:
    run = config.run
    another = "choose another run folder, or remove this one"
    digests.check_written(run, "config.yaml", "identity.json", "tokenizer/*", remedy=f"restore it, or {another}")
    changed = differing_keys(load_config(run / "config.yaml", saved=True), config)
    if changed:
        raise UserError(
            f"run {run}: holds checkpoints of another config ({', '.join(changed[:5])} differ from its config.yaml);"
            f" {another}"
        )
    file = run / "identity.json"
    with reading("run", file, f"restore it, or {another}"):
        before = json.loads(file.read_text(encoding="utf-8"))
        moved = sorted(name for name in before.keys() | identity.keys() if before.get(name) != identity.get(name))
    if moved:
        raise UserError(
            f"run {run}: was trained on other data than this config names ({', '.join(moved)} differ from its"
            f" identity.json); name the same, wherever it lies now, or {another}"
        )


def run_config(folder: Path) -> Config:
    """The config that a run was made with; UserError when the folder is no run."""
    if not (folder / "config.yaml").is_file():
        raise UserError(f"run {folder}: no config.yaml; give the folder that `efficientclip train` wrote")
    digests.check_written(folder, "config.yaml", remedy=RESTORE)
    return load_config(folder / "config.yaml", saved=True)


def run_identity(folder: Path) -> dict[str, Any] | None:
    """What the run was trained on: identity.json; None for runs of earlier versions."""
    file = folder / "identity.json"
    digests.check_written(folder, file.name, remedy=RESTORE)
    if not file.is_file():
        return None
    with reading("run", file, RESTORE):
        identity: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        for key in ("store", "tower", "tokenizer"):
            if not isinstance(identity[key], str | None):
                raise ValueError(f"{key} is no text")
    return identity


def place_model(model: PreTrainedModel, folder: Path) -> None:
    """Write it with its digests to `folder`, whole or not at all, in the place of what is there."""
    aside = folder.with_name(f".{folder.name}.partial")
    with writing(folder):
        shutil.rmtree(aside, ignore_errors=True)
        model.save_pretrained(aside)
        as_umask(aside)
        digests.write_digests(aside)
    put_in_place(aside, folder)


def keep_foreign(old: Path, new: Path) -> None:
    """Copy what a user has put into the folder `old` to `new`, which takes its place."""
    if not (old / digests.NAME).is_file():
        return
    written = digests.read_digests(old)
    for name in digests.files_in(old):
        if name not in written and not (new / name).exists():
            (new / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(old / name, new / name)


def _told_before(run: Path, names: Iterable[str]) -> digests.Described:
    """What digests.json tells of `names` already."""
    told_of = digests.read_digests(run)
    return {name: told_of[name] for name in names if name in told_of}


def seal(run: Path, history: digests.Described) -> None:
    """Digests of a finished run's own files; those of the files in `history`, and of the start, were taken at once."""
    with writing(run):
        found = digests.read_digests(run) | {f"history/{name}": entry for name, entry in history.items()}
        rest = [name for name in ENDED if (run / name).is_file()]
        digests.write_digests(run, found | digests.described(run, rest))
