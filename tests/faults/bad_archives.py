"""Bad archives and folders of images, as the preparations read them."""

from __future__ import annotations

import gzip
import io
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from bad_files import hostile
from grammar import Trial, kind, spoil_bytes
from pictures import jpeg, tar_of

IMAGENET, CIFAR = "shards/prepare_imagenet.py", "shards/prepare_cifar.py"
CLASSES, IMAGES = ("n01440764", "n01443537", "n01484850"), 3
LABELS = "labels.txt"


def _source(folder: Path, train: bytes | None = None) -> Path:
    """Write the original archives: three classes of three images for training, three for validation."""
    source = folder / "source"
    source.mkdir()
    (source / "ILSVRC2012_img_train.tar").write_bytes(train if train is not None else tar_of(_inner()))
    names = [f"ILSVRC2012_val_{number:08d}.JPEG" for number in range(1, 4)]
    (source / "ILSVRC2012_img_val.tar").write_bytes(tar_of({name: jpeg(n) for n, name in enumerate(names)}))
    pairs = zip(names, CLASSES, strict=True)
    (folder / LABELS).write_text("".join(f"{name} {wnid}\n" for name, wnid in pairs))
    return source


def _inner() -> dict[str, bytes]:
    return {
        f"{wnid}.tar": tar_of({f"{wnid}_{n}.JPEG": jpeg(10 * label + n) for n in range(IMAGES)})
        for label, wnid in enumerate(CLASSES)
    }


def prepares(what: str, *more: str) -> Trial:
    """Return ImageNet's preparation; each of its images is to be in the shards, or named as left out."""
    return Trial(what, IMAGENET, ("source", "made", "--val-labels", LABELS, "--jobs", "1", *more))


@kind("an archive's header", strict=True)
def header(random: Random, folder: Path) -> Trial:
    source = _source(folder)
    path = source / "ILSVRC2012_img_train.tar"
    content = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        member = random.choice(tar.getmembers())
    inner = random.random() < 0.5
    start = member.offset_data if inner else member.offset
    at = start + random.choice([0, 100, 124, 130, 135, 148, 150, 156, 257, 263]) + random.randrange(2)
    content[at] ^= 1 << random.randrange(8)
    path.write_bytes(bytes(content))
    return prepares(f"a bit at {at}, in the header of {'the first image of ' if inner else ''}{member.name}")


