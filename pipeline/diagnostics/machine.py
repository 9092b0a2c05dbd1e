"""What this rank's host offers: software, GPU, precision, cores, memory, disk."""

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

GIB = 2**30
DRIVER = Path("/proc/driver/nvidia/version")
LEAST_MEMORY = 2 * GIB
"""Of a rank: a process that trains the smallest network on a CPU has 0.8 GiB."""
LEAST_SHM = 512 * 2**20
"""Where NCCL joins the GPUs of a host; containers begin with 64 MiB."""
LEAST_DISK = GIB
"""Of a run: a ResNet-50 with its momentum and average is 300 MB, and two checkpoints and one in the making are kept."""


def gpu_device() -> torch.device:
    """Return the device on which this rank trains."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def software() -> dict[str, str]:
    """Return the versions that the ranks must have in common."""
    found = {name: str(value) for name, value in versions().items() if name not in ("device", "uncommitted_changes")}
    nccl_version = ".".join(map(str, nccl.version())) if torch.cuda.is_available() else None
    more = {"CUDA": torch.version.cuda, "NCCL": nccl_version, "driver": driver()}
    return {**found, **{name: value for name, value in more.items() if value}}


def driver() -> str | None:
    """Return the version of NVIDIA's driver, None without one."""
    found = re.search(r"\d+\.\d+(\.\d+)*", DRIVER.read_text()) if DRIVER.is_file() else None
    return found.group() if found else None


def check_versions() -> Finding:
    """Tell the versions, and whether the driver is one that torch can use."""
    told = ", ".join(f"{name} {value[:12]}" for name, value in software().items())
    if driver() and not torch.cuda.is_available():
        return fail(told, f"torch cannot use this driver: CUDA {torch.version.cuda} needs a newer one")
    return ok(told)


def check_gpu() -> Finding:
    """Tell this rank's GPU and its free memory."""
    if not torch.cuda.is_available():
        return skip("none; this machine trains on its CPU")
    place = gpu_device()
    free, total = torch.cuda.mem_get_info(place)
    visible = f"{torch.cuda.device_count()} visible"
    told = f"{torch.cuda.get_device_name(place)}, {free / GIB:.1f} of {total / GIB:.1f} GiB free, {visible}"
    if free < total / 2:
        return fail(told, "nvidia-smi shows what else runs on it; end that first", -free)
    return ok(told, badness=-free)


def check_precision(wanted: str | None) -> Finding:
    """Multiply matrices in the half precisions, and say whether the recipe's is among those that train here."""
    works = {name: _multiplies(dtype) for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16))}
    # Accelerate computes in fp32 where fp16 is asked of a CPU, and does not say so.
    works["fp16"] &= torch.cuda.is_available()
    told = ", ".join(f"{name} {'yes' if good else 'no'}" for name, good in works.items())
    if not works.get(wanted or "", True):
        return fail(told, f"precision: {wanted} does not train here; give precision=fp32, or another that does")
    return ok(told)


def _multiplies(dtype: torch.dtype) -> bool:
    if dtype == torch.bfloat16 and torch.cuda.is_available() and not torch.cuda.is_bf16_supported(False):
        return False
    ones = torch.ones(64, 64, dtype=dtype, device=gpu_device())
    return bool((ones @ ones == 64).all())


def check_cores() -> Finding:
    """Tell how many cores this rank has for itself, and whether Slurm gave those that the job asked for."""
    mine = frozenset(os.sched_getaffinity(0))
    everyone = collectives.gather_objects((platform.node(), mine))
    sharing = sum(host == platform.node() and bool(cores & mine) for host, cores in everyone)
    asked = int(os.environ.get("SLURM_CPUS_PER_TASK", "0"))
    told = f"{len(mine)} for {sharing} of the ranks" if sharing > 1 else f"{len(mine)}"
    if len(mine) < asked:
        advice = f"--cpus-per-task={asked} did not reach srun: export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK"
        return fail(told, advice)
    return ok(told, badness=-len(mine) / sharing)


def check_memory(local_ranks: int) -> Finding:
    """Tell how much memory the host's ranks can still have."""
    free = free_memory()
    told = f"{free / GIB:.1f} GiB free for {local_ranks} of the ranks"
    if free < local_ranks * LEAST_MEMORY:
        return fail(told, f"a rank needs {LEAST_MEMORY / GIB:.0f} GiB: start fewer, or ask for more (--mem)", -free)
    return ok(told, badness=-free)


def free_memory() -> int:
    """Return the bytes that are left to this process: those of the host, or fewer where its control group says so."""
    values = dict(re.findall(r"^(\w+):\s+(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE))
    free = 1024 * int(values["MemAvailable"])
    group = next((text[3:] for text in Path("/proc/self/cgroup").read_text().splitlines() if text[:3] == "0::"), "")
    folder = Path("/sys/fs/cgroup") / group.lstrip("/")
    limit, used = ((folder / name) for name in ("memory.max", "memory.current"))
    if limit.is_file() and limit.read_text().strip().isdecimal():
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return free


def check_shm(local_ranks: int) -> Finding:
    """Tell the shared memory by which NCCL joins the GPUs of one host."""
    free = shutil.disk_usage("/dev/shm").free
    told = f"{free / GIB:.2f} GiB free"
    if free < LEAST_SHM and local_ranks > 1 and torch.cuda.is_available():
        return fail(told, "start the container with --shm-size=1g, or --ipc=host", -free)
    return ok(told, badness=-free)


def check_disk(folder: Path, least: int = LEAST_DISK) -> Finding:
    """Tell the space that is left where ``folder`` is or will be, which must be ``least`` bytes and writable."""
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.is_dir())
    free = shutil.disk_usage(there).free
    told = f"{free / GIB:.1f} GiB free at {there}"
    if free < least:
        return fail(told, f"{least / GIB:.0f} GiB is needed: delete what is not, or name another folder", -free)
    if least and not os.access(there, os.W_OK):
        return fail(f"{there} cannot be written", "give folder=ANOTHER, or change who may write there")
    return ok(told, badness=-free)
