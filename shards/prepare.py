"""Parallel, resumable writing of a plan's shards, shared by all ``prepare_*`` commands.

A shard is written under a temporary name, flushed, renamed, and only then added to the journal. A rerun keeps the
recorded shards whose sha256 is still correct. So it produces the same bytes as a run without interruption.
"""

from __future__ import annotations

import argparse
import shutil
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from shards.classes import without_images
from shards.command import add_jobs, for_each, positive, print_above, progress_bar, seed
from shards.journal import PREPARATION_JOURNAL, PreparationJournal, ShardRecord, check_same_job, describe
from shards.manifest import MANIFEST, LeftOut, Shard, ShardTaskName, Split, read_manifest, write_manifest
from shards.plan import ImageItem, PreparationJob, ShardTask, Unusable, plan_shards, printable
from shards.read import SplitReader, sample_dtype
from shards.scan import index_fits, is_on_record, scan_shard
from shards.write import ShardWriter, index_path, write_boxes, write_samples, write_targets


class Finished(NamedTuple):
    """A shard on the disk, and its rows of the sample table."""

    record: ShardRecord
    rows: np.ndarray
    boxes: list[np.ndarray] = []  # noqa: RUF012
    """The boxes of each row's image, where images have boxes."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of every preparation."""
    add_jobs(parser)
    parser.add_argument("--seed", type=seed, default=0, help="seed of every random choice (default: %(default)s)")
    parser.add_argument(
        "--samples-per-shard",
        type=positive,
        default=1250,
        help="approximate number of images per tar (default: %(default)s)",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the plan and write nothing")
    parser.add_argument("--strict", action="store_true", help="stop at a file that is not a usable image")


def prepare(job: PreparationJob, folder: Path, options: argparse.Namespace) -> int:
    """Write the shards of a job, or those that are missing, and return the exit code.

    It may be killed at any moment, and run again. Raises ValueError or OSError for errors that the user can fix.
    """
    if options.dry_run:
        _print_plan(job, folder, list(plan_shards(job, folder)))
        return 0
    recorded = _manifest_records(job, folder)
    if not _is_complete(folder):
        with PreparationJournal(folder, job.header) as journal:
            _make_shards(job, folder, options, journal, recorded)
    (folder / PREPARATION_JOURNAL).unlink(missing_ok=True)  # the manifest contains all of it now
    return _report(folder, options.strict)


def _print_plan(job: PreparationJob, folder: Path, tasks: list[ShardTask]) -> None:
    total = 0
    for split, items in job.listings.items():
        size = sum(item.size + item.mask_size for item in items)
        shards = sum(task.split == split for task in tasks)
        total += size
        print(f"{split}: {len(items):,} files, {_gigabytes(size)}, {shards:,} shards of about {len(items) // shards:,}")
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    print(f"{job.header.num_classes:,} classes; {_gigabytes(total)} to read; {_gigabytes(free)} free at {existing}")


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:,.3f} GB"


def _manifest_records(job: PreparationJob, folder: Path) -> dict[str, ShardRecord]:
    """Return the shards of a finished manifest as records, so that a rerun repairs a folder that lost a file."""
    if not (folder / MANIFEST).exists():
        return {}
    manifest = read_manifest(folder)
    check_same_job(folder, describe(manifest), job.header)
    shards = {shard.url: shard for split in manifest.splits.values() for shard in split.shards}
    left_out = {(name, entry.id): entry for name, split in manifest.splits.items() for entry in split.left_out}
    return {
        task.path.name: ShardRecord(
            # A planned shard that the manifest does not list had no usable image.
            shards.get(task.path.name, Shard(task.path.name, 0, 0, "")),
            tuple(left_out[task.split, number] for number in task.ids if (task.split, number) in left_out),
        )
        for task in plan_shards(job, folder)
    }


def _is_complete(folder: Path) -> bool:
    try:
        for name, split in read_manifest(folder).splits.items():
            SplitReader(folder, name).check_sizes()
            if not all(index_path(folder / shard.url).is_file() for shard in split.shards):
                return False
    except (FileNotFoundError, ValueError):
        return False
    return True


