"""A manifest or a sample table that is not what was written, or says what cannot be, is one line with file and key."""

from __future__ import annotations

import hashlib
import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pictures import jpeg, write_folders

from shards.documents import DamagedFile
from shards.manifest import Manifest, Split, read_manifest, write_manifest
from shards.prepare_imagenet import main
from shards.read import SplitReader
from shards.verify import main as verify
from shards.write import ShardWriter, write_samples

ROOT = Path(__file__).resolve().parents[2]
CLASSES = ("ant", "bee", "cat")
Values = dict[str, Any]


def write(folder: Path, shards: int = 2) -> Path:
    folder.mkdir()
    written, tables = [], []
    for number in range(shards):
        with ShardWriter(folder / f"train-{number:06d}.tar", "jpg") as writer:
            for sample_id in (2 * number, 2 * number + 1):
                writer.add(sample_id, sample_id % 3, jpeg(sample_id), 20, 16)
            shard, rows = writer.close()
        written.append(shard)
        tables.append(rows)
    _, sha256 = write_samples(folder, "train", tables)
    split = Split("train", 2 * shards, 2 * shards, tuple(written), sha256, 20, 16)
    write_manifest(folder, Manifest("test", "jpg", CLASSES, splits={"train": split}))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "shards")


def put(*keys: str | int, to: Any) -> Callable[[Values], None]:
    """Return what sets a key deep in the manifest."""

    def edit(values: Values) -> None:
        place: Any = values
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = to

    return edit


def drop(*keys: str) -> Callable[[Values], None]:
    def edit(values: Values) -> None:
        place = values
        for key in keys[:-1]:
            place = place[key]
        del place[keys[-1]]

    return edit


TRAIN = ("splits", "train")
SHARD = (*TRAIN, "shards", 0)


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (drop("tool"), "tool: Field required"),
        (drop(*TRAIN, "id_count"), "splits.train.id_count: Field required"),
        (put("colour", to="red"), "colour: Unexpected keyword"),
        (put(*SHARD, "colour", to="red"), "splits.train.shards.0.colour: Unexpected keyword"),
        (put("version", to=99), "version: Input should be 1"),
        (put("image", to="gif"), "image: String should match"),
        (put("plan", "seed", to="x"), "plan: Value error, seed: expected a whole number of at least 0, got 'x'"),
        (put("plan", "samples_per_shard", to=True), "plan: Value error, samples_per_shard: expected a whole number"),
        (put("plan", "samples_per_shard", to=0), "plan: Value error, samples_per_shard: expected a whole number"),
        (
            put("plan", "members", to=["label"]),
            "plan: Value error, members: expected names for label_key, image_key and mask_key",
        ),
        (put("plan", "members", to={"key": "a"}), "plan: Value error, members: expected names for label_key"),
        (put("plan", "members", to={"label_key": 1}), "plan: Value error, members: expected names for label_key"),
        (put("classes", to=[]), "classes: 0 classes, and its task is classification"),
        (put("classes", to="abc"), "classes: Input should be a valid"),
        (put("classes", 0, to=7), "classes.0: Input should be a valid string"),
        (put("splits", to={}), "splits: Dictionary should have at least 1 item"),
        (put("splits", to=[]), "splits: Input should be an object"),
        (put("splits", "../up", to={}), "splits.../up.[key]: String should match"),
        (put(*TRAIN, "id_count", to="x"), "splits.train.id_count: Input should be a valid integer"),
        (put(*TRAIN, "id_count", to=10**12), "splits.train.id_count: Input should be less than or equal to 100000000"),
        (put(*TRAIN, "id_count", to=3), "splits.train.id_count: 3 ids are not enough"),
        (put(*TRAIN, "samples", to=-1), "splits.train.samples: Input should be greater"),
        (put(*TRAIN, "samples", to=5), "splits.train.samples: the shards have 4 samples, not 5"),
        (put(*TRAIN, "name", to="val"), "splits.train.name: the split's own name is 'val'"),
        (put(*TRAIN, "samples_sha256", to="?"), "splits.train.samples_sha256: String should match"),
        (
            put(*TRAIN, "left_out", to=[{"id": 9, "path": "a", "reason": "b"}]),
            "splits.train.left_out: id 9 is not below",
        ),
        (put(*SHARD, "url", to="../train-000000.tar"), "splits.train.shards.0.url: String should match"),
        (put(*SHARD, "url", to=".."), "splits.train.shards.0.url: String should match"),
        (put(*SHARD, "url", to="train-000001.tar"), "splits.train.shards: a file is listed twice"),
        (put(*SHARD, "nsamples", to=1.5), "splits.train.shards.0.nsamples: Input should be a valid integer"),
        (put(*SHARD, "filesize", to=-1), "splits.train.shards.0.filesize: Input should be greater"),
        (put(*SHARD, "filesize", to=10**30), "splits.train.shards.0.filesize: Input should be less"),
        (put(*SHARD, "sha256", to=""), "splits.train.shards: a file has no sha256"),
    ],
)
def test_a_manifest_that_says_what_cannot_be_is_one_line_with_the_key(folder, edit, told):
    path = folder / "manifest.json"
    values = json.loads(path.read_text())
    edit(values)
    path.write_text(json.dumps(values))
    with pytest.raises(DamagedFile) as raised:
        read_manifest(folder)
    message = str(raised.value)
    assert message.startswith(f"{path}: {told}")
    assert message.endswith("; copy it again, or prepare the shards again")
    assert "\n" not in message


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000])
def test_a_manifest_that_is_no_json_object_ends_every_command_in_one_line(folder, run, content):
    (folder / "manifest.json").write_bytes(content)
    with pytest.raises(DamagedFile, match=r"manifest\.json: "):
        read_manifest(folder)


