"""The ranks of a run agree before they start, follow rank 0's word, and end together when one of them cannot go on.

Beside the process group they share a few words in torch's TCPStore: the first error of any rank, which all others find
within a second, whatever collective they wait in.
"""

from __future__ import annotations

import os
import socket
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import timedelta
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist

from .. import stopping
from ..errors import UserError, message_of, short, tell
from ..stopping import rank_of_environment

T = TypeVar("T")
FIRST, HEARD, ALIVE = "efficientclip/first error", "efficientclip/heard", "efficientclip/alive"
POLL_SECONDS = 0.5
# For ranks that still import what this one has imported.
JOIN_SECONDS = 60
HEARD_SECONDS = 5
SIGNAL_SECONDS = 2
LOST_SECONDS = 3
# Of no sign from a rank that others wait for.
SILENT_SECONDS = 30
ANOTHER_PORT = "give all ranks another MASTER_PORT (deepspeed, torchrun: --master_port)"
LOST = (
    "connection closed by", "connection was likely closed", "connection reset", "connection refused", "broken pipe",
    "socket closed", "remote process exited", "ncclremoteerror",
)  # fmt: skip


class _Words:
    """This rank's connection to the words; none where it is alone."""

    def __init__(self) -> None:
        self.store: dist.TCPStore | None = None
        self.joining = threading.Lock()
        self.meetings = 0
        self.ended = threading.Event()


_words = _Words()


def world_of_environment() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def together(work: Callable[[], int]) -> int:
    """Run `work` on this rank and return the exit code of all: its own, or 2 (a user's error), or 1 (a defect).

    The first error of any rank is printed once and ends all others within seconds.
    """
    _words.ended.clear()
    try:
        if world_of_environment() > 1:
            stopping.before_leaving(_word_of_signal)
            threading.Thread(target=_listen, name="ranks", daemon=True).start()
        code = work()
    except Exception as error:
        message, patience = message_of(error) or _network(error), HEARD_SECONDS
        if message is None and lost_peer(error):
            if stopping.requested() is not None:
                stopping.leave_stopped()
            # Whoever ended the connection may say why, which ends this process.
            time.sleep(LOST_SECONDS)
            message = f"rank {rank_of_environment()}: another rank is gone ({short(error)}); {stopping.GOES_ON}"
            # The one that is gone hears nothing.
            patience = SIGNAL_SECONDS
        code = 1 if message is None else 2
        # What the listening thread would find now is this rank's own word.
        _words.ended.set()
        first = _is_first(code, message or str(error))
        if first:
            tell(traceback.format_exc() if message is None else f"error: {message}")
        _wait_until_heard(heard=not first, seconds=patience)
    _words.ended.set()
    return code


def told(word: T) -> T:
    """Rank 0's `word`, on all ranks."""
    words = [word]
    dist.broadcast_object_list(words)
    return words[0]


def gathered(word: T) -> list[T]:
    """The words of all ranks, on all ranks."""
    words: list[T | None] = [None] * dist.get_world_size()
    dist.all_gather_object(words, word)
    return words  # type: ignore[return-value]


def all_rows(rows: torch.Tensor) -> torch.Tensor:
    """The rows of all ranks, of which each has as many, in rank order."""
    if dist.get_world_size() == 1:
        return rows
    gathered_W = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered_W, rows.contiguous())
    return torch.cat(gathered_W)


def agree(found: Mapping[str, str], remedies: Mapping[str, str]) -> None:
    """UserError on all ranks, naming what differs and where, unless all found the same. `found`: name to digest."""
    everyone = gathered((socket.gethostname(), dict(found)))
    (first_host, first), *others = everyone
    for rank, (host, theirs) in enumerate(others, 1):
        for name in sorted(first.keys() | theirs.keys()):
            if first.get(name) != theirs.get(name):
                raise UserError(
                    f"{name}: rank {rank} on {host} has another than rank 0 on {first_host};"
                    f" {remedies.get(name, 'give all ranks the same')}"
                )


