"""Find ImageNet's files inside its original archives, which stay packed.

A split's paths are ``<wnid>/<file>`` as in class folders, so both give the same ids and the same shards.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from tqdm import tqdm

from shards.archives import Member, list_members

ARCHIVES = {"train": "ILSVRC2012_img_train.tar", "val": "ILSVRC2012_img_val.tar"}
IMAGENET_COUNTS = {"train": 1_281_167, "val": 50_000}
"""Images of the whole set, of CLASSES classes."""
ILSVRC_CLASSES = 1_000


class FoundImage(NamedTuple):
    """An image file: its class, its path in the split, its bytes, and where they start in the archive (or −1)."""

    wnid: str
    path: str
    size: int
    offset: int = -1


def list_train(path: Path) -> list[FoundImage]:
    """Return the images in the archive of the class archives. Raises ValueError where any of them is not whole."""
    found = []
    with path.open("rb") as file:
        classes = [(_class_name(path, member), member) for member in _visible(list_members(path, file))]
        for wnid, inner in tqdm(classes, f"reading {path.name}", unit=" classes", leave=False, disable=None):
            members = _visible(list_members(path, file, inner.offset, inner.offset + inner.size))
            if not members:
                raise ValueError(f"{path}: {inner.name} holds no image: download it again")
            found += [FoundImage(wnid, f"{wnid}/{_name(each)}", each.size, each.offset) for each in members]
    return _once(path, found)


def list_val(path: Path, wnids: Mapping[str, str], origin: str) -> list[FoundImage]:
    """Return the images in the archive of validation, whose classes ``wnids`` says; ``told`` names where that is from.

    Raises ValueError where it is not whole, or is not of the same files.
    """
    with path.open("rb") as file:
        members = _visible(list_members(path, file))
    check_labels(path, [_name(member) for member in members], wnids, origin)
    found = [(wnids[_name(member)], member) for member in members]
    return _once(path, [FoundImage(wnid, f"{wnid}/{_name(each)}", each.size, each.offset) for wnid, each in found])


def check_labels(location: Path, names: list[str], wnids: Mapping[str, str], origin: str) -> None:
    """Raise a ValueError unless the files are those whose classes are known."""
    if unknown := sorted(set(names) - wnids.keys()):
        raise ValueError(f"{location} holds {unknown[0]}, whose class is not known: give its line in --val-labels")
    if missing := sorted(wnids.keys() - set(names)):
        raise ValueError(
            f"{location} lacks {missing[0]}{_and_more(missing)}, whose class {origin} says: "
            "fetch it, or give the lines of those there are in --val-labels"
        )


def _and_more(names: list[str]) -> str:
    return f" and {len(names) - 1:,} more" if len(names) > 1 else ""


def _class_name(path: Path, member: Member) -> str:
    if not member.name.endswith(".tar"):
        raise ValueError(f"{path} holds {member.name}, which is no class's archive (<wnid>.tar): download it again")
    return PurePosixPath(member.name).stem


def _visible(members: list[Member]) -> list[Member]:
    return [member for member in members if not _name(member).startswith(".")]


def _name(member: Member) -> str:
    return PurePosixPath(member.name).name


def _once(path: Path, found: list[FoundImage]) -> list[FoundImage]:
    seen = set()
    for each in found:
        if each.path in seen:
            raise ValueError(f"{path} holds {each.path} twice: download it again")
        seen.add(each.path)
    return found
