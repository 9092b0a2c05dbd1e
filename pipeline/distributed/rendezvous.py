"""Whether the processes that a launcher started know of one another; if not, one line says so, not N trainings.

``refuse_lone_ranks`` reads it off the environment. ``meet`` waits until every rank is there, and joins them.
"""

from __future__ import annotations

import os
import platform
import shlex
import socket
import sys
import time
from datetime import timedelta
from threading import Thread
from typing import NamedTuple

import torch

from pipeline.distributed import collectives
from pipeline.distributed.launcher import Launch
from pipeline.errors import RecipeError

SECONDS = "PIPELINE_RENDEZVOUS_SECONDS"
"""How long a rank waits for the others to come; ``DEFAULT_SECONDS`` where it is not set."""
DEFAULT_SECONDS = 120.0
COLLECTIVES = timedelta(minutes=10)
"""How long a rank that has met the others waits for them in a collective."""

DIRECT = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What a process that is started without an elastic agent must be told."""
# How other launchers tell each of their processes how many there are.
TASKS = {"SLURM_STEP_NUM_TASKS": "srun", "OMPI_COMM_WORLD_SIZE": "mpirun", "PMI_SIZE": "mpirun"}


def refuse_lone_ranks() -> None:
    """Raise RecipeError, which tells the command that works, if several processes would each train alone.

    ``WORLD_SIZE=1`` says that this is what is wanted.
    """
    tasks, launcher = next(((int(os.environ[name]), TASKS[name]) for name in TASKS if name in os.environ), (1, ""))
    if "WORLD_SIZE" not in os.environ:
        if tasks > 1:
            raise RecipeError(_untold(tasks, launcher))
        # Accelerate's launcher of a single process leaves these traces, the second where it was to start several.
        if {"ACCELERATE_MIXED_PRECISION", "MASTER_PORT"} <= os.environ.keys():
            raise RecipeError(
                "accelerate launch was asked for several processes and started one, as it does with --cpu, MULTI_CPU "
                f"or NO; start them with: torchrun --nproc_per_node N {shlex.join(sys.argv)} (WORLD_SIZE=1 means one)"
            )
    elif "GROUP_WORLD_SIZE" in os.environ and int(os.environ["GROUP_WORLD_SIZE"]) != tasks > 1:
        raise RecipeError(
            f"{launcher} started {tasks} torchruns that do not see one another; give each: --nnodes {tasks} "
            "--rdzv_backend c10d --rdzv_endpoint HOST_OF_RANK_0:29500"
        )
    elif int(os.environ["WORLD_SIZE"]) > 1 and (missing := [name for name in DIRECT if not os.environ.get(name)]):
        raise RecipeError(f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but not set: {', '.join(missing)}")


def _untold(tasks: int, launcher: str) -> str:
    names, host = {
        "srun": (
            ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS"),
            "$(scontrol show hostnames $SLURM_STEP_NODELIST | head -n 1)",
        ),
        "mpirun": (("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_SIZE"), "HOST_OF_RANK_0"),
    }[launcher]
    told = " ".join(f"{name}=${source}" for name, source in zip(DIRECT[:3], names, strict=True))
    command = f"export {told} MASTER_ADDR={host} MASTER_PORT=29500; exec python {shlex.join(sys.argv)}"
    return (
        f"{launcher} started {tasks} processes and told none of the others; start them with: "
        f"{launcher} -n {tasks} bash -c {shlex.quote(command)} (WORLD_SIZE=1 keeps them apart)"
    )


class Asked(NamedTuple):
    """Where the ranks meet, and who comes."""

    rank: int
    world: int
    address: str
    port: int
    seconds: float
    """How long it may take until all have met."""

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.world} on {platform.node()}"


def meet(launch: Launch, timeout: timedelta = COLLECTIVES, *, gpus: str = "nccl") -> None:
    """Wait until all ranks are there and join them in a process group, of ``gpus`` or, on CPUs, gloo.

    Raises RecipeError or ConnectionError, one line, if this process would be alone or not all ranks come in time. A
    single rank, and ranks that are joined already, need nothing.
    """
    refuse_lone_ranks()
    if launch.world_size == 1 or collectives.world_size() > 1:
        return
    asked = _asked(launch)
    deadline = time.monotonic() + asked.seconds
    store = _reach(asked, deadline)
    try:
        _await_all(asked, store, deadline)
    except RuntimeError:  # torch's word for a connection that broke
        raise ConnectionError(f"{asked}: rank 0, where the ranks meet, has ended; its own line says why") from None
    gpu = None
    if not launch.on_cpu:
        gpu = (launch.local_rank or 0) % torch.cuda.device_count()
        # Accelerate takes it for the number of a visible GPU; a task that is bound to one sees that as number 0.
        os.environ["LOCAL_RANK"] = str(gpu)
    try:
        collectives.start("gloo" if gpu is None else gpus, store, asked.rank, asked.world, timeout, gpu)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise ConnectionError(
            f"{asked}: all ranks came and cannot reach one another ({reason}); name the network that joins the hosts: "
            "NCCL_SOCKET_IFNAME, on CPUs GLOO_SOCKET_IFNAME (`ip address` lists them)"
        ) from None


def _asked(launch: Launch) -> Asked:
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    if not port.isdecimal():
        raise RecipeError(f"MASTER_PORT is {port!r}, not a number")
    seconds = float(os.environ.get(SECONDS, DEFAULT_SECONDS))
    return Asked(launch.rank, launch.world_size, address, int(port), seconds)


def _reach(asked: Asked, deadline: float) -> collectives.Store:
    """Return the store at MASTER_ADDR:MASTER_PORT, which rank 0 or torchrun serves."""
    try:
        socket.getaddrinfo(asked.address, asked.port)
    except (OSError, OverflowError) as error:
        raise ConnectionError(f"{asked}: MASTER_ADDR={asked.address} MASTER_PORT={asked.port}: {error}") from None
    found: list[collectives.Store | RuntimeError] = []
    # A thread, because torch knocks again and again, and waits for ever for what takes a call and says nothing.
    knocking = Thread(target=_knock, args=(asked, found), daemon=True)
    knocking.start()
    knocking.join(deadline - time.monotonic())
    if not found:
        raise ConnectionError(
            f"{asked} found nobody at {asked.address}:{asked.port} for {asked.seconds:g} s; MASTER_ADDR is the host of "
            f"rank 0 and MASTER_PORT a free port of it, the same for all ranks; {SECONDS} gives more time"
        )
    if isinstance(found[0], RuntimeError):
        reason = str(found[0]).partition("\n")[0]
        raise ConnectionError(f"{asked}: MASTER_PORT: {reason}; give all ranks another, and each its own RANK")
    return found[0]


def _knock(asked: Asked, found: list[collectives.Store | RuntimeError]) -> None:
    try:
        found.append(collectives.open_store(asked.address, asked.port, asked.rank, COLLECTIVES))
    except RuntimeError as error:
        found.append(error)


def _await_all(asked: Asked, store: collectives.Store, deadline: float) -> None:
    """Wait until all ranks have come to the store, and nobody twice."""
    place = "meeting"
    if store.add(f"{place}/{asked.rank}", 1) > 1:
        raise RecipeError(
            f"{asked}: another process has this RANK; each needs its own (for srun in single quotes: '$SLURM_PROCID')"
        )
    come = store.add(place, 1)
    while come < asked.world:
        if time.monotonic() > deadline:
            missing = [str(rank) for rank in range(asked.world) if not store.check([f"{place}/{rank}"])]
            raise ConnectionError(
                f"{asked} waited {asked.seconds:g} s at {asked.address}:{asked.port} for {len(missing)} that did not "
                f"come: {', '.join(missing[:8])}{' …' if missing[8:] else ''}; see how they ended, and give all the "
                f"same MASTER_ADDR, MASTER_PORT and WORLD_SIZE; {SECONDS} gives more time"
            )
        time.sleep(0.1)
        come = store.add(place, 0)
