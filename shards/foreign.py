"""Samples in tars that other tools wrote, by the conventions of the webdataset library.

The members of a sample stand next to one another and share a key: the path up to the first dot of the file name. The
rest of the name is the component, in lower case. Members without a component, and folders, are skipped.

A sample needs one image and one label. The image is a component ``jpg``, ``jpeg``, ``png`` or ``webp``. The label is
the component ``cls``: digits, a class name, or a raw integer of 4 or 8 bytes, little endian. Or it is a value in the
component ``json``. Instead of a label a sample may have a mask, in a component that is named. Samples with boxes are
not listed.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image

from shards.archives import Member, list_members
from shards.classes import Label, number_of
from shards.jpeg import decode_jpeg, open_image
from shards.manifest import LeftOut, Manifest, Shard, ShardTaskName, Split, sha256_of
from shards.masks import check_size, decode_mask, meaning_of_values, to_classes
from shards.plan import Unusable, printable
from shards.read import sample_dtype
from shards.scan import Scan
from shards.write import index_text

IMAGE_COMPONENTS = ("jpg", "jpeg", "png", "webp")
LABEL_KEYS = ("label", "cls", "class")
"""Keys of a ``json`` component that are tried for the label, in this order."""
OWN_BOXES = "boxes.f32"
"""The component of the boxes in this project's shards, whose ``cls`` says nothing."""
BOX_KEYS = ("annotations", "objects", "boxes", "bboxes", "bbox")
"""Usual names of the boxes in ``json``."""
_KINDS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
_NAME = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)", re.DOTALL)
_META = re.compile(r"__[^/]*__($|/)")
"""Members with such a name describe the whole tar; webdataset skips them."""
_RAW_BYTES = (4, 8)
"""Sizes of a raw label. Digits never look like one: the highest byte of a label is zero."""
_GZIP = b"\x1f\x8b"


class Members(NamedTuple):
    """Names of the members to read.

    ``label_key`` is the key of the label in ``json``; None means ``cls``, or one of ``LABEL_KEYS``. ``image_key`` is
    the component of the image; None means the only one there is. ``mask_key`` is the component of the mask; None means
    that samples have labels.
    """

    label_key: str | None = None
    image_key: str | None = None
    mask_key: str | None = None

    @property
    def task(self) -> ShardTaskName:
        """Return the task of such samples."""
        return "segmentation" if self.mask_key else "classification"

    def described(self) -> dict[str, str | None]:
        """Return the names as the manifest has them: that of the mask only where there is one."""
        return {key: value for key, value in self._asdict().items() if value or key != "mask_key"}


class ForeignSample(NamedTuple):
    """A sample of a tar: its key, and its members by component, in their order."""

    key: str
    members: dict[str, Member]


class IndexTask(NamedTuple):
    """A tar to index: its path, its file name in the folder of shards, and what a worker process needs."""

    path: Path
    url: str
    members: Members
    strict: bool
    num_classes: int = 0
    """Number of classes of pixels, where samples have masks."""


class IndexedTar(NamedTuple):
    """A tar that was read.

    ``rows`` are its samples, with their position in the tar as id and without labels, which are in ``labels``. The ids
    of ``left_out`` are positions, too. ``images`` are the components and the kinds of its images. ``sources`` are the
    places of its labels, each with the first sample whose label is there.
    """

    shard: Shard
    rows: np.ndarray
    labels: list[Label]
    keys: list[str]
    left_out: list[LeftOut]
    index_text: str
    images: set[str]
    sources: dict[str, str]


class ForeignShard(NamedTuple):
    """A shard of a manifest, as ``scan_foreign`` needs it.

    ``first_id`` is the id of the tar's first sample, ``left_out`` are the ids of its unusable ones, and ``labels`` are
    the labels by class name.
    """

    members: Members
    first_id: int
    left_out: frozenset[int]
    labels: Mapping[str, int]


def group_samples(path: Path, members: list[Member]) -> list[ForeignSample]:
    """Return the samples of a tar. ``path`` is only used in errors.

    Raises ValueError if a key has a component twice, or comes back after another key.
    """
    samples: list[ForeignSample] = []
    for member in members:
        match = _NAME.fullmatch(member.name)
        if match is None or _META.match(member.name):
            continue
        key, component = match[1], match[2].lower()
        if not samples or samples[-1].key != key:
            samples.append(ForeignSample(key, {}))
        if component in samples[-1].members:
            raise ValueError(f"{path}: {key} has two members .{component}: give every sample a key of its own")
        samples[-1].members[component] = member
    if twice := sorted(key for key, count in Counter(sample.key for sample in samples).items() if count > 1):
        raise ValueError(
            f"{path}: the key {twice[0]} comes twice, with others between: "
            "give every sample a key of its own, and put its members next to one another"
        )
    return samples


