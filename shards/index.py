"""List the samples of tars that other tools wrote, so that training reads them in place. No image is copied.

    python shards/index.py FOLDER                             the tars in a folder
    python shards/index.py TAR... --destination FOLDER        tars anywhere, or a folder that cannot be written

It reads the WebDataset shards of img2dataset, of timm's ``imagenet-1k-wds``, and of webdataset's own writer; which
members a sample needs is told in ``shards/foreign.py``. Every image is decoded once. What is not usable is left out,
and listed in the manifest.

``manifest.json``, a sample table for each split and an index for each tar are written beside the tars. DESTINATION gets
them instead, together with symbolic links to the tars. The names of the tars say which split they belong to, or
``--train`` and ``--val`` do. Ids follow the sorted names of the tars and the order in a tar. So the files are the same
for any ``--jobs``.
"""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

if not __package__:  # started as a script: Python put this folder, not the root, on the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from shards.classes import Label, name_labels, number_of, read_classes, without_images
from shards.command import Parser, add_jobs, for_each, print_above, progress_bar, run_main
from shards.foreign import IMAGE_COMPONENTS, IndexedTar, IndexTask, Members, index_tar
from shards.manifest import MANIFEST, MOST_IDS, Manifest, Split, read_manifest, write_atomically, write_manifest
from shards.plan import check_classes
from shards.read import samples_path
from shards.split_names import add_split_options, assign_splits, print_splits, split_of
from shards.write import index_path, write_samples


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    options = _parser().parse_args(arguments)
    tars = find_tars(options.source, bool(options.destination))
    folder = options.destination or next(iter(tars.values())).parent
    splits = assign_splits(list(tars), options.train, options.val)
    print_splits(splits, list(tars))
    chosen = {name: tars[name] for names in splits.values() for name in names}
    check_destination(folder, chosen, linked=bool(options.destination))
    found = read_tars(chosen, _members(options), options)
    parts = {split: [found[name] for name in names] for split, names in splits.items()}
    _write(folder, chosen, parts, options)
    return 0


def _members(options: Namespace) -> Members:
    """Return the members to read. Raises ValueError for options that contradict one another."""
    if options.mask_key and (options.label_key or not options.classes):
        advice = "remove --label-key" if options.label_key else "name the classes of pixels with --classes FILE"
        raise ValueError(f"--mask-key: samples with masks have no labels: {advice}")
    return Members(options.label_key, options.image_key, options.mask_key)


def _pixel_classes(options: Namespace) -> list[str]:
    classes = read_classes(options.classes, set())
    check_classes(classes, has_masks=True)
    return classes


def find_tars(sources: Sequence[Path], linked: bool) -> dict[str, Path]:
    """Return the tars by their file name in the folder of shards.

    A folder means its tars, or without any those in its folders. Where several folders have tars of the same names, or
    of names without a split, the folder's name is put first. Raises ValueError unless the tars are in one folder, or
    will be ``linked`` to from one.
    """
    paths = [path.absolute() for source in sources for path in _tars_of(source)]
    names = [path.name for path in paths]
    folders = sorted({path.parent for path in paths})
    nested = len(folders) > 1
    if nested and not linked:
        raise ValueError(f"there are tars in {folders[0]} and in {folders[-1]}: give --destination FOLDER")
    if nested and (len(set(names)) < len(names) or not any(map(split_of, names))):
        names = [f"{path.parent.name}-{path.name}" for path in paths]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"two tars have the name {twice[0]}: give each once, or rename one")
    indices: dict[str, str] = {}
    for name in names:
        if (other := indices.setdefault(index_path(Path(name)).name, name)) != name:
            raise ValueError(f"{other} and {name} would have the same index: end their names in .tar, or rename one")
    return dict(zip(names, paths, strict=True))


