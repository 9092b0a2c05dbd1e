"""A command whose terminal, pipe or log is lost goes on to its end, and says so where it still can."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TextIO

import pytest
from architecture import ENTRY_POINTS
from tqdm import tqdm

from pipeline.cli import answer_help, entry, print_answer

ROOT = Path(__file__).resolve().parents[2]


def broken_pipe() -> TextIO:
    read, write = os.pipe()
    os.close(read)
    return os.fdopen(write, "w")


def full_disk() -> TextIO:
    return Path("/dev/full").open("w")


def closed() -> TextIO:
    with Path(os.devnull).open("w") as file:
        return file


def nothing() -> None:
    return None


LOST = [broken_pipe, full_disk, closed, nothing]


@pytest.mark.parametrize("lost", LOST)
@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_the_command_ends_as_it_would(
    name: str,
    lost: Callable[[], TextIO | None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    done = []

    def main(words: Sequence[str]) -> None:
        for step in tqdm(range(3), disable=False, mininterval=0):
            print(f"step {step}", flush=True)
            print(f"note {step}", file=sys.stderr, flush=True)
            tqdm.write(f"epoch {step}")
            done.append(step)

    monkeypatch.setattr(sys, "argv", ["train.py"])
    stream = lost()
    with monkeypatch.context() as patched:
        patched.setattr(sys, name, stream)
        entry(main)
    assert done == [0, 1, 2]
    told = capsys.readouterr()
    still = told.err if name == "stdout" else told.out
    title = "standard output" if name == "stdout" else "standard error"
    assert still.count(f"warning: {title} is lost") == (0 if lost is nothing else 1)
    if stream is not None:
        stream.close()


def test_without_either_it_goes_on_too(monkeypatch: pytest.MonkeyPatch):
    done = []

    def main(words: Sequence[str]) -> None:
        print("words" * 10_000, flush=True)
        print("words" * 10_000, file=sys.stderr, flush=True)
        done.append(True)

    monkeypatch.setattr(sys, "argv", ["train.py"])
    with monkeypatch.context() as patched:
        streams = broken_pipe(), broken_pipe()
        patched.setattr(sys, "stdout", streams[0])
        patched.setattr(sys, "stderr", streams[1])
        entry(main)
    assert done
    for stream in streams:
        stream.close()


def test_a_reader_that_leaves_before_the_end_of_an_answer_is_no_loss(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    text = "word " * 10_000
    answers = {"--help": lambda: answer_help(text), "--keys": lambda: entry(lambda _: print_answer(text))}
    for option, answer in answers.items():
        monkeypatch.setattr(sys, "argv", ["train.py", option])
        with monkeypatch.context() as patched, broken_pipe() as stream, suppress(SystemExit):
            patched.setattr(sys, "stdout", stream)
            answer()
        assert capsys.readouterr().err == ""


def test_help_is_shown_without_the_libraries_that_take_seconds(tmp_path: Path):
    """A module that cannot be imported stands in the place of torch."""
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    for command in sorted(ENTRY_POINTS):
        script = ROOT / "pipeline" / f"{command}.py"
        command_line = [sys.executable, str(script), "--help"]
        done = subprocess.run(command_line, env=environment, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        assert f"pipeline/{command}.py" in done.stdout


def test_an_answer_that_a_full_disk_loses_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(sys, "argv", ["train.py", "--keys"])
    with monkeypatch.context() as patched, full_disk() as stream:
        patched.setattr(sys, "stdout", stream)
        entry(lambda _: print_answer("word " * 10_000))
    assert capsys.readouterr().err.count("warning: standard output is lost") == 1


def test_a_log_that_has_room_again_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = (tmp_path / "log").open("w")
    write, room = file.write, []

    class Log:
        def write(self, text: str) -> int:
            if not room:
                raise OSError(28, "No space left on device")
            return write(text)

        def flush(self) -> None:
            file.flush()

    def main(words: Sequence[str]) -> None:
        print("dropped")
        room.append(True)
        print("kept")

    monkeypatch.setattr(sys, "argv", ["train.py"])
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", Log())
        entry(main)
    file.close()
    assert "kept" in (tmp_path / "log").read_text()


def test_an_error_is_still_one_line_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def main(words: Sequence[str]) -> None:
        print("words", flush=True)
        raise ValueError("batch: too small")

    monkeypatch.setattr(sys, "argv", ["train.py"])
    with monkeypatch.context() as patched, full_disk() as stream:
        patched.setattr(sys, "stdout", stream)
        with pytest.raises(SystemExit) as end:
            entry(main)
    assert end.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == "error: batch: too small"
