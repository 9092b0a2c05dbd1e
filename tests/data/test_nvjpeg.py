"""Which nvJPEG decodes in a process: DALI's, if it was loaded first, as the entry points do."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from architecture import ENTRY_POINTS

from pipeline import nvjpeg
from pipeline.runs import versions

ROOT = Path(__file__).resolve().parents[2]
REPORT = """
import json
from pathlib import Path
mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
print(json.dumps([version, sorted(Path(file).name for file in mapped if "libnvjpeg" in file)]))
"""


class Loaded(NamedTuple):
    version: list[int] | None
    files: list[str]
    """The names of the files that are loaded, of all nvJPEGs."""
    stderr: str


def loaded(code: str, environment: dict[str, str]) -> Loaded:
    """Run a line of Python, which may set ``version``, and return which nvJPEG that process has."""
    lines = f"from pipeline import nvjpeg\nimport ctypes\nversion = None\n{code}\n{REPORT}"
    own = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run([sys.executable, "-c", lines], env=own, capture_output=True, text=True, check=True)
    version, files = json.loads(done.stdout)
    return Loaded(version, files, done.stderr)


@pytest.fixture
def driver(tmp_path: Path) -> dict[str, str]:
    """The environment of a machine that has a driver, as far as a process sees that does not use it."""
    libraries = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
    (tmp_path / "driver").mkdir()
    (tmp_path / "driver" / "libcuda.so.1").symlink_to(next(path for path in libraries if "/libm.so" in path))
    return {"LD_LIBRARY_PATH": str(tmp_path / "driver")}


@pytest.fixture
def torchvisions() -> Path:
    """The nvJPEG that torchvision brings."""
    spec = importlib.util.find_spec("torchvision")
    assert spec is not None
    assert spec.origin is not None
    found = next(Path(spec.origin).parents[1].glob("torchvision.libs/libnvjpeg*.so.13"), None)
    if found is None or nvjpeg._file() is None:
        pytest.skip("needs a CUDA 13 build of torchvision, and nvidia-nvjpeg")
    return found


@pytest.mark.parametrize("name", sorted(ENTRY_POINTS))
def test_every_command_loads_dalis_before_it_imports_anything_else(name: str):
    head, _, _ = (ROOT / "pipeline" / f"{name}.py").read_text().partition("from collections.abc")
    assert "    nvjpeg.load_first()" in head


def test_the_first_one_is_dalis_where_it_is_loaded_first(driver: dict[str, str], torchvisions: Path):
    code = f"nvjpeg.load_first(); ctypes.CDLL({str(torchvisions)!r}); version = nvjpeg.version()"
    found = loaded(code, driver)
    assert found.version is not None
    assert found.version >= [13, 2]
    assert (found.files, found.stderr) == (sorted(["libnvjpeg.so.13", torchvisions.name]), "")


def test_it_is_torchvisions_where_nothing_was_loaded_before(driver: dict[str, str], torchvisions: Path):
    code = f"ctypes.CDLL({str(torchvisions)!r}); nvjpeg.load_first(); version = nvjpeg.version()"
    found = loaded(code, driver)
    assert found.version is not None
    assert found.version < [13, 2]


def test_who_asks_first_gets_dalis(driver: dict[str, str], torchvisions: Path):
    found = loaded("version = nvjpeg.version()", driver)
    assert found.files == ["libnvjpeg.so.13"]
    assert found.version is not None
    assert found.version >= [13, 2]


def test_without_a_driver_nothing_is_loaded_or_said():
    assert loaded("nvjpeg.load_first(); version = nvjpeg.version()", {}) == (None, [], "")


def test_where_it_is_not_installed_nothing_is_said(driver: dict[str, str], tmp_path: Path):
    (tmp_path / "nvidia").mkdir()
    (tmp_path / "nvidia" / "__init__.py").touch()
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    assert loaded("nvjpeg.load_first()", {**driver, "PYTHONPATH": path}) == (None, [], "")
    no_packages = "import sys; sys.path = [path for path in sys.path if 'site-packages' not in path]"
    assert loaded(f"{no_packages}; nvjpeg.load_first()", driver) == (None, [], "")


@pytest.mark.parametrize(("rank", "lines"), [("0", 1), ("1", 0)])
def test_one_that_cannot_be_loaded_is_told_once(driver: dict[str, str], tmp_path: Path, rank: str, lines: int):
    file = tmp_path / "nvidia" / "cu13" / "lib" / "libnvjpeg.so.13"
    file.parent.mkdir(parents=True)
    file.write_text("no library")
    (tmp_path / "nvidia" / "__init__.py").touch()
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    found = loaded("nvjpeg.load_first()", {**driver, "PYTHONPATH": path, "RANK": rank})
    told = found.stderr.splitlines()
    assert len(told) == lines
    assert all(line.startswith(f"warning: nvJPEG cannot be loaded ({file}: ") for line in told)


def test_versions_have_it_on_a_gpu_alone(monkeypatch: pytest.MonkeyPatch):
    found = nvjpeg.Version(13, 3, 2)
    monkeypatch.setattr(nvjpeg, "version", lambda: found)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "nvjpeg" not in versions.versions()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    assert versions.versions()["nvjpeg"] == versions.packages()["nvjpeg"] == "13.3.2"
    monkeypatch.setattr(nvjpeg, "version", lambda: None)
    assert "nvjpeg" not in versions.versions()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_machine_without_a_gpu_has_no_engine():
    assert not nvjpeg.finds_engine()
