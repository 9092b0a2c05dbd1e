"""``prepare_cifar.py``: every pixel, the official order, and no code out of a pickle."""

from __future__ import annotations

import hashlib
import lzma
import os
import pickle
import runpy
import shutil
from pathlib import Path

import numpy as np
import pytest
from pictures import decode, tar_of

from shards.manifest import read_manifest
from shards.prepare_cifar import main
from shards.read import SplitReader
from shards.verify import verify

ROOT = Path(__file__).resolve().parents[2]
OFFICIAL = ROOT.parent / "shared/data/cifar100"
CLASSES = [b"apple", b"aquarium_fish", b"baby"]
FAMILIES, FAMILY = [b"fish", b"fruit"], [1, 0, 0]
"""Names of the superclasses, and the superclass of each class."""

META = {b"fine_label_names": CLASSES, b"coarse_label_names": FAMILIES}


def rows(count: int, seed: int) -> dict[bytes, object]:
    random = np.random.default_rng(seed)
    fine = random.integers(0, 3, count).tolist()
    coarse = [FAMILY[label] for label in fine]
    return {b"data": random.integers(0, 256, (count, 3072), np.uint8), b"fine_labels": fine, b"coarse_labels": coarse}


def write_pickles(folder: Path, **contents: object) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in contents.items():
        (folder / name).write_bytes(pickle.dumps(content, protocol=3))
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_pickles(tmp_path / "cifar-100-python", train=rows(7, 0), test=rows(5, 1), meta=META)


def prepare(source: Path, destination: Path, *options: str) -> Path:
    assert main([str(source), str(destination), "--jobs", "1", "--samples-per-shard", "3", *options]) == 0
    return destination


def assert_holds(folder: Path, split: str, content: dict[bytes, object], labels: bytes = b"fine_labels") -> None:
    reader = SplitReader(folder, split)
    data = np.asarray(content[b"data"]).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    assert reader.labels_by_id().tolist() == content[labels]
    for sample_id, view in zip(reader.samples["id"], reader.bytes(np.arange(len(reader.samples))), strict=True):
        np.testing.assert_array_equal(decode(view), data[sample_id])


def test_every_pixel_and_label_comes_back_under_its_official_row(source, tmp_path):
    folder = prepare(source, tmp_path / "out")
    assert_holds(folder, "train", rows(7, 0))
    assert_holds(folder, "val", rows(5, 1))
    manifest = read_manifest(folder)
    assert (manifest.classes, manifest.image) == (("apple", "aquarium_fish", "baby"), "png")
    assert verify(folder, 1) == []


def test_the_archive_and_the_folder_above_give_the_same_bytes(source, tmp_path, contents):
    files = {f"cifar-100-python/{path.name}": path.read_bytes() for path in source.iterdir()}
    (tmp_path / "cifar-100-python.tar.gz").write_bytes(tar_of(files))
    wanted = contents(prepare(source, tmp_path / "out"))
    assert contents(prepare(tmp_path / "cifar-100-python.tar.gz", tmp_path / "packed")) == wanted
    assert contents(prepare(tmp_path, tmp_path / "above")) == wanted


def test_the_number_of_processes_changes_no_byte(source, tmp_path, contents, run):
    assert run("prepare_cifar.py", source, tmp_path / "out", "--jobs", 3, "--samples-per-shard", 3).returncode == 0
    assert contents(tmp_path / "out") == contents(prepare(source, tmp_path / "alone"))


class _Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, ("evil",)


