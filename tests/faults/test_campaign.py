"""A short campaign of faults: what holds today, and what is known not to.

``known.txt`` lists the breaches: part, kind and judgement. One that is mended is to be taken off the list.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import campaign
import pytest
import shim
from forks import Forks
from judge import GOOD, ended

KNOWN = Path(__file__).with_name("known.txt")
ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.endurance,
    pytest.mark.skipif(bool(shim.missing()), reason=str(shim.missing())),
    pytest.mark.timeout(900),
]


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    folder = tmp_path_factory.mktemp("forks")
    with Forks(ROOT, folder, shim.build(folder)) as forks:
        yield forks


@pytest.fixture(scope="module")
def cases(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> list[campaign.Case]:
    return list(campaign.run_campaign(forks, tmp_path_factory.mktemp("campaign"), campaign.SHORT, seed=0))


PLANTED = {
    "accepted": "",
    "one line": "print('error: x', file=sys.stderr); sys.exit(2)",
    "many lines": "sys.exit(2)",
    "traceback": "raise KeyError('x')",
    "hang": "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM]); time.sleep(60)",
    "abort": "os.abort()",
    "reported": "print('a.tar is missing'); sys.exit(1)",
}


@pytest.mark.parametrize("judgement", PLANTED)
def test_a_forked_command_ends_as_its_script_does(forks: Forks, tmp_path: Path, judgement: str):
    script = tmp_path / "planted.py"
    script.write_text(f"import os, signal, sys, time\n{PLANTED[judgement]}\n")
    assert ended(forks.run(str(script), (), tmp_path, seconds=2 if judgement == "hang" else 20)) == judgement


def test_a_forked_command_has_its_words_its_folder_its_environment_and_a_bound_of_memory(forks: Forks, tmp_path: Path):
    script = tmp_path / "planted.py"
    script.write_text("import os, sys\nprint(sys.argv[1:], os.getcwd(), os.environ['X'], __name__)\nbytes(1 << 40)\n")
    done = forks.run(str(script), ("a=1", "b"), tmp_path, X="y")
    assert done.out == f"['a=1', 'b'] {tmp_path} y __main__\n"
    assert done.err.endswith("MemoryError\n")


def known() -> set[tuple[str, ...]]:
    lines = [line for line in KNOWN.read_text().splitlines() if line and not line.startswith("#")]
    return {tuple(part.strip() for part in line.split("|")) for line in lines}


def test_no_breach_is_new(cases: list[campaign.Case]):
    new = [case for case in cases if case.judgement not in GOOD and case.key not in known()]
    assert not new, "\n".join(f"{' | '.join(case.key)}  (case {case.number}: {case.what})\n{case.err}" for case in new)


def test_every_breach_that_is_known_is_still_there(cases: list[campaign.Case]):
    mended = known() - {case.key for case in cases}
    assert not mended, "mended, take them off known.txt:\n" + "\n".join(" | ".join(key) for key in sorted(mended))


def test_nothing_that_lies_in_data_was_executed_and_every_case_was_made(cases: list[campaign.Case]):
    assert {case.judgement for case in cases}.isdisjoint({"canary executed", "not run"})


def test_every_kind_of_bad_input_took_its_turn(cases: list[campaign.Case]):
    kinds, _ = campaign.PARTS["inputs"]
    assert {case.kind for case in cases if case.part == "inputs"} == set(kinds)
