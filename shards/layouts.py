"""Find a set's images in whichever of the common layouts they lie, and say how it was read.

    train/<class>/<file>                 and val/ (or validation/, valid/, test/) alike: torchvision's ImageFolder
    train/<class>/images/<file>          and val/images/<file> with val_annotations.txt: Tiny-ImageNet
    ILSVRC/Data/CLS-LOC/train/…          and val/<file> with LOC_val_solution.csv: Kaggle's ImageNet
    ILSVRC2012_img_train.tar             and ILSVRC2012_img_val.tar with the development kit: the original archives
    <class>/<file>                       a set without splits

Whatever the layout, a file's path in its split is ``<class>/<file>``, so all give the same ids and the same shards.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from shards.ilsvrc import ARCHIVES, FoundImage, check_labels, list_train, list_val
from shards.val_labels import find_labels

KAGGLE_FOLDERS = Path("ILSVRC/Data/CLS-LOC")
VALIDATION = ("val", "validation", "valid")
IMAGES = "images"
"""Tiny-ImageNet's folder between a class, or a split, and its images."""
SUFFIXES = (".jpg", ".jpeg", ".png")
ARCHIVE, FLAT, BY_CLASS, WITHIN_CLASS = "", "{file}", "{wnid}/{file}", "{wnid}/" + IMAGES + "/{file}"


class ImageLocation(NamedTuple):
    """Where the files of a split lie: in an archive, or in a folder, where ``pattern`` says how their paths follow."""

    root: Path
    pattern: str

    def path(self, path: str) -> Path:
        """Return the file that holds what has this path in its split."""
        wnid, _, file = path.partition("/")
        return self.root / self.pattern.format(wnid=wnid, file=file)


class Listing(NamedTuple):
    """The files of a split, where they lie, how they were read, and the class folders without any."""

    files: list[FoundImage]
    place: ImageLocation
    description: str
    empty: frozenset[str] = frozenset()


def find_splits(source: Path, val_labels: Path | None) -> dict[str, Listing]:
    """Return the splits of the set in a folder: ``train``, ``val``, or both.

    Raises FileNotFoundError where there is none of them, and ValueError or OSError, one line, where one is not whole.
    """
    source = source.resolve()
    root = source / KAGGLE_FOLDERS if (source / KAGGLE_FOLDERS).is_dir() else source
    # Kaggle's lists lie beside ILSVRC, even if it is the folder within that was named.
    top = root.parents[2] if root.parts[-3:] == KAGGLE_FOLDERS.parts else source
    folders = {"train": _train_folder(root), "val": _validation_folder(root)}
    found = {}
    for split, archive in ARCHIVES.items():
        path, folder = source / archive, folders[split]
        if path.is_file() and folder:
            raise ValueError(f"{source} holds both {folder.name}/ and {archive}: move one of them away")
        if path.is_file():
            found[split] = _read_archive(path, split, source, val_labels)
        elif folder:
            found[split] = _read_folder(folder, split, top, val_labels)
    found = found or {"train": _read_classes(source, "<class>")}
    if val_labels and ("val" not in found or found["val"].place.pattern in (BY_CLASS, WITHIN_CLASS)):
        raise ValueError(f"--val-labels: {source} has no validation images outside of class folders: leave it out")
    return found


def _train_folder(root: Path) -> Path | None:
    return root / "train" if (root / "train").is_dir() else None


def _validation_folder(root: Path) -> Path | None:
    there = [root / name for name in VALIDATION if (root / name).is_dir()]
    if len(there) > 1:
        raise ValueError(f"{root} holds both {there[0].name}/ and {there[1].name}/: move one of them away")
    # Where it has no class folders, as in ImageNet, nobody knows the classes of its images.
    test = root / "test"
    if not there and (root / "train").is_dir() and test.is_dir() and _class_folders(test):
        return test
    return there[0] if there else None


