"""The launcher's settings for this process, read from the environment once, when a command begins."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from pipeline.errors import ROOT, RecipeError

_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
_MPI_VARIABLES = (
    *("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    *(f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")),
    *(f"MV2_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")),
)
NUMBERS = (*_RANK_VARIABLES, *_MPI_VARIABLES, "OMP_NUM_THREADS")
"""Variables that Accelerate reads as numbers wherever they are set, those of other launchers included."""


@dataclass(frozen=True)
class Launch:
    """A process among those that were started with it; the defaults describe a process without a launcher."""

    rank: int = 0
    world_size: int = 1
    local_rank: int | None = None
    """Rank of the process on its host; None if it is not set."""
    use_cpu: bool = False
    """True if the launcher selects the CPU."""
    use_deepspeed: bool = False
    deepspeed_file: str | None = None
    """JSON file with DeepSpeed's settings."""

    @property
    def deepspeed_path(self) -> Path | None:
        """Return the path of ``deepspeed_file``, from the current folder or the project's; None if there is none."""
        name = self.deepspeed_file or ""
        return next((path for path in (Path(name), ROOT / name) if path.is_file()), None)

    @property
    def is_main(self) -> bool:
        """Return whether this is rank 0."""
        return self.rank == 0

    @property
    def on_cpu(self) -> bool:
        """Return whether the process computes on the CPU, by choice or because there is no GPU."""
        return self.use_cpu or not torch.cuda.is_available()


def read_launch() -> Launch:
    """Return the launcher's settings from the environment. Raises RecipeError for an impossible rank.

    An empty variable counts as not set, and is deleted: Accelerate would fail on it.
    """
    for name in NUMBERS:
        if os.environ.get(name) == "":
            del os.environ[name]
    for name in _MPI_VARIABLES:
        read_number(name, 0)  # for the error only: Accelerate reads these, too, and would end in a traceback
    rank, world_size = read_number("RANK", 0), read_number("WORLD_SIZE", 1)
    if world_size == 0:
        raise RecipeError("WORLD_SIZE is 0; set it to the number of processes, 1 for a single one")
    if rank >= world_size:
        raise RecipeError(f"RANK is {rank}, but WORLD_SIZE is {world_size}; give a rank from 0 to {world_size - 1}")
    return Launch(
        rank=rank,
        world_size=world_size,
        local_rank=read_number("LOCAL_RANK", 0) if os.environ.get("LOCAL_RANK") else None,
        use_cpu=is_set("ACCELERATE_USE_CPU"),
        use_deepspeed=is_set("ACCELERATE_USE_DEEPSPEED"),
        deepspeed_file=os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE") or None,
    )


def read_number(name: str, default: int) -> int:
    """Return the number in a variable, the default if it is not set or empty. Raises RecipeError for other text."""
    text = os.environ.get(name) or str(default)
    if not text.isdecimal():
        raise RecipeError(f"{name} is {text!r}, not a number")
    return int(text)


def is_set(name: str) -> bool:
    """Return whether a variable is set to yes, by the rules of Accelerate for its own variables."""
    return os.environ.get(name, "").lower() in ("1", "true", "yes")
