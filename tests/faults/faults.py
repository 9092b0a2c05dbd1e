"""Kills and storage errors in the jobs that write, and whether the same command ends in the same bytes afterwards."""

from __future__ import annotations

from pathlib import Path
from random import Random

from damages import undamaged
from forks import Done
from judge import ended, names
from shim import KINDS
from world import JOBS, TRACKED, Job, World


def killed(world: World, random: Random, name: str) -> tuple[str, Done, str]:
    """Kill a job at one storage call, or at two one after the other, and go on; return what, its end, the judgement."""
    job, (kind, twice) = ALL[name.split(",")[0]], random.choice([("stop", False), ("tear", False), ("stop", True)])
    folder, what = world.copy(), []
    for _ in range(2 if twice else 1):
        nth = random.randint(1, undamaged(world, job).calls)
        world.do(job, folder=folder, fault=(str(folder / job.folder), nth, KINDS[kind]))
        what.append(f"{kind} at storage call {nth}")
    done = world.do(job, folder=folder)
    judgement, left = afterwards(world, job, folder, done)
    return ", then ".join(what) + left, done, judgement


def failed(world: World, random: Random, name: str) -> tuple[str, Done, str]:
    """Let the storage fail under a job, and run it again; return what, how it failed, and the judgement of both."""
    job, kind = ALL[name.split(",")[0]], name.rpartition(" ")[2]
    nth = random.randint(1, undamaged(world, job).calls)
    folder = world.copy()
    done = world.do(job, folder=folder, fault=(str(folder / job.folder), nth, KINDS[kind]))
    found = "went on" if ended(done) == "accepted" else ended(done)
    again = world.do(job, folder=folder)
    then, left = afterwards(world, job, folder, again)
    what = f"{kind} at storage call {nth}{left}"
    if then != "same":
        return what, again, f"{then} afterwards"
    return what, done, found


def afterwards(world: World, job: Job, folder: Path, done: Done) -> tuple[str, str]:
    """Judge the command that was to mend what a fault left; return that, and which files should be gone."""
    expected, made = undamaged(world, job), folder / job.folder
    if (found := ended(done)) != "accepted":
        return found, ""
    if job.result(made) != expected.result:
        return "other bytes", ""
    left = sorted(names(made) - expected.names)
    return ("left behind", f"; {', '.join(left)}") if left else ("same", "")


ALL = {**JOBS, **TRACKED}
KILLS = {f"{job}, killed": killed for job in ALL}
ERRORS = {f"{job}, {kind}": failed for jobs in (JOBS, TRACKED) for kind in ("ENOSPC", "EIO", "EDQUOT") for job in jobs}
"""In both the tracked job is last, beyond a short campaign's reach."""
