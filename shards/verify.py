"""Check a folder of shards: every byte, every value, every image.

    python shards/verify.py DESTINATION

Prints one line per problem and exits with 1, or prints a summary with the label histogram and exits with 0. The tars'
contents are compared with sample table, index and manifest, so damaged, exchanged and missing files are found. JPEGs
that end in plain grey are counted, because they may have been broken in the source, but they are not an error.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

if not __package__:  # started as a script: Python put this folder, not the root, on the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np

from shards.boxes import (
    BOX_COLUMNS,
    box_offsets_path,
    boxes_path,
    find_wrong_box,
    load_box_offsets,
    load_boxes,
    no_boxes,
)
from shards.command import Parser, add_jobs, for_each, progress_bar, run_main
from shards.copies import check_copy, decode_rgb
from shards.foreign import ForeignShard, foreign_shards, scan_foreign
from shards.jpeg import decode_jpeg, ends_in_grey
from shards.manifest import IGNORED_VALUE, Manifest, Shard, ShardTaskName, Split, read_manifest, sha256_of
from shards.masks import check_size, decode_mask, meaning_of_values, to_classes
from shards.plan import Unusable
from shards.read import load_samples, load_targets, sample_dtype, samples_path, targets_path
from shards.scan import Scan, index_fits, scan_shard
from shards.write import index_path


class VerifyTask(NamedTuple):
    """A shard to check, with its rows of the sample table (None: the table is unusable)."""

    folder: Path
    shard: Shard
    image: str
    split: str
    expected: np.ndarray | None
    foreign: ForeignShard | None = None
    """How to read a tar that another tool wrote."""
    task: ShardTaskName = "classification"
    num_classes: int = 0
    targets: np.ndarray | None = None
    """The shard's rows of the table of targets (None: there is no such table, or it is unusable)."""
    boxes: list[np.ndarray] | None = None
    """The boxes of each row in the tables of boxes (None: there are no such tables, or they are unusable)."""
    scale: int = 1
    """How many times smaller the copies are."""


class CheckedShard(NamedTuple):
    """The problems of a shard, and the rows that its tar really contains."""

    task: VerifyTask
    problems: list[str]
    rows: np.ndarray
    grey: list[int]
    """Ids of images that end in plain grey."""
    targets: list[bytes] = []  # noqa: RUF012
    """The targets that its tar really contains."""
    pixels: np.ndarray = np.zeros(256, np.int64)
    """Number of pixels of each value in its masks."""
    boxes: list[np.ndarray] = []  # noqa: RUF012
    """The boxes that its tar really contains."""


def check_shard(task: VerifyTask) -> CheckedShard:
    """Check a tar, its index and its images. Runs in a worker process."""
    path, shard = task.folder / task.shard.url, task.shard
    no_rows = np.empty(0, sample_dtype(task.task))
    if not path.is_file():
        return CheckedShard(task, [f"{path} is missing"], no_rows, [])
    problems = []
    if path.stat().st_size != shard.filesize:
        problems.append(f"{path} has {path.stat().st_size:,} bytes, but {shard.filesize:,} in the manifest")
    elif sha256_of(path) != shard.sha256:
        problems.append(f"{path} has a sha256 that differs from the manifest")
    try:
        scan = scan_foreign(path, task.foreign) if task.foreign else scan_shard(path, task.image, task.task)
    except ValueError as error:
        return CheckedShard(task, [*problems, str(error)], no_rows, [])
    if len(scan.rows) != shard.nsamples:
        problems.append(f"{path} contains {len(scan.rows):,} samples, according to the manifest {shard.nsamples:,}")
    if not index_fits(path, scan):
        index = index_path(path)
        problems.append(f"{index} does not fit its tar" if index.is_file() else f"{index} is missing")
    if task.expected is not None:
        problems += _check_rows(path, scan.rows, task.expected)
    if task.task == "multilabel":
        problems += _check_targets(path, scan, task.num_classes, task.targets)
    if task.task == "detection":
        problems += _check_boxes(path, scan, task.num_classes, task.boxes)
    grey: list[int] = []
    problems += _check_images(path, scan.rows, task.foreign is not None, grey)
    pixels = np.zeros(256, np.int64)
    if task.task == "segmentation":
        problems += _check_masks(path, scan.rows, task.num_classes, pixels)
    if task.task == "super_resolution":
        problems += _check_copies(path, scan.rows, task.scale)
    return CheckedShard(task, problems, scan.rows, grey, scan.targets, pixels, scan.boxes)