def _tars_of(source: Path) -> list[Path]:
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise FileNotFoundError(f"{source} does not exist: name a folder of tars, or tars")
    here, below = sorted(source.glob("*.tar")), sorted(source.glob("*/*.tar"))
    packed = sorted(path for ending in ("tar.gz", "tgz") for path in source.glob(f"*.{ending}"))
    if not here and not below:
        unpack = f", or unpack {packed[0].name} with gunzip" if packed else ""
        raise FileNotFoundError(f"{source} contains no .tar file: name a folder of tars, or tars{unpack}")
    for paths, advice in ((packed, "unpack with gunzip"), (below if here else [], "name the folders, too")):
        if paths:
            print(f"not read: {len(paths):,} files such as {paths[0]}: {advice}")
    return here or below


def check_destination(folder: Path, tars: dict[str, Path], *, linked: bool) -> None:
    """Raise ValueError if the folder has the tars, or files of someone else that would be overwritten or mixed."""
    # A link there would be replaced by a link to itself.
    inside = [path for path in tars.values() if linked and path.parent.resolve() == folder.resolve()]
    if inside:
        raise ValueError(f"{inside[0]} is in the destination itself: leave out --destination, or name a new folder")
    manifest = folder / MANIFEST
    if manifest.exists():
        try:
            if read_manifest(folder).is_foreign:
                return
        except ValueError:
            pass  # damaged, or of another tool
        raise ValueError(f"{manifest} exists, and shards/index.py did not write it: give another --destination")
    written = {samples_path(folder, split).name for split in ("train", "val")}
    written |= {name for tar in tars for name in (tar, index_path(Path(tar)).name)}
    if linked:
        others = {path.name for path in folder.iterdir()} - written if folder.is_dir() else set()
        if others:
            raise ValueError(f"{folder} contains {min(others)}: use a new folder")
    elif not os.access(folder, os.W_OK):
        raise ValueError(f"{folder} cannot be written: give --destination FOLDER, which gets links to the tars")


def read_tars(tars: dict[str, Path], members: Members, options: Namespace) -> dict[str, IndexedTar]:
    """Read all tars in worker processes, and return them by name. Raises like ``index_tar``."""
    found: dict[str, IndexedTar] = {}
    with progress_bar(None, "index") as bar:

        def receive(tar: IndexedTar) -> None:
            found[tar.shard.url] = tar
            for entry in tar.left_out:
                print_above(bar, f"left out: {entry.path}: {entry.reason}")
            bar.update(len(tar.rows) + len(tar.left_out))

        num_classes = len(_pixel_classes(options)) if members.mask_key else 0
        tasks = [IndexTask(path, name, members, options.strict, num_classes) for name, path in tars.items()]
        for_each(index_tar, tasks, options.jobs, receive)
    return found


def _write(folder: Path, tars: dict[str, Path], parts: dict[str, list[IndexedTar]], options: Namespace) -> None:
    """Write all files; the manifest is the last one."""
    for split, each in parts.items():
        if not any(len(tar.rows) for tar in each):
            entry = next((entry for tar in each for entry in tar.left_out), None)
            first = f"{entry.path}: {entry.reason}" if entry else f"{each[0].shard.url} is empty"
            raise ValueError(f"the split '{split}' has no usable sample; the first: {first}")
    _check_sources([tar for each in parts.values() for tar in each])
    classes = name_labels({split: _labels(each) for split, each in parts.items()}, options.classes)
    _check_indices(folder, parts)
    if options.destination:
        _link(folder, tars)
    numbers = {name: number for number, name in enumerate(classes)}
    splits = {split: _write_split(folder, split, each, numbers) for split, each in parts.items()}
    images = ";".join(sorted({kind for each in parts.values() for tar in each for kind in tar.images}))
    members = _members(options)
    plan = {"members": members.described()}
    write_manifest(folder, Manifest("index", images, tuple(classes), {}, plan, splits, task=members.task))
    for line in _report(folder, splits, parts, classes, numbers, options):
        print(line)


def _check_sources(tars: list[IndexedTar]) -> None:
    """Raise ValueError if labels stand in different places, whose numbers may mean different classes."""
    found = {source: sample for tar in reversed(tars) for source, sample in tar.sources.items()}
    if len(found) > 1:
        (one, first), (other, second) = sorted(found.items())[:2]
        raise ValueError(f"{first} has its label in {one}, {second} in {other}: choose a key of json with --label-key")


