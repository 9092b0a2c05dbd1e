"""Detection of the common folder layouts of image data sets.

    train/<class>/<file>                 and the same in val/, validation/, valid/ or test/: torchvision's ImageFolder
    train/<class>/images/<file>          and val/images/<file> with val_annotations.txt: Tiny-ImageNet
    ILSVRC/Data/CLS-LOC/train/…          and val/<file> with LOC_val_solution.csv: Kaggle's ImageNet
    ILSVRC2012_img_train.tar             and ILSVRC2012_img_val.tar with the development kit: the original archives
    <class>/<file>                       a data set without splits

In every layout a file's path in its split is ``<class>/<file>``. So all layouts give the same ids and shards.
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
"""Tiny-ImageNet's folder between a class or a split and its images."""
SUFFIXES = (".jpg", ".jpeg", ".png")
ARCHIVE, FLAT, BY_CLASS, WITHIN_CLASS = "", "{file}", "{wnid}/{file}", "{wnid}/" + IMAGES + "/{file}"
AS_LISTED = "{path}"
"""The path in the split is the path in the folder."""


class ImageLocation(NamedTuple):
    """The archive or folder of a split's files; in a folder, ``pattern`` gives the path of each file."""

    root: Path
    pattern: str

    def path(self, path: str) -> Path:
        """Return the file on disk for a path in the split, ``<class>/<file>``."""
        wnid, _, file = path.partition("/")
        return self.root / self.pattern.format(wnid=wnid, file=file, path=path)


class Listing(NamedTuple):
    """The files of a split, and how they were found."""

    files: list[FoundImage]
    location: ImageLocation
    description: str
    """Text for the user: folder, layout, and the origin of the classes."""
    empty: frozenset[str] = frozenset()
    """Class folders without images."""


def find_splits(source: Path, val_labels: Path | None, unsplit: str | None = None) -> dict[str, Listing]:
    """Return the splits of the data set in a folder: ``train``, ``val``, or both.

    ``unsplit`` is the split of class folders that are in neither, by default ``train``. Raises FileNotFoundError if
    there are no images, and ValueError or OSError if something is damaged or ambiguous.
    """
    source = source.resolve()
    root = source / KAGGLE_FOLDERS if (source / KAGGLE_FOLDERS).is_dir() else source
    # Kaggle's lists are next to the folder ILSVRC, also if the user named the folder CLS-LOC inside it.
    top = root.parents[2] if root.parts[-3:] == KAGGLE_FOLDERS.parts else source
    folders = {"train": _train_folder(root), "val": _validation_folder(root)}
    found = {}
    for split, archive in ARCHIVES.items():
        path, folder = source / archive, folders[split]
        if path.is_file() and folder:
            raise ValueError(f"{source} contains both {folder.name}/ and {archive}: move one of them away")
        if path.is_file():
            found[split] = _read_archive(path, split, source, val_labels)
        elif folder:
            found[split] = _read_folder(folder, split, top, val_labels)
    if unsplit and found:
        raise ValueError(f"--split: {source} has {' and '.join(found)} already: remove the option")
    found = found or {unsplit or "train": _read_classes(source, "<class>")}
    if val_labels and ("val" not in found or found["val"].location.pattern in (BY_CLASS, WITHIN_CLASS)):
        raise ValueError(f"--val-labels: {source} has no validation images outside of class folders: remove the option")
    return found


def _train_folder(root: Path) -> Path | None:
    return root / "train" if (root / "train").is_dir() else None


def _validation_folder(root: Path) -> Path | None:
    existing = [root / name for name in VALIDATION if (root / name).is_dir()]
    if len(existing) > 1:
        raise ValueError(f"{root} contains both {existing[0].name}/ and {existing[1].name}/: move one of them away")
    # A test folder without class folders, as in ImageNet, has no public labels.
    test = root / "test"
    if not existing and (root / "train").is_dir() and test.is_dir() and _class_folders(test):
        return test
    return existing[0] if existing else None


def _class_folders(folder: Path) -> list[os.DirEntry[str]]:
    return [entry for entry in visible(folder) if entry.is_dir() and entry.name != IMAGES]