def _check_masks(path: Path, rows: np.ndarray, num_classes: int, pixels: np.ndarray) -> Iterator[str]:
    """Yield the problems of a tar's masks, and add the number of pixels of each value to ``pixels``."""
    meaning = meaning_of_values(num_classes)
    with path.open("rb") as file:
        for row in rows:
            file.seek(row["mask_offset"])
            try:
                mask_HW = decode_mask(file.read(row["mask_size"]))
                check_size(mask_HW, row["width"], row["height"])
                pixels += np.bincount(to_classes(mask_HW, meaning).ravel(), minlength=256)
            except Unusable as reason:
                yield f"{path}: the sample of id {row['id']} is unusable: {reason}"


def _check_copies(path: Path, rows: np.ndarray, scale: int) -> Iterator[str]:
    """Yield the problems of a tar's smaller copies, which must be their images, ``scale`` times smaller."""
    with path.open("rb") as file:
        for row in rows:
            try:
                image_HWC, low_HWC = (
                    decode_rgb(_read_bytes(file, row[offset], row[size]))
                    for offset, size in (("offset", "size"), ("low_offset", "low_size"))
                )
                check_copy(image_HWC, low_HWC, scale)
            except Unusable as reason:
                yield f"{path}: the sample of id {row['id']} is unusable: {reason}"


def _read_bytes(file: BinaryIO, offset: int, size: int) -> bytes:
    file.seek(offset)
    return file.read(size)


def _check_targets(path: Path, scan: Scan, num_targets: int, expected: np.ndarray | None) -> Iterator[str]:
    """Yield the problems of the targets of a tar."""
    for number, targets in zip(scan.rows["id"], scan.targets, strict=True):
        if len(targets) != num_targets or not set(targets) <= {0, 1}:
            yield f"{path}: the labels of id {number} are not {num_targets:,} bytes of 0 or 1"
            return
    if expected is not None and b"".join(scan.targets) != expected.tobytes():
        yield f"{path} and the table of targets disagree"


def _check_boxes(path: Path, scan: Scan, num_classes: int, expected: list[np.ndarray] | None) -> Iterator[str]:
    """Yield the problems of the boxes of a tar."""
    for row, boxes in zip(scan.rows, scan.boxes, strict=True):
        if wrong := find_wrong_box(boxes, row["width"], row["height"], num_classes):
            yield f"{path}: box {wrong[0]} of id {row['id']} {wrong[1]}"
    pairs = zip(scan.boxes, expected or scan.boxes, strict=False)
    same = all(np.array_equal(one, other, equal_nan=True) for one, other in pairs)
    if expected is not None and not (same and len(expected) == len(scan.boxes)):
        yield f"{path} and the tables of boxes disagree"


def _check_rows(path: Path, rows: np.ndarray, expected: np.ndarray) -> list[str]:
    if len(rows) != len(expected):
        return [f"{path} contains {len(rows):,} samples, the sample table {len(expected):,}"]
    names = [name for name in rows.dtype.names or () if name != "shard" and (rows[name] != expected[name]).any()]
    return [f"{path} and the sample table disagree about {', '.join(names)}"] if names else []


