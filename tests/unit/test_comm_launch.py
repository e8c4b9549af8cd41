"""How a process learns from its environment who it is; partial and contradictory environments are errors."""

from __future__ import annotations

import pytest

from deepcore.comm.launch import LaunchInfo, detect, first_host
from deepcore.errors import CommError

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "1234",
}
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
}
SRUN = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "6",
    "SLURM_LOCALID": "2",
    "SLURM_NODEID": "1",
    "SLURM_NTASKS": "16",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_TASKS_PER_NODE": "4,3",
    "SLURM_STEP_NODELIST": "gpu[003-004]",
}


def without(env, *names):
    return {name: value for name, value in env.items() if name not in names}


def test_torchrun():
    assert detect(TORCHRUN) == LaunchInfo("torchrun", 5, 8, 1, 4, "node0", 1234)
    agent = TORCHRUN | {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "2"}
    assert detect(agent) == LaunchInfo("torchrun", 5, 8, 1, 4, "node0", 1234, agent_store=True, attempt=2)


def test_variables_set_by_hand_on_one_machine_need_no_local_rank():
    by_hand = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
    assert detect(by_hand, 4000) == LaunchInfo("torchrun", 1, 2, 1, 2, "localhost", 4000)


def test_openmpi():
    assert detect(OPENMPI) == LaunchInfo("openmpi", 3, 4, 3, 4, "127.0.0.1", 29500)
    two_nodes = OPENMPI | {"OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
    with pytest.raises(CommError, match="mpirun -x MASTER_ADDR"):
        detect(two_nodes)
    addressed = two_nodes | {"MASTER_ADDR": "head", "MASTER_PORT": "5"}
    assert detect(addressed) == LaunchInfo("openmpi", 3, 4, 1, 2, "head", 5)


def test_slurm():
    assert detect(SRUN) == LaunchInfo("slurm", 6, 7, 2, 3, "gpu003", 29500)
    assert detect(SRUN | {"MASTER_ADDR": "head"}).address == "head"
    assert detect(without(SRUN, "SLURM_STEP_NUM_TASKS") | {"SLURM_NTASKS": "7"}).size == 7
    one_node = SRUN | {"SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_TASKS_PER_NODE": "7", "SLURM_NODEID": "0"}
    assert detect(one_node) == LaunchInfo("slurm", 6, 7, 2, 7, "127.0.0.1", 29500)


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("gpu[003-007,9],cpu1", "gpu003"),
        ("gpu7", "gpu7"),
        ("a1,b[2-3]", "a1"),
        ("rack[1-2]-n4,x", "rack1-n4"),
        ("n[5,8]", "n5"),
        ("", ""),
    ],
)
def test_first_host_of_a_node_list(nodelist, host):
    assert first_host(nodelist) == host


def test_allocation_shells_are_one_process_with_a_hint():
    shell = {"SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "8"}
    info = detect(shell)
    assert (info.launcher, info.size) == ("solo", 1)
    assert "8 tasks" in info.hint
    assert detect(shell | {"SLURM_NTASKS": "1"}).hint == ""


@pytest.mark.parametrize(
    "env",
    [
        {},
        {"PATH": "/bin", "RANK": "", "WORLD_SIZE": ""},
        {"MASTER_ADDR": "somewhere", "MASTER_PORT": "29500"},
        {"WORLD_SIZE": "1"},
        {"RANK": "0", "WORLD_SIZE": "1"},
        {"LOCAL_RANK": "0"},
        {name: "1" if name.endswith("SIZE") else "0" for name in OPENMPI},
        SRUN | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
    ],
)
def test_alone(env):
    assert detect(env) == LaunchInfo("solo", 0, 1, 0, 1)


def test_a_launched_world_of_one_is_a_real_one():
    env = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    assert detect(env).launcher == "torchrun"


def test_precedence():
    assert detect(TORCHRUN | OPENMPI | SRUN).launcher == "torchrun"
    assert detect(OPENMPI | SRUN).launcher == "openmpi"


@pytest.mark.parametrize(
    ("env", "names"),
    [
        (without(TORCHRUN, "WORLD_SIZE"), "WORLD_SIZE is missing"),
        (without(TORCHRUN, "RANK"), "RANK is missing"),
        (without(TORCHRUN, "MASTER_ADDR"), "MASTER_ADDR is missing"),
        (without(TORCHRUN, "LOCAL_RANK"), "LOCAL_RANK is missing"),
        ({"LOCAL_RANK": "3"}, "RANK and WORLD_SIZE is missing"),
        (without(OPENMPI, "OMPI_COMM_WORLD_RANK"), "OMPI_COMM_WORLD_RANK is missing"),
        (without(SRUN, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"), "SLURM_STEP_NUM_TASKS or SLURM_NTASKS is missing"),
        (without(SRUN, "SLURM_STEP_NODELIST"), "SLURM_STEP_NODELIST or MASTER_ADDR is missing"),
        (without(SRUN, "SLURM_LOCALID"), "SLURM_LOCALID is not set"),
        (TORCHRUN | {"RANK": "eight"}, "RANK='eight'"),
        (TORCHRUN | {"MASTER_PORT": "x"}, "MASTER_PORT='x'"),
        (TORCHRUN | {"RANK": "8"}, "RANK=8, WORLD_SIZE=8"),
        (TORCHRUN | {"RANK": "-1"}, "RANK=-1, WORLD_SIZE=8"),
        (TORCHRUN | {"LOCAL_RANK": "4"}, "LOCAL_RANK=4, LOCAL_WORLD_SIZE=4"),
        (TORCHRUN | {"WORLD_SIZE": "0"}, "RANK=5, WORLD_SIZE=0"),
        (TORCHRUN | {"WORLD_SIZE": "4", "RANK": "0"} | OPENMPI, "RANK=0, OMPI_COMM_WORLD_RANK=3"),
        (TORCHRUN | {"WORLD_SIZE": "7"} | SRUN, "RANK=5, SLURM_PROCID=6"),
    ],
)
def test_partial_and_contradictory_environments_are_named(env, names):
    with pytest.raises(CommError) as caught:
        detect(env)
    assert names in str(caught.value)
    assert caught.value.do


def test_torchrun_inside_an_allocation_is_no_contradiction():
    inside = TORCHRUN | SRUN | {"WORLD_SIZE": "7", "TORCHELASTIC_RUN_ID": "x"}
    assert detect(inside).rank == 5