def find_image(path: Path, sample: ForeignSample, image_key: str | None) -> str:
    """Return the component of the sample's image. Raises Unusable if there is none, ValueError if there are several."""
    found = [each for each in ((image_key,) if image_key else IMAGE_COMPONENTS) if each in sample.members]
    if not found:
        wanted = image_key or f"{', '.join(IMAGE_COMPONENTS[:-1])} or {IMAGE_COMPONENTS[-1]}"
        raise Unusable(f"no image: its members are {', '.join(sample.members)}, none is {wanted}")
    if len(found) > 1:
        raise ValueError(f"{path}: {sample.key} has two images, {' and '.join(found[:2])}: choose with --image-key")
    return found[0]


def read_label(file: BinaryIO, sample: ForeignSample, label_key: str | None) -> tuple[Label, str]:
    """Return the label of a sample, and where it stands. Raises Unusable if there is none, or boxes instead."""
    if label_key is None and OWN_BOXES in sample.members:
        raise Unusable(_boxes_instead(OWN_BOXES))
    if label_key is None and "cls" in sample.members:
        return _parse_label(_content(file, sample.members["cls"]), "cls"), "cls"
    if "json" not in sample.members:
        member = "json" if label_key else "cls or json"
        raise Unusable(f"no label: its members are {', '.join(sample.members)}, none is {member}")
    try:
        values = json.loads(_content(file, sample.members["json"]))
    except (ValueError, RecursionError):
        raise Unusable("no label: its json cannot be parsed") from None
    keys = (label_key,) if label_key else LABEL_KEYS
    key = next((key for key in keys if isinstance(values, dict) and key in values), None)
    if key is None:
        boxes = next((key for key in BOX_KEYS if isinstance(values, dict) and key in values), None)
        if boxes and label_key is None:
            raise Unusable(_boxes_instead(f"{boxes} of its json"))
        raise Unusable(f"no label: its json has no {' or '.join(keys)}; name the key with --label-key")
    value, source = values[key], f"{key} of its json"
    if type(value) is int:
        return value, source
    if not isinstance(value, str):
        raise Unusable(f"no label: {source} is {json.dumps(value)[:40]}, neither a whole number nor a name")
    return _parse_label(value.encode(errors="replace"), source), source


def _boxes_instead(source: str) -> str:
    """Return the reason why a sample is not usable that has boxes and no label. Tools write them in many ways."""
    return f"no label, but boxes in {source}, which are not read in place: write shards with shards/prepare_coco.py"


def index_tar(task: IndexTask) -> IndexedTar:
    """Read a tar completely, and decode every image of it. Runs in a worker process.

    Raises ValueError for a damaged or ambiguous tar, and with ``strict`` for a sample that is not usable.
    """
    rows, labels, keys, left_out, lines = [], [], [], [], []
    images, sources = set[str](), dict[str, str]()
    with task.path.open("rb") as file:
        for position, sample in enumerate(_samples(task.path, file)):
            try:
                component = find_image(task.path, sample, task.members.image_key)
                label, source = _label_of(file, sample, task.members)
                member = sample.members[component]
                image = _decode(_content(file, member))
                mask = _check_mask(file, sample, task, image.size)
            except Unusable as reason:
                name = f"{task.url}/{printable(sample.key)}"
                if task.strict:
                    raise ValueError(f"{name} is not a usable sample: {reason}") from None
                left_out.append(LeftOut(position, name, str(reason)))
                continue
            rows.append((position, -1, 0, member.offset, member.size, *image.size, *mask))
            labels.append(label)
            keys.append(sample.key)
            lines.append(_index_line(sample))
            images |= {component, _KINDS[image.format or ""]}
            sources.setdefault(source, f"{task.url}/{printable(sample.key)}")
    shard = Shard(task.url, len(rows), task.path.stat().st_size, sha256_of(task.path))
    table = np.array(rows, sample_dtype(task.members.task))
    return IndexedTar(shard, table, labels, keys, left_out, index_text(lines), images, sources)


