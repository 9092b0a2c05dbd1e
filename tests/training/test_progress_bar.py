"""The bar of a terminal moves at every step; a log has a line a minute; neither changes a number of the run."""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import re
import struct
import termios
from collections.abc import Callable
from pathlib import Path
from threading import Thread

import pytest
from gloo_ranks import Ranks
from training_on_ranks import train

from pipeline.batch import Progress
from pipeline.config.recipe import StopConfig
from pipeline.training import progress_bar
from pipeline.training.journal import trace
from pipeline.training.progress_bar import SECONDS_PER_LINE, LogLines
from pipeline.training.stopping import last_step

Train = Callable[..., None]


class Terminal:
    """A pseudo-terminal as standard error, and what was drawn on it; pytest replaces one that a fixture makes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, columns: int = 160) -> None:
        self.master, self.slave = os.openpty()
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self.stream = os.fdopen(self.slave, "w")
        self.bytes = b""
        self.thread = Thread(target=self._read, daemon=True)  # it reads all the time: a terminal that is full blocks
        self.thread.start()
        monkeypatch.setattr("sys.stderr", self.stream)
        monkeypatch.setattr(progress_bar, "BAR_SECONDS", 0.0)

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # how Linux reports that the other end is closed
            while read := os.read(self.master, 4096):
                self.bytes += read

    def drawn(self) -> list[str]:
        """Close the terminal, and return every bar that was drawn, in order."""
        self.stream.close()
        self.thread.join()
        os.close(self.master)
        return [text.strip() for text in re.split(r"[\r\n]", self.bytes.decode()) if text.strip().startswith("epoch ")]


def steps_of(drawn: list[str]) -> list[tuple[int, int]]:
    """Return the step and the last step of each bar, without repetitions."""
    found = [re.search(r"(\d+)/(\d+) \|", text) for text in drawn]
    return list(dict.fromkeys((int(match[1]), int(match[2])) for match in found if match))


def test_the_bar_of_a_terminal_moves_at_every_step_and_shows_what_is_known(
    run_train: Train, recipes: Path, monkeypatch: pytest.MonkeyPatch
):
    terminal = Terminal(monkeypatch)
    run_train("ce.yaml", "journal.every_steps=100")
    drawn = terminal.drawn()
    assert steps_of(drawn) == [(step, 10) for step in range(11)]
    first_epoch = [text for text in drawn if text.startswith("epoch 1/2 4/10 ")]
    lines = trace(recipes / "runs" / "ce" / "journal.jsonl")
    assert f"loss {lines[0]['total']:.3f} train {lines[0]['top1']:.1f} lr 0.0" in first_epoch[0]
    assert re.search(r"\| \d\d:\d\d<\d\d:\d\d, loss", first_epoch[0])
    assert "img/s" in first_epoch[0]
    assert "val" not in first_epoch[0]
    assert any(text.startswith("epoch 1/2 validating 5/10 ") for text in drawn)
    first, second = (line["top1"] for line in lines if "top5" in line)
    assert f" val {first:.2f} best {first:.2f} " in next(text for text in drawn if text.startswith("epoch 2/2 7/10 "))
    assert drawn[-1].startswith("epoch 2/2 10/10 ")
    assert f" val {second:.2f} best {max(first, second):.2f} " in drawn[-1]


def test_the_bar_ends_where_this_command_ends_and_goes_on_from_there(run_train: Train, monkeypatch: pytest.MonkeyPatch):
    terminal = Terminal(monkeypatch)
    run_train("ce.yaml", "stop.steps=3")
    run_train("ce.yaml", "stop.epoch=1")
    assert steps_of(terminal.drawn()) == [*((step, 3) for step in range(4)), *((step, 5) for step in (3, 4, 5))]


def test_a_narrow_terminal_shows_the_loss_first(run_train: Train, monkeypatch: pytest.MonkeyPatch):
    terminal = Terminal(monkeypatch, columns=60)
    run_train("ce.yaml", "stop.steps=4")
    last = terminal.drawn()[-1]
    assert " loss " in last
    assert len(last) <= 60


def test_a_log_has_a_line_for_each_epoch_and_no_carriage_return_and_the_same_journal(
    run_train: Train, recipes: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    run_train("ce.yaml", "folder=runs/log")
    captured = capfd.readouterr()
    assert "\r" not in captured.out + captured.err
    found = [line for line in captured.out.splitlines() if line.startswith("step ")]
    assert [line.partition(":")[0] for line in found] == [
        "step 0/10, epoch 1/2",
        "step 5/10, epoch 1/2",
        "step 10/10, epoch 2/2",
    ]
    assert all(re.search(r"loss \d.* lr 0\.\d+ \d+ img/s .*ETA 00:0\d$", line) for line in found[1:])
    Terminal(monkeypatch, columns=80)
    run_train("ce.yaml", "folder=runs/terminal")
    log, terminal = (trace(recipes / "runs" / name / "journal.jsonl") for name in ("log", "terminal"))
    assert log == terminal


def test_a_command_that_has_no_step_left_prints_no_line_of_a_step(run_train: Train, capsys: pytest.CaptureFixture[str]):
    run_train("ce.yaml", "stop.steps=3")
    capsys.readouterr()
    run_train("ce.yaml", "stop.steps=3")
    assert "step 3/" not in capsys.readouterr().out


def seconds_later(seconds: list[float]) -> Callable[[], float]:
    """Return a clock that stands at the sum of ``seconds`` so far."""
    return lambda: sum(seconds)


def test_a_log_has_a_line_each_minute_with_the_time_that_is_left(capsys: pytest.CaptureFixture[str]):
    passed = [1000.0]
    progress = Progress(steps_per_epoch=1000)
    with LogLines(progress, epochs=2, last_step=2000, clock=seconds_later(passed)) as log:
        assert capsys.readouterr().out == "step 0/2000, epoch 1/2: training begins\n"
        log.values.loss, log.values.train, log.values.images_per_second = 2.5, 12.0, 640.0
        for _ in range(40):
            passed.append(7.0)
            progress = progress.after(64)
            log.tick(progress, rate=0.1)
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition("/")[0] for line in lines] == ["step 9", "step 18", "step 27", "step 36"]
    assert 9 * 7 >= SECONDS_PER_LINE > 8 * 7
    assert lines[0] == "step 9/2000, epoch 1/2: loss 2.500 train 12.0 lr 0.1 640 img/s ETA 3:52:17"


@pytest.mark.parametrize(
    ("stop", "expected"),
    [({}, 100), ({"steps": 30}, 30), ({"epoch": 2}, 20), ({"epoch": 2, "steps": 30}, 20), ({"steps": 300}, 100)],
)
def test_the_last_step_is_the_earliest_end(stop: dict[str, int], expected: int):
    assert last_step(StopConfig(**stop), steps_per_epoch=10, total_steps=100) == expected


def printed_lines(rank: int, world: int, folder: Path, words: list[str]) -> str:
    """Train so, and return what this rank printed."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        train(rank, world, folder, words)
    return printed.getvalue()


def test_of_two_ranks_the_first_prints(ranks: Ranks, recipes: Path):
    first, second = ranks(printed_lines, recipes, ["ce.yaml", "stop.steps=2"])
    assert "folder     runs/ce: new\n" in first
    assert "batch      12 images = 2 ranks × 6 rows × accumulation 1\n" in first
    assert "step 2/2, epoch 1/2: loss " in first
    assert not [word for word in ("recipe", "folder", "batch", "step", "epoch") if word in second]
