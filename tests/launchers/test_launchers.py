"""However a run is launched, its ranks are one world; where they cannot be, one line says so.

Two ranks of torchrun, and two of ``accelerate launch``, train in ``test_commands.py``.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch
import yaml
from accelerate.commands import launch
from accelerate.utils.launch import prepare_simple_launcher_cmd_env
from commands import BIN, ROOT, TRAIN, environment, run

from pipeline.distributed import collectives, rendezvous
from pipeline.distributed.launcher import read_launch
from pipeline.errors import RecipeError

Launch = Callable[..., None]
TOLD = (
    *rendezvous.REQUIRED_VARIABLES,
    *rendezvous.TASK_COUNT_VARIABLES,
    rendezvous.SECONDS_VARIABLE,
    "GROUP_WORLD_SIZE",
    "ACCELERATE_MIXED_PRECISION",
    "SLURM_PTY_PORT",
)
MULTI_CPU = {
    "compute_environment": "LOCAL_MACHINE",
    "distributed_type": "MULTI_CPU",
    "machine_rank": 0,
    "mixed_precision": "no",
    "num_machines": 1,
    "num_processes": 2,
    "use_cpu": True,
}


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in TOLD:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Launch:
    """``launched(RANK=1, …)``: this process was told this by its launcher."""

    def tell(**told: object) -> None:
        for name, value in told.items():
            monkeypatch.setenv(name, str(value))

    return tell


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def by_accelerate(*words: str) -> dict[str, str]:
    """Return the environment that ``accelerate launch`` gives to the one process it would start."""
    options = launch.launch_command_parser().parse_args([*words, "pipeline/train.py"])
    options, _, _ = launch._validate_launch_command(options)
    assert not options.multi_gpu, "it would start several"
    return prepare_simple_launcher_cmd_env(options)[1]


def told(world_size: int, rank: int, port: int, seconds: float = 0.5) -> dict[str, object]:
    direct = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1"}
    return {**direct, "MASTER_PORT": port, rendezvous.SECONDS_VARIABLE: seconds}


def refused() -> str:
    with pytest.raises((RecipeError, ConnectionError)) as caught:
        rendezvous.init_process_group(read_launch())
    assert "\n" not in str(caught.value)
    return str(caught.value)


def worlds(place: Path, folder: str) -> set[int]:
    """Return how many ranks saved a run's checkpoints."""
    states = (place / "runs" / folder / "checkpoints").glob("step-*/state.json")
    return {json.loads(state.read_text())["world_size"] for state in states}


# -- one world --------------------------------------------------------------------------------------------------------


def test_accelerate_launch_starts_one_rank(place: Path, main_job: subprocess.CompletedProcess[str]):
    assert worlds(place, "ddkd") == {1}