def _label_of(file: BinaryIO, sample: ForeignSample, members: Members) -> tuple[Label, str]:
    """Return the label of a sample, which is 0 where it has a mask, and where it stands."""
    return (0, "its mask") if members.mask_key else read_label(file, sample, members.label_key)


def _mask_position(sample: ForeignSample, members: Members) -> tuple[int, ...]:
    """Return offset and size of a sample's mask, nothing if samples have none. Raises Unusable if it is missing."""
    if members.mask_key is None:
        return ()
    if members.mask_key not in sample.members:
        raise Unusable(f"no mask: its members are {', '.join(sample.members)}, none is {members.mask_key}")
    member = sample.members[members.mask_key]
    return member.offset, member.size


def _check_mask(file: BinaryIO, sample: ForeignSample, task: IndexTask, size: tuple[int, int]) -> tuple[int, ...]:
    """Return the position of a sample's mask, if there are masks. Raises Unusable if it does not fit the image."""
    position = _mask_position(sample, task.members)
    if position:
        mask_HW = decode_mask(_content(file, sample.members[task.members.mask_key or ""]))
        check_size(to_classes(mask_HW, meaning_of_values(task.num_classes)), *size)
    return position


def foreign_shards(manifest: Manifest, split: Split) -> dict[str, ForeignShard]:
    """Return what ``scan_foreign`` needs for each shard of a split, by file name."""
    counts = Counter({shard.url: shard.nsamples for shard in split.shards})
    left_out: dict[str, set[int]] = {}
    for entry in split.left_out:
        url = entry.path.partition("/")[0]
        counts[url] += 1
        left_out.setdefault(url, set()).add(entry.id)
    members = Members(**manifest.plan["members"])
    labels = {name: label for label, name in enumerate(manifest.classes)}
    found, first = {}, 0
    for url in sorted(counts):
        found[url] = ForeignShard(members, first, frozenset(left_out.get(url, ())), labels)
        first += counts[url]
    return found


def scan_foreign(path: Path, shard: ForeignShard) -> Scan:
    """Return the rows and the index text of a tar, from its headers, labels and the headers of its images.

    Raises ValueError for a damaged tar.
    """
    rows, lines = [], []
    with path.open("rb") as file:
        for number, sample in enumerate(_samples(path, file), shard.first_id):
            if number in shard.left_out:
                continue
            try:
                member = sample.members[find_image(path, sample, shard.members.image_key)]
                label, _ = _label_of(file, sample, shard.members)
                sides = open_image(_content(file, member), webp=True).size
                mask = _mask_position(sample, shard.members)
            except Unusable as reason:
                raise ValueError(f"{path}: {printable(sample.key)} is not a usable sample: {reason}") from None
            rows.append((number, number_of(label, shard.labels), 0, member.offset, member.size, *sides, *mask))
            lines.append(_index_line(sample))
    return Scan(np.array(rows, sample_dtype(shard.members.task)), index_text(lines))


def _samples(path: Path, file: BinaryIO) -> list[ForeignSample]:
    if file.read(2) == _GZIP:
        raise ValueError(f"{path} is compressed, and cannot be read in place: unpack it with gunzip")
    return group_samples(path, list_members(path, file))


def _decode(data: bytes) -> Image.Image:
    image = decode_jpeg(data, webp=True)
    if image.mode.startswith("I"):
        raise Unusable("a grey image of 16 bits, which decoders convert in different ways: store 8 bits")
    return image


def _parse_label(content: bytes, name: str) -> Label:
    if len(content) in _RAW_BYTES and b"\0" in content:
        return int.from_bytes(content, "little", signed=True)
    try:
        text = content.decode().strip()
    except UnicodeDecodeError:
        text = ""
    if not text or "\0" in text:
        raise Unusable(f"no label: {name} is neither text nor an integer of 4 or 8 bytes")
    return int(text) if re.fullmatch(r"[+-]?[0-9]{1,18}", text) else text


def _content(file: BinaryIO, member: Member) -> bytes:
    file.seek(member.offset)
    return file.read(member.size)


def _index_line(sample: ForeignSample) -> str:
    """Return the line of a sample in DALI's index, where names contain no spaces and components no capitals."""
    members = ((component, member) for component, member in sample.members.items() if component)
    return " ".join(
        f"{_joined(component)} {member.offset} {member.size} {_joined(member.name)}" for component, member in members
    )


def _joined(name: str) -> str:
    return "_".join(printable(name).split())
