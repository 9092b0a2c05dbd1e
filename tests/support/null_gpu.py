"""Builds the GPU that computes nothing (``tests/nullgpu/null.c``) for this environment's torch; starts Python on it.

    python tests/support/null_gpu.py launchers/gpu/half_hour.py 1 2 3 --rehearse out=/tmp/half_hour

runs a script there, with all that it starts: what the host does is real, and no number is. What has to be otherwise for
that is in ``tests/nullgpu/hook/sitecustomize.py``. Tests that need a GPU are only collected: they compare numbers.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from one_core import one_core

SOURCE = Path(__file__).resolve().parents[1] / "nullgpu" / "null.c"
ROOT = SOURCE.parents[2]
LIBRARIES = ("libc10_cuda", "libtorch_cuda", "libtorch_cuda_linalg", "libtorch_python", "libtorch_cpu", "libtorch")
DRIVER = """
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *on) { if (flags) *flags = 0; *on = 1; return 0; }
int cuGetErrorString(int error, const char **text) { *text = "null GPU"; return 0; }
int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int *version) { *version = 13020; return 0; }
"""


def missing() -> str | None:
    """Return why it cannot be built here; None if it can."""
    if shutil.which("gcc") is None or shutil.which("nm") is None:
        return "needs gcc and nm"
    if torch.version.cuda is None or not (_site() / "nvidia" / "cu13" / "include").is_dir():
        return "needs a CUDA 13 build of torch"
    return None


def build(folder: Path) -> dict[str, str]:
    """Compile it into ``folder``, in two seconds; return the environment in which Python has that GPU.

    What torch's libraries leave undefined and ``null.c`` does not define succeeds and does nothing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    site, lib = _site(), Path(torch.__file__).parent / "lib"
    includes = [f"-I{site / 'nvidia/cu13/include'}", f"-I{site / 'triton/backends/nvidia/include'}"]  # triton has crt/
    _gcc("-c", "-fPIC", *includes, str(SOURCE), "-o", str(folder / "null.o"))
    wanted = {name for library in LIBRARIES for name in _undefined(lib / f"{library}.so")}
    runtime = {name for name in wanted if re.match(r"(__)?cuda|cublas", name)} - _defined(folder / "null.o")
    (folder / "rest.c").write_text(_succeeding(runtime))
    _gcc(
        "-shared",
        "-fPIC",
        "-fno-builtin",
        f"-I{folder}",
        *(str(folder / name) for name in ("null.o", "rest.c")),
        "-lpthread",
        "-o",
        str(folder / "libnull.so"),
    )
    own = set(re.findall(r"int (cu\w+)\(", DRIVER))
    driver = {name for name in _undefined(lib / "libcaffe2_nvrtc.so") if re.match(r"cu[A-Z]", name)} - own
    (folder / "driver.c").write_text(DRIVER + _succeeding(driver))
    soname = "-Wl,-soname,libcuda.so.1"
    _gcc("-shared", "-fPIC", soname, str(folder / "driver.c"), "-o", str(folder / "libcuda.so.1"))
    return {"LD_LIBRARY_PATH": str(folder), "LD_PRELOAD": str(folder / "libnull.so")}


def python(
    environment: dict[str, str], *words: str, folder: Path, seconds: float = 280
) -> subprocess.CompletedProcess[str]:
    """Run Python with that GPU, on this tree, in ``folder``."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support")])
    own = {**os.environ, **environment, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *words]
    with one_core():
        return subprocess.run(
            command, cwd=folder, env=own, capture_output=True, text=True, timeout=seconds, check=False
        )


def main(words: Sequence[str]) -> int:
    """Run a script with that GPU, where this process is, and return its exit code."""
    if reason := missing():
        sys.exit(f"error: {reason}")
    path = os.pathsep.join([str(SOURCE.parent / "hook"), str(ROOT / "tests" / "support")])
    own = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTEST_ADDOPTS": "--collect-only"}
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, **build(Path(folder)), **own}
        return subprocess.run([sys.executable, *words], env=environment, check=False).returncode


def _site() -> Path:
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parents[1]


def _gcc(*words: str) -> None:
    subprocess.run(["gcc", "-O1", "-w", *words], check=True)


def _undefined(library: Path) -> set[str]:
    """Return the functions of CUDA that a library expects of others; none where there is no such library."""
    if not library.is_file():
        return set()
    return {name for name in _names("-D", "--undefined-only", str(library)) if re.match(r"(__)?cu[A-Zdb]", name)}


def _defined(library: Path) -> set[str]:
    return set(_names("--defined-only", str(library)))


def _names(*words: str) -> list[str]:
    done = subprocess.run(["nm", *words], check=True, capture_output=True, text=True)
    return [line.split()[-1].partition("@")[0] for line in done.stdout.splitlines() if line]


def _succeeding(names: set[str]) -> str:
    return "".join(f"int {name}(void) {{ return 0; }}\n" for name in sorted(names))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
