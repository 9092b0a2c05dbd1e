"""Checks of the ranks together: world, software versions, clocks, all-reduce."""

from __future__ import annotations

import platform
import time
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta

import torch

from pipeline.diagnostics.machine import gpu_device, software
from pipeline.diagnostics.result import Finding, fail, ok, skip
from pipeline.distributed import collectives, rendezvous
from pipeline.distributed.launcher import Launch

_MIB = 2**20
LONGEST_WAIT = timedelta(minutes=1)
LARGEST_CLOCK_DIFFERENCE = 2.0
"""Largest accepted difference between the clocks of two hosts, in seconds.

With a larger one, logs of several hosts are out of order, and new files may have a time in the future.
"""
SINGLE_RANK = "there is only one rank"


def check_world(launch: Launch) -> Finding:
    """Connect the ranks that the launcher started, and return a finding with every host."""
    # Gloo as well: with NCCL alone, ranks that lose each other only abort, without a message.
    rendezvous.init_process_group(launch, LONGEST_WAIT, gpus="cpu:gloo,cuda:nccl")
    device = gpu_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    expected, world = launch.world_size, collectives.world_size()
    hosts = Counter(collectives.gather_objects(platform.node()))
    value = f"{world} {'ranks' if world > 1 else 'rank'}: {', '.join(f'{host} × {n}' for host, n in hosts.items())}"
    if world != expected:
        return fail(value, f"the launcher started {expected}; start them with torchrun --nproc_per_node N")
    return ok(value)


def check_same_versions() -> Finding:
    """Compare the software versions of the ranks."""
    everyone = collectives.gather_objects(software())
    first = everyone[0]
    for rank, other in enumerate(everyone):
        differing = sorted(name for name in first.keys() | other.keys() if first.get(name) != other.get(name))
        if differing:
            name = differing[0]
            value = f"rank {rank} has another {', '.join(differing)} than rank 0"
            return fail(value, f"install the same everywhere ({name}: {first.get(name)} and {other.get(name)})")
    return ok("the same everywhere") if len(everyone) > 1 else skip(SINGLE_RANK)


def check_clocks() -> Finding:
    """Compare the clocks of the ranks when they leave a barrier."""
    if collectives.world_size() == 1:
        return skip(SINGLE_RANK)
    collectives.barrier()
    return clocks_agree(collectives.gather_objects(time.time()))


def clocks_agree(times: Sequence[float]) -> Finding:
    """Return whether the ranks' times of the same moment, in seconds, agree, as a finding."""
    apart = max(times) - min(times)
    if apart <= LARGEST_CLOCK_DIFFERENCE:
        return ok(f"{apart:.3f} s apart")
    slow, fast = times.index(min(times)), times.index(max(times))
    return fail(f"rank {fast} is {apart:.1f} s ahead of rank {slow}", "let chrony or ntpd set the hosts' clocks")


def check_all_reduce() -> Finding:
    """All-reduce tensors of several sizes, check the sums, and measure bus bandwidths.

    Bus bandwidth is the traffic on each link, independent of the number n of ranks: bytes/seconds · 2(n − 1)/n.
    """
    if collectives.world_size() == 1:
        return skip(SINGLE_RANK)
    device = gpu_device()
    sizes = (_MIB, 8 * _MIB, 64 * _MIB) if device.type == "cuda" else (_MIB // 16, _MIB, 4 * _MIB)
    for size in sizes:
        total = _sum_of_ranks(size, device)
        if not is_correct_sum(total, collectives.world_size()):
            return fail(
                f"a sum of {_format_bytes(size)} over the ranks is wrong", "compare with NCCL_P2P_DISABLE=1 set"
            )
    speeds = {size: bus_bandwidth(size, _seconds(size, device), collectives.world_size()) for size in sizes}
    value = ", ".join(f"{_format_bytes(size)} {speed / 1e9:.2f} GB/s" for size, speed in speeds.items())
    return ok(f"{'NCCL' if device.type == 'cuda' else 'gloo'}: {value}", badness=-min(speeds.values()))


def check_latency() -> Finding:
    """Measure an all-reduce of 8 bytes."""
    if collectives.world_size() == 1:
        return skip(SINGLE_RANK)
    seconds = _seconds(8, gpu_device(), repeats=50)
    return ok(f"{1e6 * seconds:.0f} µs for 8 bytes", badness=seconds)


def is_correct_sum(total: torch.Tensor, world: int) -> bool:
    """Return whether every element is 1 + 2 + … + ``world``, which float32 represents exactly."""
    return bool((total == world * (world + 1) // 2).all())


def bus_bandwidth(size: int, seconds: float, world: int) -> float:
    """Return bytes per second on each link for an all-reduce of ``size`` bytes."""
    return size / seconds * 2 * (world - 1) / world


def _sum_of_ranks(size: int, device: torch.device) -> torch.Tensor:
    return collectives.all_reduce_(torch.full((size // 4,), collectives.rank() + 1.0, device=device))


def _seconds(size: int, device: torch.device, repeats: int = 5) -> float:
    """Return the seconds of an all-reduce of ``size`` bytes: the mean of ``repeats``, after two to warm up."""
    zeros = torch.zeros(size // 4, device=device)
    for _ in range(2):
        collectives.all_reduce_(zeros)
    collectives.barrier()
    started = _now(device)
    for _ in range(repeats):
        collectives.all_reduce_(zeros)
    return (_now(device) - started) / repeats


def _now(device: torch.device) -> float:
    """Return the time in seconds after all work of the device so far."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _format_bytes(size: int) -> str:
    return f"{size / _MIB:g} MiB" if size >= _MIB else f"{size // 1024} KiB"
