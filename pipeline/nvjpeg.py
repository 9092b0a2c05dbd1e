"""The nvJPEG of this process, NVIDIA's library that decodes JPEGs on a GPU.

DALI's packages bring a newer nvJPEG than torchvision, under the same SONAME. Whoever asks for that name later gets the
one that was loaded first. So the entry points call ``load_first`` before anything imports torchvision. This module uses
the standard library only. In a process that is no entry point, torchvision's may have come first: ``version`` asks the
library itself.
"""

from __future__ import annotations

import ctypes
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

_SONAME = "libnvjpeg.so.13"
"""The name by which DALI's decoder asks for it (nvImageCodec, ``dynlink_nvjpeg.cpp``)."""
_PACKAGE = "nvidia.cu13"
"""The folder of CUDA 13's libraries, which several packages share. The decoder looks there, too."""
_HARDWARE = 3
"""``NVJPEG_BACKEND_HARDWARE`` of ``nvjpeg.h``."""


class Version(NamedTuple):
    """A version of nvJPEG."""

    major: int
    minor: int
    patch: int

    def __str__(self) -> str:
        """Return it as its package writes it: ``13.3.2``."""
        return ".".join(map(str, self))


def load_first() -> None:
    """Load the nvJPEG of DALI's packages, so that later callers get it in place of torchvision's.

    Nothing is loaded without NVIDIA's driver, where no GPU decodes, nor where that nvJPEG is not installed. Prints a
    warning if it is installed and cannot be loaded.
    """
    path = _file() if _load("libcuda.so.1") else None
    if path is None:
        return
    try:
        ctypes.CDLL(str(path))
    except OSError as error:
        if os.environ.get("RANK", "0") == "0":
            text = f"warning: nvJPEG cannot be loaded ({error}), so torchvision's older one decodes"
            print(f"{text}; install nvidia-nvjpeg again", file=sys.stderr)


def version() -> Version | None:
    """Return the version of the nvJPEG that DALI gets in this process, None if there is none."""
    library = _library()
    if library is None:
        return None
    found = [ctypes.c_int() for _ in Version._fields]
    # ``libraryPropertyType`` of ``library_types.h`` counts from major to patch level.
    for number, value in enumerate(found):
        library.nvjpegGetProperty(number, ctypes.byref(value))
    return Version(*(value.value for value in found))


def finds_engine() -> bool:
    """Return whether nvJPEG finds a JPEG engine on the current GPU, asked in the way of DALI's decoder."""
    library, handle = _library(), ctypes.c_void_p()
    if library is None or library.nvjpegCreateEx(_HARDWARE, None, None, 0, ctypes.byref(handle)):
        return False
    library.nvjpegDestroy(handle)
    return True


def _library() -> ctypes.CDLL | None:
    """Return the nvJPEG that was loaded first, by whomever; where there is none yet, load that of DALI's packages."""
    if (library := _load(_SONAME, os.RTLD_NOLOAD)) is None:
        load_first()
        library = _load(_SONAME, os.RTLD_NOLOAD)
    return library


def _load(name: str, mode: int = 0) -> ctypes.CDLL | None:
    """Return the library of that name, None if there is none."""
    try:
        return ctypes.CDLL(name, mode)
    except OSError:
        return None


def _file() -> Path | None:
    """Return the nvJPEG of DALI's packages, None if it is not installed."""
    try:
        package = find_spec(_PACKAGE)
    except ModuleNotFoundError:  # there is not even the package that it would be in
        return None
    folders = (package.submodule_search_locations if package else None) or ()
    return next((path for folder in folders if (path := Path(folder, "lib", _SONAME)).is_file()), None)
