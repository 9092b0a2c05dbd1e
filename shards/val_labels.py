"""Learn the classes of validation images whose archive or folder does not tell them.

They come from a list, the user's or one that came with the images, or from the development kit (the ground truth is a
number for each image; ``meta.mat`` turns numbers into wnids).
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
"""What Tiny-ImageNet and Kaggle put beside the images, or above them."""
KAGGLE_CSV = "ImageId,PredictionString"


def find_labels(source: Path, folder: Path, given: Path | None) -> tuple[dict[str, str], str]:
    """Return the class of each validation image by its file's name, and the name of what said so.

    ``given`` is the user's list; without it the one that lies in ``folder``, beside the images, or above it up to
    ``source``, and else the development kit's. Raises FileNotFoundError where there is none.
    """
    if given:
        return read_list(given), given.name
    for place in (folder, *folder.parents):
        for name in LISTS:
            if (place / name).is_file():
                return read_list(place / name), name
        if place == source:
            break
    return read_devkit(source), "the development kit"


def read_list(path: Path) -> dict[str, str]:
    """Return the classes by file name that a list says: Kaggle's, Tiny-ImageNet's, or one of the user's own.

    That has ``file class`` on each line, or just the class of each of ImageNet's validation images in turn.
    """
    lines = read_lines(path)
    if lines and lines[0].startswith(KAGGLE_CSV):
        fields = [line.split(",", 1) for line in lines[1:]]
        pairs = [(f"{name}.JPEG", _first_word(rest)) for name, *rests in fields for rest in rests[:1]]
        return _by_name(path, pairs)
    rows = [line.split("\t") if "\t" in line else line.split(maxsplit=1) for line in lines]
    if all(len(row) == 1 for row in rows):
        return _numbered([name for (name,) in rows])
    if any(len(row) == 1 for row in rows):
        raise ValueError(f"{path} is no list of labels: each line needs 'file class', or each just a class")
    return _by_name(path, [(name, _described(what)) for name, what, *_ in rows])


def _first_word(text: str) -> str:
    return text.split()[0] if text.split() else ""


def _described(text: str) -> str:
    """Return the class that a text names: a wnid, whatever follows it, or the text."""
    return _first_word(text) if WNID.fullmatch(_first_word(text)) else text.strip()


def _by_name(path: Path, pairs: list[tuple[str, str]]) -> dict[str, str]:
    labels = {}
    for name, wnid in pairs:
        if labels.setdefault(PurePosixPath(name).name, wnid) != wnid:
            raise ValueError(f"{path} gives {name} two classes: leave one of its lines")
    return labels


def read_devkit(source: Path) -> dict[str, str]:
    """Read the development kit in ``source``, packed or not; return the wnids by file name."""
    contents = _packed(source / f"{DEVKIT}.tar.gz") or _unpacked(source)
    if contents is None:
        raise FileNotFoundError(
            f"{source} holds neither {DEVKIT}.tar.gz nor {GROUND_TRUTH} with {META}: add one, or pass --val-labels FILE"
        )
    wnids = _wnids_by_number(contents[META])
    try:
        return _numbered([wnids[int(number)] for number in contents[GROUND_TRUTH].split()])
    except (KeyError, ValueError) as error:
        raise ValueError(f"{source}: {GROUND_TRUTH} does not fit {META} ({error}): fetch both again") from None


def _numbered(wnids: list[str]) -> dict[str, str]:
    return {f"ILSVRC2012_val_{number:08d}.JPEG": wnid for number, wnid in enumerate(wnids, 1)}


def _packed(archive: Path) -> dict[str, bytes] | None:
    if not archive.is_file():
        return None
    files = read_archive(archive, (GROUND_TRUTH, META))
    if len(files) < 2:
        raise ValueError(f"{archive} does not hold both {GROUND_TRUTH} and {META}: download it again")
    return files


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
    try:
        synsets = scipy_io.loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
        return dict(zip(map(int, synsets["ILSVRC2012_ID"]), map(str, synsets["WNID"]), strict=True))
    except Exception as error:  # scipy raises many kinds
        raise ValueError(f"the devkit's {META} cannot be read ({error}): fetch it again") from None
