"""A campaign of faults against a checkout's commands: kills, storage errors, bad input, damaged files.

    python tests/faults/campaign.py [PART …] [--root CHECKOUT] [--seed S] [--count N] [--out FOLDER]
    python tests/faults/campaign.py PART --only NUMBER [--keep FOLDER]     one case again, with what it said

Parts are inputs, damages, errors and kills. A case follows from part, seed and number alone. Writes ``cases.jsonl``, a
line a case, and ``report.md``, a table of the judgements and the breaches by kind.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

HERE = Path(__file__).resolve().parent
if __name__ == "__main__":
    sys.path[1:1] = [str(HERE.parent / "support"), str(HERE.parents[1])]

import bad_archives  # noqa: F401  (each of the three registers its kinds)
import bad_files  # noqa: F401
import bad_recipes  # noqa: F401
import damages
import faults
import shim
from forks import Done, Forks
from grammar import CANARY, KINDS
from judge import GOOD, damage_judgement, input_judgement
from world import World, make

COUNTS = {"inputs": 550, "damages": 132, "errors": 45, "kills": 42}
"""Cases of a whole campaign."""
SHORT = {"inputs": 50, "damages": 26, "errors": 8, "kills": 5}
"""Cases of the short one: of bad input, one of each kind."""


@dataclass(frozen=True)
class Case:
    """What was done, and what came of it."""

    part: str
    number: int
    kind: str
    what: str
    judgement: str
    code: int | None
    signal: int | None
    seconds: float
    processor: float
    err: str

    @property
    def key(self) -> tuple[str, str, str]:
        """What a list of what is known goes by."""
        return self.part, self.kind, self.judgement


Found = tuple[str, Done, str]
"""What was done, how the command ended, and the judgement."""


def bad_input(world: World, random: Random, name: str) -> Found:
    """Write an input of that kind, and run what reads it."""
    folder = world.copy()
    trial = KINDS[name].write(random, folder)
    done = world.forks.run(trial.script, trial.words, folder, **trial.environment)
    what = f"{trial.what} [{trial.script} {' '.join(trial.words)}]"
    canary = next(iter(folder.rglob(f"{CANARY}*")), folder / CANARY)
    return what, done, input_judgement(done, canary, KINDS[name].strict)


def damage(world: World, random: Random, name: str) -> Found:
    """Damage a folder, and run what reads it."""
    what, done, by = damages.damaged(world, random, name)
    return what, done, damage_judgement(done, **by)


PARTS: dict[str, tuple[list[str], Callable[[World, Random, str], Found]]] = {
    "inputs": (list(KINDS), bad_input),
    "damages": (list(damages.KINDS), damage),
    "errors": (list(faults.ERRORS), faults.failed),
    "kills": (list(faults.KILLS), faults.killed),
}


def run_case(world: World, part: str, number: int, seed: int) -> Case:
    """Run the case of that number; one that could not be made is a breach of the campaign's own."""
    kinds, run = PARTS[part]
    kind = kinds[number % len(kinds)]
    try:
        what, done, judgement = run(world, Random(f"{part} {seed} {number}"), kind)
    except (LookupError, ValueError, TypeError, OSError):
        return Case(part, number, kind, "", "not run", None, None, 0.0, 0.0, traceback.format_exc())
    what = what.encode(errors="backslashreplace").decode()
    ends = (done.code, done.signal, done.seconds, done.processor)
    return Case(part, number, kind, what[:500], judgement, *ends, done.err[-1500:])


def run_campaign(forks: Forks, folder: Path, counts: dict[str, int], seed: int) -> Iterator[Case]:
    """Run the first cases of each part, in a folder that is made for it."""
    world = make(forks, folder)
    for part, count in counts.items():
        for number in range(count):
            yield run_case(world, part, number, seed)


# -- the report -------------------------------------------------------------------------------------------------------


def report(cases: list[Case]) -> str:
    """Return the judgements by part, and the breaches by kind, each with its first case."""
    lines = ["| part | cases | judgement | |", "|---|---|---|---|"]
    for part in PARTS:
        own = [case for case in cases if case.part == part]
        for judgement, count in Counter(case.judgement for case in own).most_common():
            mark = "" if judgement in GOOD else "breach"
            lines.append(f"| {part} | {count} of {len(own)} | {judgement} | {mark} |")
    breaches = [case for case in cases if case.judgement not in GOOD]
    lines += [
        "",
        f"{len(breaches)} breaches of {len(cases)} cases.",
        "",
        "| part | kind | judgement | cases | such as |",
    ]
    lines += ["|---|---|---|---|---|", *_by_kind(breaches)]
    taken = [case for case in cases if case.judgement in ("accepted", "said")]
    lines += ["", "Taken, or gone on with after a word: harmless or not is for a reader to say.", ""]
    lines += [f"- {case.part} {case.number}, {case.kind}: {_cell(case.what)}" for case in taken]
    return "\n".join(lines) + "\n"


def _by_kind(cases: Iterable[Case]) -> Iterator[str]:
    groups: dict[tuple[str, str, str], list[Case]] = {}
    for case in cases:
        groups.setdefault(case.key, []).append(case)
    for (part, kind, judgement), own in sorted(groups.items(), key=lambda item: -len(item[1])):
        last = (own[0].err.strip().splitlines() or [""])[-1]
        such = f"{own[0].number}: {own[0].what} → {last}"
        yield f"| {part} | {kind} | {judgement} | {len(own)} | {_cell(such)} |"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")[:240]


# -- the command ------------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Run a campaign of faults against a checkout's commands.")
    parser.add_argument(
        "parts", nargs="*", choices=[*PARTS, []], metavar="PART", help=f"of {', '.join(PARTS)} (default: all)"
    )
    parser.add_argument("--root", type=Path, default=HERE.parents[1], help="the checkout (default: this one)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, help="cases of each part")
    parser.add_argument("--only", type=int, metavar="NUMBER", help="one case, with its error output")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="with --only: where to copy what the case left")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/faults"), help="folder of the report (default: %(default)s)"
    )
    return parser


def main() -> None:
    """Run the command."""
    options = _parser().parse_args()
    parts = options.parts or list(PARTS)
    if reason := shim.missing():
        sys.exit(reason)
    with tempfile.TemporaryDirectory() as place:
        if options.only is not None:
            _one(Path(place), parts[0], options)
            return
        counts = {part: options.count or COUNTS[part] for part in parts}
        options.out.mkdir(parents=True, exist_ok=True)
        cases, folder = [], Path(place)
        with (
            (options.out / "cases.jsonl").open("w") as file,
            Forks(options.root, folder, shim.build(folder)) as forks,
        ):
            for case in run_campaign(forks, folder, counts, options.seed):
                cases.append(case)
                print(json.dumps(asdict(case)), file=file, flush=True)
                if case.judgement not in GOOD:
                    print(f"{case.part} {case.number}: {case.judgement}: {case.kind}: {_cell(case.what)}", flush=True)
    (options.out / "report.md").write_text(report(cases))
    print(f"{options.out}: {sum(case.judgement not in GOOD for case in cases)} breaches of {len(cases)} cases")


def _one(place: Path, part: str, options: Any) -> None:
    with Forks(options.root, place, shim.build(place)) as forks:
        world = make(forks, place)
        case = run_case(world, part, options.only, options.seed)
        if options.keep:
            shutil.copytree(world.scratch, options.keep)
    print(json.dumps(asdict(case), indent=1))


if __name__ == "__main__":
    main()
