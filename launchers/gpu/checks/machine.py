"""Facts about this machine that the figures depend on."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

import torch
from options import Options

from checks import CheckAnswer, answer, cuda_device
from pipeline.data.jpeg_engine import has_engine
from pipeline.runs.versions import versions

QUERY = "name,driver_version,memory.total,memory.free,clocks.sm,clocks.max.sm,clocks.mem,ecc.mode.current,power.limit"


def check(options: Options, folder: Path) -> CheckAnswer:
    """Return the machine's facts. This check always passes."""
    rows = [[name, str(value)] for name, value in versions().items() if value is not None]
    rows += [["cores", str(len(os.sched_getaffinity(0)))], ["bf16", str(_has_bf16())]]
    if torch.cuda.is_available():
        rows += [["CUDA", str(torch.version.cuda)], ["cuDNN", str(torch.backends.cudnn.version())]]
        rows += [["to the GPU, pinned", f"{_bandwidth(2 if options.rehearse else 20):.1f} GB/s"], *_gpu_facts()]
    rows += [["JPEG engine", str(has_engine(cuda_device()))]]
    rows += [["nvJPEG", path] for path in _loaded_libraries("nvjpeg")]
    return answer("Machine", ["", ""], rows)


def _has_bf16() -> bool:
    return torch.cuda.is_bf16_supported() if torch.cuda.is_available() else "bf16" in Path("/proc/cpuinfo").read_text()


def _gpu_facts() -> list[list[str]]:
    """Return nvidia-smi's facts about the first GPU, an empty list if it fails."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    values = done.stdout.splitlines()[0].split(", ") if done.returncode == 0 and done.stdout else []
    return [[name, value] for name, value in zip(QUERY.split(","), values, strict=False)]


def _bandwidth(times: int) -> float:
    """Return the bandwidth of copies from pinned memory to the GPU in GB/s."""
    host, device = (
        torch.empty(2**28, dtype=torch.uint8).pin_memory(),
        torch.empty(2**28, dtype=torch.uint8, device="cuda"),
    )
    device.copy_(host, non_blocking=True)  # warm-up
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(times):
        device.copy_(host, non_blocking=True)
    torch.cuda.synchronize()
    return times * host.nbytes / (time.perf_counter() - began) / 1e9


def _loaded_libraries(name: str) -> list[str]:
    """Return the paths of loaded shared libraries with ``name`` in their file name, after importing DALI."""
    import torchvision.io  # noqa: F401

    try:
        import nvidia.dali.fn  # noqa: F401
    except ImportError:
        return ["DALI is not installed"]
    lines = Path("/proc/self/maps").read_text().splitlines()
    return sorted({line.split()[-1] for line in lines if name in line.rpartition("/")[2]})
