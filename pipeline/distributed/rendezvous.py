"""Rendezvous: the ranks of a launch find one another, compare their settings and join in a process group.

``check_launcher`` reads the environment, and refuses processes that would each train alone. ``init_process_group``
waits until every rank is there, compares their settings, and joins them.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shlex
import socket
import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from threading import Thread
from typing import Any, NamedTuple

import torch

from pipeline.distributed import agreement, collectives, signals
from pipeline.distributed.launcher import Launch, read_number
from pipeline.errors import Interrupted, RecipeError

SECONDS_VARIABLE = "PIPELINE_RENDEZVOUS_SECONDS"
"""Environment variable: seconds that a rank waits for the others; ``DEFAULT_SECONDS`` if it is not set."""
DEFAULT_SECONDS = 120.0
POLL_SECONDS = 0.1
"""Seconds between two reads of the store."""
LEAVE_SECONDS = 10.0
"""Seconds that rank 0, which serves the store, waits for the others to read an error from it."""
COLLECTIVE_TIMEOUT = timedelta(minutes=10)
"""Longest wait in a collective, once all ranks have joined."""

REQUIRED_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Variables that a process needs if no elastic agent started it."""
# Where other launchers give each process the number of processes.
TASK_COUNT_VARIABLES = {"SLURM_STEP_NUM_TASKS": "srun", "OMPI_COMM_WORLD_SIZE": "mpirun", "PMI_SIZE": "mpirun"}


def check_launcher() -> None:
    """Raise RecipeError, with a command that works, if several processes would each train alone.

    A user who wants that sets ``WORLD_SIZE=1``.
    """
    variable = "" if _is_srun_shell() else next((name for name in TASK_COUNT_VARIABLES if os.environ.get(name)), "")
    tasks, launcher = read_number(variable, 1), TASK_COUNT_VARIABLES.get(variable, "")
    world = read_number("WORLD_SIZE", 0)
    if not world:
        if tasks > 1:
            raise RecipeError(_missing_environment_message(tasks, launcher))
        # `accelerate launch` sets the first for a single process, and the second, too, if it was to start several.
        if {"ACCELERATE_MIXED_PRECISION", "MASTER_PORT"} <= os.environ.keys():
            raise RecipeError(
                "accelerate launch started one process of several, as it does with --cpu, MULTI_CPU or NO; "
                f"start them with: torchrun --nproc_per_node N {shlex.join(sys.argv)} (WORLD_SIZE=1 means one)"
            )
    elif os.environ.get("GROUP_WORLD_SIZE") and read_number("GROUP_WORLD_SIZE", 1) != tasks > 1:
        raise RecipeError(
            f"{launcher} started {tasks} torchruns that cannot see one another; give each: --nnodes {tasks} "
            "--rdzv_backend c10d --rdzv_endpoint HOST_OF_RANK_0:29500"
        )
    elif world > 1 and (missing := [name for name in REQUIRED_VARIABLES if not os.environ.get(name)]):
        raise RecipeError(f"WORLD_SIZE is {world}, but these are not set: {', '.join(missing)}")


def _is_srun_shell() -> bool:
    """Return whether a user typed the command in the shell of ``srun -n N --pty bash``.

    In such a step only the first task is still running, so the command is a single process. If the command is itself a
    task of the step, or runs in a task other than the first, it is one of several processes.
    """
    # The shell is the task; a command typed in it has a process id of its own.
    task = (os.environ.get("SLURM_PROCID"), os.environ.get("SLURM_TASK_PID"))
    return "SLURM_PTY_PORT" in os.environ and task[0] == "0" and task[1] != str(os.getpid())


def _missing_environment_message(tasks: int, launcher: str) -> str:
    names, host = {
        "srun": (
            ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS"),
            "$(scontrol show hostnames $SLURM_STEP_NODELIST | head -n 1)",
        ),
        "mpirun": (("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_SIZE"), "HOST_OF_RANK_0"),
    }[launcher]
    settings = " ".join(f"{name}=${source}" for name, source in zip(REQUIRED_VARIABLES[:3], names, strict=True))
    command = f"export {settings} MASTER_ADDR={host} MASTER_PORT=29500; exec python {shlex.join(sys.argv)}"
    return (
        f"{launcher} started {tasks} processes without RANK and WORLD_SIZE; start them with: "
        f"{launcher} -n {tasks} bash -c {shlex.quote(command)} (WORLD_SIZE=1 trains each alone)"
    )


class Rendezvous(NamedTuple):
    """The address where the ranks meet, and the rank of this process."""

    rank: int
    world: int
    address: str
    port: int
    seconds: float
    """Longest wait in seconds until all ranks have connected."""

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.world} on {platform.node()}"


