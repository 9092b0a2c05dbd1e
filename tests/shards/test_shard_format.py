"""The files themselves: bytes, index, table, and the libraries that read them."""

from __future__ import annotations

import gc
import resource
import struct
import tarfile
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pictures import decode, jpeg

from shards.manifest import Manifest, Split, read_manifest, write_manifest
from shards.read import SAMPLE_DTYPE, SplitReader
from shards.write import ShardWriter, index_path, write_samples

SAMPLES = [(3, 0), (0, 41), (5, 2), (1, 9)]
"""Ids and labels in storage order, two to a shard; the ids 2 and 4 are holes."""


def write_shards(folder: Path, split: str = "train") -> Path:
    folder.mkdir(exist_ok=True)
    shards, tables = [], []
    for number in range(2):
        with ShardWriter(folder / f"{split}-{number:06d}.tar", "jpg") as writer:
            for sample_id, label in SAMPLES[2 * number : 2 * number + 2]:
                writer.add(sample_id, label, jpeg(sample_id, 10 + sample_id, 12), 10 + sample_id, 12)
            shard, rows = writer.close()
        shards.append(shard)
        tables.append(rows)
    _, sha256 = write_samples(folder, split, tables)
    classes = tuple(f"class {label}" for label in range(42))
    described = Split(split, len(SAMPLES), 6, tuple(shards), sha256, 15, 12)
    write_manifest(folder, Manifest("test", "jpg", classes, splits={split: described}))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_shards(tmp_path / "shards")


def test_the_same_samples_give_the_same_bytes(tmp_path, contents):
    assert contents(write_shards(tmp_path / "one")) == contents(write_shards(tmp_path / "two"))


def test_members_are_plain_ustar_without_traces_of_where_and_when(folder):
    content = (folder / "train-000000.tar").read_bytes()
    with tarfile.open(folder / "train-000000.tar") as tar:
        members = tar.getmembers()
    assert [member.name for member in members[:4]] == [
        "00000003.jpg",
        "00000003.cls",
        "00000003.id.i64",
        "00000003.wh.i32",
    ]
    for member in members:
        header = content[member.offset : member.offset + 512]
        assert header[257:265] == b"ustar\x0000"
        assert (member.mtime, member.uid, member.gid, member.uname, member.gname) == (0, 0, 0, "", "")


def test_small_members_hold_label_id_and_size(folder):
    with tarfile.open(folder / "train-000000.tar") as tar:
        read = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    assert read["00000000.cls"] == b"0041"
    assert read["00000000.id.i64"] == struct.pack("<q", 0)
    assert read["00000003.wh.i32"] == struct.pack("<ii", 13, 12)


def test_index_is_the_one_that_dali_would_write(folder, tmp_path):
    wds2idx = pytest.importorskip("wds2idx")
    with wds2idx.IndexCreator(str(folder / "train-000001.tar"), str(tmp_path / "idx"), verbose=False) as creator:
        creator.create_index()
    assert (tmp_path / "idx").read_text() == index_path(folder / "train-000001.tar").read_text()


def test_an_abandoned_writer_leaves_nothing(tmp_path):
    with ShardWriter(tmp_path / "train-000000.tar", "jpg") as writer:
        writer.add(0, 0, b"image", 1, 1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("sample_id", "label"), [(0, 10_000), (0, -2), (100_000_000, 0), (-1, 0)])
def test_numbers_of_too_many_digits_are_refused(tmp_path, sample_id, label):
    with pytest.raises(ValueError, match="does not fit"), ShardWriter(tmp_path / "train-000000.tar", "jpg") as writer:
        writer.add(sample_id, label, b"image", 1, 1)


def test_reader_gives_the_images_by_row_of_the_table(folder):
    reader = SplitReader(folder, "train")
    assert reader.samples.dtype == SAMPLE_DTYPE
    assert reader.samples["id"].tolist() == [3, 0, 5, 1]
    assert reader.samples["shard"].tolist() == [0, 0, 1, 1]
    for row, view in zip((3, 0, 1), reader.bytes(np.array([3, 0, 1])), strict=True):
        sample_id, label = SAMPLES[row]
        assert view.tobytes() == jpeg(sample_id, 10 + sample_id, 12)
        assert reader.samples["label"][row] == label


def test_reader_hands_out_views_that_nobody_can_write_to(folder):
    reader = SplitReader(folder, "train")
    (view,) = reader.bytes(np.array([2]))
    assert view.base is not None
    assert not view.flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        reader.samples["label"][0] = 1


