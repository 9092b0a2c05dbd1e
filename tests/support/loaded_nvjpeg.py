"""Which nvJPEG this process has once torchvision was imported and DALI has decoded: to be run by ``null_gpu.python``.

    loaded_nvjpeg.py [SCRIPT WORDS …]       after that script, run as a command; without one torchvision comes first

Its last line is JSON. DALI does not know the GPU that computes nothing, so its decoder is one of the CPU.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from contextlib import suppress
from pathlib import Path


def main(words: list[str]) -> None:
    """Run the script, decode, and print which nvJPEG was loaded first, and the files of all."""
    if words:
        sys.argv = words
        with suppress(SystemExit):
            runpy.run_path(words[0], run_name="__main__")
    import torch
    import torchvision  # noqa: F401

    from pipeline import nvjpeg
    from pipeline.data import dali
    from pipeline.data.config import Config
    from pipeline.diagnostics.inputs import check_decoding
    from pipeline.runs.versions import versions

    gpu = torch.device("cuda", 0)
    decoding = check_decoding(torch.device("cpu"))
    assert decoding.status == "ok", decoding
    mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
    found = {
        "version": nvjpeg.version(),
        "boxes": dali.decodes_boxes(gpu),
        "recorded": versions()["nvjpeg"],
        "of a cache": dali.dali_fingerprint(Config(path="", size=32, mean=(0, 0, 0), std=(1, 1, 1)), gpu)["nvjpeg"],
        "files": sorted(Path(file).name for file in mapped if "/libnvjpeg." in file),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(0)  # threads of libraries that believe in their GPU may not end