def _check_images(path: Path, rows: np.ndarray, foreign: bool, grey: list[int]) -> Iterator[str]:
    """Yield the problems of a tar's images, and add the ids of images that end in grey to ``grey``."""
    with path.open("rb") as file:
        for row in rows:
            file.seek(row["offset"])
            try:
                image = decode_jpeg(file.read(row["size"]), webp=foreign)
            except Unusable as reason:
                yield f"{path}: the image of id {row['id']} is unusable: {reason}"
                continue
            width, height = image.size
            grey += [int(row["id"])] if ends_in_grey(image) else []
            if (width, height) != (row["width"], row["height"]):
                yield f"{path}: the image of id {row['id']} is {width}×{height}, not {row['width']}×{row['height']}"


def check_split(manifest: Manifest, split: Split, rows: np.ndarray) -> Iterator[str]:
    """Yield the problems of a split as a whole; ``rows`` are those of all its tars."""
    ids, counts = np.unique(rows["id"], return_counts=True)
    left_out = np.array([entry.id for entry in split.left_out], np.int64)
    for number in ids[counts > 1]:
        yield f"{split.name}: id {number} is used more than once"
    for number in np.intersect1d(ids, left_out):
        yield f"{split.name}: id {number} is in a shard, but according to the manifest it was left out"
    missing = np.setdiff1d(np.arange(split.id_count), np.union1d(ids, left_out))
    beyond = ids[(ids < 0) | (ids >= split.id_count)]
    for numbers, problem in ((missing, "missing"), (beyond, f"not from 0 to {split.id_count - 1:,}")):
        if len(numbers):
            yield f"{split.name}: {len(numbers):,} ids are {problem}, the first is {numbers[0]}"
    for label in np.setdiff1d(rows["label"], np.arange(manifest.num_classes) if manifest.classes else [-1]):
        yield f"{split.name}: label {label} is not one of the manifest's {manifest.num_classes:,} classes"
    if len(rows) and (rows["width"].max(), rows["height"].max()) != (split.max_width, split.max_height):
        yield f"{split.name}: the largest sides are not the manifest's {split.max_width} and {split.max_height}"


def check_table(
    folder: Path, split: Split, task: ShardTaskName = "classification"
) -> tuple[np.ndarray | None, list[str]]:
    """Return the rows of a split's sample table, None if it is unusable, and the problems of its file."""
    path = samples_path(folder, split.name)
    table, problems = _read_table(path, split.samples_sha256, partial(load_samples, dtype=sample_dtype(task)))
    if table is None:
        return None, problems
    indices = np.repeat(np.arange(len(split.shards)), [shard.nsamples for shard in split.shards])
    if not np.array_equal(table["shard"], indices):
        problems.append(f"{path} assigns samples to other shards than the manifest")
    return table, problems


def check_targets_table(folder: Path, split: Split, manifest: Manifest) -> tuple[np.ndarray | None, list[str]]:
    """Return a split's table of targets, None if there is none or it is unusable, and the problems of its file."""
    if not split.targets_sha256:
        return None, []
    path = targets_path(folder, split.name)
    table, problems = _read_table(path, split.targets_sha256, load_targets)
    if table is None:
        return None, problems
    if table.shape != (split.samples, manifest.num_classes):
        return None, [*problems, f"{path} has {table.shape[0]:,} rows of {table.shape[1]:,} classes"]
    return table, problems


def check_box_tables(folder: Path, split: Split, task: ShardTaskName) -> tuple[list[np.ndarray] | None, list[str]]:
    """Return the boxes of each row of a split, None if there are none or they are unusable, and the problems."""
    if task != "detection":
        return None, []
    path = boxes_path(folder, split.name)
    boxes, problems = _read_table(path, split.boxes_sha256, load_boxes)
    offsets, wrong = _read_table(box_offsets_path(folder, split.name), split.box_offsets_sha256, load_box_offsets)
    problems += wrong
    if boxes is None or offsets is None:
        return None, problems
    if (len(offsets), offsets[-1]) != (split.samples + 1, len(boxes)):
        return None, [*problems, f"{path} and its offsets disagree about the number of boxes or images"]
    return np.split(boxes, offsets[1:-1]), problems


