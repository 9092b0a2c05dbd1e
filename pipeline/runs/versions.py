"""The versions of packages, the commit and the machine of a run."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from typing import Any

import torch

import pipeline
from pipeline import nvjpeg
from pipeline.errors import IS_INSTALLED, ROOT


def versions() -> dict[str, Any]:
    """Return the information needed to repeat a run: versions, commit and machine."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {
        "version": pipeline.__version__,
        "python": platform.python_version(),
        **packages(),
        "device": device,
        **_commit(),
    }


def packages() -> dict[str, str]:
    """Return the versions of the packages that can change a run's numbers, and on a GPU that of nvJPEG."""
    names = (
        "torch",
        "torchvision",
        "accelerate",
        "nvidia-dali-cuda130",
        "nvidia-dali-cuda120",
        "numpy",
        "pydantic",
        "timm",
    )
    # From the metadata: to import a package for its version may take seconds.
    found = {name: importlib.metadata.version(name) for name in names if _installed(name)}
    # Several packages bring nvJPEG; only the library in this process says which one decodes.
    decoder = nvjpeg.version() if torch.cuda.is_available() else None
    return {**found, "nvjpeg": str(decoder)} if decoder else found


def _installed(name: str) -> bool:
    try:
        return bool(importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return False


def _commit() -> dict[str, Any]:
    if IS_INSTALLED:  # a folder above may belong to another project's repository
        return {"commit": None, "uncommitted_changes": False}

    def git(*arguments: str) -> str | None:
        try:
            answer = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
        except OSError:  # a machine without git
            return None
        return answer.stdout.strip() if answer.returncode == 0 else None

    return {"commit": git("rev-parse", "HEAD"), "uncommitted_changes": bool(git("status", "--porcelain"))}
