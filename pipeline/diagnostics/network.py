"""Whether the ranks are one world: who is in it, with the same software and time, and how fast their sums are."""

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
"""Seconds; logs of several hosts still read in order, and the files of one do not come from another's future."""
SINGLE_RANK = "one rank has none to wait for"


def check_world(launch: Launch) -> Finding:
    """Join the ranks that the launcher started, and name every host."""
    # Of NCCL alone an abort of the process would be all there is to see of ranks that lose one another.
    rendezvous.init_process_group(launch, LONGEST_WAIT, gpus="cpu:gloo,cuda:nccl")
    place = gpu_device()
    if place.type == "cuda":
        torch.cuda.set_device(place)
    asked, world = launch.world_size, collectives.world_size()
    hosts = Counter(collectives.gather_objects(platform.node()))
    told = f"{world} {'ranks' if world > 1 else 'rank'}: {', '.join(f'{host} × {n}' for host, n in hosts.items())}"
    if world != asked:
        return fail(told, f"the launcher started {asked}; start them with torchrun --nproc_per_node N")
    return ok(told)


def check_same_versions() -> Finding:
    """Compare the ranks' software."""
    everyone = collectives.gather_objects(software())
    first = everyone[0]
    for rank, other in enumerate(everyone):
        differing = sorted(name for name in first.keys() | other.keys() if first.get(name) != other.get(name))
        if differing:
            name = differing[0]
            told = f"rank {rank} has another {', '.join(differing)} than rank 0"
            return fail(told, f"install the same everywhere ({name}: {first.get(name)} and {other.get(name)})")
    return ok("the same everywhere") if len(everyone) > 1 else skip(SINGLE_RANK)


def check_clocks() -> Finding:
    """Compare the ranks' clocks at the moment when they leave a barrier."""
    if collectives.world_size() == 1:
        return skip(SINGLE_RANK)
    collectives.barrier()
    return clocks_agree(collectives.gather_objects(time.time()))


def clocks_agree(times: Sequence[float]) -> Finding:
    """Judge the ranks' times of one moment, in seconds."""
    apart = max(times) - min(times)
    if apart <= LARGEST_CLOCK_DIFFERENCE:
        return ok(f"{apart:.3f} s apart")
    slow, fast = times.index(min(times)), times.index(max(times))
    return fail(f"rank {fast} is {apart:.1f} s ahead of rank {slow}", "let chrony or ntpd set the hosts' clocks")


def check_all_reduce() -> Finding:
    """Add tensors up over the ranks, compare with the right sum, and measure bus bandwidths.

    Bus bandwidth is what each link carries, whatever the number of ranks: bytes/seconds · 2(n − 1)/n for n ranks.
    """
    if collectives.world_size() == 1:
        return skip(SINGLE_RANK)
    place = gpu_device()
    sizes = (_MIB, 8 * _MIB, 64 * _MIB) if place.type == "cuda" else (_MIB // 16, _MIB, 4 * _MIB)
    for size in sizes:
        found = _sum_of_ranks(size, place)
        if not right_sum(found, collectives.world_size()):
            return fail(
                f"a sum of {_format_bytes(size)} over the ranks is wrong", "compare with NCCL_P2P_DISABLE=1 set"
            )
    speeds = {size: bus_bandwidth(size, _seconds(size, place), collectives.world_size()) for size in sizes}
    told = ", ".join(f"{_format_bytes(size)} {speed / 1e9:.2f} GB/s" for size, speed in speeds.items())
    return ok(f"{'NCCL' if place.type == 'cuda' else 'gloo'}: {told}", badness=-min(speeds.values()))


def check_latency() -> Finding:
    """Measure an all-reduce of 8 bytes."""
    if collectives.world_size() == 1:
        return skip(SINGLE_RANK)
    seconds = _seconds(8, gpu_device(), repeats=50)
    return ok(f"{1e6 * seconds:.0f} µs for 8 bytes", badness=seconds)


def right_sum(found: torch.Tensor, world: int) -> bool:
    """Whether every number is 1 + 2 + … + ``world``, which float32 holds exactly."""
    return bool((found == world * (world + 1) // 2).all())


def bus_bandwidth(size: int, seconds: float, world: int) -> float:
    """Return bytes per second on each link for an all-reduce of ``size`` bytes."""
    return size / seconds * 2 * (world - 1) / world


def _sum_of_ranks(size: int, device: torch.device) -> torch.Tensor:
    return collectives.all_reduce_(torch.full((size // 4,), collectives.rank() + 1.0, device=device))


def _seconds(size: int, device: torch.device, repeats: int = 5) -> float:
    """Return what an all-reduce of ``size`` bytes takes, the mean of ``repeats`` after two for warmth."""
    zeros = torch.zeros(size // 4, device=device)
    for _ in range(2):
        collectives.all_reduce_(zeros)
    collectives.barrier()
    began = _now(device)
    for _ in range(repeats):
        collectives.all_reduce_(zeros)
    return (_now(device) - began) / repeats


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _format_bytes(size: int) -> str:
    return f"{size / _MIB:g} MiB" if size >= _MIB else f"{size // 1024} KiB"