def _read_archive(path: Path, split: str, source: Path, val_labels: Path | None) -> Listing:
    if split == "train":
        files, description = list_train(path), str(path)
    else:
        wnids, label_source = find_labels(source, source, val_labels)
        files, description = list_val(path, wnids, label_source), f"{path}, classes from {label_source}"
    return Listing(files, ImageLocation(path, ARCHIVE), description)


def _read_folder(folder: Path, split: str, top: Path, val_labels: Path | None) -> Listing:
    if split == "train":
        return _read_classes(folder, "train/<class>")
    flat = bool(visible(folder)) and not _class_folders(folder)
    listing = _read_flat(folder, top, val_labels) if flat else _read_classes(folder, f"{folder.name}/<class>")
    unread = folder.name != "test" and (folder.parent / "test").is_dir()
    return listing._replace(description=f"{listing.description}; test/ is not read") if unread else listing


def _read_flat(folder: Path, top: Path, val_labels: Path | None) -> Listing:
    """Return the validation images of a folder without class folders; a list gives their classes."""
    images = folder / IMAGES if (folder / IMAGES).is_dir() else folder
    wnids, label_source = find_labels(top, folder, val_labels)
    # The list itself may be in the same folder as the images.
    files = {entry.name: entry for entry in _check_files(visible(images)) if entry.name != label_source}
    check_labels(images, list(files), wnids, label_source)
    found = [FoundImage(wnids[name], f"{wnids[name]}/{name}", entry.stat().st_size) for name, entry in files.items()]
    return Listing(found, ImageLocation(images, FLAT), f"{images}, classes from {label_source}")


def _read_classes(folder: Path, layout: str) -> Listing:
    """Return the images of class folders, which may have a folder ``images`` each; ``layout`` is for the user."""
    entries = visible(folder)
    folders = [entry for entry in entries if entry.is_dir()]
    if not folders and layout == "<class>":
        names = ["train/<class>/*.JPEG", "val/<class>/*.JPEG", *ARCHIVES.values(), "<class>/*.JPEG"]
        raise FileNotFoundError(f"{folder} has none of {', '.join(names)}")
    unread = _check_no_images([entry for entry in entries if not entry.is_dir()], f"{folder}/<class>/")
    nested = any(Path(entry.path, IMAGES).is_dir() for entry in folders)
    found, empty = [], set()
    for entry in folders:
        files = visible(Path(entry.path))
        if nested:
            unread += _check_no_images([file for file in files if file.name != IMAGES], f"{entry.path}/{IMAGES}/")
            files = visible(Path(entry.path, IMAGES)) if Path(entry.path, IMAGES).is_dir() else []
        found += [
            FoundImage(entry.name, f"{entry.name}/{file.name}", file.stat().st_size) for file in _check_files(files)
        ]
        empty |= set() if files else {entry.name}
    description = f"{folder}, as {layout}{f'/{IMAGES}' if nested else ''}/<file>"
    if unread:
        description += f"; not read: {min(unread)}" + (f" and {len(unread) - 1:,} more" if len(unread) > 1 else "")
    return Listing(found, ImageLocation(folder, WITHIN_CLASS if nested else BY_CLASS), description, frozenset(empty))


def _check_no_images(entries: list[os.DirEntry[str]], folder: str) -> list[str]:
    """Return the names of files next to the image folders. Raises ValueError if one is an image."""
    for entry in _check_files(entries):
        if Path(entry.name).suffix.lower() in SUFFIXES:
            raise ValueError(f"{entry.path} is outside of the class folders: move it to {folder}")
    return [entry.name for entry in entries]


def _check_files(entries: list[os.DirEntry[str]]) -> list[os.DirEntry[str]]:
    """Return ``entries``. Raises ValueError if one is not a file, such as a folder."""
    for entry in entries:
        if not entry.is_file():
            raise ValueError(f"{entry.path} is not a file: a class folder must contain images only")
    return entries


def visible(folder: Path) -> list[os.DirEntry[str]]:
    """Return the entries of a folder without hidden ones, in no particular order."""
    with os.scandir(folder) as entries:
        return [entry for entry in entries if not entry.name.startswith(".")]