def _class_folders(folder: Path) -> list[os.DirEntry[str]]:
    return [entry for entry in visible(folder) if entry.is_dir() and entry.name != IMAGES]


def _read_archive(path: Path, split: str, source: Path, val_labels: Path | None) -> Listing:
    if split == "train":
        files, told = list_train(path), str(path)
    else:
        wnids, by = find_labels(source, source, val_labels)
        files, told = list_val(path, wnids, by), f"{path}, classes from {by}"
    return Listing(files, ImageLocation(path, ARCHIVE), told)


def _read_folder(folder: Path, split: str, top: Path, val_labels: Path | None) -> Listing:
    if split == "train":
        return _read_classes(folder, "train/<class>")
    flat = bool(visible(folder)) and not _class_folders(folder)
    listing = _read_flat(folder, top, val_labels) if flat else _read_classes(folder, f"{folder.name}/<class>")
    unread = folder.name != "test" and (folder.parent / "test").is_dir()
    return listing._replace(description=f"{listing.description}; test/ is not read") if unread else listing


def _read_flat(folder: Path, top: Path, val_labels: Path | None) -> Listing:
    within = folder / IMAGES if (folder / IMAGES).is_dir() else folder
    wnids, told = find_labels(top, folder, val_labels)
    files = {entry.name: entry for entry in _files(visible(within)) if entry.name != told}
    check_labels(within, list(files), wnids, told)
    found = [FoundImage(wnids[name], f"{wnids[name]}/{name}", entry.stat().st_size) for name, entry in files.items()]
    return Listing(found, ImageLocation(within, FLAT), f"{within}, classes from {told}")


def _read_classes(folder: Path, wanted: str) -> Listing:
    entries = visible(folder)
    folders = [entry for entry in entries if entry.is_dir()]
    if not folders and wanted == "<class>":
        names = ["train/<class>/*.JPEG", "val/<class>/*.JPEG", *ARCHIVES.values(), "<class>/*.JPEG"]
        raise FileNotFoundError(f"{folder} has none of {', '.join(names)}")
    beside = _lists([each for each in entries if not each.is_dir()], f"{folder}/<class>/")
    nested = any(Path(entry.path, IMAGES).is_dir() for entry in folders)
    found, empty = [], set()
    for entry in folders:
        files = visible(Path(entry.path))
        if nested:
            beside += _lists([each for each in files if each.name != IMAGES], f"{entry.path}/{IMAGES}/")
            files = visible(Path(entry.path, IMAGES)) if Path(entry.path, IMAGES).is_dir() else []
        found += [FoundImage(entry.name, f"{entry.name}/{file.name}", file.stat().st_size) for file in _files(files)]
        empty |= set() if files else {entry.name}
    told = f"{folder}, as {wanted}{f'/{IMAGES}' if nested else ''}/<file>"
    if beside:
        told += f"; not read: {min(beside)}" + (f" and {len(beside) - 1:,} more" if len(beside) > 1 else "")
    return Listing(found, ImageLocation(folder, WITHIN_CLASS if nested else BY_CLASS), told, frozenset(empty))


def _lists(entries: list[os.DirEntry[str]], folder: str) -> list[str]:
    """Return the names of files that lie beside the folders of images. Raises ValueError where there are images."""
    for entry in _files(entries):
        if Path(entry.name).suffix.lower() in SUFFIXES:
            raise ValueError(f"{entry.path} lies outside the class folders: move it to {folder}")
    return [entry.name for entry in entries]


def _files(entries: list[os.DirEntry[str]]) -> list[os.DirEntry[str]]:
    for entry in entries:
        if not entry.is_file():
            raise ValueError(f"{entry.path} is not a file: a class folder holds images only")
    return entries


def visible(folder: Path) -> list[os.DirEntry[str]]:
    """Return what a folder holds, but for hidden names, in no order."""
    with os.scandir(folder) as entries:
        return [entry for entry in entries if not entry.name.startswith(".")]
