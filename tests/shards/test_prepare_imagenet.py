"""``prepare_imagenet.py``: layouts, options, odd files and errors."""

from __future__ import annotations

import gzip
import io
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from pictures import encode, jpeg, pixels, tar_of, write_folders, write_splits
from PIL import Image

from shards.manifest import read_manifest
from shards.prepare_imagenet import main
from shards.read import SplitReader
from shards.verify import verify

CLASSES = ["n01440764", "n01443537", "n02105855"]
SMALL = ("--jobs", "1", "--samples-per-shard", "4")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_splits(tmp_path / "source", CLASSES, 4, 2)


def prepare(source: Path, name: str, *options: object) -> Path:
    destination = source.parent / name
    assert main([str(source), str(destination), *SMALL, *map(str, options)]) == 0
    return destination


def images_by_id(folder: Path, split: str = "train") -> dict[int, bytes]:
    reader = SplitReader(folder, split)
    views = reader.bytes(np.arange(len(reader.samples)))
    return {int(number): bytes(view) for number, view in zip(reader.samples["id"], views, strict=True)}


def test_ids_number_the_sorted_paths_and_labels_the_sorted_classes(source):
    folder = prepare(source, "out")
    paths = sorted(path.relative_to(source / "train").as_posix() for path in source.glob("train/*/*"))
    assert images_by_id(folder) == {number: (source / "train" / path).read_bytes() for number, path in enumerate(paths)}
    labels = [CLASSES.index(path.split("/")[0]) for path in paths]
    assert SplitReader(folder, "train").labels_by_id().tolist() == labels
    assert read_manifest(folder).classes == tuple(CLASSES)
    assert verify(folder, 1) == []


def test_shards_are_of_equal_size_and_mix_the_classes(source):
    write_folders(source, "train", CLASSES, 20)
    samples = SplitReader(prepare(source, "out", "--samples-per-shard", 9), "train").samples
    assert np.bincount(samples["shard"]).tolist() == [9, 9, 9, 9, 8, 8, 8]
    assert all(len(set(samples["label"][samples["shard"] == shard])) > 1 for shard in range(7))
    assert samples["id"].tolist() != sorted(samples["id"])


def test_another_seed_is_another_order_of_the_same_images(source):
    one, other = prepare(source, "one"), prepare(source, "other", "--seed", 1)
    assert images_by_id(one) == images_by_id(other)
    assert SplitReader(one, "train").samples["id"].tolist() != SplitReader(other, "train").samples["id"].tolist()


def test_the_number_of_processes_changes_no_byte(source, run, contents):
    outputs = []
    for jobs in (1, 2, 3):
        done = run(
            "prepare_imagenet.py", source, source.parent / f"out{jobs}", "--jobs", jobs, "--samples-per-shard", 3
        )
        assert (done.returncode, done.stderr) == (0, "")
        outputs.append(contents(source.parent / f"out{jobs}"))
    assert outputs[0] == outputs[1] == outputs[2]


def test_either_split_may_be_missing(source):
    shutil.rmtree(source / "train")
    assert set(read_manifest(prepare(source, "out")).splits) == {"val"}


def write_archives(source: Path) -> Path:
    """Pack the folders of ``source`` as the original archives; the devkit's numbers are not in alphabetical order."""
    packed = source.parent / "packed"
    packed.mkdir()
    inner = {}
    for wnid in reversed(CLASSES):
        files = {path.name: path.read_bytes() for path in sorted((source / "train" / wnid).iterdir(), reverse=True)}
        inner[f"{wnid}.tar"] = tar_of(files)
    (packed / "ILSVRC2012_img_train.tar").write_bytes(tar_of(inner))
    images = sorted(source.glob("val/*/*"), key=lambda path: path.name)
    renamed = {f"ILSVRC2012_val_{number:08d}.JPEG": path for number, path in enumerate(images, 1)}
    (packed / "ILSVRC2012_img_val.tar").write_bytes(tar_of({name: path.read_bytes() for name, path in renamed.items()}))
    for name, path in renamed.items():
        path.rename(path.with_name(name))
    wnids = [path.parent.name for path in images]
    (packed / "val.txt").write_text("".join(f"{wnid}\n" for wnid in wnids))
    return packed


def devkit(source: Path, packed: Path) -> dict[str, bytes]:
    scipy_io = pytest.importorskip("scipy.io")
    numbers = {"n02105855": 1, "n01440764": 2, "n01443537": 3}
    kinds = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O")]
    synsets = np.array([((number,), wnid, "words") for wnid, number in numbers.items()], kinds)
    meta = io.BytesIO()
    scipy_io.savemat(meta, {"synsets": synsets[:, None]}, do_compression=True)
    truth = "".join(f"{numbers[wnid]}\n" for wnid in (packed / "val.txt").read_text().split())
    return {"meta.mat": meta.getvalue(), "ILSVRC2012_validation_ground_truth.txt": truth.encode()}


