"""Which classes there are, and which number each has: a label that moves is a wrong result without an error."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

WNID = re.compile(r"n\d{8}")


def read_lines(path: Path) -> list[str]:
    """Return the lines of a list, without blank ones and the spaces around them. Raises ValueError or OSError."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8 ({error.reason} at byte {error.start}): save it so") from None
    return [line.strip() for line in text.splitlines() if line.strip()]


def read_classes(path: Path, found: set[str]) -> list[str]:
    """Read a list of classes in the order of their labels, one a line; what follows a wnid describes it.

    A name may have spaces. A line that is no class among ``found``, but begins with one, is that class described.
    """
    classes = [_class_of(line, found) for line in read_lines(path)]
    if not classes:
        raise ValueError(f"{path} names no class: it needs one on each line")
    if twice := sorted({name for name in classes if classes.count(name) > 1}):
        raise ValueError(f"{path} names a class twice ({twice[0]}): leave one of its lines")
    return classes


def _class_of(line: str, found: set[str]) -> str:
    first = re.split(r"[\s,]", line, maxsplit=1)[0]
    return first if WNID.fullmatch(first) or (line not in found and first in found) else line


def number_classes(used: Mapping[str, set[str]], empty: Mapping[str, set[str]], listed: Path | None) -> list[str]:
    """Return the classes in the order of their labels: ``listed``, or those of training in alphabetical order.

    ``used`` are each split's classes with an image, ``empty`` its folders without one. Raises ValueError, one line,
    where that would move labels: for a class that has no image to learn from, and one that the list lacks.
    """
    splits = {split: used[split] | empty.get(split, set()) for split in used}
    if listed:
        classes = read_classes(listed, set().union(*splits.values()))
        for split, names in splits.items():
            _refuse(names - set(classes), split, f"which the list {listed} lacks: add it there")
        return classes
    first = next(iter(splits))  # train, where there is one
    _refuse(
        splits[first] - used[first],
        first,
        "without an image: add its images, remove its folder, or name all classes in --classes, in their order",
    )
    for split, names in splits.items():
        beyond = names - used[first]
        advice = "give the classes' own names" if all(name.isdecimal() for name in beyond) else "add or remove it"
        _refuse(beyond, split, f"which {first} lacks: {advice}, or name all classes in --classes, in their order")
    return sorted(used[first])


def _refuse(names: set[str], split: str, why: str) -> None:
    if names:
        more = f" and {len(names) - 1:,} more" if len(names) > 1 else ""
        raise ValueError(f"{split} has the class {min(names)}{more}, {why}")


def without_images(labels: set[int], classes: Sequence[str]) -> str:
    """Return a few words on the classes that have none of the labels; empty where all have."""
    lacking = [name for label, name in enumerate(classes) if label not in labels]
    if not lacking:
        return ""
    return f"{len(lacking):,} of {len(classes):,} classes without an image, the first being {lacking[0]}"
