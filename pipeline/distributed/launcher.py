"""What the launcher told this process: read from the environment once, where a command begins, and handed on."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from pipeline.errors import RecipeError

_OF_A_RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
_OF_MPI = (
    *("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    *(f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")),
    *(f"MV2_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")),
)
NUMBERS = (*_OF_A_RANK, *_OF_MPI, "OMP_NUM_THREADS")
"""Variables that Accelerate, which looks at other launchers', too, takes for numbers wherever they are set."""


@dataclass(frozen=True)
class Launch:
    """This process among those that were started with it; the defaults are a process without a launcher."""

    rank: int = 0
    world_size: int = 1
    local_rank: int | None = None
    """Its number on its host; None where nobody said."""
    use_cpu: bool = False
    """Whether the launcher wants it to compute on the CPU."""
    use_deepspeed: bool = False
    deepspeed_file: str | None = None
    """JSON of DeepSpeed's settings."""

    @property
    def is_main(self) -> bool:
        """Whether this is the first rank."""
        return self.rank == 0

    @property
    def on_cpu(self) -> bool:
        """Whether it computes on the CPU, by choice or for want of a GPU."""
        return self.use_cpu or not torch.cuda.is_available()


def read_launch() -> Launch:
    """Return what the environment says. Raises RecipeError for a rank that cannot be.

    An empty variable says nothing, and is taken away: Accelerate would fail on it.
    """
    for name in NUMBERS:
        if os.environ.get(name) == "":
            del os.environ[name]
    for name in _OF_MPI:
        number(name, 0)
    rank, world_size = number("RANK", 0), number("WORLD_SIZE", 1)
    if world_size == 0:
        raise RecipeError("WORLD_SIZE is 0; it is the number of processes, 1 for a single one")
    if rank >= world_size:
        raise RecipeError(f"RANK is {rank}, which is none of the {world_size} ranks of WORLD_SIZE")
    return Launch(
        rank=rank,
        world_size=world_size,
        local_rank=number("LOCAL_RANK", 0) if os.environ.get("LOCAL_RANK") else None,
        use_cpu=is_set("ACCELERATE_USE_CPU"),
        use_deepspeed=is_set("ACCELERATE_USE_DEEPSPEED"),
        deepspeed_file=os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE") or None,
    )


def number(name: str, default: int) -> int:
    """Return what a variable says, the default where it is not set or empty. Raises RecipeError for no number."""
    text = os.environ.get(name) or str(default)
    if not text.isdecimal():
        raise RecipeError(f"{name} is {text!r}, not a number")
    return int(text)


def is_set(name: str) -> bool:
    """Whether a variable says yes, as Accelerate reads its own."""
    return os.environ.get(name, "").lower() in ("1", "true", "yes")
