"""Image files inside ImageNet's original archives, which are read without unpacking.

A path in a split is ``<wnid>/<file>``, as with class folders. So archives and folders give the same ids and shards.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from tqdm import tqdm

from shards.archives import Member, list_members

ARCHIVES = {"train": "ILSVRC2012_img_train.tar", "val": "ILSVRC2012_img_val.tar"}
IMAGENET_COUNTS = {"train": 1_281_167, "val": 50_000}
"""Number of images in each split of the complete ImageNet."""
ILSVRC_CLASSES = 1_000


class FoundImage(NamedTuple):
    """An image file: its class, its path in the split, its size in bytes, and its offset in the archive or −1."""

    wnid: str
    path: str
    size: int
    offset: int = -1


def list_train(path: Path) -> list[FoundImage]:
    """Return the images in the training archive, which contains an archive per class. Raises ValueError for damage."""
    found = []
    with path.open("rb") as file:
        archives = [(_class_name(path, member), member) for member in _visible(list_members(path, file))]
        for wnid, inner in tqdm(archives, f"reading {path.name}", unit=" classes", leave=False, disable=None):
            members = _visible(list_members(path, file, inner.offset, inner.offset + inner.size))
            if not members:
                raise ValueError(f"{path}: {inner.name} contains no image: download it again")
            found += [FoundImage(wnid, f"{wnid}/{_name(member)}", member.size, member.offset) for member in members]
    return _check_unique(path, found)


def list_val(path: Path, wnids: Mapping[str, str], label_source: str) -> list[FoundImage]:
    """Return the images in the validation archive; ``wnids`` maps their file names to classes.

    ``label_source`` names the origin of ``wnids`` in errors. Raises ValueError if the archive is damaged, or if it
    contains other files than ``wnids``.
    """
    with path.open("rb") as file:
        members = _visible(list_members(path, file))
    check_labels(path, [_name(member) for member in members], wnids, label_source)
    labelled = [(wnids[_name(member)], member) for member in members]
    found = [FoundImage(wnid, f"{wnid}/{_name(member)}", member.size, member.offset) for wnid, member in labelled]
    return _check_unique(path, found)


def check_labels(location: Path, names: list[str], wnids: Mapping[str, str], label_source: str) -> None:
    """Raise ValueError unless the file names are exactly those whose classes are known."""
    if unknown := sorted(set(names) - wnids.keys()):
        raise ValueError(f"{location} contains {unknown[0]}, whose class is not known: add its line to --val-labels")
    if missing := sorted(wnids.keys() - set(names)):
        raise ValueError(
            f"{location} does not contain {missing[0]}{_and_more(missing)}, which {label_source} lists: "
            "add it, or list only the existing files in --val-labels"
        )


def _and_more(names: list[str]) -> str:
    return f" and {len(names) - 1:,} more" if len(names) > 1 else ""


def _class_name(path: Path, member: Member) -> str:
    if not member.name.endswith(".tar"):
        raise ValueError(
            f"{path} contains {member.name}, which is not the archive of a class (<wnid>.tar): download it again"
        )
    return PurePosixPath(member.name).stem


def _visible(members: list[Member]) -> list[Member]:
    # Names with a leading dot come from the packer's own system, such as macOS's ._ files.
    return [member for member in members if not _name(member).startswith(".")]


def _name(member: Member) -> str:
    return PurePosixPath(member.name).name


def _check_unique(path: Path, found: list[FoundImage]) -> list[FoundImage]:
    """Return ``found``. Raises ValueError if a path comes twice, as two images would get the same name."""
    seen = set()
    for image in found:
        if image.path in seen:
            raise ValueError(f"{path} contains {image.path} twice: download it again")
        seen.add(image.path)
    return found
