"""The project's commands as forked children of one process that has imported them: a tenth of a second, not five.

    python tests/faults/forking.py ROOT

reads requests, a JSON object a line, and answers each with what became of its child (``forks.Done``). A child runs the
script itself, as ``__main__``, in its own folder, session and limits.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import json
import os
import resource
import runpy
import select
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn, TextIO

SCRIPTS = ("train", "evaluate", "cache_teacher", "compare", "doctor")
SHARDS = ("prepare_demo", "prepare_imagenet", "prepare_cifar", "verify")
LONGEST = 10_000
"""Characters of a stream's head, and of its tail, that are kept."""


def serve(root: Path, requests: TextIO, answers: TextIO) -> None:
    """Import the commands of the checkout, and answer requests until there are no more."""
    sys.path[:0] = [str(root)]
    for name in (*(f"pipeline.{name}" for name in SCRIPTS), *(f"shards.{name}" for name in SHARDS)):
        found = Path(__import__(name, fromlist=["main"]).__file__ or "")
        if not found.is_relative_to(root):
            sys.exit(f"{name} was imported from {found}, not from {root}")
    from pipeline.data import dali  # noqa: F401  (its library takes seconds)

    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in requests:
        request = json.loads(line)
        done = answer(root, request)
        if request["learn"]:
            _import(Path(request["aside"]) / "modules")
        print(json.dumps(done), file=answers, flush=True)


def _import(names: Path) -> None:
    """Import what a child had imported, so that no later one has to."""
    for name in names.read_text().split() if names.is_file() else ():
        with contextlib.suppress(Exception):
            __import__(name)
    gc.freeze()


def answer(root: Path, request: dict[str, Any]) -> dict[str, Any]:
    """Run a child to its end, or to its limit."""
    began, aside = time.monotonic(), Path(request["aside"])
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    child = os.fork()
    if child == 0:
        _child(root, request, aside)
    ended = _wait(child, request["seconds"])
    status, usage = os.wait4(child, 0)[1:]
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # what it left running
    code = os.waitstatus_to_exitcode(status)
    calls = aside / "calls"
    return {
        "code": None if code < 0 else code,
        "signal": -code if code < 0 and ended else None,
        "late": not ended,
        "seconds": round(time.monotonic() - began, 3),
        "processor": round(usage.ru_utime + usage.ru_stime, 3),
        "calls": int(calls.read_text()) if calls.is_file() else None,
        "out": _text(aside / "out"),
        "err": _text(aside / "err"),
    }


def _wait(child: int, seconds: float) -> bool:
    """Wait for the child's end; where it does not come, kill it and its group, and return False.

    One that got less than half of a core has three times as long: on a busy machine it waits for its turn.
    """
    descriptor = os.pidfd_open(child)
    try:
        for more in (seconds, 2 * seconds):
            if select.select([descriptor], [], [], more)[0]:
                return True
            if _processor(child) > seconds / 2:
                break
    finally:
        os.close(descriptor)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    os.kill(child, signal.SIGKILL)
    return False


def _processor(child: int) -> float:
    """Return the seconds of a core that the child has used."""
    fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _text(path: Path) -> str:
    text = path.read_bytes().decode(errors="replace") if path.is_file() else ""
    return text if len(text) < 2 * LONGEST else text[:LONGEST] + "\n…\n" + text[-LONGEST:]


def _child(root: Path, request: dict[str, Any], aside: Path) -> NoReturn:
    """Be the command; never return."""
    os.setsid()
    for number, target in ((0, os.devnull), (1, aside / "out"), (2, aside / "err")):
        os.dup2(os.open(target, os.O_RDWR | os.O_CREAT | os.O_TRUNC), number)
    sys.stdin, sys.stdout, sys.stderr = (open(n, mode) for n, mode in ((0, "r"), (1, "w"), (2, "w")))  # noqa: SIM115
    os.chdir(request["folder"])
    script = str(root / request["script"])
    sys.argv, sys.path = [script, *request["words"]], [str(Path(script).parent), *sys.path]
    os.environ.update(request["environment"])
    limit = request["memory"] + _virtual_bytes()
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if request["fault"]:
        folder, nth, kind = request["fault"]
        storage = ctypes.CDLL(None)
        storage.storage_arm(os.fsencode(folder), ctypes.c_long(nth), kind)
    code = _run(script)
    if request["fault"]:
        (aside / "calls").write_text(str(storage.storage_count()))
    if request["learn"]:
        (aside / "modules").write_text(" ".join(sys.modules))
    os._exit(code)


def _run(script: str) -> int:
    """Run the script to its end and return its exit code, as Python itself would do."""
    code = 0
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    return code


def _virtual_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


if __name__ == "__main__":
    # What a command prints must not be taken for an answer.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(Path(sys.argv[1]).resolve(), sys.stdin, answers)
    os._exit(0)  # the libraries' own farewells are long
