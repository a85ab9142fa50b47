"""A process's place, from every launcher's variables; and what is said when they are half set."""

from pathlib import Path

import pytest

from lmx.errors import UserError
from lmx.sharding.launchers import Cluster, Place, find_place, local_device_ids

SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:34911",
}
KUBERNETES = {"JOB_COMPLETION_INDEX": "1", "LMX_PROCESSES": "2"}
POD = "lmx-1.lmx.default.svc.cluster.local"


@pytest.mark.parametrize(
    ("environ", "place"),
    [
        ({}, None),
        ({"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, None),  # a batch script of one task
        ({**SLURM, "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, None),
        ({**SLURM, "LMX_PROCESSES": "1"}, None),
        (SLURM, Place("Slurm", None, 4, 3, (1, 2))),
        ({**SLURM, "LMX_COORDINATOR": "node9:1"}, Place("Slurm", "node9:1", 4, 3, (1, 2))),
        (OPEN_MPI, Place("Open MPI", None, 2, 1, (1, 2))),
        ({**SLURM, **OPEN_MPI}, Place("Open MPI", None, 2, 1, (1, 2))),  # mpirun in an allocation of Slurm
        (KUBERNETES, Place("Kubernetes", "lmx-0.lmx.default.svc.cluster.local:8476", 2, 1)),
        ({**KUBERNETES, "LMX_COORDINATOR": "lmx-0.lmx:9"}, Place("Kubernetes", "lmx-0.lmx:9", 2, 1)),
        (
            {"LMX_COORDINATOR": "a:1", "LMX_PROCESSES": "2", "LMX_PROCESS": "0", **SLURM},
            Place("the options", "a:1", 2, 0),
        ),
    ],
)
def test_a_place_is_found(environ: dict[str, str], place: Place | None) -> None:
    assert find_place(Cluster(), environ, POD) == place


def test_options_come_before_the_environment() -> None:
    place = find_place(Cluster("b:2", 3, 2), {"LMX_COORDINATOR": "a:1", **SLURM}, POD)
    assert place == Place("the options", "b:2", 3, 2)


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2"}, "SLURM_PROCID, SLURM_STEP_NODELIST, SLURM_LOCALID is missing"),
        ({k: v for k, v in SLURM.items() if k != "SLURM_NTASKS"}, "SLURM_NTASKS is missing; start the command with sr"),
        ({k: v for k, v in OPEN_MPI.items() if "uri" not in k}, "OMPI_MCA_orte_hnp_uri is missing"),
        ({"JOB_COMPLETION_INDEX": "0"}, "LMX_PROCESSES, LMX_COORDINATOR is missing"),
        ({"LMX_COORDINATOR": "a:1"}, "LMX_COORDINATOR=a:1 is there, LMX_PROCESSES, LMX_PROCESS is missing"),
        ({"LMX_PROCESSES": "2"}, "LMX_PROCESSES=2 is there, LMX_COORDINATOR, LMX_PROCESS is missing"),
        ({"LMX_COORDINATOR": "a", "LMX_PROCESSES": "2", "LMX_PROCESS": "0"}, "expected HOST:PORT"),
        (
            {"LMX_COORDINATOR": "a:1", "LMX_PROCESSES": "2", "LMX_PROCESS": "2"},
            "process 2 of 2; expected a number from 0",
        ),
        ({"LMX_PROCESSES": "two"}, "LMX_PROCESSES is 'two', expected a number"),
    ],
)
def test_what_is_half_set_is_named_in_one_sentence(environ: dict[str, str], words: str) -> None:
    with pytest.raises(UserError, match=r".") as caught:
        find_place(Cluster(), environ, "host")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("local", "environ", "gpus", "expected"),
    [
        (None, {}, 8, []),
        ((0, 1), {}, 8, []),  # one process on each node drives all eight
        ((3, 8), {}, 8, [3]),
        ((1, 2), {}, 8, [4, 5, 6, 7]),
        ((1, 2), {"CUDA_VISIBLE_DEVICES": "5"}, 8, []),  # srun --gpus-per-task has chosen
        ((1, 2), {}, 0, [1]),  # no GPUs to see: as JAX has it
        ((1, 2), {"JAX_LOCAL_DEVICE_IDS": "0"}, 8, None),
    ],
)
def test_gpus_are_divided_among_a_hosts_processes(
    local: tuple[int, int] | None, environ: dict[str, str], gpus: int, expected: list[int] | None, tmp_path: Path
) -> None:
    for name in ["nvidiactl", "nvidia-uvm", *(f"nvidia{i}" for i in range(gpus))]:
        (tmp_path / name).touch()
    assert local_device_ids(Place("Slurm", local=local), environ, tmp_path) == expected


def test_gpus_that_cannot_be_divided_are_an_error(tmp_path: Path) -> None:
    for index in range(8):
        (tmp_path / f"nvidia{index}").touch()
    with pytest.raises(UserError, match="3 processes, which do not divide its 8 GPUs"):
        local_device_ids(Place("Slurm", local=(0, 3)), {}, tmp_path)
