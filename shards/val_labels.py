"""Learn the classes of ImageNet's validation images, whose archive does not tell them.

They come from the development kit (the ground truth is a number for each image; ``meta.mat`` turns numbers into wnids),
or from a list that the user gives.
"""

from __future__ import annotations

import importlib
import io
import tarfile
from pathlib import Path, PurePosixPath

DEVKIT = "ILSVRC2012_devkit_t12"
GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
META = "meta.mat"


def read_list(path: Path) -> dict[str, str]:
    """Read ``file wnid`` on each line, or just the wnid of each image in turn; return the wnids by file name."""
    lines = [line.split() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    widths = {len(line) for line in lines}
    if widths == {1}:
        return _numbered([wnid for (wnid,) in lines])
    if widths != {2}:
        raise ValueError(f"{path} is no list of labels: each line needs 'file wnid', or each just a wnid")
    return {PurePosixPath(name).name: wnid for name, wnid in lines}


def read_devkit(source: Path) -> dict[str, str]:
    """Read the development kit in ``source``, packed or not; return the wnids by file name."""
    contents = _packed(source / f"{DEVKIT}.tar.gz") or _unpacked(source)
    if contents is None:
        raise FileNotFoundError(
            f"{source} holds neither {DEVKIT}.tar.gz nor {GROUND_TRUTH} with {META}: add one, or pass --val-labels FILE"
        )
    wnids = _wnids_by_number(contents[META])
    return _numbered([wnids[int(number)] for number in contents[GROUND_TRUTH].split()])


def _numbered(wnids: list[str]) -> dict[str, str]:
    return {f"ILSVRC2012_val_{number:08d}.JPEG": wnid for number, wnid in enumerate(wnids, 1)}


def _packed(archive: Path) -> dict[str, bytes] | None:
    if not archive.is_file():
        return None
    try:
        with tarfile.open(archive) as tar:
            files = {PurePosixPath(member.name).name: tar.extractfile(member) for member in tar if member.isfile()}
            return {name: file.read() for name in (GROUND_TRUTH, META) if (file := files[name])}
    except (tarfile.TarError, EOFError, KeyError) as error:
        raise ValueError(f"{archive} is damaged or something else ({error}): download it again") from None


def _unpacked(source: Path) -> dict[str, bytes] | None:
    for folder in (source, source / "data", source / DEVKIT / "data"):
        if (folder / GROUND_TRUTH).is_file() and (folder / META).is_file():
            return {name: (folder / name).read_bytes() for name in (GROUND_TRUTH, META)}
    return None


def _wnids_by_number(meta: bytes) -> dict[int, str]:
    try:
        scipy_io = importlib.import_module("scipy.io")
    except ModuleNotFoundError:
        raise ValueError(f"reading the devkit's {META} needs scipy: install it, or pass --val-labels FILE") from None
    synsets = scipy_io.loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
    return dict(zip(map(int, synsets["ILSVRC2012_ID"]), map(str, synsets["WNID"]), strict=True))