def test_the_original_archives_give_the_same_bytes_as_the_folders(source, contents):
    packed = write_archives(source)
    inside = {f"ILSVRC2012_devkit_t12/data/{name}": data for name, data in devkit(source, packed).items()}
    (packed / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(gzip.compress(tar_of(inside)))
    assert contents(prepare(packed, "from_archives")) == contents(prepare(source, "from_folders"))


def test_the_development_kit_may_be_unpacked(source, contents):
    packed = write_archives(source)
    for name, data in devkit(source, packed).items():
        (packed / name).write_bytes(data)
    assert contents(prepare(packed, "from_archives")) == contents(prepare(source, "from_folders"))


@pytest.mark.parametrize("with_names", [False, True])
def test_validation_labels_may_come_from_a_list(source, contents, with_names):
    packed = write_archives(source)
    labels = packed / "val.txt"
    if with_names:
        lines = [f"ILSVRC2012_val_{n:08d}.JPEG {wnid}\n" for n, wnid in enumerate(labels.read_text().split(), 1)]
        labels.write_text("".join(reversed(lines)))
    output = prepare(packed, "from_archives", "--val-labels", labels)
    assert contents(output) == contents(prepare(source, "from_folders"))


def test_a_list_of_classes_fixes_the_labels(source):
    names = source.parent / "classes.txt"
    names.write_text("n02105855 a shepherd dog\nn00000001 nothing\n\nn01443537\nn01440764 tench\n")
    folder = prepare(source, "out", "--classes", names)
    assert read_manifest(folder).classes == ("n02105855", "n00000001", "n01443537", "n01440764")
    assert SplitReader(folder, "train").labels_by_id().tolist() == [3] * 4 + [2] * 4 + [0] * 4


def test_a_subset_is_even_over_the_classes_and_has_new_ids(source):
    folder = prepare(source, "out", "--subset", 5)
    for split in ("train", "val"):
        labels = SplitReader(folder, split).labels_by_id()
        assert sorted(np.bincount(labels)) == [1, 2, 2]
        assert labels.tolist() == sorted(labels)
    assert set(images_by_id(folder).values()) <= {path.read_bytes() for path in source.glob("train/*/*")}
    assert images_by_id(folder) != images_by_id(prepare(source, "other", "--subset", 5, "--seed", 1))
    assert verify(folder, 1) == []


def test_a_subset_larger_than_the_split_is_the_split(source):
    assert images_by_id(prepare(source, "out", "--subset", 100)) == images_by_id(prepare(source, "whole"))


def test_images_shrink_on_demand(source):
    folder = prepare(source, "out", "--resize-short", 10, "--quality", 80)
    samples = SplitReader(folder, "train").samples
    assert set(np.minimum(samples["width"], samples["height"])) == {10}
    assert read_manifest(folder).transform == {"resize_short": 10, "max_side": None, "quality": 80}
    assert verify(folder, 1) == []


def write_odd_files(source: Path) -> None:
    image = Image.fromarray(pixels(7))
    (source / "train/n01440764/a_png.JPEG").write_bytes(encode(image, "PNG"))
    (source / "train/n01440764/cmyk.JPEG").write_bytes(encode(image.convert("CMYK")))
    (source / "train/n01440764/gif.JPEG").write_bytes(encode(image.convert("P"), "GIF"))
    (source / "train/n01443537/cut.JPEG").write_bytes(jpeg(8)[:-50])
    (source / "train/n01443537/empty.JPEG").write_bytes(b"")


def test_unusable_files_are_reported_and_leave_holes(source, run):
    write_odd_files(source)
    done = run("prepare_imagenet.py", source, source.parent / "out", *SMALL)
    unusable = ["train/n01440764/gif.JPEG", "train/n01443537/cut.JPEG", "train/n01443537/empty.JPEG"]
    assert done.returncode == 0
    assert sorted(line.split(": ")[1] for line in done.stderr.splitlines()) == unusable
    split = read_manifest(source.parent / "out").splits["train"]
    paths = sorted(path.relative_to(source).as_posix() for path in source.glob("train/*/*"))
    holes = [paths.index(path) for path in unusable]
    assert (split.samples, split.id_count) == (14, 17)
    assert [(each.id, each.path) for each in split.left_out] == list(zip(holes, unusable, strict=True))
    assert np.flatnonzero(SplitReader(source.parent / "out", "train").labels_by_id() < 0).tolist() == holes
    assert verify(source.parent / "out", 1) == []


def test_left_out_files_change_no_place_in_the_plan(source):
    before = SplitReader(prepare(source, "before"), "train").samples
    victim = source / "train/n01443537/n01443537_1.JPEG"
    victim.write_bytes(b"x" * victim.stat().st_size)
    after = SplitReader(prepare(source, "after"), "train").samples
    kept = before[before["id"] != 5]
    assert after[["id", "shard"]].tolist() == kept[["id", "shard"]].tolist()


def test_a_shard_of_unusable_files_only_is_no_file(source, contents):
    (source / "train/n01443537/empty.JPEG").write_bytes(b"")
    folder = prepare(source, "out", "--samples-per-shard", 1)
    manifest = read_manifest(folder)
    assert len(manifest.splits["train"].shards) == 12
    assert verify(folder, 1) == []
    before = contents(folder)
    assert contents(prepare(source, "out", "--samples-per-shard", 1)) == before


def test_strict_stops_at_an_unusable_file(source, run):
    write_odd_files(source)
    for jobs in (1, 2):
        done = run("prepare_imagenet.py", source, source.parent / f"out{jobs}", "--jobs", jobs, "--strict")
        assert done.returncode == 2
        assert "is not a usable image" in done.stderr
        assert len(done.stderr.splitlines()) == 1
        assert not (source.parent / f"out{jobs}/manifest.json").exists()


def test_a_dry_run_prints_the_plan_and_writes_nothing(source, capsys):
    destination = source.parent / "new" / "out"
    assert main([str(source), str(destination), *SMALL, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "train: 12 files" in printed
    assert "3 shards" in printed
    assert f"GB free at {source.parent}" in printed
    assert not destination.parent.exists()


def _no_split(source: Path) -> list[object]:
    shutil.rmtree(source / "train")
    shutil.rmtree(source / "val")
    return []


def _empty_split(source: Path) -> list[object]:
    shutil.rmtree(source / "val")
    (source / "val").mkdir()
    return []


def _flat_val(source: Path) -> list[object]:
    (source / "val/ILSVRC2012_val_00000001.JPEG").write_bytes(jpeg(1))
    return []


def _nested_folder(source: Path) -> list[object]:
    (source / "train/n01440764/more").mkdir()
    return []


def _class_not_listed(source: Path) -> list[object]:
    (source / "classes.txt").write_text("n01440764\nn01443537\n")
    return ["--classes", source / "classes.txt"]


def _class_listed_twice(source: Path) -> list[object]:
    (source / "classes.txt").write_text("n01440764\nn01440764\n")
    return ["--classes", source / "classes.txt"]


def _both_layouts(source: Path) -> list[object]:
    (source / "ILSVRC2012_img_train.tar").write_bytes(tar_of({}))
    return []


def _val_without_labels(source: Path) -> list[object]:
    shutil.rmtree(source / "val")
    (source / "ILSVRC2012_img_val.tar").write_bytes(tar_of({"ILSVRC2012_val_00000001.JPEG": jpeg(1)}))
    return []


def _cut_archive(source: Path) -> list[object]:
    shutil.rmtree(source / "train")
    inner = tar_of({f"n01440764_{number}.JPEG": jpeg(number) for number in range(40)})
    (source / "ILSVRC2012_img_train.tar").write_bytes(tar_of({"n01440764.tar": inner})[:20_000])
    return []


@pytest.mark.parametrize(
    ("arrange", "message"),
    [
        (_no_split, "has none of train/<class>/*.JPEG"),
        (_empty_split, "no files for the split 'val'"),
        (_flat_val, "is outside of the class folders"),
        (_nested_folder, "n01440764/more is not a file"),
        (_class_not_listed, "train has the class n02105855, which is missing from the list"),
        (_class_listed_twice, "contains a class twice"),
        (_both_layouts, "contains both train/ and ILSVRC2012_img_train.tar"),
        (_val_without_labels, "pass --val-labels FILE"),
        (_cut_archive, "ILSVRC2012_img_train.tar is damaged"),
        (lambda source: ["--jobs", 0], "argument --jobs: expected a whole number from 1 to 1,024, got '0'"),
        (lambda source: ["--resize-short", 5, "--max-side", 5], "not allowed with argument"),
        (lambda source: ["--seed", 2**64], "invalid seed value"),
    ],
)
def test_an_error_is_one_line_and_nothing_is_written(source, run, arrange, message):
    options = arrange(source)
    done = run("prepare_imagenet.py", source, source.parent / "out", *options)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (source.parent / "out").exists()


def test_a_folder_with_other_things_in_it_is_refused(source, run):
    (source.parent / "out").mkdir()
    (source.parent / "out/letters.txt").write_text("dear reader")
    done = run("prepare_imagenet.py", source, source.parent / "out")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "is not empty and contains no shards" in done.stderr


def test_an_archive_that_cannot_be_read_through_names_the_missing_labels(source, run):
    packed = write_archives(source)
    (packed / "val.txt").write_text("ILSVRC2012_val_00000001.JPEG n01440764\n")
    done = run("prepare_imagenet.py", packed, source.parent / "out", "--val-labels", packed / "val.txt")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "ILSVRC2012_val_00000002.JPEG, whose class is not known" in done.stderr


def test_members_of_the_archives_are_read_in_place(source):
    packed = write_archives(source)
    with tarfile.open(packed / "ILSVRC2012_img_train.tar") as tar:
        assert {member.name for member in tar} == {f"{wnid}.tar" for wnid in CLASSES}
    before = {path.name for path in packed.iterdir()}
    prepare(packed, "out", "--val-labels", packed / "val.txt")
    assert {path.name for path in packed.iterdir()} == before