def join() -> dist.TCPStore | None:
    """This rank's connection to the words, once it is known to be that of its own run; None where it is alone."""
    if world_of_environment() == 1:
        return None
    with _words.joining:
        if _words.store is None:
            agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
            store = dist.TCPStore(
                os.environ["MASTER_ADDR"],
                int(os.environ["MASTER_PORT"]),
                is_master=rank_of_environment() == 0 and not agent,
                timeout=timedelta(seconds=JOIN_SECONDS),
                wait_for_workers=False,
                # torch's own store of the process group is the same server.
                multi_tenant=True,
            )
            _take_seat(store)
            _words.store = store
        return _words.store


def words(name: str) -> dist.Store | None:
    """The words of this run's ranks about `name`, each of which any rank may set; None where this rank is alone."""
    store = join()
    return None if store is None else dist.PrefixStore(_key(f"efficientclip/{name}"), store)


def signs_of(rank: int) -> int:
    """How many signs of life another rank of this run has given, two a second."""
    store = join()
    return 0 if store is None else store.add(_key(f"{ALIVE} {rank}"), 0)


def take_device() -> None:
    """The CUDA device of this rank's number on its node; where a launcher shows each its own alone, that one."""
    if not torch.cuda.is_available():
        return
    rank, devices = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if devices == 1:
        # DeepSpeed reads it, too.
        rank, os.environ["LOCAL_RANK"] = 0, "0"
    if rank >= devices:
        raise UserError(
            f"LOCAL_RANK: {rank}, but this node shows {devices} devices; start a rank a device at most"
            " (CUDA_VISIBLE_DEVICES says which are shown)"
        )
    torch.cuda.set_device(rank)


def _take_seat(store: dist.TCPStore) -> None:
    """End this process, without a word to the others, where another run keeps its words at the same address.

    Rank 0 of this run could not listen there, and an error or a signal told here would end that other run.
    """
    rank, world = rank_of_environment(), str(world_of_environment())
    mine = f"{socket.gethostname()} {os.getpid()} {time.time_ns()}"
    if store.compare_set(_key("efficientclip/ranks"), "", world).decode() == world and (
        store.compare_set(_key(f"efficientclip/rank {rank}"), "", mine).decode() == mine
    ):
        return
    # Rank 0 tells as much, and its end is this one's under most launchers.
    time.sleep(LOST_SECONDS)
    stopping.leave(2, f"error: {_place()}: in use by another run; {ANOTHER_PORT}" if rank <= 1 else None)


def _key(name: str) -> str:
    return f"{name}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"


def _listen() -> None:
    """End this process when another rank has an error, or when rank 0, which keeps the words, is gone."""
    failed: list[Exception] = []
    joining = threading.Thread(target=_try_to_join, args=(failed,), daemon=True)
    joining.start()
    # A program that takes the connection and says nothing keeps torch waiting for ever.
    joining.join(JOIN_SECONDS + POLL_SECONDS)
    store = _words.store
    if store is None:
        return _leave_alone(failed[0] if failed else dist.DistNetworkError("timed out"))
    while not _words.ended.wait(POLL_SECONDS):
        try:
            store.add(_key(f"{ALIVE} {rank_of_environment()}"), 1)
            found = store.check([_key(FIRST)])
        except Exception:
            _rank_0_is_gone()
            return
        if found and not _words.ended.is_set():
            _leave_with(store)


def _try_to_join(failed: list[Exception]) -> None:
    try:
        join()
    except Exception as error:
        failed.append(error)


def _leave_alone(error: Exception) -> None:
    """End this process, which does not find the others; rank 0 knows its own reason, and one of the others tells."""
    if _words.ended.wait(LOST_SECONDS):
        return
    if stopping.requested() is not None:
        stopping.leave_stopped()
    stopping.leave(2, f"error: {_network(error) or short(error)}" if rank_of_environment() <= 1 else None)


