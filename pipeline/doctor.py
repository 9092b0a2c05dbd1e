"""Check in half a minute whether this machine can train: one line per check, exit code 1 if any fails on any rank.

    python pipeline/doctor.py                                               this host
    python pipeline/doctor.py RECIPE [key=value …]                          and the files that the recipe reads
    torchrun --nproc_per_node 8 pipeline/doctor.py RECIPE [key=value …]     every rank; under srun, start it as training

A line has ok, FAIL or skip, then the measured values of the worst rank, and after → what to do.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from pipeline import nvjpeg
    from pipeline.cli import answer_help
    from pipeline.distributed import signals

    answer_help(__doc__)
    signals.exit_quietly_on_interrupt()
    nvjpeg.load_first()  # before the imports below: torchvision brings an older one

import platform
from collections.abc import Callable, Sequence
from functools import partial

from pipeline.cli import entry
from pipeline.config.arguments import parse_recipe_args
from pipeline.config.recipe import LoadedRecipe, load_recipe
from pipeline.diagnostics import inputs, machine, network
from pipeline.diagnostics.result import FAIL, Finding, fail, line, run_check
from pipeline.distributed import collectives
from pipeline.distributed.launcher import Launch, read_launch
from pipeline.errors import one_line
from pipeline.runs.identity import run_folder
from shards.manifest import MANIFEST

Checks = dict[str, Callable[[], Finding]]


def main(args: Sequence[str]) -> None:
    """Check the machine and, if the command line names one, the recipe."""
    launch = read_launch()
    loaded = load_recipe(*parse_recipe_args(args)) if args else None
    # Joins the ranks, so it comes before the checks that use collectives.
    good = run_checks({"world": partial(network.check_world, launch)}, launch)
    # The ranks of one host share its memory, so the checks below need their number.
    hosts = collectives.gather_objects(platform.node())
    good &= run_checks(machine_checks(hosts.count(platform.node()), loaded), launch)
    if loaded:
        good &= run_checks(recipe_checks(loaded, launch), launch)
    collectives.destroy_process_group()
    if not good:
        sys.exit(1)


def run_checks(checks: Checks, launch: Launch) -> bool:
    """Run the checks on every rank, print a line for each, and return whether all passed on all ranks."""
    good = True
    for name, check in checks.items():
        finding = run_check(check)
        hosts, findings = zip(*gather_findings(name, finding), strict=True)
        failed = any(found.status == FAIL for found in findings)
        # Without a process group, rank 0 knows nothing of the others, so each rank prints its own failures.
        if launch.is_main or (failed and collectives.world_size() == 1):
            print(line(name, findings, hosts), flush=True)
        good &= not failed
    return good


def gather_findings(name: str, finding: Finding) -> list[tuple[str, Finding]]:
    """Return every rank's host and finding; if a rank has ended, print that and exit with code 1."""
    ours = (platform.node(), finding)
    try:
        return collectives.gather_objects(ours)
    except RuntimeError as error:
        print(line(name, [finding], [platform.node()]))
        lost = fail(f"the connection between the ranks is lost: {one_line(error, 300)}", "see each rank's last lines")
        print(line(name, [lost], [platform.node()]), flush=True)
        sys.exit(1)


def machine_checks(local_ranks: int, loaded: LoadedRecipe | None) -> Checks:
    """Return the checks of the machine, by name."""
    folder = run_folder(loaded) if loaded else Path("runs")
    return {
        "versions": machine.check_versions,
        "same versions": network.check_same_versions,
        "clocks": network.check_clocks,
        "GPU": machine.check_gpu,
        "precision": partial(machine.check_precision, loaded.recipe.precision if loaded else None),
        "cores": machine.check_cores,
        "memory": partial(machine.check_memory, local_ranks),
        "/dev/shm": partial(machine.check_shm, local_ranks),
        "all-reduce": network.check_all_reduce,
        "latency": network.check_latency,
        "decoding": partial(inputs.check_decoding, machine.gpu_device()),
        "run folder": partial(machine.check_disk, folder),
    }


def recipe_checks(loaded: LoadedRecipe, launch: Launch) -> Checks:
    """Return the checks of a recipe, by name."""
    recipe = loaded.recipe
    shards = Path(recipe.data.path)
    # Shards that are there already need no more space.
    least = 0 if (shards / MANIFEST).is_file() else machine.LEAST_DISK
    return {
        "data.path": partial(machine.check_disk, shards, least),
        "shards": partial(inputs.check_shards, loaded),
        "checksums": partial(inputs.check_checksums, recipe),
        "reading": partial(inputs.check_reading, recipe),
        "teacher": partial(inputs.check_teacher_source, loaded, launch),
        "batch": partial(inputs.check_batch, recipe),
    }


if __name__ == "__main__":
    entry(main)
