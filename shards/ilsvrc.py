"""Find ImageNet's files: in class folders, or inside the original archives, which stay packed.

A split's paths are ``<wnid>/<file>`` in either layout, so both give the same ids and the same shards.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from shards.val_labels import read_devkit, read_list

ARCHIVES = {"train": "ILSVRC2012_img_train.tar", "val": "ILSVRC2012_img_val.tar"}


class Found(NamedTuple):
    """An image file: its class, its path in the split, its bytes, and where they start in the archive (or −1)."""

    wnid: str
    path: str
    size: int
    offset: int


def find_split(source: Path, split: str, val_labels: Path | None) -> Iterator[Found] | None:
    """Iterate over a split's files; None where the source lacks it. Raises ValueError or OSError, one line."""
    folder, archive = source / split, source / ARCHIVES[split]
    if folder.is_dir() and archive.is_file():
        raise ValueError(f"{source} holds both {folder.name}/ and {archive.name}: move one of them away")
    if folder.is_dir():
        return _in_folders(folder)
    if not archive.is_file():
        return None
    if split == "train":
        return _in_archives(archive)
    return _in_archive(archive, read_list(val_labels) if val_labels else read_devkit(source))


def _in_folders(folder: Path) -> Iterator[Found]:
    for wnid in _visible(folder):
        if not wnid.is_dir():
            raise ValueError(f"{wnid.path} lies outside the class folders: move it to {folder.name}/<wnid>/")
        for file in _visible(Path(wnid.path)):
            if not file.is_file():
                raise ValueError(f"{file.path} is not a file: a class folder holds images only")
            yield Found(wnid.name, f"{wnid.name}/{file.name}", file.stat().st_size, -1)


def _visible(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return [entry for entry in entries if not entry.name.startswith(".")]


def _in_archives(path: Path) -> Iterator[Found]:
    with path.open("rb") as file:
        classes = [member for member in _members(path, file, 0) if member.name.endswith(".tar")]
        for inner in tqdm(classes, f"reading {path.name}", unit=" classes", leave=False, disable=None):
            wnid = Path(inner.name).stem
            for member in _members(path, file, inner.offset_data):
                if member.offset_data + member.size > inner.offset_data + inner.size:
                    raise ValueError(f"{path} is damaged: {member.name} reaches beyond {inner.name}")
                yield Found(wnid, f"{wnid}/{Path(member.name).name}", member.size, member.offset_data)


def _in_archive(path: Path, wnids: dict[str, str]) -> Iterator[Found]:
    with path.open("rb") as file:
        for member in _members(path, file, 0):
            name = Path(member.name).name
            if name not in wnids:
                raise ValueError(f"{path} holds {name}, whose class is not known: give its line in --val-labels")
            yield Found(wnids[name], f"{wnids[name]}/{name}", member.size, member.offset_data)


def _members(path: Path, file: BufferedReader, start: int) -> list[tarfile.TarInfo]:
    file.seek(start)
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            return [member for member in tar if member.isfile()]
    except tarfile.TarError as error:
        raise ValueError(f"{path} is damaged at byte {start:,} or behind it ({error}): download it again") from None
