from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from gloo_ranks import Ranks
from hypothesis import settings

from pipeline import nvjpeg
from pipeline.distributed import signals

# A slow machine is no failure, and a test that passes here passes everywhere: the examples are the same each time.
settings.register_profile("steady", deadline=None, derandomize=True)
settings.load_profile("steady")

# A shell starts what it runs in the background with Ctrl-C ignored, and so would every command that a test starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
nvjpeg.load_first()  # as the commands do, before a test imports torchvision
# Two OpenMP threads wait for one another actively, and a test's tensors are small.
torch.set_num_threads(1)

pytest_plugins = ("drawn_shards", "main_job", "tiny_runs", "masked_runs")
"""Fixtures that several folders share; they lie in ``tests/support``."""

SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--endurance", action="store_true", help="run the tests that take minutes, too")
    parser.addoption("--long", action="store_true", help="run the tests that CI leaves out, too")
    parser.addoption("--record", metavar="WHY", help="store what test_counts.py counts, and in BENCHMARKS.md why")
    parser.addoption(
        "--published",
        type=Path,
        default=Path(__file__).parent / "published",
        help="folder of published values to check (default: tests/published)",
    )


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give each of N workers an N-th of the tests in their order, since files share fixtures; whoever is done helps."""
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what this machine or this command does not offer; the reasons stand at the end of the report."""
    missing = {
        "gpu": None if torch.cuda.is_available() else "needs a CUDA device",
        "endurance": None if config.getoption("--endurance") else "takes minutes; give --endurance",
        "long": None if config.getoption("--long") else "longer than CI; give --long",
        "shared": None if SHARED.is_dir() else "needs the real data sets beside the checkout",
    }
    for item in items:
        for marker, reason in missing.items():
            if reason and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))
    if "PYTEST_XDIST_WORKER" in os.environ:
        dear = dearest_fixture_of_files(items)
        items.sort(key=lambda item: dear[item.path])


def dearest_fixture_of_files(items: list[pytest.Item]) -> dict[Path, int]:
    """Return a place in the order by file: those that share a fixture that takes many seconds go to one worker."""
    found: dict[Path, int] = {}
    for item in items:
        names = set(getattr(item, "fixturenames", ()))
        place = 0 if "main_job" in names else 2 if names & {"ranks", "three_ranks", "several_ranks"} else 1
        known = found.get(item.path, 1)
        found[item.path] = place if known == 1 or place == 0 else known
    return found


@pytest.fixture(autouse=True, scope="session")
def _own_notes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep what commands remember between runs out of the user's own folder, and let no run draw its report."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("PIPELINE_REPORT", "0")  # thousands of runs; tests/reports draws
        yield


@pytest.fixture(autouse=True)
def _as_if_alone() -> Iterator[None]:
    """Begin a test with the same draws whatever ran before, and leave no notice to stop that another was given."""
    torch.manual_seed(0)
    yield
    signals._requested = False


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Two standing gloo processes: ``ranks(function, *args)`` runs ``function(rank, world, *args)`` on both."""
    both = Ranks(tmp_path_factory.mktemp("ranks"))
    yield both
    both.close()


@pytest.fixture(scope="session")
def three_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Three of them."""
    three = Ranks(tmp_path_factory.mktemp("three_ranks"), 3)
    yield three
    three.close()


@pytest.fixture(scope="session", params=["ranks", "three_ranks"])
def several_ranks(request: pytest.FixtureRequest) -> Ranks:
    """Two of them, then three: the test runs with either."""
    return request.getfixturevalue(request.param)