def _leave_with(store: dist.TCPStore) -> NoReturn:
    code = 2
    with suppress(Exception):
        code = int(store.get(_key(FIRST)).split()[0])
    _wait_until_heard(heard=True)
    if code > 128:
        stopping.leave_stopped(code - 128)
    stopping.leave(code)


def _rank_0_is_gone() -> None:
    # At the end of a run rank 0 may leave first.
    if _words.ended.wait(LOST_SECONDS):
        return
    if stopping.requested() is not None:
        stopping.leave_stopped()
    stopping.leave(2, f"error: rank 0 is gone; {stopping.GOES_ON}" if rank_of_environment() == 1 else None)


def _is_first(code: int, why: str) -> bool:
    """Whether this rank is the first to end before its time, with exit code `code`; it is where nobody can be asked."""
    try:
        store = join()
        if store is None:
            return True
        mine = f"{code} {rank_of_environment()} {os.getpid()} {why[:500]}"
        return bool(store.compare_set(_key(FIRST), "", mine).decode(errors="replace") == mine)
    except Exception:
        return True


def _word_of_signal(code: int) -> None:
    _is_first(code, "a signal")
    _wait_until_heard(seconds=SIGNAL_SECONDS)


def _wait_until_heard(*, heard: bool = False, seconds: float = HEARD_SECONDS) -> None:
    """Note that this rank has `heard` the first word. Rank 0 keeps the words: it waits until all others have."""
    with suppress(Exception):
        if _words.store is None:
            return
        if heard:
            _words.store.add(_key(HEARD), 1)
        deadline = time.monotonic() + seconds
        while rank_of_environment() == 0 and time.monotonic() < deadline:
            if _words.store.add(_key(HEARD), 0) >= world_of_environment() - 1:
                return
            time.sleep(POLL_SECONDS / 5)


def assembled() -> None:
    """Wait, however long, until all ranks have come here: a collective would give up after ten minutes.

    For work of some ranks that takes long; the others end by the listening thread where it fails, and rank 0 ends them
    where one of them gives no sign for SILENT_SECONDS.
    """
    store = join()
    if store is None:
        return
    _words.meetings += 1
    key = _key(f"efficientclip/meeting {_words.meetings}")
    store.add(key, 1)
    signs: dict[int, tuple[int, float]] = {}
    while store.add(key, 0) < world_of_environment():
        if rank_of_environment() == 0:
            _require_signs(signs)
        time.sleep(POLL_SECONDS / 5)
    # Rank 0, which keeps the words, goes on when all have seen that all are here.
    dist.barrier()


def _require_signs(signs: dict[int, tuple[int, float]]) -> None:
    """UserError where a rank's count stands still: its launcher may not tell that it was killed. `signs` keeps the last
    count of each rank, and since when."""
    now = time.monotonic()
    for rank in range(1, world_of_environment()):
        count, since = signs.get(rank, (-1, now))
        # Asking all ranks at each poll would be the work of many ranks' store.
        if rank in signs and now - since < SILENT_SECONDS / 10:
            continue
        found = signs_of(rank)
        if found != count:
            signs[rank] = found, now
        elif now - since > SILENT_SECONDS:
            raise UserError(f"rank {rank}: gave no sign for {SILENT_SECONDS} seconds; {stopping.GOES_ON}")


def _network(error: Exception) -> str | None:
    """What to do where the ranks cannot find each other at all."""
    text = str(error).lower()
    if not isinstance(error, RuntimeError):
        return None
    if "eaddrinuse" in text or "address already in use" in text:
        return f"{_place()}: in use by another process; {ANOTHER_PORT}"
    if isinstance(error, dist.DistNetworkError) and ("timed out" in text or "failed to connect" in text):
        return (
            f"rank 0 cannot be reached at {_place()} ({short(error)}); is it running, does MASTER_ADDR name its host,"
            " and does no other program use MASTER_PORT?"
        )
    return None


def _place() -> str:
    return f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"


def lost_peer(error: BaseException) -> bool:
    """Whether `error` is that of a connection which another rank's end has closed."""
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(words in text for words in LOST)
