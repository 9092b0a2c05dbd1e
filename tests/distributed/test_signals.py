"""A scheduler's signal, whenever it comes: nothing is lost or hangs, and the run folder says that it wants to go on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from architecture import ENTRY_POINTS

from pipeline.batch import Progress
from pipeline.config.recipe import StopConfig
from pipeline.distributed import signals
from pipeline.errors import ROOT
from pipeline.training.stopping import SIGNAL, StopCondition

Train = Callable[..., None]
TRAIN = [sys.executable, str(ROOT / "pipeline" / "train.py")]


def listens(process: subprocess.Popen[str]) -> bool:
    """Whether a process has a handler of its own for SIGUSR1."""
    for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
        if line.startswith("SigCgt:"):
            return bool(int(line.split()[1], 16) >> (signal.SIGUSR1 - 1) & 1)
    return False


def start(folder: Path, recipe: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*TRAIN, recipe], cwd=folder, env=environment, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("first", [signal.SIGUSR1, signal.SIGINT])
def test_a_signal_during_the_imports_and_every_one_that_follows_lets_the_command_end_in_peace(
    recipes: Path, first: signal.Signals
):
    with start(recipes, "ce.yaml") as process:
        while not listens(process):
            time.sleep(0.002)
        process.send_signal(first)
        while process.poll() is None:
            process.send_signal(signal.SIGUSR1)
            time.sleep(0.05)
        assert process.stdout is not None
        told = process.stdout.read().splitlines()
        assert told[-1] == "runs/ce: stopped after step 0 (a signal to stop); the same command continues"
    assert process.returncode == 0
    assert (recipes / "runs" / "ce" / "preempted").exists()


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGINT])
def test_a_signal_while_a_teacher_is_made_ends_both_and_the_run_wants_to_go_on(recipes: Path, number: signal.Signals):
    with start(recipes, "ddkd.yaml") as process:
        assert process.stdout is not None
        assert any("$ python" in line and "teacher.yaml" in line for line in process.stdout)
        process.send_signal(number)  # the teacher's process is hardly there
        told = process.stdout.read()
    assert process.returncode == 0
    assert told.endswith("was stopped before its end; the same command continues\n")
    assert (recipes / "runs" / "ddkd" / "preempted").exists()
    assert not list(recipes.rglob("result.json"))


STUCK = """
import ctypes
from pipeline.distributed import signals
signals.install()
print("up", flush=True)
mutex, lock = ctypes.create_string_buffer(64), ctypes.CDLL(None).pthread_mutex_lock
lock(mutex)
lock(mutex)
"""
"""A process whose main thread waits within a library, where no handler runs, as for a rank that is gone."""


def test_a_second_ctrl_c_ends_even_a_process_that_waits_within_a_library():
    command = [sys.executable, "-c", STUCK]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)  # as a launcher repeats it
        time.sleep(signals.SAME_KEY_PRESS_SECONDS)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.communicate() == ("", signals.KILLED_MESSAGE.decode())
    assert process.returncode == 128 + signal.SIGINT


def test_what_runs_in_the_background_of_a_shell_goes_on_ignoring_the_terminal():
    code = "import signal; from pipeline.distributed import signals; signals.install(); print(signal.getsignal(2).name)"
    command = ["bash", "-c", 'trap "" INT; exec "$0" -c "$1"', sys.executable, code]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout == "SIG_IGN\n"


def test_a_command_with_nothing_to_save_ends_by_ctrl_c_in_one_line():
    code = "import time; from pipeline.distributed import signals; signals.exit_quietly_on_interrupt()"
    command = [sys.executable, "-c", f"{code}; print(1, flush=True); time.sleep(60)"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert process.communicate() == ("", "stopped by Ctrl-C\n")
    assert process.returncode == 128 + signal.SIGINT


@pytest.mark.parametrize("name", sorted(ENTRY_POINTS))
def test_every_command_hears_signals_before_it_loads_what_takes_time(name: str):
    head, _, _ = (ROOT / "pipeline" / f"{name}.py").read_text().partition("from collections.abc")
    assert "    signals.install()" in head or "    signals.exit_quietly_on_interrupt()" in head


def test_the_word_of_a_preemption_is_gone_when_the_run_goes_on(recipes: Path, run_train: Train):
    folder = recipes / "runs" / "ce"
    folder.mkdir(parents=True)
    (folder / "preempted").touch()
    run_train("ce.yaml", "stop.steps=1")
    assert not (folder / "preempted").exists()


def test_ranks_ask_at_the_beginning_and_every_poll_steps(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(signals, "install", lambda: None)
    monkeypatch.setattr(signals, "_requested", True)
    monkeypatch.setattr("pipeline.distributed.collectives.world_size", lambda: 2)
    monkeypatch.setattr("pipeline.distributed.collectives.any_rank", lambda flag: flag)
    stopping = StopCondition(StopConfig(), poll_steps=10)
    assert stopping.reason(Progress(100, 7), beginning=True) == SIGNAL
    assert [step for step in range(1, 31) if stopping.reason(Progress(100, step))] == [10, 20, 30]