def test_processes_started_directly_are_the_ranks_that_they_are_told_to_be(
    place: Path, main_job: subprocess.CompletedProcess[str], port: int
):
    command = [sys.executable, TRAIN, "ce.yaml", "folder=runs/direct", "stop.steps=2"]
    both = [
        subprocess.Popen(
            command,
            cwd=place,
            env=environment(**{name: str(value) for name, value in told(2, rank, port, seconds=120).items()}),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [process.communicate()[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], errors
    assert worlds(place, "direct") == {2}


# -- several worlds of one --------------------------------------------------------------------------------------------


def test_accelerates_launcher_that_starts_one_process_of_two(launched: Launch, tmp_path: Path):
    config = tmp_path / "two.yaml"
    config.write_text(yaml.safe_dump(MULTI_CPU))
    for words in (["--cpu", "--num_processes", "2"], ["--config_file", str(config)]):
        launched(**by_accelerate(*words))
        assert "accelerate launch started one process of several" in refused()
        assert "torchrun --nproc_per_node N" in refused()


def test_accelerates_launcher_of_one_process_is_no_mistake(launched: Launch):
    launched(**by_accelerate("--cpu", "--num_processes", "1"))
    rendezvous.init_process_group(read_launch())


@pytest.mark.parametrize(
    ("variable", "command"), [("SLURM_STEP_NUM_TASKS", "srun -n 2"), ("OMPI_COMM_WORLD_SIZE", "mpirun -n 2")]
)
def test_tasks_that_are_not_told_of_one_another(launched: Launch, variable: str, command: str):
    launched(**{variable: 2})
    message = refused()
    assert f"start them with: {command} bash -c 'export RANK=$" in message
    assert "WORLD_SIZE=$" in message
    launched(WORLD_SIZE=1)
    rendezvous.init_process_group(read_launch())


def test_torchruns_that_do_not_see_one_another(launched: Launch, port: int):
    launched(**told(8, 0, port), SLURM_STEP_NUM_TASKS=2, GROUP_WORLD_SIZE=1)
    assert "srun started 2 torchruns that cannot see one another; give each: --nnodes 2" in refused()


def test_no_teacher_is_trained_by_each_of_several_lone_ranks(
    place: Path, main_job: subprocess.CompletedProcess[str], tmp_path: Path
):
    for recipe in place.glob("*.yaml"):
        (tmp_path / recipe.name).write_text(recipe.read_text())
    words = ["launch", "--cpu", "--num_processes", "2", TRAIN, "ddkd.yaml", f"data.path={place / 'shards'}"]
    done = run(str(BIN / "accelerate"), *words, folder=tmp_path)
    assert done.returncode != 0
    assert [text for text in done.stderr.splitlines() if text.startswith("error: ")] == [
        "error: accelerate launch started one process of several, as it does with --cpu, MULTI_CPU or NO; "
        f"start them with: torchrun --nproc_per_node N {TRAIN} ddkd.yaml data.path={place / 'shards'} "
        "(WORLD_SIZE=1 means one)"
    ]
    assert not (tmp_path / "runs").exists()


# -- a rendezvous that fails ------------------------------------------------------------------------------------------


def test_a_rank_without_all_that_it_must_be_told(launched: Launch):
    launched(WORLD_SIZE=2, RANK=1, MASTER_ADDR="127.0.0.1")
    assert refused() == "WORLD_SIZE is 2, but these are not set: LOCAL_RANK, MASTER_PORT"


def test_a_rank_that_is_none_of_the_world(launched: Launch, port: int):
    launched(**told(2, 2, port))
    assert "RANK is 2, but WORLD_SIZE is 2; give a rank from 0 to 1" in refused()
    launched(RANK="$SLURM_PROCID")
    assert refused() == "RANK is '$SLURM_PROCID', not a number"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"WORLD_SIZE": 0}, "WORLD_SIZE is 0; set it to the number of processes, 1 for a single one"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two', not a number"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK is 'x', not a number"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT is 'http', not a number"),
        ({"PMI_SIZE": "x", "WORLD_SIZE": ""}, "PMI_SIZE is 'x', not a number"),
        ({"GROUP_WORLD_SIZE": "x"}, "GROUP_WORLD_SIZE is 'x', not a number"),
        (
            {rendezvous.SECONDS_VARIABLE: "a minute"},
            f"{rendezvous.SECONDS_VARIABLE} is 'a minute', not a number of seconds",
        ),
    ],
)
def test_a_variable_that_is_no_number_is_named(launched: Launch, port: int, wrong: dict[str, object], message: str):
    launched(**{**told(2, 0, port), **wrong})
    assert refused() == message


def test_an_empty_variable_of_another_launcher_says_nothing(launched: Launch):
    launched(PMI_SIZE="", OMPI_COMM_WORLD_SIZE="", WORLD_SIZE="")
    rendezvous.init_process_group(read_launch())


SHELL = {"SLURM_STEP_NUM_TASKS": 8, "SLURM_PTY_PORT": 40123, "SLURM_PROCID": 0, "SLURM_TASK_PID": 1}
"""What ``srun -n 8 --pty bash`` gives to the shell, which is process 1."""


def test_a_command_in_the_interactive_shell_of_a_step_of_many_tasks_is_one_process(launched: Launch, port: int):
    launched(**SHELL)
    rendezvous.init_process_group(read_launch())
    # And so is a torchrun that is started there: its ranks meet.
    launched(**told(8, 0, port), GROUP_WORLD_SIZE=1)
    assert "of the ranks to connect" in refused()


@pytest.mark.parametrize("more", [{"SLURM_TASK_PID": os.getpid()}, {"SLURM_PROCID": 1}])
def test_the_tasks_of_such_a_step_themselves_are_not(launched: Launch, more: dict[str, object]):
    launched(**{**SHELL, **more})
    assert "srun started 8 processes without RANK and WORLD_SIZE" in refused()


def test_a_host_that_has_no_address(launched: Launch, port: int):
    launched(**{**told(2, 1, port), "MASTER_ADDR": "nowhere.invalid"})
    assert f"MASTER_ADDR=nowhere.invalid MASTER_PORT={port}: " in refused()