def test_labels_by_id_are_minus_one_in_holes(folder):
    assert SplitReader(folder, "train").labels_by_id().tolist() == [41, 9, -1, 0, -1, 2]


def test_threads_share_a_reader(folder):
    reader, widths = SplitReader(folder, "train"), {}

    def read(seed: int) -> None:
        rows = np.random.default_rng(seed).integers(0, 4, 200)
        widths[seed] = [decode(view).shape[1] for view in reader.bytes(rows)] == reader.samples["width"][rows].tolist()

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert widths == dict.fromkeys(range(4), True)


def test_reader_makes_room_for_a_map_per_shard(folder):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    SplitReader(folder, "train")
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] in (min(soft + 2, hard), soft + 2)


def test_check_sizes_names_the_tar(folder):
    reader = SplitReader(folder, "train")
    reader.check_sizes()
    with (folder / "train-000001.tar").open("ab") as file:
        file.write(b"x")
    with pytest.raises(ValueError, match=r"train-000001\.tar has .* bytes, but .* in the manifest"):
        reader.check_sizes()
    (folder / "train-000001.tar").unlink()
    with pytest.raises(FileNotFoundError, match=r"train-000001\.tar is missing"):
        reader.check_sizes()


def test_reader_names_the_splits_there_are(folder):
    with pytest.raises(ValueError, match="contains no split 'val', only train"):
        SplitReader(folder, "val")


def test_manifest_survives_the_way_over_the_disk(folder):
    manifest = read_manifest(folder)
    write_manifest(folder, manifest)
    assert read_manifest(folder) == manifest
    assert manifest.num_classes == 42


def test_manifest_sha256_changes_with_the_shards(folder):
    before = read_manifest(folder).sha256
    assert read_manifest(write_shards(folder)).sha256 == before
    write_manifest(folder, replace(read_manifest(folder), classes=("another",)))
    assert read_manifest(folder).sha256 != before


def test_a_missing_manifest_is_one_line_that_says_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"manifest\.json does not exist: prepare the shards"):
        read_manifest(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"manifest\.json does not exist: prepare the shards"):
        read_manifest(tmp_path / "nowhere")


# The library leaves the files to the garbage collector.
@pytest.mark.filterwarnings("ignore:.*unclosed file:ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_webdataset_library_reads_the_shards_as_they_are(folder):
    webdataset = pytest.importorskip("webdataset")
    tars = [str(folder / f"train-{number:06d}.tar") for number in range(2)]
    samples = list(webdataset.WebDataset(tars, shardshuffle=False).decode("rgb8"))
    gc.collect()
    assert [(struct.unpack("<q", sample["id.i64"])[0], sample["cls"]) for sample in samples] == SAMPLES
    for sample, (sample_id, _) in zip(samples, SAMPLES, strict=True):
        np.testing.assert_array_equal(sample["jpg"], decode(jpeg(sample_id, 10 + sample_id, 12)))


def test_dali_reads_the_shards_by_their_indices(folder):
    dali = pytest.importorskip("nvidia.dali")
    tars = [folder / f"train-{number:06d}.tar" for number in range(2)]

    @dali.pipeline_def(batch_size=4, num_threads=1, device_id=None)
    def read():
        images, labels, ids, sides = dali.fn.readers.webdataset(
            paths=list(map(str, tars)),
            index_paths=[str(index_path(tar)) for tar in tars],
            ext=["jpg", "cls", "id.i64", "wh.i32"],
            dtypes=[dali.types.UINT8, dali.types.UINT8, dali.types.INT64, dali.types.INT32],
            missing_component_behavior="error",
        )
        return dali.fn.decoders.image(images, device="cpu"), labels, ids, sides

    pipeline = read()
    pipeline.build()
    images, labels, ids, sides = pipeline.run()
    found = [(int(each[0]), int(bytes(label))) for each, label in zip(ids.as_array(), labels.as_array(), strict=True)]
    assert found == SAMPLES
    for row, (sample_id, _) in enumerate(SAMPLES):
        image = np.asarray(images.at(row))
        assert image.shape[1::-1] == tuple(sides.as_array()[row]) == (10 + sample_id, 12)
        np.testing.assert_allclose(image, decode(jpeg(sample_id, 10 + sample_id, 12)), atol=4)
