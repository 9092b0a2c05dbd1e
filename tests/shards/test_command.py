"""What every command does around its own work."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

CUT_UNDER_A_MAP = """
import sys
from pathlib import Path
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/tests/support", sys.argv[1] + "/tests/shards"]
import numpy as np
from test_damaged_shards import write
from shards.read import SplitReader
from {module} import {start}

def main(words):
    folder = write(Path(sys.argv[2]))
    (view,) = SplitReader(folder, "train").bytes(np.array([3]))
    with (folder / "train-000001.tar").open("r+b") as file:
        file.truncate(0)
    view.sum()

{start}(main)
"""


@pytest.mark.parametrize(("module", "start"), [("shards.command", "run_main"), ("pipeline.cli", "entry")])
def test_a_tar_that_is_cut_while_it_is_read_ends_a_command_with_the_line_that_read_it(tmp_path, module, start):
    script = CUT_UNDER_A_MAP.format(module=module, start=start)
    done = subprocess.run(
        [sys.executable, "-c", script, ROOT, tmp_path / "shards"], capture_output=True, text=True, check=False
    )
    assert done.returncode < 0
    assert "Fatal Python error: Bus error" in done.stderr
    assert "in main" in done.stderr
