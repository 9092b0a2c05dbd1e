"""The split that a file belongs to, as its name says: ``imagenet1k-validation-00.tar`` is one of ``val``."""

from __future__ import annotations

import argparse
import fnmatch
import re
from collections.abc import Mapping, Sequence

_WORDS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}


def add_split_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that name the files of each split."""
    parser.add_argument("--train", metavar="PATTERN", help="names of the training files, such as 'a-*' (default: all)")
    parser.add_argument("--val", metavar="PATTERN", help="names of the validation files; the others are for training")


def assign_splits(names: Sequence[str], train: str | None, val: str | None) -> dict[str, list[str]]:
    """Return the file names of each split, sorted: ``train``, ``val`` or both.

    ``train`` and ``val`` are patterns such as ``a-*.tar``; with one of them only patterns count. Otherwise a word in
    the names decides. Names without such a word are all ``train``. A test split is ``val`` if there is no other, and
    left out if there is. Raises ValueError if a name fits no split, or more than one.
    """
    found = _by_pattern(names, train, val) if train or val else _by_word(names)
    return {split: sorted(found[split]) for split in ("train", "val") if found.get(split)}


def print_splits(splits: Mapping[str, Sequence[str]], names: Sequence[str]) -> None:
    """Print the first and last file of each split, and those of ``names`` that are not read."""
    for split, each in splits.items():
        print(f"{split}: {len(each):,} files, {each[0]} to {each[-1]}")
    if unread := sorted({*names} - {name for each in splits.values() for name in each}):
        print(f"not read: {unread[0]}" + (f" and {len(unread) - 1:,} more" if len(unread) > 1 else ""))


def _by_pattern(names: Sequence[str], train: str | None, val: str | None) -> dict[str, list[str]]:
    found = {split: fnmatch.filter(names, pattern) for split, pattern in (("train", train), ("val", val)) if pattern}
    for split, pattern in (("train", train), ("val", val)):
        if pattern and not found[split]:
            raise ValueError(f"--{split} {pattern}: no file has such a name; the first is {min(names)}")
    if twice := sorted({*found.get("train", ())} & {*found.get("val", ())}):
        raise ValueError(f"{twice[0]} fits both --train and --val: give narrower patterns")
    if not train:
        found["train"] = sorted({*names} - {*found["val"]})
    return found


def _by_word(names: Sequence[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(split_of(name), []).append(name)
    if "" in found and len(found) > 1:
        raise ValueError(f"the name {min(found[''])} says no split, but others do: give --train and --val")
    if "" in found:
        return {"train": found[""]}
    if "val" not in found and "test" in found:
        found["val"] = found["test"]
    return found


def split_of(name: str) -> str:
    """Return the split in a name, an empty text if there is none. Raises ValueError if there are two."""
    splits = {_WORDS[word] for word in re.split(r"[^a-z]+", name.lower()) if word in _WORDS}
    if len(splits) > 1:
        raise ValueError(f"the name {name} says both {' and '.join(sorted(splits))}: give --train and --val")
    return splits.pop() if splits else ""
