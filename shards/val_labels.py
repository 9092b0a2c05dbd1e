"""The classes of validation images that are not sorted into class folders.

They come from a list, either the user's or one next to the images, or from the development kit. The kit's ground truth
is a number per image, and its ``meta.mat`` maps numbers to wnids.
"""

from __future__ import annotations

import importlib
import io
from pathlib import Path, PurePosixPath

from shards.archives import read_archive
from shards.classes import WNID, read_lines

DEVKIT = "ILSVRC2012_devkit_t12"
GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
META = "meta.mat"
LISTS = ("val_annotations.txt", "LOC_val_solution.csv")
"""File names of the lists of Tiny-ImageNet and Kaggle, in the folder of the images or above it."""
KAGGLE_CSV = "ImageId,PredictionString"
"""First line of Kaggle's list."""


def find_labels(source: Path, folder: Path, user_list: Path | None) -> tuple[dict[str, str], str]:
    """Return the class of each validation image by file name, and the name of the list or kit that was read.

    Without ``user_list`` a known list is searched in ``folder``, the folder of the images, and above it up to
    ``source``. Without such a list the development kit is read. Raises FileNotFoundError if that is missing, too.
    """
    if user_list:
        return read_list(user_list), user_list.name
    for parent in (folder, *folder.parents):
        for name in LISTS:
            if (parent / name).is_file():
                return read_list(parent / name), name
        if parent == source:
            break
    return read_devkit(source), "the development kit"


def read_list(path: Path) -> dict[str, str]:
    """Return the classes by file name in a list of Kaggle, of Tiny-ImageNet, or of the user.

    A user's list has lines of ``file class``, or one class per line for ImageNet's validation images in order. Raises
    ValueError for other lines.
    """
    lines = read_lines(path)
    if lines and lines[0].startswith(KAGGLE_CSV):
        # The prediction is the class, followed by boxes.
        fields = [line.split(",", 1) for line in lines[1:]]
        pairs = [(f"{name}.JPEG", _first_word(rest)) for name, *rests in fields for rest in rests[:1]]
        return _by_name(path, pairs)
    rows = [line.split("\t") if "\t" in line else line.split(maxsplit=1) for line in lines]
    if all(len(row) == 1 for row in rows):
        return _numbered([name for (name,) in rows])
    if any(len(row) == 1 for row in rows):
        raise ValueError(
            f"{path} is not a list of labels: write 'file class' on every line, or only a class on every line"
        )
    return _by_name(path, [(name, _parse_class_text(text)) for name, text, *_ in rows])


def _first_word(text: str) -> str:
    return text.split()[0] if text.split() else ""


def _parse_class_text(text: str) -> str:
    """Return the wnid at the beginning of a text, without the description after it, or else the text itself."""
    return _first_word(text) if WNID.fullmatch(_first_word(text)) else text.strip()


def _by_name(path: Path, pairs: list[tuple[str, str]]) -> dict[str, str]:
    labels = {}
    for name, wnid in pairs:
        if labels.setdefault(PurePosixPath(name).name, wnid) != wnid:
            raise ValueError(f"{path} contains two classes for {name}: remove one of the lines")
    return labels


def read_devkit(source: Path) -> dict[str, str]:
    """Return the wnids by file name from the development kit in ``source``, packed or unpacked."""
    contents = _read_packed(source / f"{DEVKIT}.tar.gz") or _read_unpacked(source)
    if contents is None:
        raise FileNotFoundError(
            f"{source} contains neither {DEVKIT}.tar.gz nor {GROUND_TRUTH} with {META}: "
            "add one of them, or pass --val-labels FILE"
        )
    wnids = _wnids_by_number(contents[META])
    try:
        return _numbered([wnids[int(number)] for number in contents[GROUND_TRUTH].split()])
    except (KeyError, ValueError) as error:
        raise ValueError(f"{source}: {GROUND_TRUTH} does not fit {META} ({error}): download both again") from None


def _numbered(wnids: list[str]) -> dict[str, str]:
    return {f"ILSVRC2012_val_{number:08d}.JPEG": wnid for number, wnid in enumerate(wnids, 1)}


def _read_packed(archive: Path) -> dict[str, bytes] | None:
    if not archive.is_file():
        return None
    files = read_archive(archive, (GROUND_TRUTH, META))
    if len(files) < 2:
        raise ValueError(f"{archive} does not contain both {GROUND_TRUTH} and {META}: download it again")
    return files


def _read_unpacked(source: Path) -> dict[str, bytes] | None:
    for folder in (source, source / "data", source / DEVKIT / "data"):
        if (folder / GROUND_TRUTH).is_file() and (folder / META).is_file():
            return {name: (folder / name).read_bytes() for name in (GROUND_TRUTH, META)}
    return None


def _wnids_by_number(meta: bytes) -> dict[int, str]:
    try:
        # Imported here: scipy is optional, and needed for the development kit only.
        scipy_io = importlib.import_module("scipy.io")
    except ModuleNotFoundError:
        raise ValueError(f"reading the devkit's {META} needs scipy: install it, or pass --val-labels FILE") from None
    try:
        synsets = scipy_io.loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
        return dict(zip(map(int, synsets["ILSVRC2012_ID"]), map(str, synsets["WNID"]), strict=True))
    except Exception as error:  # scipy raises many types
        raise ValueError(f"the devkit's {META} cannot be read ({error}): download it again") from None