def test_a_port_where_nobody_is(launched: Launch, port: int):
    launched(**told(2, 1, port))
    message = refused()
    assert f"rank 1 of 2 on {os.uname().nodename}: no answer from 127.0.0.1:{port} in 0.5 s" in message
    assert "PIPELINE_RENDEZVOUS_SECONDS gives more time" in message


def test_a_port_that_is_another_programs(launched: Launch, port: int):
    with socket.socket() as other:
        other.bind(("", port))
        other.listen()
        other.detach()  # open until the process ends, or torch would tell at length that it was hung up on
    launched(**told(2, 1, port))
    assert "no answer from" in refused()
    launched(RANK=0)
    assert "address already in use; give all ranks another port" in refused()


def test_the_ranks_that_never_came_are_named(launched: Launch, port: int):
    launched(**told(4, 0, port))
    assert "for 3 of the ranks to connect: 1, 2, 3. See how they ended" in refused()


def test_two_processes_of_one_rank(launched: Launch, port: int):
    served = collectives.open_store("127.0.0.1", port, 0, rendezvous.COLLECTIVE_TIMEOUT)
    launched(**told(3, 1, port))
    assert "of the ranks to connect: 0, 2." in refused()
    assert "another process has this RANK; each needs its own" in refused()
    del served


def test_ranks_whose_first_has_gone(launched: Launch, port: int, monkeypatch: pytest.MonkeyPatch):
    launched(**told(2, 1, port))
    monkeypatch.setattr(
        rendezvous, "_connect_store", lambda *_: mock.Mock(add=mock.Mock(side_effect=RuntimeError("reset")))
    )
    assert "rank 0, which serves the store, has ended" in refused()


def test_what_an_attempt_said_in_torchruns_store_is_not_heard_in_the_next(port: int, monkeypatch: pytest.MonkeyPatch):
    first = collectives.open_store("127.0.0.1", port, 0, rendezvous.COLLECTIVE_TIMEOUT)
    first.set("key", "of the first")
    again = collectives.open_store("127.0.0.1", port, 1, rendezvous.COLLECTIVE_TIMEOUT)
    assert again.check(["key"])
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    second = collectives.open_store("127.0.0.1", port, 1, rendezvous.COLLECTIVE_TIMEOUT)
    assert not second.check(["key"])


@pytest.mark.parametrize(("visible", "gpu"), [(1, 0), (8, 3)])
def test_a_task_is_at_its_own_gpu_and_one_that_sees_a_single_one_at_that(
    launched: Launch, port: int, monkeypatch: pytest.MonkeyPatch, visible: int, gpu: int
):
    launched(**told(8, 3, port))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(rendezvous, "_connect_store", lambda *_: mock.Mock())
    monkeypatch.setattr(rendezvous, "_compare_ranks", mock.Mock())
    monkeypatch.setattr(torch.distributed, "init_process_group", join := mock.Mock())
    monkeypatch.setenv("TORCH_DIST_USE_NCCL2", "as the user says")
    rendezvous.init_process_group(read_launch())
    assert join.call_args.args == ("nccl",)
    assert join.call_args.kwargs["device_id"] == torch.device("cuda", gpu)
    assert (os.environ["LOCAL_RANK"], os.environ["TORCH_DIST_USE_NCCL2"]) == (str(gpu), "as the user says")
    monkeypatch.delenv("TORCH_DIST_USE_NCCL2")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(rendezvous, "_connect_store", lambda *_: mock.Mock())
    rendezvous.init_process_group(read_launch())
    assert (join.call_args.args, join.call_args.kwargs["device_id"]) == (("gloo",), None)


def test_ranks_that_came_and_cannot_reach_one_another(launched: Launch, port: int, monkeypatch: pytest.MonkeyPatch):
    launched(**told(2, 1, port))
    monkeypatch.setattr(rendezvous, "_connect_store", lambda *_: mock.Mock())
    monkeypatch.setattr(rendezvous, "_compare_ranks", mock.Mock())
    monkeypatch.setattr(collectives, "create_process_group", mock.Mock(side_effect=RuntimeError("no route\nframe #0")))
    assert "cannot reach one another (no route); give the network between the hosts" in refused()


def test_a_lone_rank_ends_in_one_line_with_exit_code_2(
    place: Path, main_job: subprocess.CompletedProcess[str], port: int
):
    given = {name: str(value) for name, value in told(2, 1, port).items()}
    done = run(sys.executable, str(ROOT / "pipeline" / "evaluate.py"), "runs/ce", folder=place, **given)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: rank 1 of 2 on ")
    assert done.stdout == ""
