"""Check a folder of shards: every byte, every number, every image.

    python shards/verify.py DESTINATION

Prints what is wrong, a line for each thing, and exits 1; or a summary with the label histogram, and exits 0. The tars'
own contents are held against sample table, index and manifest, so whatever was damaged, exchanged or lost shows. JPEGs
that end in plain grey are counted, as they may have come broken, and are no error.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

if not __package__:  # started as a script: Python put this folder, not the root, on the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np

from shards.command import Parser, add_jobs, for_each, progress_bar, run_main
from shards.jpeg import decode_jpeg, ends_in_grey
from shards.manifest import Manifest, Shard, Split, read_manifest, sha256_of
from shards.plan import Unusable
from shards.read import SAMPLE_DTYPE, load_samples, samples_path
from shards.scan import index_fits, scan_shard
from shards.write import index_path

NO_ROWS = np.empty(0, SAMPLE_DTYPE)


class VerifyTask(NamedTuple):
    """A shard to check, with the rows that the sample table has for it (None: the table is unusable)."""

    folder: Path
    shard: Shard
    image: str
    split: str
    expected: np.ndarray | None


class Checked(NamedTuple):
    """What is wrong with a shard, and the rows that its tar really holds."""

    task: VerifyTask
    problems: list[str]
    rows: np.ndarray
    grey: list[int]
    """Ids of images that end in plain grey."""


def check_shard(task: VerifyTask) -> Checked:
    """Check a tar and its index. Runs in a worker process."""
    path, shard = task.folder / task.shard.url, task.shard
    if not path.is_file():
        return Checked(task, [f"{path} is missing"], NO_ROWS, [])
    problems = []
    if path.stat().st_size != shard.filesize:
        problems.append(f"{path} has {path.stat().st_size:,} bytes, the manifest says {shard.filesize:,}")
    elif sha256_of(path) != shard.sha256:
        problems.append(f"{path} has another sha256 than the manifest says")
    try:
        scan = scan_shard(path, task.image)
    except ValueError as error:
        return Checked(task, [*problems, str(error)], NO_ROWS, [])
    if len(scan.rows) != shard.nsamples:
        problems.append(f"{path} holds {len(scan.rows):,} samples, the manifest says {shard.nsamples:,}")
    if not index_fits(path, scan):
        index = index_path(path)
        problems.append(f"{index} does not fit its tar" if index.is_file() else f"{index} is missing")
    if task.expected is not None:
        problems += _check_rows(path, scan.rows, task.expected)
    grey: list[int] = []
    return Checked(task, [*problems, *_check_images(path, scan.rows, grey)], scan.rows, grey)


def _check_rows(path: Path, rows: np.ndarray, expected: np.ndarray) -> list[str]:
    if len(rows) != len(expected):
        return [f"{path} holds {len(rows):,} samples, the sample table {len(expected):,}"]
    names = [name for name in SAMPLE_DTYPE.names or () if name != "shard" and (rows[name] != expected[name]).any()]
    return [f"{path} and the sample table disagree about {', '.join(names)}"] if names else []


def _check_images(path: Path, rows: np.ndarray, grey: list[int]) -> Iterator[str]:
    """Yield what is wrong with the images, and add to ``grey`` the ids of those that end in it."""
    with path.open("rb") as file:
        for row in rows:
            file.seek(row["offset"])
            try:
                image = decode_jpeg(file.read(row["size"]))
            except Unusable as reason:
                yield f"{path}: the image of id {row['id']} {reason}"
                continue
            width, height = image.size
            grey += [int(row["id"])] if ends_in_grey(image) else []
            if (width, height) != (row["width"], row["height"]):
                yield f"{path}: the image of id {row['id']} is {width}×{height}, not {row['width']}×{row['height']}"


def check_split(manifest: Manifest, split: Split, rows: np.ndarray) -> Iterator[str]:
    """Check what concerns all the rows of a split, as its tars hold them."""
    ids, counts = np.unique(rows["id"], return_counts=True)
    left_out = np.array([each.id for each in split.left_out], np.int64)
    for number in ids[counts > 1]:
        yield f"{split.name}: id {number} comes more than once"
    for number in np.intersect1d(ids, left_out):
        yield f"{split.name}: id {number} is in a shard, the manifest says it was left out"
    lacking = np.setdiff1d(np.arange(split.id_count), np.union1d(ids, left_out))
    beyond = ids[(ids < 0) | (ids >= split.id_count)]
    for numbers, what in ((lacking, "missing"), (beyond, f"outside of the manifest's {split.id_count:,}")):
        if len(numbers):
            yield f"{split.name}: {len(numbers):,} ids are {what}, the first being {numbers[0]}"
    for label in np.setdiff1d(rows["label"], np.arange(manifest.num_classes)):
        yield f"{split.name}: label {label} lies outside the manifest's {manifest.num_classes:,} classes"
    if len(rows) and (rows["width"].max(), rows["height"].max()) != (split.max_width, split.max_height):
        yield f"{split.name}: the largest sides are not the manifest's {split.max_width} and {split.max_height}"


def check_table(folder: Path, split: Split) -> tuple[np.ndarray | None, list[str]]:
    """Check the sample table's file; return its rows, None where it cannot be used, and what is wrong."""
    path = samples_path(folder, split.name)
    if not path.is_file():
        return None, [f"{path} is missing"]
    problems = [] if sha256_of(path) == split.samples_sha256 else [f"{path} has another sha256 than the manifest says"]
    try:
        table = load_samples(path)
    except ValueError as error:
        return None, [*problems, str(error)]
    places = np.repeat(np.arange(len(split.shards)), [shard.nsamples for shard in split.shards])
    if not np.array_equal(table["shard"], places):
        problems.append(f"{path} deals the samples to other shards than the manifest does")
    return table, problems