def test_shards_without_a_split_are_not_well(folder, run):
    manifest = read_manifest(folder)
    write_manifest(folder, replace(manifest, splits={}))
    done = run("verify.py", folder)
    assert (done.returncode, len(done.stderr.splitlines()), done.stdout) == (2, 1, "")


def edit_table(folder: Path, edit: Callable[[np.ndarray], object], *, agreed: bool = True) -> None:
    """Edit a table's rows, and where it is agreed let the manifest name the new digest."""
    path = folder / "train.samples.npy"
    samples = np.load(path)
    edit(samples)
    np.save(path, samples)
    if agreed:
        agree(folder)


def agree(folder: Path) -> None:
    manifest = read_manifest(folder)
    sha256 = hashlib.sha256((folder / "train.samples.npy").read_bytes()).hexdigest()
    write_manifest(
        folder, replace(manifest, splits={"train": replace(manifest.splits["train"], samples_sha256=sha256)})
    )


def cell(column: str, value: int) -> Callable[[np.ndarray], object]:
    return lambda samples: samples[column].__setitem__(2, value)


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (cell("label", 25), "label of row 2 is 25, but there are 3 classes"),
        (cell("label", -1), "label of row 2 is -1, but there are 3 classes"),
        (cell("shard", 99), "shard of row 2 is 99, but the manifest has another"),
        (cell("shard", 0), "shard of row 2 is 0, but the manifest has another"),
        (cell("shard", -1), "shard of row 2 is -1, but the manifest has another"),
        (cell("id", 10**12), "id of row 2 is 1000000000000, not from 0 to 3"),
        (cell("id", -5), "id of row 2 is -5, not from 0 to 3"),
        (cell("id", 1), "id of row 2 is 1, which is used more than once"),
        (cell("offset", -512), "offset of row 2 is -512, outside of its tar"),
        (cell("offset", 2**62), "outside of its tar"),
        (cell("size", 2**62), "beyond its tar's end"),
        (cell("size", -1), "size of row 2 is -1, beyond its tar's end"),
        (cell("width", 0), "width of row 2 is 0, not from 1 to 20"),
        (cell("height", 2**31 - 1), "height of row 2 is 2147483647, not from 1 to 16"),
    ],
)
def test_a_table_of_wrong_numbers_is_one_line_with_the_row_even_if_its_digest_is_right(folder, edit, told):
    SplitReader(folder, "train")
    edit_table(folder, edit)
    with pytest.raises(ValueError, match=r"train\.samples\.npy: ") as raised:
        SplitReader(folder, "train")
    assert told in str(raised.value)
    assert "\n" not in str(raised.value)


def _reverse(samples: np.ndarray) -> None:
    samples["label"] = samples["label"][::-1].copy()


@pytest.mark.parametrize("edit", [_reverse, cell("label", 1), cell("width", 19), cell("offset", 1024)])
def test_a_table_that_was_changed_is_not_trained_from(folder, edit):
    SplitReader(folder, "train")
    edit_table(folder, edit, agreed=False)
    message = r"train\.samples\.npy has a sha256 that differs from the manifest: copy it again"
    with pytest.raises(ValueError, match=message):
        SplitReader(folder, "train")