def test_code_in_a_pickle_is_refused_and_never_run(source, tmp_path, run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_pickles(source, train=_Evil())
    with pytest.raises(ValueError, match=r"damaged or not CIFAR-100: train: it contains (posix|os)\.mkdir"):
        main([str(source), str(tmp_path / "out")])
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize(
    "content",
    [
        {**rows(7, 0), b"fine_labels": [0] * 6},
        {**rows(7, 0), b"fine_labels": [0] * 6 + [3]},
        {**rows(7, 0), b"data": np.zeros((7, 3072))},
        {**rows(7, 0), b"fine_labels": [[0]] * 7},
        {**rows(7, 0), b"fine_labels": [0.5] * 7},
        {**rows(7, 0), b"fine_labels": 7},
        {**rows(7, 0), b"data": 7},
        {b"data": rows(7, 0)[b"data"]},
        "a text",
    ],
    ids=[
        "a label less",
        "an unknown label",
        "real numbers",
        "lists for labels",
        "halves for labels",
        "one number for labels",
        "one number for images",
        "no labels",
        "a text",
    ],
)
def test_what_is_not_cifar_is_refused_in_one_line(source, tmp_path, run, content):
    write_pickles(source, train=content)
    done = run("prepare_cifar.py", source, tmp_path / "out")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "damaged or not CIFAR-100" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("names", [3, b"apple", [3], ["apple"], [b"\xff"], {b"apple": 1}, None])
def test_names_of_classes_that_are_none_are_refused_in_one_line(source, tmp_path, run, names):
    write_pickles(source, meta={b"fine_label_names": names})
    done = run("prepare_cifar.py", source, tmp_path / "out")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "damaged or not CIFAR-100" in done.stderr


def test_a_missing_or_cut_file_is_one_line(source, tmp_path, run):
    (source / "test").write_bytes((source / "test").read_bytes()[:500])
    done = run("prepare_cifar.py", source, tmp_path / "out")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    (tmp_path / "empty").mkdir()
    for there in (tmp_path / "nothing", tmp_path / "empty"):
        done = run("prepare_cifar.py", there, tmp_path / "out")
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
        assert done.stderr.startswith(f"error: there is no file {there}")
        assert "pass the folder cifar-100-python, or cifar-100-python.tar.gz" in done.stderr


@pytest.mark.shared
@pytest.mark.skipif(not OFFICIAL.is_dir(), reason="the official CIFAR-100 is not beside the checkout")
def test_the_official_test_images_come_back_bit_for_bit(tmp_path):
    unpack = runpy.run_path(str(OFFICIAL / "unpack.py"))
    head, tail = lzma.decompress((OFFICIAL / "test.head.xz").read_bytes()), (OFFICIAL / "test.tail").read_bytes()
    official = head + b"".join(unpack["pixels"]("test")) + tail
    assert hashlib.md5(official).hexdigest() == unpack["MD5"]["test"]
    # Pickled training images of our own: the official ones would take five times as long.
    source = write_pickles(tmp_path / "cifar-100-python", train=rows(3, 0))
    (source / "test").write_bytes(official)
    shutil.copy(OFFICIAL / "meta", source / "meta")
    assert main([str(source), str(tmp_path / "out"), "--jobs", "1"]) == 0
    content = pickle.loads(official, encoding="bytes")
    assert_holds(tmp_path / "out", "val", content)
    manifest = read_manifest(tmp_path / "out")
    assert (manifest.num_classes, manifest.classes[0], manifest.classes[99]) == (100, "apple", "worm")


def test_the_first_images_of_every_class_can_be_taken_alone(source, tmp_path):
    destination = tmp_path / "few"
    options = ["--jobs", "1", "--samples-per-shard", "3", "--train-per-class", "1"]
    assert main([str(source), str(destination), *options]) == 0
    content = rows(7, 0)
    labels = content[b"fine_labels"]
    first = [row for row, label in enumerate(labels) if label not in labels[:row]]
    assert_holds(
        destination, "train", {b"data": content[b"data"][first], b"fine_labels": [labels[row] for row in first]}
    )
    assert_holds(destination, "val", rows(5, 1))


def test_the_superclasses_can_be_the_labels_of_the_same_images(source, tmp_path):
    folder = prepare(source, tmp_path / "coarse", "--superclasses")
    assert_holds(folder, "train", rows(7, 0), b"coarse_labels")
    assert_holds(folder, "val", rows(5, 1), b"coarse_labels")
    assert read_manifest(folder).classes == ("fish", "fruit")
    with pytest.raises(ValueError, match="was prepared with another classes"):
        main([str(source), str(folder), "--jobs", "1", "--samples-per-shard", "3"])


def test_a_source_without_superclasses_is_refused_in_one_line(source, tmp_path, run):
    write_pickles(source, meta={b"fine_label_names": CLASSES})
    done = run("prepare_cifar.py", source, tmp_path / "out", "--superclasses")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "meta has no coarse_label_names" in done.stderr
