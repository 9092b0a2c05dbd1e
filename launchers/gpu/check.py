"""Run one check of the half hour and write what it found.

python launchers/gpu/check.py NAME OUT FOLDER

NAME is a file of ``checks/``; OUT the half hour's folder, FOLDER the one for ``answer.json``.
"""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:1] = [
    str(HERE.parents[1]),
    str(HERE),
    str(HERE.parents[1] / "tests"),
    str(HERE.parents[1] / "tests" / "support"),
]

from options import load_options
from supervise import ANSWER

if __name__ == "__main__":
    name, out, folder = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    answer = import_module(f"checks.{name}").check(load_options(out), folder)
    (folder / ANSWER).write_text(json.dumps(answer, indent=1) + "\n")