def _zipped(path: Path) -> None:
    samples = np.load(path)
    with path.open("wb") as file:
        np.savez(file, samples=samples)


def _floats(path: Path) -> None:
    np.save(path, np.zeros(4))


def _square(path: Path) -> None:
    np.save(path, np.load(path).reshape(2, 2))


def _objects(path: Path) -> None:
    np.save(path, np.array([{}], object), allow_pickle=True)


def _fewer(path: Path) -> None:
    np.save(path, np.load(path)[:3])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _text(path: Path) -> None:
    path.write_text("no table")


def _half_zip(path: Path) -> None:
    path.write_bytes(b"PK\x03\x04 half of a zip")


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("spoil", [_zipped, _floats, _square, _objects, _fewer, _empty, _text, _half_zip, _cut])
@pytest.mark.parametrize("agreed", [False, True])
def test_a_file_that_is_no_table_is_one_line_for_reading_and_for_verify(folder, capsys, spoil, agreed):
    spoil(folder / "train.samples.npy")
    if agreed:
        agree(folder)
    with pytest.raises(ValueError, match=r"train\.samples\.npy (is not a sample table|has )") as raised:
        SplitReader(folder, "train")
    assert "\n" not in str(raised.value)
    assert verify([str(folder), "--jobs", "1"]) == 1
    assert "train.samples.npy" in capsys.readouterr().out


def test_a_table_is_read_once_a_process_for_its_digest_and_again_when_it_changes(folder, monkeypatch):
    digests = []
    real = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda *args: digests.append(1) or real(*args))
    for _ in range(3):
        SplitReader(folder, "train")
    assert len(digests) == 1
    shutil.copy(folder / "train.samples.npy", folder / "copy")
    (folder / "copy").rename(folder / "train.samples.npy")
    SplitReader(folder, "train")
    assert len(digests) == 2


def test_running_the_preparation_again_mends_a_table(tmp_path):
    write_folders(tmp_path / "source", "train", ["ant", "bee"], 3)
    command = [str(tmp_path / "source"), str(tmp_path / "out"), "--jobs", "1"]
    assert main(command) == 0
    before = (tmp_path / "out/train.samples.npy").read_bytes()
    edit_table(tmp_path / "out", _reverse, agreed=False)
    with pytest.raises(ValueError, match="or run the preparation again"):
        SplitReader(tmp_path / "out", "train")
    assert main(command) == 0
    SplitReader(tmp_path / "out", "train")
    assert (tmp_path / "out/train.samples.npy").read_bytes() == before


@pytest.mark.parametrize("size", [0, 512, 100_000])
def test_a_tar_of_another_size_is_not_mapped_by_a_reader_that_was_opened_before(folder, size):
    reader = SplitReader(folder, "train")
    reader.check_sizes()
    with (folder / "train-000001.tar").open("r+b") as file:
        file.truncate(size)
    reader.bytes(np.array([0]))
    message = rf"train-000001\.tar has {size:,} bytes, but .* in the manifest: copy it again"
    with pytest.raises(ValueError, match=message):
        reader.bytes(np.array([0, 2]))


READ_ALL = """
import resource, sys
from pathlib import Path
import numpy as np
sys.path.insert(0, sys.argv[1])
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[3]),) * 2)
from shards.read import SplitReader
reader = SplitReader(Path(sys.argv[2]), "train")
kept = [reader.bytes(np.arange(len(reader.samples))) for _ in range(2)]
print(*{sum(int(view.sum()) for view in views) for views in kept}, len(reader._tars))
"""


@pytest.mark.parametrize("limit", [64, 100, resource.getrlimit(resource.RLIMIT_NOFILE)[0]])
def test_more_tars_than_a_process_may_open_files_are_read_all_the_same(tmp_path, limit):
    folder = write(tmp_path / "shards", shards=120)
    done = subprocess.run(
        [sys.executable, "-c", READ_ALL, ROOT, folder, str(limit)], capture_output=True, text=True, check=True
    )
    expected = sum(sum(jpeg(number)) for number in range(240))
    found, mapped = map(int, done.stdout.split())
    assert found == expected
    assert mapped < limit - 60
