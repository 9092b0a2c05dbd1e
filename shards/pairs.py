"""Images and their masks: finding the pairs in folders, and writing them as shards. All preparations of masks use it.

An image and its mask have the same path in their folders. Only the extensions differ, and endings of the names, such
as ``_leftImg8bit`` and ``_gtFine_labelIds``.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from shards.choice import choose
from shards.jpeg import Transform
from shards.layouts import SUFFIXES
from shards.manifest import read_manifest
from shards.masks import (
    Meaning,
    changes_of,
    check_size,
    decode_mask,
    encode_mask,
    resized_mask,
    to_classes,
)
from shards.plan import EncodedImage, ImageItem, make_job, permutation, printable
from shards.prepare import prepare
from shards.read import SplitReader
from shards.upright import read_upright
from shards.write import image_extension

_BOTH = "jpg;png"
_MAGIC_BYTES = 4
_LOOKED_AT = 500
"""Masks of a split in which a preparation looks for the classes."""


class Endings(NamedTuple):
    """The ends of the names of images and of masks, before the extension."""

    image: str = ""
    mask: str = ""


_NO_ENDINGS = Endings()


class MaskedSplit(NamedTuple):
    """The images and masks of a split, and the folders to which their paths are relative."""

    images: Path
    masks: Path
    items: list[ImageItem]


@dataclass(frozen=True)
class MaskedFiles:
    """A source of images with masks: each split's folders, the conversion of images, and what the values mean."""

    folders: dict[str, tuple[Path, Path]]
    transform: Transform
    meaning: Meaning

    def load(self, split: str, item: ImageItem) -> EncodedImage:
        """Return an image and its mask, converted. Raises Unusable, and ValueError if a file's size has changed."""
        images, masks = self.folders[split]
        upright = read_upright(_read(images / item.path, item.size))
        mask_HW = to_classes(decode_mask(_read(masks / item.mask, item.mask_size), palette=True), self.meaning)
        check_size(mask_HW, *upright.image.size)
        image = upright.stored(self.transform)
        return image._replace(mask=encode_mask(resized_mask(mask_HW, image.width, image.height)))


def find_pairs(
    images: Path, masks: Path, endings: Endings = _NO_ENDINGS, names: Sequence[str] | None = None
) -> MaskedSplit:
    """Return the pairs of images and masks in two folders, and print which files have no partner.

    ``names`` are paths of the wanted images without extension and ending. Raises ValueError or FileNotFoundError if one
    of them has no image or no mask, or if there is no pair at all.
    """
    found = _by_name(images, endings.image), _by_name(masks, endings.mask)
    if names is None:
        names = sorted(found[0].keys() & found[1].keys())
        _check_any(names, images, masks, found)
        _print_without_partner(found, ("image", "mask"))
        _print_without_partner(found[::-1], ("mask", "image"))
    for name in names:
        for folder, files, kind in zip((images, masks), found, ("image", "mask"), strict=True):
            if name not in files:
                raise ValueError(f"{folder} has no {kind} {printable(name)}: add it, or take the name off the list")
    return MaskedSplit(images, masks, [_item(images, masks, found[0][name], found[1][name]) for name in names])


def prepare_masked(
    tool: str, classes: Sequence[str], splits: Mapping[str, MaskedSplit], meaning: Meaning, options: Namespace
) -> int:
    """Write images with masks as shards, as the options of ``add_upright_options`` say, and return the exit code.

    ``tool`` is the name of the command, for the manifest. Raises like ``prepare``.
    """
    if "val" not in splits:
        print("there is no validation split: training will not validate")
    items = {split: each.items for split, each in splits.items()}
    if options.subset:
        items = {split: choose(each, options.subset, options.seed, split) for split, each in items.items()}
    transform = Transform(options.resize_short, options.max_side, options.quality)
    folders = {split: (each.images.resolve(), each.masks.resolve()) for split, each in splits.items()}
    job = make_job(
        tool,
        common_extensions(_heads(splits, items)),
        classes,
        items,
        MaskedFiles(folders, transform, meaning),
        options,
        asdict(transform),
        task="segmentation",
        images_per_split=options.subset,
        mask_values=changes_of(meaning),
    )
    code = prepare(job, options.destination, options)
    if not options.dry_run:
        _print_missing_classes(options.destination)
    return code


def _by_name(folder: Path, ending: str) -> dict[str, str]:
    """Return the paths of the image files in a folder and those inside by their path without extension and ending."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder: name the folders of images and of masks")
    found: dict[str, str] = {}
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        if path.suffix.lower() not in SUFFIXES or any(part.startswith(".") for part in inside.parts):
            continue
        name = inside.with_suffix("").as_posix()
        if not name.endswith(ending) or not path.is_file():
            continue
        name = name[: len(name) - len(ending)]
        if name in found:
            raise ValueError(f"{folder} has {printable(found[name])} and {inside.name}: remove one of them")
        found[name] = inside.as_posix()
    return found


def _check_any(names: Sequence[str], images: Path, masks: Path, found: tuple[dict[str, str], dict[str, str]]) -> None:
    if names:
        return
    examples = [f", such as {printable(next(iter(each.values())))}" if each else "" for each in found]
    raise ValueError(
        f"no image in {images} has a mask in {masks}: {len(found[0]):,} images{examples[0]}; "
        f"{len(found[1]):,} masks{examples[1]}. The paths must be equal but for extension and ending"
    )


def _print_without_partner(found: tuple[dict[str, str], ...], kinds: tuple[str, str]) -> None:
    if lone := sorted(found[0].keys() - found[1].keys()):
        print(f"not used: {len(lone):,} {kinds[0]}s without {kinds[1]}, the first is {printable(found[0][lone[0]])}")


def _item(images: Path, masks: Path, image: str, mask: str) -> ImageItem:
    return ImageItem(image, 0, (images / image).stat().st_size, mask=mask, mask_size=(masks / mask).stat().st_size)


def _read(path: Path, size: int) -> bytes:
    data = path.read_bytes()
    if len(data) != size:
        raise ValueError(f"{path} has changed since it was listed: start again when nothing writes to it")
    return data


def common_extensions(heads: Iterable[bytes]) -> str:
    """Return the extensions of images as their first bytes say: ``jpg``, ``png``, or both."""
    return ";".join(sorted({image_extension(head, _BOTH) for head in heads}))


def _heads(splits: Mapping[str, MaskedSplit], items: Mapping[str, list[ImageItem]]) -> Iterator[bytes]:
    for split, each in items.items():
        for item in each:
            with (splits[split].images / item.path).open("rb") as file:
                yield file.read(_MAGIC_BYTES)


def _print_missing_classes(folder: Path) -> None:
    """Print the classes without a pixel in some masks of each split: a wrong list of classes shows there."""
    manifest = read_manifest(folder)
    for split in manifest.splits:
        reader = SplitReader(folder, split, manifest)
        rows = permutation(len(reader.samples), 0, "masks")[:_LOOKED_AT]
        used = np.zeros(256, np.bool_)
        for mask in reader.masks(rows):
            used |= np.bincount(decode_mask(mask.tobytes()).ravel(), minlength=256) > 0
        missing = [name for name, seen in zip(manifest.classes, used, strict=False) if not seen]
        if missing:
            some = ", ".join(missing[:5]) + (", …" if len(missing) > 5 else "")
            print(f"{split}: {len(rows):,} masks have no pixel of {len(missing):,} classes: {some}")
