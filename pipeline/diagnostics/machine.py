"""Checks of this rank's host: software, GPU, precision, cores, memory, disk."""

from __future__ import annotations

import os
import platform
import re
import shutil
from pathlib import Path

import torch
from torch.cuda import nccl

from pipeline.diagnostics.result import Finding, fail, ok, skip
from pipeline.distributed import collectives
from pipeline.runs.versions import versions
from shards.cores import usable_cores

GIB = 2**30
DRIVER = Path("/proc/driver/nvidia/version")
MEMORY = Path("/proc/meminfo")
SHARED_MEMORY = Path("/dev/shm")
LEAST_MEMORY = 2 * GIB
"""Bytes per rank: a process that trains the smallest network on a CPU uses 0.8 GiB."""
LEAST_SHM = 512 * 2**20
"""Bytes of shared memory that NCCL needs between the GPUs of a host; the default of containers is 64 MiB."""
LEAST_DISK = GIB
"""Bytes per run: ResNet-50 with momentum and average is 300 MB, times two checkpoints and one being written."""


def gpu_device() -> torch.device:
    """Return the device on which this rank trains."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    # Modulo, because a launcher may show each rank only its own GPU.
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def software() -> dict[str, str]:
    """Return the versions that must be equal on all ranks."""
    packages = {name: str(value) for name, value in versions().items() if name not in ("device", "uncommitted_changes")}
    nccl_version = ".".join(map(str, nccl.version())) if torch.cuda.is_available() else None
    more = {"CUDA": torch.version.cuda, "NCCL": nccl_version, "driver": driver()}
    return {**packages, **{name: value for name, value in more.items() if value}}


def driver() -> str | None:
    """Return the version of NVIDIA's driver, None if there is no driver."""
    found = re.search(r"\d+\.\d+(\.\d+)*", DRIVER.read_text()) if DRIVER.is_file() else None
    return found.group() if found else None


def check_versions() -> Finding:
    """List the versions, and check that torch can use the driver."""
    value = ", ".join(f"{name} {version[:12]}" for name, version in software().items())
    if driver() and not torch.cuda.is_available():
        return fail(
            value,
            f"torch cannot use this driver: CUDA {torch.version.cuda} needs a newer one; see CUDA 12 in README.md",
        )
    return ok(value)


def check_gpu() -> Finding:
    """Check that half the memory of this rank's GPU is free."""
    if not torch.cuda.is_available():
        return skip("none; this machine trains on its CPU")
    device = gpu_device()
    free, total = torch.cuda.mem_get_info(device)
    visible = f"{torch.cuda.device_count()} visible"
    value = f"{torch.cuda.get_device_name(device)}, {free / GIB:.1f} of {total / GIB:.1f} GiB free, {visible}"
    if free < total / 2:
        return fail(value, "another process uses it; find it with nvidia-smi and stop it first", -free)
    return ok(value, badness=-free)


def check_precision(wanted: str | None) -> Finding:
    """Multiply matrices in bf16 and fp16, and check that the recipe's precision trains on this machine."""
    works = {name: _multiplies(dtype) for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16))}
    # On a CPU, Accelerate silently computes in fp32 instead of fp16.
    works["fp16"] &= torch.cuda.is_available()
    value = ", ".join(f"{name} {'yes' if good else 'no'}" for name, good in works.items())
    if not works.get(wanted or "", True):
        return fail(value, f"precision: {wanted} does not train on this machine; give precision=fp32, or another")
    return ok(value)


def _multiplies(dtype: torch.dtype) -> bool:
    # Without ``False`` torch also counts GPUs that only emulate bf16, which is slow.
    if dtype == torch.bfloat16 and torch.cuda.is_available() and not torch.cuda.is_bf16_supported(False):
        return False
    ones = torch.ones(64, 64, dtype=dtype, device=gpu_device())
    return bool((ones @ ones == 64).all())


def check_cores() -> Finding:
    """Count this rank's cores, and check that Slurm gave the number that the job requested."""
    mine = frozenset(usable_cores())
    everyone = collectives.gather_objects((platform.node(), mine))
    sharing = sum(host == platform.node() and bool(cores & mine) for host, cores in everyone)
    requested = int(os.environ.get("SLURM_CPUS_PER_TASK", "0"))
    value = f"{len(mine)} for {sharing} of the ranks" if sharing > 1 else f"{len(mine)}"
    if len(mine) < requested:
        # srun no longer inherits this option of sbatch; SRUN_CPUS_PER_TASK passes it on.
        advice = f"--cpus-per-task={requested} did not reach srun: export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK"
        return fail(value, advice)
    return ok(value, badness=-len(mine) / sharing)


def check_memory(local_ranks: int) -> Finding:
    """Check that the host has enough free memory for its ranks."""
    free = free_memory()
    if free is None:
        return skip("this system does not say how much is free")
    value = f"{free / GIB:.1f} GiB free for {local_ranks} of the ranks"
    if free < local_ranks * LEAST_MEMORY:
        return fail(value, f"a rank needs {LEAST_MEMORY / GIB:.0f} GiB: start fewer, or request more (--mem)", -free)
    return ok(value, badness=-free)


def free_memory() -> int | None:
    """Return the bytes that this process can still use: those of the host, or fewer if its cgroup has a limit.

    None on a system without ``/proc/meminfo``, such as macOS.
    """
    if not MEMORY.is_file():
        return None
    values = dict(re.findall(r"^(\w+):\s+(\d+) kB$", MEMORY.read_text(), re.MULTILINE))
    free = 1024 * int(values["MemAvailable"])
    group = next((text[3:] for text in Path("/proc/self/cgroup").read_text().splitlines() if text[:3] == "0::"), "")
    folder = Path("/sys/fs/cgroup") / group.lstrip("/")
    limit, used = ((folder / name) for name in ("memory.max", "memory.current"))
    if limit.is_file() and limit.read_text().strip().isdecimal():
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return free


def check_shm(local_ranks: int) -> Finding:
    """Check that NCCL has enough shared memory between the GPUs of one host."""
    if not SHARED_MEMORY.is_dir():
        return skip("this system has none, and needs none")
    free = shutil.disk_usage(SHARED_MEMORY).free
    value = f"{free / GIB:.2f} GiB free"
    if free < LEAST_SHM and local_ranks > 1 and torch.cuda.is_available():
        return fail(value, "start the container with --shm-size=1g, or --ipc=host", -free)
    return ok(value, badness=-free)


def check_disk(folder: Path, least: int = LEAST_DISK) -> Finding:
    """Check that the place of ``folder``, which may not exist yet, is writable and has ``least`` bytes free."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(existing).free
    value = f"{free / GIB:.1f} GiB free at {existing}"
    if free < least:
        return fail(value, f"{least / GIB:.0f} GiB is needed: delete other files, or name another folder", -free)
    if least and not os.access(existing, os.W_OK):
        return fail(f"{existing} cannot be written", "give folder=ANOTHER, or change its permissions")
    return ok(value, badness=-free)