def _read_table(path: Path, sha256: str, load: Callable[[Path], np.ndarray]) -> tuple[np.ndarray | None, list[str]]:
    """Return a table, None if it is unusable, and the problems of its file; ``sha256`` is the manifest's."""
    if not path.is_file():
        return None, [f"{path} is missing"]
    problems = []
    if sha256_of(path) != sha256:
        problems.append(f"{path} has a sha256 that differs from the manifest")
    try:
        return load(path), problems
    except ValueError as error:
        return None, [*problems, str(error)]


class SplitTables(NamedTuple):
    """The tables of a split; None for one that there is not, or that is unusable."""

    samples: np.ndarray | None
    targets: np.ndarray | None
    boxes: list[np.ndarray] | None


def _read_tables(folder: Path, manifest: Manifest, split: Split) -> tuple[SplitTables, list[str]]:
    """Return the tables of a split, and the problems of their files."""
    samples, problems = check_table(folder, split, manifest.task)
    targets, of_targets = check_targets_table(folder, split, manifest)
    boxes, of_boxes = check_box_tables(folder, split, manifest.task)
    return SplitTables(samples, targets, boxes), [*problems, *of_targets, *of_boxes]


def _tasks_of(folder: Path, manifest: Manifest, split: Split, tables: SplitTables) -> Iterator[VerifyTask]:
    """Yield the task of each shard of a split."""
    foreign = foreign_shards(manifest, split) if manifest.is_foreign else {}
    ends = np.cumsum([shard.nsamples for shard in split.shards])
    for number, (shard, end) in enumerate(zip(split.shards, ends.tolist(), strict=True)):
        own = slice(end - shard.nsamples, end)
        yield VerifyTask(
            folder,
            shard,
            manifest.image,
            split.name,
            None if tables.samples is None else tables.samples[tables.samples["shard"] == number],
            foreign.get(shard.url),
            manifest.task,
            manifest.num_classes,
            None if tables.targets is None else tables.targets[own],
            None if tables.boxes is None else tables.boxes[own],
            manifest.scale,
        )


def verify(folder: Path, jobs: int) -> list[str]:
    """Return all problems of a folder of shards; print the label histogram of each split."""
    manifest = read_manifest(folder)
    problems, tasks = [], []
    for split in manifest.splits.values():
        tables, wrong = _read_tables(folder, manifest, split)
        problems += wrong
        tasks += _tasks_of(folder, manifest, split, tables)
    checked: dict[str, CheckedShard] = {}
    with progress_bar(sum(task.shard.nsamples for task in tasks), folder.name) as bar:

        def receive(result: CheckedShard) -> None:
            checked[result.task.shard.url] = result
            bar.update(result.task.shard.nsamples)

        for_each(check_shard, tasks, jobs, receive)
    if "val" not in manifest.splits and manifest.classes:
        print("there is no validation split: training will not validate")
    results = [checked[task.shard.url] for task in tasks]
    problems += [problem for result in results for problem in result.problems]
    for split in manifest.splits.values():
        problems += _check_and_print(manifest, split, [each for each in results if each.task.split == split.name])
    return problems


def _check_and_print(manifest: Manifest, split: Split, results: list[CheckedShard]) -> list[str]:
    """Print what a split has, and return its problems as a whole."""
    rows = np.concatenate([np.empty(0, sample_dtype(manifest.task)), *(result.rows for result in results)])
    if manifest.task == "segmentation":
        _print_pixels(manifest, split, rows, np.sum([result.pixels for result in results], axis=0))
    elif manifest.task == "detection":
        _print_boxes(manifest, split, [boxes for result in results for boxes in result.boxes])
    elif manifest.task == "unlabelled":
        files = f"in {len(split.shards):,} shards; {len(split.left_out):,} files left out"
        print(f"{split.name}: {len(rows):,} images without labels {files}")
    elif manifest.task == "super_resolution":
        _print_copies(manifest, split, rows)
    else:
        targets = [row for result in results for row in result.targets]
        _print_histogram(manifest, split, rows, _images_by_class(manifest, rows, targets))
    _print_grey(split.name, sorted(number for result in results for number in result.grey))
    return list(check_split(manifest, split, rows))