def init_process_group(
    launch: Launch,
    timeout: timedelta = COLLECTIVE_TIMEOUT,
    *,
    gpus: str = "nccl",
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Wait until all ranks have connected and join them in a process group with backend ``gpus`` or, on CPUs, gloo.

    Raises RecipeError or ConnectionError, one line, if this process would train alone or not all ranks connect in time.
    Raises RecipeError, too, if the ``settings`` of a rank differ from rank 0's, and Interrupted after a signal to stop.
    A single rank needs no process group, and ranks that have joined already do not join again.
    """
    check_launcher()
    if launch.world_size == 1 or collectives.world_size() > 1:
        return
    rdzv = _read_rendezvous(launch)
    deadline = time.monotonic() + rdzv.seconds
    store = _connect_store(rdzv, deadline)
    try:
        _compare_ranks(rdzv, store, deadline, {"device": "cpu" if launch.on_cpu else "cuda", **(settings or {})})
    except RuntimeError:  # torch raises it for a broken connection
        raise ConnectionError(f"{rdzv}: rank 0, which serves the store, has ended; see its error message") from None
    _join(rdzv, launch, store, timeout, gpus)


def _compare_ranks(rdzv: Rendezvous, store: collectives.Store, deadline: float, settings: Mapping[str, Any]) -> None:
    """Wait until all ranks have connected. Raises RecipeError, the same on all, if the settings of one differ."""
    if rdzv.rank == 0:
        agreement.publish(store, settings)
    _wait_for_all(rdzv, store, "meeting", deadline)
    agreement.compare_with_rank0(store, settings, str(rdzv))
    _wait_for_all(rdzv, store, "compared", time.monotonic() + rdzv.seconds)
    if (difference := agreement.read_difference(store)) is None:
        return
    if rdzv.rank == 0:  # leaves last, because the store ends with it
        with contextlib.suppress(ConnectionError):
            _wait_for_all(rdzv, store, "read", time.monotonic() + LEAVE_SECONDS)
    else:
        store.add("read", 1)
    raise RecipeError(difference)


def _join(rdzv: Rendezvous, launch: Launch, store: collectives.Store, timeout: timedelta, gpus: str) -> None:
    """Create the process group, after all ranks have connected to the store."""
    gpu = None
    if not launch.on_cpu:
        gpu = (launch.local_rank or 0) % torch.cuda.device_count()
        # Accelerate takes it as the index of a visible GPU; a task that is bound to one GPU sees it as index 0.
        os.environ["LOCAL_RANK"] = str(gpu)
    try:
        collectives.create_process_group("gloo" if gpu is None else gpus, store, rdzv.rank, rdzv.world, timeout, gpu)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise ConnectionError(
            f"{rdzv}: all ranks started, but cannot reach one another ({reason}); "
            "give the network between the hosts in NCCL_SOCKET_IFNAME, on CPUs GLOO_SOCKET_IFNAME "
            "(`ip address` lists them)"
        ) from None


def _read_rendezvous(launch: Launch) -> Rendezvous:
    address, port = os.environ["MASTER_ADDR"], read_number("MASTER_PORT", 0)
    text = os.environ.get(SECONDS_VARIABLE) or str(DEFAULT_SECONDS)
    try:
        seconds = float(text)
    except ValueError:
        raise RecipeError(f"{SECONDS_VARIABLE} is {text!r}, not a number of seconds") from None
    return Rendezvous(launch.rank, launch.world_size, address, port, seconds)


def _connect_store(rdzv: Rendezvous, deadline: float) -> collectives.Store:
    """Return the store at MASTER_ADDR:MASTER_PORT, which rank 0 or torchrun serves."""
    try:
        socket.getaddrinfo(rdzv.address, rdzv.port)
    except (OSError, OverflowError) as error:
        raise ConnectionError(f"{rdzv}: MASTER_ADDR={rdzv.address} MASTER_PORT={rdzv.port}: {error}") from None
    found: list[collectives.Store | RuntimeError] = []
    # In a thread, because torch retries without end, and waits for ever for a server that accepts and sends nothing.
    connecting = Thread(target=_open_store, args=(rdzv, found), daemon=True)
    connecting.start()
    while connecting.is_alive() and time.monotonic() < deadline:
        connecting.join(POLL_SECONDS)
        _check_signals(rdzv)
    if not found:
        raise ConnectionError(
            f"{rdzv}: no answer from {rdzv.address}:{rdzv.port} in {rdzv.seconds:g} s; {SECONDS_VARIABLE} gives more "
            "time. Give all ranks the host of rank 0 as MASTER_ADDR and its free port as MASTER_PORT"
        )
    if isinstance(found[0], RuntimeError):
        reason = str(found[0]).partition("\n")[0]
        raise ConnectionError(f"{rdzv}: MASTER_PORT: {reason}; give all ranks another port, and each its own RANK")
    return found[0]


def _open_store(rdzv: Rendezvous, found: list[collectives.Store | RuntimeError]) -> None:
    try:
        found.append(collectives.open_store(rdzv.address, rdzv.port, rdzv.rank, COLLECTIVE_TIMEOUT))
    except RuntimeError as error:
        found.append(error)


def _wait_for_all(rdzv: Rendezvous, store: collectives.Store, stage: str, deadline: float) -> None:
    """Wait until all ranks have reported that stage to the store. Raises RecipeError if one reports it twice."""
    if store.add(f"{stage}/{rdzv.rank}", 1) > 1:
        raise RecipeError(
            f"{rdzv}: another process has this RANK; each needs its own (for srun in single quotes: '$SLURM_PROCID')"
        )
    arrived = store.add(stage, 1)
    while arrived < rdzv.world:
        if time.monotonic() > deadline:
            missing = [str(rank) for rank in range(rdzv.world) if not store.check([f"{stage}/{rank}"])]
            raise ConnectionError(
                f"{rdzv} waited {rdzv.seconds:g} s at {rdzv.address}:{rdzv.port} for {len(missing)} of the ranks to "
                f"connect: {', '.join(missing[:8])}{' …' if missing[8:] else ''}. See how they ended, and give all the "
                f"same MASTER_ADDR, MASTER_PORT and WORLD_SIZE; {SECONDS_VARIABLE} gives more time"
            )
        time.sleep(POLL_SECONDS)
        _check_signals(rdzv)
        arrived = store.add(stage, 0)  # reads the counter


def _check_signals(rdzv: Rendezvous) -> None:
    if signals.stop_requested():
        raise Interrupted(f"{rdzv} was stopped while it waited for the others; the same command continues")