@kind("an archive that ends early", strict=True)
def cut(random: Random, folder: Path) -> Trial:
    source = _source(folder)
    name = random.choice(["ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"])
    content = (source / name).read_bytes()
    # What may be gone is tar's padding behind the last member.
    last = len(content.rstrip(b"\0")) - 1
    at = random.choice([random.randrange(last), 512 * random.randrange(1 + last // 512)])
    (source / name).write_bytes(content[:at])
    return prepares(f"{name} is cut at {at} of {len(content)}")


@kind("zeros in an archive", strict=True)
def zeros(random: Random, folder: Path) -> Trial:
    source = _source(folder)
    path = source / "ILSVRC2012_img_train.tar"
    content = path.read_bytes()
    with tarfile.open(path) as tar:
        member = random.choice(tar.getmembers())
    blocks = random.choice([1, 2, 4])
    at = random.choice([member.offset, member.offset_data])
    path.write_bytes(content[:at] + bytes(512 * blocks) + content[at + 512 * blocks :])
    return prepares(f"{blocks} blocks of zeros at {at}, at {member.name}")


@kind("an archive of something else", strict=True)
def otherwise(random: Random, folder: Path) -> Trial:
    inner = _inner()
    contents: dict[str, Callable[[], bytes]] = {
        "nothing": lambda: b"",
        "text": lambda: b"hello" * 1000,
        "zeros": lambda: bytes(10_240),
        "no classes": lambda: tar_of({"a.JPEG": jpeg(1)}),
        "a class that is no tar": lambda: tar_of({**inner, "n99.tar": b"hello" * 200}),
        "an empty class": lambda: tar_of({**inner, "n99.tar": tar_of({})}),
        "no images": lambda: tar_of({name: tar_of({"a.JPEG": b"hello"}) for name in inner}),
    }
    what = random.choice(list(contents))
    _source(folder, contents[what]())
    return prepares(f"the archive is {what}")


@kind("an archive of strange members")
def strange(random: Random, folder: Path) -> Trial:
    inner = _inner()
    packed = tar_of(inner)
    contents: dict[str, Callable[[], bytes]] = {
        "packed": lambda: gzip.compress(packed),
        "names that climb": lambda: tar_of({f"../../{name}": data for name, data in inner.items()}),
        "absolute names": lambda: tar_of({f"/etc/{name}": data for name, data in inner.items()}),
        "a class twice": lambda: packed[: len(packed.rstrip(b"\0")) // 512 * 512 + 512] + packed,
        "an image twice": lambda: tar_of({**inner, "n99.tar": tar_of({"a.JPEG": jpeg(1), "./a.JPEG": jpeg(2)})}),
        "long names": lambda: tar_of({"a" * 300 + ".tar": tar_of({"b" * 300 + ".JPEG": jpeg(1)})}),
        "strange names": lambda: tar_of({"é\n\\ .tar": tar_of({"\x01 \n.JPEG": jpeg(1)})}),
        "links": lambda: _links(inner),
    }
    what = random.choice(list(contents))
    _source(folder, contents[what]())
    return prepares(f"the archive has {what}")


def _links(inner: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in inner.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        for kind, target in (
            (tarfile.SYMTYPE, "/etc/passwd"),
            (tarfile.LNKTYPE, next(iter(inner))),
            (tarfile.FIFOTYPE, ""),
        ):
            member = tarfile.TarInfo(f"n99{len(target)}.tar")
            member.type, member.linkname = kind, target
            tar.addfile(member)
    return buffer.getvalue()


@kind("an archive that is damaged")
def damaged(random: Random, folder: Path) -> Trial:
    source = _source(folder)
    return prepares(spoil_bytes(source / random.choice(["ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"]), random))


@kind("lists of classes and labels", strict=True)
def lists(random: Random, folder: Path) -> Trial:
    _source(folder)
    text = random.choice(["", "\x00", "a b c\n", "1\n2\n3\n", "x\n", "n01440764\n" * 2, "\n".join(CLASSES[:2]), "\xff"])
    if random.random() < 0.5:
        (folder / LABELS).write_bytes(text.encode("latin-1"))
        return prepares(f"the labels are {text!r}")
    (folder / "classes.txt").write_bytes(text.encode("latin-1"))
    return prepares(f"the classes are {text!r}", "--classes", "classes.txt")


@kind("folders of images")
def image_folders(random: Random, folder: Path) -> Trial:
    source = folder / "source"
    for split in ("train", "val"):
        for label, wnid in enumerate(CLASSES):
            (source / split / wnid).mkdir(parents=True)
            (source / split / wnid / "a.JPEG").write_bytes(jpeg(label))
    first = source / "train" / CLASSES[0]
    changes: dict[str, Callable[[], Any]] = {
        "an empty class": lambda: (source / "train" / "n00").mkdir(),
        "a class of validation's own": lambda: (source / "val" / CLASSES[0]).rename(source / "val" / "n00"),
        "a file beside the classes": lambda: (source / "train" / "README").write_text("x"),
        "a folder in a class": lambda: (first / "more").mkdir(),
        "a text in a class": lambda: (first / "b.JPEG").write_text("x"),
        "an empty image": lambda: (first / "b.JPEG").write_bytes(b""),
        "half an image": lambda: (first / "b.JPEG").write_bytes(jpeg(9)[:300]),
        "a link to nowhere": lambda: (first / "b.JPEG").symlink_to("nowhere"),
        "a link to itself": lambda: (first / "b.JPEG").symlink_to("b.JPEG"),
        "no validation": lambda: (source / "val").rename(source / "validation"),
        "no splits": lambda: (source / "train").rename(source / "images"),
    }
    what = random.choice(list(changes))
    changes[what]()
    return Trial(what, IMAGENET, ("source", "made", "--jobs", "1"))


@kind("options of a preparation", strict=True)
def options(random: Random, folder: Path) -> Trial:
    _source(folder)
    bad = random.choice(
        [
            *(("--jobs", "0"), ("--jobs", "x"), ("--quality", "0"), ("--quality", "101"), ("--resize-short", "-1")),
            *(("--subset", "0"), ("--subset", "-1"), ("--foo",), ("--seed", "-1"), ("--seed", "1" * 30)),
            *(
                ("--samples-per-shard", "0"),
                ("--classes", "missing"),
                ("--classes", "."),
                ("--max-side", "1", "--resize-short", "1"),
            ),
            *(("more",), ("--jobs",), ("--seed", "é"), ("--val-labels", "/dev/null")),
        ]
    )
    return prepares(" ".join(bad), *bad)


CIFAR_IMAGES = 4


@kind("CIFAR's files", strict=True)
def cifar(random: Random, folder: Path) -> Trial:
    names = [b"apple", b"bear"]
    pixels = np.zeros((CIFAR_IMAGES, 3072), np.uint8)
    data: dict[bytes, Any] = {b"data": pixels, b"fine_labels": [0, 1, 0, 1]}
    bads: dict[str, Any] = {
        "hostile": hostile(random),
        "hostile within": {**data, b"more": hostile(random)},
        "objects": {**data, b"data": np.array([hostile(random)] * CIFAR_IMAGES, object)},
        "a list": [data],
        "a number": 3,
        "without data": {b"fine_labels": [0]},
        "without labels": {b"data": pixels},
        "labels beyond": {**data, b"fine_labels": [0, 1, 2, 1]},
        "labels below": {**data, b"fine_labels": [0, 1, -1, 1]},
        "labels of text": {**data, b"fine_labels": ["a", "b", "a", "b"]},
        "labels of lists": {**data, b"fine_labels": [[0], [1], [0], [1]]},
        "labels of fractions": {**data, b"fine_labels": [0.5, 1, 0, 1]},
        "labels of nothing": {**data, b"fine_labels": None},
        "fewer labels": {**data, b"fine_labels": [0, 1]},
        "floats": {**data, b"data": pixels.astype(float)},
        "another shape": {**data, b"data": pixels[:, :100]},
        "bytes": {**data, b"data": b"x"},
        "no images": {b"data": pixels[:0], b"fine_labels": []},
    }
    what, file = random.choice(list(bads)), random.choice(["train", "test"])
    source = folder / "cifar-100-python"
    source.mkdir()
    contents = {"train": data, "test": data, "meta": {b"fine_label_names": names}, file: bads[what]}
    for name, content in contents.items():
        (source / name).write_bytes(pickle.dumps(content, 4))
    if random.random() < 0.3:
        what = f"damaged: {spoil_bytes(source / file, Random(random.random()))}"
    return Trial(f"CIFAR's {file}: {what}", CIFAR, (str(source), "made", "--jobs", "1"))


@kind("CIFAR's names and archive", strict=True)
def cifar_archive(random: Random, folder: Path) -> Trial:
    data = {b"data": np.zeros((2, 3072), np.uint8), b"fine_labels": [0, 1]}
    meta = random.choice(
        [
            {},
            {b"fine_label_names": 3},
            {b"fine_label_names": ["a", "b"]},
            {b"fine_label_names": [b"\xff"]},
            [],
            hostile(random),
        ]
    )
    files = {f"cifar-100-python/{name}": pickle.dumps(data) for name in ("train", "test")}
    whole = gzip.compress(tar_of({**files, "cifar-100-python/meta": pickle.dumps(meta)}))
    way = random.choice(["names", "cut", "text", "lacking"])
    content = {
        "names": whole,
        "cut": whole[: len(whole) // 2],
        "text": b"hello",
        "lacking": gzip.compress(tar_of({"x": b""})),
    }[way]
    (folder / "cifar.tar.gz").write_bytes(content)
    return Trial(f"CIFAR's archive: {way}, {str(meta)[:40]}", CIFAR, ("cifar.tar.gz", "made", "--jobs", "1"))