def _make_shards(
    job: PreparationJob,
    folder: Path,
    options: argparse.Namespace,
    journal: PreparationJournal,
    recorded: dict[str, ShardRecord],
) -> None:
    _remove_temporaries(folder)
    tasks = list(plan_shards(job, folder, recorded | journal.records, strict=options.strict))
    finished: dict[str, Finished] = {}
    with progress_bar(sum(len(task.ids) for task in tasks), folder.name) as bar:

        def receive(shard: Finished) -> None:
            url = shard.record.shard.url
            finished[url] = shard
            if journal.records.get(url) != shard.record:
                journal.append(shard.record)
            for entry in shard.record.left_out:
                print_above(bar, f"left out: {entry.path}: {entry.reason}")
            bar.update(len(shard.rows) + len(shard.record.left_out))

        try:
            for_each(make_shard, tasks, options.jobs, receive)
        finally:
            _remove_temporaries(folder)
    splits = {}
    for split, items in job.listings.items():
        parts = [finished[task.path.name] for task in tasks if task.split == split]
        splits[split] = _finish_split(folder, job.header.task, split, parts, items)
    write_manifest(folder, replace(job.header, splits=splits))


def _remove_temporaries(folder: Path) -> None:
    for path in folder.glob("*.tmp"):
        path.unlink(missing_ok=True)


def make_shard(task: ShardTask) -> Finished:
    """Write a shard, unless the file on disk is the recorded one. Runs in a worker process."""
    record = task.record
    if record is not None:
        if record.shard.nsamples == 0:
            return Finished(record, np.empty(0, sample_dtype(task.task)))
        if is_on_record(task.path, record.shard):
            scan = scan_shard(task.path, task.image, task.task)
            if index_fits(task.path, scan):
                return Finished(record, scan.rows, scan.boxes)
    return _write_shard(task)


def _write_shard(task: ShardTask) -> Finished:
    left_out = []
    with ShardWriter(task.path, task.image) as writer:
        for number, item in zip(task.ids, task.items, strict=True):
            try:
                image = task.source.load(task.split, item)
                targets = (item.targets, image.mask, image.boxes, image.low)
                writer.add(number, item.label, image.data, image.width, image.height, *targets)
            except Unusable as reason:
                if task.strict:
                    raise ValueError(f"{task.split}/{item.path} is not a usable image: {reason}") from None
                left_out.append(LeftOut(number, f"{task.split}/{printable(item.path)}", str(reason)))
        if len(left_out) == len(task.ids):
            # No file: DALI counts a tar without members as one empty sample.
            record = ShardRecord(Shard(task.path.name, 0, 0, ""), tuple(left_out))
            return Finished(record, np.empty(0, sample_dtype(task.task)))
        shard, rows = writer.close()
    return Finished(ShardRecord(shard, tuple(left_out)), rows, writer.boxes)


def _finish_split(folder: Path, task: ShardTaskName, name: str, parts: list[Finished], items: list[ImageItem]) -> Split:
    left_out = sorted((entry for part in parts for entry in part.record.left_out), key=lambda entry: entry.id)
    parts = [part for part in parts if len(part.rows)]
    if not parts:
        first = f"{left_out[0].path}: {left_out[0].reason}"
        raise ValueError(f"the split '{name}' has no usable image; the first of its files is {first}")
    samples, sha256 = write_samples(folder, name, [part.rows for part in parts])
    split = Split(
        name=name,
        samples=len(samples),
        id_count=len(samples) + len(left_out),
        shards=tuple(part.record.shard for part in parts),
        samples_sha256=sha256,
        max_width=int(samples["width"].max()),
        max_height=int(samples["height"].max()),
        left_out=tuple(left_out),
    )
    if task == "multilabel":  # an id is an index in the listing
        targets = [items[number].targets or b"" for number in samples["id"].tolist()]
        return replace(split, targets_sha256=write_targets(folder, name, targets))
    if task == "detection":
        boxes, offsets = write_boxes(folder, name, [rows for part in parts for rows in part.boxes])
        return replace(split, boxes_sha256=boxes, box_offsets_sha256=offsets)
    return split


def _report(folder: Path, strict: bool) -> int:
    manifest = read_manifest(folder)
    for name, split in manifest.splits.items():
        if strict and split.left_out:
            raise ValueError(f"{split.left_out[0].path} is not a usable image: {split.left_out[0].reason}")
        size = sum(shard.filesize for shard in split.shards)
        print(
            f"{name}: {split.samples:,} images in {len(split.shards):,} shards, {_gigabytes(size)}; "
            f"{len(split.left_out):,} files left out"
        )
        if message := without_images(SplitReader(folder, name, manifest).classes_in_use(), manifest.classes):
            print(f"{name}: {message}")
    return 0