def _print_pixels(manifest: Manifest, split: Split, rows: np.ndarray, pixels: np.ndarray) -> None:
    counts, total = pixels[: manifest.num_classes], max(1, pixels.sum())
    shares = 100 * counts[counts > 0] / total
    range_text = f"{shares.min():.3g} to {shares.max():.3g} % of the pixels in a class" if len(shares) else "no pixels"
    print(
        f"{split.name}: {len(rows):,} images with masks in {len(split.shards):,} shards; "
        f"{len(shares):,} of {manifest.num_classes:,} classes, {range_text}, "
        f"{100 * pixels[IGNORED_VALUE] / total:.3g} % ignored; {len(split.left_out):,} files left out"
    )


def _print_copies(manifest: Manifest, split: Split, rows: np.ndarray) -> None:
    pixels = rows["width"].astype(np.int64) * rows["height"]
    range_text = f", {pixels.min():,} to {pixels.max():,} pixels each" if len(rows) else ""
    print(
        f"{split.name}: {len(rows):,} images with copies {manifest.scale} times smaller in {len(split.shards):,} shards"
        f"{range_text}; {len(split.left_out):,} files left out"
    )


def _print_boxes(manifest: Manifest, split: Split, boxes: list[np.ndarray]) -> None:
    rows = np.concatenate([no_boxes(), *boxes])
    classes, counts = np.unique(rows[:, BOX_COLUMNS.index("class")], return_counts=True)
    range_text = f", {counts.min():,} to {counts.max():,} in each" if len(counts) else ""
    empty, crowds = sum(not len(each) for each in boxes), (rows[:, BOX_COLUMNS.index("crowd")] == 1).sum()
    print(
        f"{split.name}: {len(boxes):,} images in {len(split.shards):,} shards, {empty:,} without a box; "
        f"{len(rows):,} boxes, {crowds:,} of crowds; "
        f"{len(classes):,} of {manifest.num_classes:,} classes{range_text}; {len(split.left_out):,} left out"
    )


def _print_grey(split: str, ids: list[int]) -> None:
    if ids:
        some = ", ".join(map(str, ids[:5])) + (", …" if len(ids) > 5 else "")
        print(
            f"{split}: {len(ids):,} suspicious images: their last rows are plain grey, as in a broken JPEG: ids {some}"
        )


def _images_by_class(manifest: Manifest, rows: np.ndarray, targets: list[bytes]) -> np.ndarray:
    """Return the number of images of each class."""
    if manifest.task == "multilabel":
        counts = np.zeros(manifest.num_classes, np.int64)
        for row in targets:
            if len(row) == manifest.num_classes:
                counts += np.frombuffer(row, np.uint8) > 0
        return counts
    labels = rows["label"]
    return np.bincount(labels[(labels >= 0) & (labels < manifest.num_classes)], minlength=manifest.num_classes)


def _print_histogram(manifest: Manifest, split: Split, rows: np.ndarray, counts: np.ndarray) -> None:
    counts = counts[counts > 0]
    range_text = f"{counts.min():,} to {counts.max():,} images in a class" if len(counts) else "no images"
    classes = f"{len(counts):,} of {manifest.num_classes:,} classes"
    left_out = f"{len(split.left_out):,} files left out"
    print(f"{split.name}: {len(rows):,} images in {len(split.shards):,} shards; {classes}, {range_text}; {left_out}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = Parser(prog="verify.py", description="Check a folder of shards: every byte, every value, every image.")
    parser.add_argument("destination", type=Path)
    add_jobs(parser)
    options = parser.parse_args(arguments)
    problems = verify(options.destination, options.jobs)
    print("\n".join(problems) if problems else "no problems found")
    return 1 if problems else 0


if __name__ == "__main__":
    run_main(main)
