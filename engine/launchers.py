"""Which rank this process is: what `srun` or `mpirun` told it, put into the variables that torchrun and deepspeed set.

A launcher inside another wins: torchrun and deepspeed in a batch job see Slurm's variables, too, and so does mpirun. A
process that is one of several and cannot tell which would be a run of its own in the others' folder: it is refused.
"""

from __future__ import annotations

import os
import re
import socket
import zlib
from collections.abc import MutableMapping
from dataclasses import dataclass, replace

from .errors import UserError

Environment = MutableMapping[str, str]


@dataclass(frozen=True)
class Launcher:
    """Names of the variables in which a launcher tells its processes who they are."""

    name: str
    rank: str
    world: str
    local_rank: str
    local_size: str


TORCH = Launcher("torchrun or deepspeed", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
OPEN_MPI = Launcher(
    "mpirun",
    *(f"OMPI_COMM_WORLD_{what}" for what in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")),
)
PMI = Launcher("mpirun", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")
SLURM = Launcher("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE")
# Batch scripts and the shells of salloc are steps of their own, with numbers from here on.
SPECIAL_STEPS = 0xFFFFFFF0
# torch's own.
PORT = "29500"
# Below those that Linux gives to connections that ask for any.
PORTS = range(12000, 32000)


def adopt_rank(environment: Environment = os.environ) -> None:
    """RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_SIZE, MASTER_ADDR and MASTER_PORT as the launcher means them.

    None of them where this process is alone. UserError where it is one of several, but not told all that a rank needs.
    """
    launcher = _launcher(environment)
    if launcher is None:
        return
    world = _number(environment, launcher, launcher.world)
    if world < 1:
        raise UserError(f"{launcher.world}: {world} processes are none; {_remedy(launcher)}")
    rank = _number(environment, launcher, launcher.rank)
    if rank >= world:
        raise UserError(
            f"{launcher.rank}: {rank}, but {launcher.world} is {world}, so ranks are 0 to {world - 1};"
            f" {_remedy(launcher)}"
        )
    told = environment.get("WORLD_SIZE", str(world))
    if told != str(world) and launcher is not TORCH:
        raise UserError(
            f"WORLD_SIZE: {told}, but {launcher.name} started {world} processes ({launcher.world}); start as many"
            " processes as ranks are wanted, or unset WORLD_SIZE"
        )
    # Who is alone needs no address that others know: the next step finds a free port.
    told_all = launcher is TORCH and {"LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"} <= environment.keys()
    if world == 1 and not told_all:
        environment.pop("RANK", None)
        return
    local_rank = _number(environment, launcher, launcher.local_rank)
    # Slurm writes 4(x2),3: nodes are filled alike.
    size = re.match(r"\d+", environment.get(launcher.local_size, ""))
    address, port = _address(environment, launcher, world, size and size[0]), _port(environment, launcher)
    environment.update({"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(local_rank)})
    environment.update({"MASTER_ADDR": address, "MASTER_PORT": port})
    if size:
        environment.setdefault("LOCAL_SIZE", size[0])


def stand_alone(environment: Environment = os.environ) -> None:
    """The same variables for the only rank of its world."""
    environment.update({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"})
    environment["MASTER_PORT"] = str(free_port())


def free_port() -> int:
    """One of this machine that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def _launcher(environment: Environment) -> Launcher | None:
    if "RANK" in environment:
        return TORCH
    if environment.keys() & {OPEN_MPI.rank, OPEN_MPI.world}:
        return OPEN_MPI
    step = environment.get("SLURM_STEP_ID", environment.get("SLURM_STEPID", ""))
    stepped = step.isdecimal() and int(step) < SPECIAL_STEPS
    # Slurm's own PMI sets these without a local rank; mpirun's processes may carry the step that started its daemons.
    if environment.keys() & {PMI.rank, PMI.world} and (PMI.local_rank in environment or not stepped):
        return PMI
    if stepped:
        slurm = SLURM if SLURM.world in environment else replace(SLURM, world="SLURM_NTASKS")
        if environment.get(slurm.world, "1") != "1":
            return slurm
    return TORCH if environment.get("WORLD_SIZE", "1") != "1" else None


def _number(environment: Environment, launcher: Launcher, name: str) -> int:
    text = environment.get(name)
    if text is None:
        raise UserError(f"{name}: not set, but a process of several needs it; {_remedy(launcher)}")
    if not (text.isascii() and text.isdecimal()):
        raise UserError(f"{name}: {text!r} is no number from 0 on; {_remedy(launcher)}")
    return int(text)


def _remedy(launcher: Launcher) -> str:
    if launcher is TORCH:
        return (
            "start all ranks by deepspeed, torchrun, srun or mpirun, which set RANK, WORLD_SIZE and LOCAL_RANK, or"
            " unset these three for one process alone"
        )
    return f"let {launcher.name} start each rank itself, and hand its variables on into containers and scripts"


def _address(environment: Environment, launcher: Launcher, world: int, local_size: str | None) -> str:
    """Where rank 0 listens."""
    given = environment.get("MASTER_ADDR")
    if given:
        return given
    if launcher is TORCH:
        raise UserError(f"MASTER_ADDR: not set; give all ranks the address of rank 0's node, or {_remedy(launcher)}")
    if launcher.name != SLURM.name:
        if local_size == str(world):
            return "127.0.0.1"
        way = "-x MASTER_ADDR=HOST" if launcher is OPEN_MPI else "-genv MASTER_ADDR HOST"
        raise UserError(
            f"MASTER_ADDR: not set, and mpirun does not tell on which of several nodes rank 0 is; name it: mpirun"
            f" {way} …"
        )
    for name in ("SLURM_STEP_NODELIST", "SLURM_NODELIST", "SLURM_JOB_NODELIST"):
        if environment.get(name):
            return first_host(environment[name])
    raise UserError(f"MASTER_ADDR: not set, nor is SLURM_STEP_NODELIST; {_remedy(launcher)}")


def first_host(nodes: str) -> str:
    """The first of a list as Slurm writes it: `rack2-node[07-12,15],login` begins with rack2-node07."""
    first = re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", nodes)
    return first.split(",")[0]


def _port(environment: Environment, launcher: Launcher) -> str:
    """The same on all ranks, and seldom that of another job on the node."""
    given = environment.get("MASTER_PORT")
    if given:
        if not (given.isascii() and given.isdecimal() and 0 < int(given) < 65536):
            raise UserError(
                f"MASTER_PORT: {given!r} is no port; give a free one from 1024 to 65535, the same on all ranks"
            )
        return given
    if launcher is TORCH:
        raise UserError(f"MASTER_PORT: not set; give all ranks the same free port, or {_remedy(launcher)}")
    # Of mpirun's daemons on several nodes not all are of one step.
    names = {OPEN_MPI: ["PMIX_NAMESPACE"], PMI: ["SLURM_JOB_ID"]}.get(launcher, ["SLURM_JOB_ID", "SLURM_STEP_ID"])
    job = " ".join(environment.get(name, "") for name in names).strip()
    return str(PORTS[zlib.crc32(job.encode()) % len(PORTS)]) if job else PORT