def _labels(tars: list[IndexedTar]) -> dict[Label, str]:
    """Return the labels in some tars, each with the first sample that has it."""
    found = {}
    for tar in tars:
        for label, key in zip(tar.labels, tar.keys, strict=True):
            if label not in found:
                found[label] = f"{tar.shard.url}/{key}"
    return found


def _check_indices(folder: Path, parts: dict[str, list[IndexedTar]]) -> None:
    """Raise ValueError for an index of a tar that another tool wrote."""
    if (folder / MANIFEST).exists():
        return
    for tar in (tar for tars in parts.values() for tar in tars if len(tar.rows)):
        path = index_path(folder / tar.shard.url)
        if path.exists() and path.read_bytes() != tar.index_text.encode():
            raise ValueError(f"{path} exists, and differs from what would be written: remove it, or give --destination")


def _link(folder: Path, tars: dict[str, Path]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, path in tars.items():
        link = folder / name
        if link.is_symlink():
            link.unlink()
        elif link.exists():
            raise ValueError(f"{link} is a file, where a link to {path} should be: use a new folder")
        link.symlink_to(path.resolve())


def _write_split(folder: Path, name: str, tars: list[IndexedTar], numbers: dict[str, int]) -> Split:
    if (total := sum(len(tar.rows) + len(tar.left_out) for tar in tars)) > MOST_IDS:
        raise ValueError(f"the split '{name}' has {total:,} samples, but {MOST_IDS:,} are the most: give fewer tars")
    first, left_out, tables, used = 0, [], [], []
    for tar in tars:
        left_out += [replace(entry, id=first + entry.id) for entry in tar.left_out]
        if len(tar.rows):  # DALI counts a tar without samples as one empty sample
            tar.rows["id"] += first
            tar.rows["label"] = [number_of(label, numbers) for label in tar.labels]
            write_atomically(index_path(folder / tar.shard.url), tar.index_text.encode())
            tables.append(tar.rows)
            used.append(tar.shard)
        first += len(tar.rows) + len(tar.left_out)
    samples, sha256 = write_samples(folder, name, tables)
    width, height = (int(samples[side].max()) for side in ("width", "height"))
    return Split(name, len(samples), total, tuple(used), sha256, width, height, tuple(left_out))


def _report(
    folder: Path,
    splits: dict[str, Split],
    parts: dict[str, list[IndexedTar]],
    classes: list[str],
    numbers: dict[str, int],
    options: Namespace,
) -> Iterator[str]:
    for name, split in splits.items():
        yield (
            f"{name}: {split.samples:,} images of {len(classes):,} classes in {len(split.shards):,} tars; "
            f"{len(split.left_out):,} samples left out"
        )
        labels = {number_of(label, numbers) for tar in parts[name] for label in tar.labels}
        if not options.mask_key and (message := without_images(labels, classes)):
            yield f"{name}: {message}"
    if "val" not in splits:
        yield "there is no validation split: training will not validate; --val PATTERN names its tars"
    yield f"data.path={folder}"


def _parser() -> ArgumentParser:
    parser = Parser(prog="index.py", description="List the samples of other tools' tars, to train from them in place.")
    parser.add_argument("source", type=Path, nargs="+", help="a folder of tars, or tars")
    parser.add_argument(
        "--destination", type=Path, metavar="FOLDER", help="folder for the lists and for links to the tars"
    )
    add_split_options(parser)
    parser.add_argument(
        "--classes", type=Path, metavar="FILE", help="class names, one per line, in the order of labels"
    )
    parser.add_argument("--label-key", metavar="KEY", help="key of the label in json members (default: cls members)")
    parser.add_argument(
        "--mask-key", metavar="NAME", help="ending of the mask, such as mask.png, where samples have one and no label"
    )
    parser.add_argument(
        "--image-key",
        choices=IMAGE_COMPONENTS,
        help="ending of the image, such as jpg, where a sample has more than one",
    )
    add_jobs(parser)
    parser.add_argument("--strict", action="store_true", help="stop at a sample that is not usable")
    return parser


if __name__ == "__main__":
    run_main(main)
