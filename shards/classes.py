"""Class names and their labels.

A class that gets another label gives wrong results without an error. So every doubtful case is refused here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

WNID = re.compile(r"n\d{8}")
"""A WordNet id, the name of an ImageNet class."""
MOST_CLASSES = 100_000
"""Largest number of classes that numbers alone may name; a larger number is probably no label."""

Label = int | str
"""A label as it stands in a data set: a number, or the name of a class."""


def read_lines(path: Path) -> list[str]:
    """Return the lines of a text file, stripped and without blank lines. Raises ValueError or OSError."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # without the byte-order mark that Windows editors add
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}): save it as UTF-8") from None
    return [line.strip() for line in text.splitlines() if line.strip()]


def read_classes(path: Path, found: set[str]) -> list[str]:
    """Return the class names in a file, one per line, in the order of their labels.

    ``found`` are the class names in the data set; a name may contain spaces. Text after a wnid is a description, and is
    ignored. So is text after a class name, if the line as a whole is not a class in ``found``.
    """
    classes = [_parse_class(line, found) for line in read_lines(path)]
    if not classes:
        raise ValueError(f"{path} contains no class: write one class per line")
    if twice := sorted({name for name in classes if classes.count(name) > 1}):
        raise ValueError(f"{path} contains a class twice ({twice[0]}): remove one of the lines")
    return classes


def _parse_class(line: str, found: set[str]) -> str:
    first = re.split(r"[\s,]", line, maxsplit=1)[0]
    return first if WNID.fullmatch(first) or (line not in found and first in found) else line


def number_classes(used: Mapping[str, set[str]], empty: Mapping[str, set[str]], listed: Path | None) -> list[str]:
    """Return the classes in the order of their labels.

    The file ``listed`` defines the order. Without it, the classes of the first split, normally ``train``, are sorted.
    ``used`` are the classes with an image of each split, ``empty`` its class folders without one. Raises ValueError
    where labels could shift: a class folder without images, or a class that is missing from the list.
    """
    splits = {split: used[split] | empty.get(split, set()) for split in used}
    if listed:
        classes = read_classes(listed, set().union(*splits.values()))
        for split, names in splits.items():
            _refuse(names - set(classes), split, f"which is missing from the list {listed}: add it there")
        return classes
    first = next(iter(splits))  # train, if there is a training split
    _refuse(
        splits[first] - used[first],
        first,
        "which has no image: add its images, remove its folder, or list all classes in order with --classes",
    )
    for split, names in splits.items():
        unknown = names - used[first]
        # Only digits: these are probably labels, not the names of class folders.
        advice = "use the class names" if all(name.isdecimal() for name in unknown) else "add or remove it"
        _refuse(unknown, split, f"which {first} does not have: {advice}, or list all classes in order with --classes")
    return sorted(used[first])


def name_labels(found: Mapping[str, Mapping[Label, str]], listed: Path | None) -> list[str]:
    """Return the class names in the order of their numbers, for labels that are all names, or all numbers.

    ``found`` are the labels of each split, each with the first sample that has it. Names are numbered like folders, and
    numbers are named by the file ``listed``, or by themselves. Raises ValueError for a label that is not one of them.
    """
    samples = {label: sample for split in reversed([*found.values()]) for label, sample in split.items()}
    names = [label for label in samples if isinstance(label, str)]
    numbers = [label for label in samples if isinstance(label, int)]
    if names and numbers:
        name, number = min(names), min(numbers)
        raise ValueError(
            f"the labels are names and numbers: {samples[name]} has {name!r}, {samples[number]} has {number}"
        )
    if names:
        return number_classes({split: {str(label) for label in each} for split, each in found.items()}, {}, listed)
    classes = read_classes(listed, set()) if listed else []
    end = len(classes) or MOST_CLASSES
    for number in sorted(numbers):
        if not 0 <= number < end:
            advice = f"{listed} has {end:,} classes" if listed else "list the classes with --classes FILE"
            raise ValueError(f"{samples[number]} has the label {number}, which is not from 0 to {end - 1:,}: {advice}")
    return classes or [str(number) for number in range(max(numbers, default=0) + 1)]


def number_of(label: Label, numbers: Mapping[str, int]) -> int:
    """Return a label as a number, −1 for a name that is not in ``numbers``."""
    return label if isinstance(label, int) else numbers.get(label, -1)


def _refuse(names: set[str], split: str, reason: str) -> None:
    """Raise ValueError if there are any ``names``."""
    if names:
        more = f" and {len(names) - 1:,} more" if len(names) > 1 else ""
        raise ValueError(f"{split} has the class {min(names)}{more}, {reason}")


def without_images(labels: set[int], classes: Sequence[str]) -> str:
    """Return a message about the classes whose label is not in ``labels``; an empty string if there are none."""
    unused = [name for label, name in enumerate(classes) if label not in labels]
    if not unused:
        return ""
    return f"{len(unused):,} of {len(classes):,} classes have no image, the first is {unused[0]}"
