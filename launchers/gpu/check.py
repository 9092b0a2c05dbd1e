"""Run one check of the half hour and write its answer.

    python launchers/gpu/check.py NAME OUT FOLDER

NAME is a module in ``checks/``, OUT is the output folder of the half hour, and ``answer.json`` is written to FOLDER.
"""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path

HERE = Path(__file__).resolve().parent
# The root for the packages, this folder for its own modules, and tests/support for the losses' examples.
sys.path[:1] = [
    str(HERE.parents[1]),
    str(HERE),
    str(HERE.parents[1] / "tests"),
    str(HERE.parents[1] / "tests" / "support"),
]

from pipeline import nvjpeg

nvjpeg.load_first()  # as the commands do

from options import load_options
from supervise import ANSWER

if __name__ == "__main__":
    name, out, folder = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    answer = import_module(f"checks.{name}").check(load_options(out), folder)
    (folder / ANSWER).write_text(json.dumps(answer, indent=1) + "\n")
