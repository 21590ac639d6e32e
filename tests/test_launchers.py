"""What each launcher sets, and what a rank makes of it."""

from __future__ import annotations

import pytest

from efficientclip.errors import UserError
from efficientclip.launchers import PORTS, adopt_rank, first_host

TORCH = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "host", "MASTER_PORT": "1234"}
# In a batch script Slurm says rank 0, but no step.
BATCH = {
    "SLURM_JOB_ID": "77",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODELIST": "n[1-2]",
}
STEP = BATCH | {"SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4"}
STEP |= {"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_STEP_TASKS_PER_NODE": "2(x2)"}
SALLOC = BATCH | {"SLURM_STEP_ID": str(0xFFFFFFFA), "SLURM_STEP_NUM_TASKS": "1"}
OPEN_MPI = {f"OMPI_COMM_WORLD_{name}": "2" for name in ("SIZE", "LOCAL_SIZE")}
OPEN_MPI |= {f"OMPI_COMM_WORLD_{name}": "1" for name in ("RANK", "LOCAL_RANK")} | {"PMIX_NAMESPACE": "1665794049"}
FAR = OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}
PMI = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
HERE = "127.0.0.1"


def without(environment: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name not in names}


@pytest.mark.parametrize(
    ("environment", "rank", "address"),
    [
        (TORCH, (1, 2, 1), "host"),
        (STEP | TORCH, (1, 2, 1), "host"),
        (OPEN_MPI | TORCH, (1, 2, 1), "host"),
        (STEP, (3, 4, 1), "n1"),
        (STEP | {"MASTER_ADDR": "given"}, (3, 4, 1), "given"),
        (STEP | {"WORLD_SIZE": "4"}, (3, 4, 1), "n1"),
        (without(STEP, "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST"), (3, 4, 1), "n1"),
        (STEP | {"PMI_RANK": "3", "PMI_SIZE": "4"}, (3, 4, 1), "n1"),
        (OPEN_MPI, (1, 2, 1), HERE),
        (STEP | OPEN_MPI, (1, 2, 1), HERE),
        (BATCH | OPEN_MPI, (1, 2, 1), HERE),
        (FAR | {"MASTER_ADDR": "given"}, (1, 2, 0), "given"),
        (PMI, (1, 2, 1), HERE),
        (STEP | PMI, (1, 2, 1), HERE),
    ],
    ids=[
        "torch", "torch in srun", "torch in mpirun", "srun", "srun, address given", "srun, world given", "old Slurm",
        "srun --mpi=pmi2", "mpirun", "mpirun under srun's daemons", "mpirun in a batch", "mpirun, address given",
        "mpiexec", "mpiexec under srun's daemons",
    ],
)  # fmt: skip
def test_a_rank_of_several(environment: dict[str, str], rank: tuple[int, int, int], address: str) -> None:
    found = dict(environment)
    adopt_rank(found)
    assert tuple(int(found[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")) == rank
    assert found["MASTER_ADDR"] == address
    assert found["MASTER_PORT"] == environment.get("MASTER_PORT", found["MASTER_PORT"])
    again = dict(found)
    adopt_rank(again)
    assert again == found


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"WORLD_SIZE": "1"},
        BATCH,
        SALLOC,
        STEP | {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "1"},
        {"PMI_RANK": "0", "PMI_SIZE": "1"},
        {"RANK": "0", "WORLD_SIZE": "1"},
    ],
    ids=["none", "world of one", "sbatch", "salloc", "srun -n 1", "srun -n 1 --mpi=pmi2", "pod"],
)
def test_a_process_alone(environment: dict[str, str]) -> None:
    found = dict(environment)
    adopt_rank(found)
    assert found == without(environment, "RANK")


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "2"}, "RANK: not set.*deepspeed, torchrun, srun or mpirun.*or unset"),
        ({"RANK": "0"}, "WORLD_SIZE: not set"),
        (without(TORCH, "LOCAL_RANK"), "LOCAL_RANK: not set"),
        (without(TORCH, "MASTER_ADDR"), "MASTER_ADDR: not set; give all ranks the address of rank 0's node"),
        (without(TORCH, "MASTER_PORT"), "MASTER_PORT: not set; give all ranks the same free port"),
        (TORCH | {"RANK": "2"}, "RANK: 2, but WORLD_SIZE is 2, so ranks are 0 to 1"),
        (TORCH | {"RANK": "-1"}, "RANK: '-1' is no number"),
        (TORCH | {"WORLD_SIZE": "two"}, "WORLD_SIZE: 'two' is no number"),
        (TORCH | {"WORLD_SIZE": "0"}, "WORLD_SIZE: 0 processes are none"),
        (TORCH | {"LOCAL_RANK": ""}, "LOCAL_RANK: '' is no number"),
        (TORCH | {"MASTER_PORT": "99999"}, "MASTER_PORT: '99999' is no port; give a free one"),
        (without(STEP, "SLURM_PROCID"), "SLURM_PROCID: not set.*let srun start each rank itself"),
        (STEP | {"SLURM_STEP_NUM_TASKS": "x"}, "SLURM_STEP_NUM_TASKS: 'x' is no number"),
        (STEP | {"WORLD_SIZE": "8"}, "WORLD_SIZE: 8, but srun started 4 processes .*unset WORLD_SIZE"),
        (without(OPEN_MPI, "OMPI_COMM_WORLD_RANK"), "OMPI_COMM_WORLD_RANK: not set.*let mpirun start"),
        (FAR, "MASTER_ADDR: not set, and mpirun does not tell.*mpirun -x MASTER_ADDR=HOST"),
        (PMI | {"MPI_LOCALNRANKS": "1"}, "MASTER_ADDR: not set.*mpirun -genv MASTER_ADDR HOST"),
        (without(PMI, "MPI_LOCALRANKID"), "MPI_LOCALRANKID: not set"),
    ],
)
def test_one_of_several_that_is_not_told_enough(environment: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        adopt_rank(dict(environment))


def test_ranks_of_a_job_share_a_port_that_other_jobs_have_not() -> None:
    def port(environment: dict[str, str]) -> int:
        found = dict(environment)
        adopt_rank(found)
        return int(found["MASTER_PORT"])

    jobs = [
        STEP,
        STEP | {"SLURM_JOB_ID": "78"},
        STEP | {"SLURM_STEP_ID": "1"},
        OPEN_MPI,
        OPEN_MPI | {"PMIX_NAMESPACE": "a"},
    ]
    assert len({port(job) for job in jobs}) == len(jobs) and all(port(job) in PORTS for job in jobs)
    assert port(STEP) == port(STEP | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"})


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node7", "node7"),
        ("a,b", "a"),
        ("node[07-12,15],login", "node07"),
        ("rack[2,4]-node[1-3]", "rack2-node1"),
        ("n[3,5]-ib", "n3-ib"),
    ],
)
def test_the_first_host_of_slurms_lists(nodes: str, first: str) -> None:
    assert first_host(nodes) == first