def verify(folder: Path, jobs: int) -> list[str]:
    """Return everything that is wrong with a folder of shards; print the label histogram of each split."""
    manifest = read_manifest(folder)
    problems, tasks = [], []
    for split in manifest.splits.values():
        table, wrong = check_table(folder, split)
        problems += wrong
        for number, shard in enumerate(split.shards):
            expected = None if table is None else table[table["shard"] == number]
            tasks.append(VerifyTask(folder, shard, manifest.image, split.name, expected))
    checked: dict[str, Checked] = {}
    with progress_bar(sum(task.shard.nsamples for task in tasks), folder.name) as bar:

        def receive(result: Checked) -> None:
            checked[result.task.shard.url] = result
            bar.update(result.task.shard.nsamples)

        for_each(check_shard, tasks, jobs, receive)
    if "val" not in manifest.splits:
        print("there is no validation split: training will not validate")
    results = [checked[task.shard.url] for task in tasks]
    problems += [problem for result in results for problem in result.problems]
    for split in manifest.splits.values():
        rows = np.concatenate([NO_ROWS, *(result.rows for result in results if _is_of(result, split))])
        problems += check_split(manifest, split, rows)
        _print_histogram(manifest, split, rows)
        _print_grey(split.name, sorted(each for result in results for each in result.grey if _is_of(result, split)))
    return problems


def _is_of(result: Checked, split: Split) -> bool:
    return result.task.split == split.name


def _print_grey(split: str, ids: list[int]) -> None:
    if ids:
        some = ", ".join(map(str, ids[:5])) + (", …" if len(ids) > 5 else "")
        print(
            f"{split}: {len(ids):,} suspicious images, whose last rows are plain grey as in a broken JPEG: ids {some}"
        )


def _print_histogram(manifest: Manifest, split: Split, rows: np.ndarray) -> None:
    labels = rows["label"]
    there = np.unique(labels[(labels >= 0) & (labels < manifest.num_classes)], return_counts=True)[1]
    range_text = f"{there.min():,} to {there.max():,} images in a class" if len(there) else "no images"
    classes = f"{len(there):,} of {manifest.num_classes:,} classes"
    left_out = f"{len(split.left_out):,} files left out"
    print(f"{split.name}: {len(rows):,} images in {len(split.shards):,} shards; {classes}, {range_text}; {left_out}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = Parser(prog="verify.py", description="Check a folder of shards: every byte, every number, every image.")
    parser.add_argument("destination", type=Path)
    add_jobs(parser)
    options = parser.parse_args(arguments)
    problems = verify(options.destination, options.jobs)
    print("\n".join(problems) if problems else "all is well")
    return 1 if problems else 0


if __name__ == "__main__":
    run_main(main)
