"""``shards/index.py``: tars of other tools, read in place; the webdataset library says what they contain."""

from __future__ import annotations

import json
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
from foreign_tars import (
    IMAGES,
    Entries,
    picture,
    read_by_webdataset,
    write_as_timm,
    write_by_img2dataset,
    write_by_webdataset,
    write_tar,
)
from pictures import decode, encode, jpeg, pixels

from shards import stage
from shards.index import main
from shards.manifest import read_manifest
from shards.prepare_demo import main as draw
from shards.read import SplitReader
from shards.verify import verify

ONE = ("--jobs", "1")
pytestmark = [
    # The webdataset library leaves the files to the garbage collector.
    pytest.mark.filterwarnings("ignore:.*unclosed file:ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
LAYOUTS = {"webdataset": write_by_webdataset, "img2dataset": write_by_img2dataset, "timm": write_as_timm}


def index(*words: object) -> None:
    assert main([*map(str, words), *ONE]) == 0


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
    """The folder of the tars, and the folder to train from."""
    source = LAYOUTS[request.param](tmp_path / "source")
    if request.param != "img2dataset":
        index(source)
        return source, source
    index(source, "--destination", tmp_path / "out")
    return source, tmp_path / "out"


def label_of(sample: dict[str, bytes], classes: tuple[str, ...]) -> int:
    if "cls" in sample:
        return int(sample["cls"])
    return classes.index(json.loads(sample["json"])["label"])


def test_the_table_is_what_the_webdataset_library_iterates(layout: tuple[Path, Path]):
    _, folder = layout
    manifest = read_manifest(folder)
    for name, split in manifest.splits.items():
        reader = SplitReader(folder, name)
        images = [bytes(view) for view in reader.bytes(np.arange(split.samples))]
        samples = list(read_by_webdataset([folder / shard.url for shard in split.shards]))
        assert images == [next(sample[kind] for kind in IMAGES if kind in sample) for sample in samples]
        assert reader.samples["label"].tolist() == [label_of(sample, manifest.classes) for sample in samples]
        assert reader.samples["id"].tolist() == list(range(split.id_count))
        assert len({sample["__key__"] + sample["__url__"] for sample in samples}) == split.samples
        sides = [decode(image).shape[1::-1] for image in images]
        assert list(zip(reader.samples["width"], reader.samples["height"], strict=True)) == sides


def test_verify_finds_no_problem_and_then_a_label_that_was_changed(layout: tuple[Path, Path]):
    _, folder = layout
    assert verify(folder, 1) == []
    tar = sorted(folder.glob("*.tar"))[0]
    content = tar.read_bytes()
    old = b'"label": "cat"' if b'"label": "cat"' in content else None
    with tarfile.open(tar) as archive:
        offset = content.index(old) + 10 if old else next(m for m in archive if m.name.endswith("cls")).offset_data
    changed = b"bee" if old else b"2"
    tar.write_bytes(content[:offset] + changed + content[offset + len(changed) :])
    problems = verify(folder, 1)
    assert any("sha256" in problem for problem in problems)
    assert any("disagree about label" in problem for problem in problems)


def test_nothing_is_copied_and_no_tar_is_touched(tmp_path: Path):
    sources = [write_by_webdataset(tmp_path / "here"), write_by_img2dataset(tmp_path / "there")]
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.rglob("*") if path.is_file()}
    index(sources[0])
    index(sources[1], "--destination", tmp_path / "out")
    assert all((path.read_bytes(), path.stat().st_mtime_ns) == value for path, value in before.items())
    assert all(path.is_symlink() for path in (tmp_path / "out").glob("*.tar"))
    written = [path for path in tmp_path.rglob("*") if path.is_file() and not path.is_symlink() and path not in before]
    assert {path.suffix for path in written} == {".idx", ".npy", ".json"}
    assert not [path for path in written for n in range(26) if jpeg(n)[:64] in path.read_bytes()]


def test_the_number_of_processes_changes_no_byte(tmp_path: Path, contents):
    source = write_by_img2dataset(tmp_path / "source")
    for jobs in (1, 2):
        assert main([str(source), "--destination", str(tmp_path / f"out{jobs}"), "--jobs", str(jobs)]) == 0
    assert contents(tmp_path / "out1") == contents(tmp_path / "out2")


def test_a_rerun_takes_in_tars_that_were_added(tmp_path: Path):
    folder = write_by_webdataset(tmp_path / "tars")
    index(folder)
    before = (folder / "manifest.json").read_bytes()
    index(folder)
    assert (folder / "manifest.json").read_bytes() == before
    write_tar(folder / "train-9999.tar", [("a.jpg", jpeg(1)), ("a.cls", b"1")])
    index(folder)
    assert read_manifest(folder).splits["train"].samples == 27


def test_staging_copies_the_tars_behind_the_links(tmp_path: Path):
    index(write_by_img2dataset(tmp_path / "source"), "--destination", tmp_path / "out")
    copy = stage.stage_shards(tmp_path / "out", tmp_path / "local")
    assert not [path for path in copy.iterdir() if path.is_symlink()]
    assert verify(copy, 1) == []


def test_dali_reads_all_kinds_of_images_by_the_indices(tmp_path: Path):
    dali = pytest.importorskip("nvidia.dali")
    folder = write_as_timm(tmp_path / "tars")
    index(folder)
    assert read_manifest(folder).image == "jpeg;jpg;png;webp"

    @dali.pipeline_def(batch_size=13, num_threads=1, device_id=None)
    def read():
        tar = folder / "imagenet1k-train-0000.tar"
        return dali.fn.readers.webdataset(
            paths=[str(tar)],
            index_paths=[str(tar.with_suffix(".idx"))],
            ext=[read_manifest(folder).image],
            missing_component_behavior="error",
        )

    pipeline = read()
    pipeline.build()
    (images,) = pipeline.run()
    reader = SplitReader(folder, "train")
    assert [bytes(np.asarray(image)) for image in images] == [bytes(view) for view in reader.bytes(np.arange(13))]


def small(folder: Path, *labels: bytes | dict | None, name: str = "a.tar") -> Path:
    """Write a tar with an image for each label: bytes for ``cls``, values for ``json``, or neither."""
    entries: Entries = []
    for number, label in enumerate(labels):
        entries.append((f"{number}.jpg", jpeg(number)))
        if label is not None:
            kind, data = ("cls", label) if isinstance(label, bytes) else ("json", json.dumps(label).encode())
            entries.append((f"{number}.{kind}", data))
    write_tar(folder / name, entries)
    return folder


def labels_in(folder: Path, *options: object) -> tuple[list[int], tuple[str, ...]]:
    index(folder, *options)
    return SplitReader(folder, "train").samples["label"].tolist(), read_manifest(folder).classes


@pytest.mark.parametrize(
    ("labels", "numbers", "classes"),
    [
        ((b"2", b"0\n", b"0001"), [2, 0, 1], "012"),
        ((struct.pack("<i", 2), struct.pack("<q", 0), struct.pack("<i", 50)), [2, 0, 50], [str(n) for n in range(51)]),
        (({"label": 1}, {"label": "2"}, {"label": 0, "n": [1]}), [1, 2, 0], "012"),
        (({"cls": "2"}, {"cls": 0}), [2, 0], "012"),
        (({"class": 1, "n": [1]}, {"class": 0}), [1, 0], "01"),
        (({"label": "bee"}, {"label": "ant"}, {"label": "Äpfel"}), [1, 0, 2], ["ant", "bee", "Äpfel"]),
        ((b"bee", b"ant", b"bee"), [1, 0, 1], ["ant", "bee"]),
    ],
)
def test_labels_are_numbers_in_text_or_bytes_or_names(tmp_path: Path, labels, numbers, classes):
    assert labels_in(small(tmp_path / "a", *labels)) == (numbers, tuple(classes))


def test_a_key_chooses_the_label_and_a_file_names_the_classes(tmp_path: Path):
    folder = small(tmp_path / "a", {"label": 0, "kind": 2}, {"label": 0, "kind": 1})
    (tmp_path / "names").write_text("ant\nbee\ncat\nfly\n")
    expected = [2, 1], ("ant", "bee", "cat", "fly")
    assert labels_in(folder, "--label-key", "kind", "--classes", tmp_path / "names") == expected
    folder = small(tmp_path / "b", {"label": "fly"}, {"label": "bee"})
    assert labels_in(folder, "--classes", tmp_path / "names") == ([3, 1], ("ant", "bee", "cat", "fly"))


def test_a_key_chooses_the_image_where_a_sample_has_two(tmp_path: Path):
    write_tar(tmp_path / "a.tar", [("1.jpg", jpeg(1)), ("1.png", picture(2, "png")), ("1.cls", b"0")])
    index(tmp_path, "--image-key", "png")
    (view,) = SplitReader(tmp_path, "train").bytes(np.arange(1))
    assert bytes(view) == picture(2, "png")
    assert verify(tmp_path, 1) == []


def names_of(folder: Path) -> dict[str, list[str]]:
    return {name: [shard.url for shard in split.shards] for name, split in read_manifest(folder).splits.items()}


@pytest.mark.parametrize(
    ("names", "options", "train", "val"),
    [
        (["b.tar", "a.tar"], (), ["a.tar", "b.tar"], []),
        (["x-Training-0.tar", "x-validation-0.tar", "x-test-0.tar"], (), ["x-Training-0.tar"], ["x-validation-0.tar"]),
        (["train0.tar", "test0.tar"], (), ["train0.tar"], ["test0.tar"]),
        (["0.tar", "1.tar", "9.tar"], ("--val", "9*"), ["0.tar", "1.tar"], ["9.tar"]),
        (["0.tar", "1.tar", "9.tar"], ("--val", "9*", "--train", "0*"), ["0.tar"], ["9.tar"]),
    ],
)
def test_splits_follow_the_names_or_the_options(tmp_path: Path, names, options, train, val, capsys):
    for name in names:
        small(tmp_path, b"0", name=name)
    index(tmp_path, *options)
    assert names_of(tmp_path) == {"train": train} | ({"val": val} if val else {})
    printed = capsys.readouterr().out
    assert ("not read" in printed) == (len(names) > len(train) + len(val))
    assert ("training will not validate" in printed) == (not val)


def test_folders_of_splits_give_the_links_their_names(tmp_path: Path):
    index(write_by_img2dataset(tmp_path / "source"), "--destination", tmp_path / "out")
    assert names_of(tmp_path / "out") == {
        "train": ["train-00000.tar", "train-00001.tar", "train-00002.tar"],
        "val": ["val-00000.tar"],
    }
    assert (tmp_path / "out/val-00000.tar").resolve() == tmp_path / "source/val/00000.tar"


UNUSABLE: dict[str, tuple[Entries, str]] = {
    "no image": ([("b.txt", b"x"), ("b.cls", b"0")], "no image: its members are txt, cls, none is jpg, jpeg, png or"),
    "dots in a key": ([("b.v1.jpg", jpeg(1)), ("b.v1.cls", b"0")], "no image: its members are v1.jpg, v1.cls"),
    "no label": ([("b.jpg", jpeg(1)), ("b.txt", b"x")], "no label: its members are jpg, txt, none is cls or json"),
    "no key": ([("b.jpg", jpeg(1)), ("b.json", b'{"text": 1}')], "no label: its json has no label or cls or class"),
    "broken json": ([("b.jpg", jpeg(1)), ("b.json", b"{")], "no label: its json cannot be parsed"),
    "a list": ([("b.jpg", jpeg(1)), ("b.json", b'{"label": [1]}')], "no label: label of its json is [1], neither"),
    "odd bytes": ([("b.jpg", jpeg(1)), ("b.cls", b"\0\1\2")], "no label: cls is neither text nor an integer"),
    "empty": ([("b.jpg", jpeg(1)), ("b.cls", b" ")], "no label: cls is neither text nor an integer"),
    "boxes of COCO": (
        [("b.jpg", jpeg(1)), ("b.json", b'{"image_id": 1, "annotations": [{"bbox": [1, 1, 5, 5], "category_id": 3}]}')],
        "no label, but boxes in annotations of its json, which are not read in place: write shards with shards/prepare",
    ),
    "boxes of a shard of this project": (
        [("b.cls", b"0000"), ("b.jpg", jpeg(1)), ("b.boxes.f32", b""), ("b.areas.f32", b"")],
        "no label, but boxes in boxes.f32, which are not read in place: write shards with shards/prepare_coco.py",
    ),
    "cut image": ([("b.jpg", jpeg(1)[:200]), ("b.cls", b"0")], "cannot be decoded: "),
    "no picture": ([("b.png", b"text"), ("b.cls", b"0")], "neither a JPEG, a PNG nor a WebP"),
    "a GIF": ([("b.jpg", encode(pixels(1), "GIF")), ("b.cls", b"0")], "neither a JPEG, a PNG nor a WebP"),
    "16 bits": ([("b.png", encode(np.zeros((4, 4), np.uint16), "PNG")), ("b.cls", b"0")], "a grey image of 16 bits"),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_a_sample_that_is_not_usable_is_left_out_by_name_or_with_strict_an_error(tmp_path: Path, name: str, capsys):
    entries, reason = UNUSABLE[name]
    good = [("a.jpg", jpeg(1)), ("a.cls", b"0")], [("c.jpg", jpeg(2)), ("c.cls", b"1")]
    write_tar(tmp_path / "a.tar", [*good[0], *entries, *good[1]])
    with pytest.raises(ValueError, match=r"^a\.tar/b is not a usable sample: ") as raised:
        main([str(tmp_path), *ONE, "--strict"])
    assert reason in str(raised.value)
    assert not (tmp_path / "manifest.json").exists()
    index(tmp_path)
    (entry,) = read_manifest(tmp_path).splits["train"].left_out
    assert (entry.id, entry.path) == (1, "a.tar/b")
    assert reason in entry.reason
    assert f"left out: a.tar/b: {entry.reason}" in capsys.readouterr().err
    reader = SplitReader(tmp_path, "train")
    assert reader.samples["id"].tolist() == [0, 2]
    assert reader.labels_by_id().tolist() == [0, -1, 1]
    assert verify(tmp_path, 1) == []


def test_a_tar_without_any_usable_sample_is_no_shard(tmp_path: Path):
    small(tmp_path, b"0", b"1", name="a.tar")
    small(tmp_path, None, None, name="b.tar")
    small(tmp_path, b"1", name="c.tar")
    index(tmp_path)
    assert names_of(tmp_path) == {"train": ["a.tar", "c.tar"]}
    assert SplitReader(tmp_path, "train").samples["id"].tolist() == [0, 1, 4]
    assert not (tmp_path / "b.idx").exists()
    assert verify(tmp_path, 1) == []


def test_names_in_folders_with_spaces_dots_or_without_an_ending_follow_the_library(tmp_path: Path):
    entries: Entries = [
        ("__meta__/a.json", b"{}"),
        ("README", b"text"),
        ("./x.y/_.cls", b"1"),
        ("./x.y/_.JPG", jpeg(0)),
    ]
    long = "folder/" * 20 + "é 1"
    entries += [(f"{long}.jpeg", jpeg(1)), (f"{long}.cls", b"0"), ("./._x.jpg", b"of macOS")]
    write_tar(tmp_path / "a.tar", entries, tarfile.PAX_FORMAT)
    index(tmp_path)
    keys = [sample["__key__"] for sample in read_by_webdataset([tmp_path / "a.tar"])]
    assert keys == ["./x.y/_", long]
    views = SplitReader(tmp_path, "train").bytes(np.arange(2))
    assert [bytes(view) for view in views] == [jpeg(0), jpeg(1)]
    assert verify(tmp_path, 1) == []


def two_images(folder: Path) -> None:
    write_tar(folder / "a.tar", [("1.jpg", jpeg(1)), ("1.png", picture(1, "png")), ("1.cls", b"0")])


def the_same_name(folder: Path) -> None:
    write_tar(folder / "a.tar", [("1.jpg", jpeg(1)), ("1.JPG", jpeg(2)), ("1.cls", b"0")])


def interleaved(folder: Path) -> None:
    write_tar(folder / "a.tar", [("1.jpg", jpeg(1)), ("2.jpg", jpeg(2)), ("1.cls", b"0"), ("2.cls", b"0")])


def truncated(folder: Path) -> None:
    tar = write_tar(folder / "a.tar", [("1.jpg", jpeg(1)), ("1.cls", b"0")])
    tar.write_bytes(tar.read_bytes()[:900])


def compressed(folder: Path) -> None:
    (folder / "a.tar").write_bytes(b"\x1f\x8b\x08" + bytes(99))


def without_labels(folder: Path) -> None:
    small(folder, None, None)


def names_and_numbers(folder: Path) -> None:
    small(folder, b"0", b"ant")


def several_places(folder: Path) -> None:
    small(folder, {"label": 0, "class": 1}, {"class": 1})


def text_and_json(folder: Path) -> None:
    small(folder, {"label": 0})
    small(folder, b"1", name="b.tar")


def negative(folder: Path) -> None:
    small(folder, b"0", b"-1")


def enormous(folder: Path) -> None:
    small(folder, b"0", b"100000000")


def unknown_in_val(folder: Path) -> None:
    small(folder, b"ant", b"bee", name="train.tar")
    small(folder, b"fly", name="val.tar")


def half_named(folder: Path) -> None:
    small(folder, b"0", name="train.tar")
    small(folder, b"0", name="0001.tar")


def twice_named(folder: Path) -> None:
    small(folder, b"0", name="train-val.tar")


def no_tar(folder: Path) -> None:
    (folder / "a.tar.gz").touch()


def prepared(folder: Path) -> None:
    draw([str(folder), "--train", "4", "--val", "2", "--size", "8", *ONE])


def other_manifest(folder: Path) -> None:
    small(folder, b"0")
    (folder / "manifest.json").write_text("[]")


def other_index(folder: Path) -> None:
    small(folder, b"0")
    (folder / "a.idx").write_text("v1.2 0\n")


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (two_images, r"a\.tar: 1 has two images, jpg and png: choose with --image-key"),
        (the_same_name, r"a\.tar: 1 has two members \.jpg: give every sample a key of its own"),
        (interleaved, r"a\.tar: the key 1 comes twice, with others between: give every sample a key of its own"),
        (truncated, r"a\.tar is damaged at byte"),
        (compressed, r"a\.tar is compressed, and cannot be read in place: unpack it with gunzip"),
        (without_labels, r"the split 'train' has no usable sample; the first: a\.tar/0: no label: its members are jpg"),
        (names_and_numbers, r"the labels are names and numbers: a\.tar/1 has 'ant', a\.tar/0 has 0"),
        (several_places, r"a\.tar/1 has its label in class of its json, a\.tar/0 in label of its json: choose a key"),
        (text_and_json, r"b\.tar/0 has its label in cls, a\.tar/0 in label of its json: choose a key of json with"),
        (negative, r"a\.tar/1 has the label -1, which is not from 0 to 99,999: list the classes with --classes FILE"),
        (enormous, r"a\.tar/1 has the label 100000000, which is not from 0 to 99,999"),
        (unknown_in_val, r"val has the class fly, which train does not have"),
        (half_named, r"the name 0001\.tar says no split, but others do: give --train and --val"),
        (twice_named, r"the name train-val\.tar says both train and val: give --train and --val"),
        (no_tar, r"contains no \.tar file: name a folder of tars, or tars"),
        (prepared, r"manifest\.json exists, and shards/index\.py did not write it: give another --destination"),
        (other_manifest, r"manifest\.json exists, and shards/index\.py did not write it"),
        (other_index, r"a\.idx exists, and differs from what would be written: remove it, or give --destination"),
    ],
)
def test_what_cannot_be_indexed_is_one_line_and_writes_nothing(tmp_path: Path, write, message, contents):
    write(tmp_path)
    before = contents(tmp_path)
    with pytest.raises((ValueError, OSError), match=message) as raised:
        main([str(tmp_path), *ONE])
    assert "\n" not in str(raised.value)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("write", [two_images, truncated, without_labels])
def test_the_command_ends_with_two_and_one_line(tmp_path: Path, write, run):
    write(tmp_path)
    done = run("index.py", tmp_path, "--jobs", 1)
    assert (done.returncode, done.stderr.splitlines()[-1][:7]) == (2, "error: ")
    assert len([line for line in done.stderr.splitlines() if not line.startswith("left out: ")]) == 1


def test_a_label_beyond_the_listed_classes_is_named_with_the_list(tmp_path: Path):
    small(tmp_path / "a", b"0", b"2")
    (tmp_path / "names").write_text("ant\nbee\n")
    with pytest.raises(ValueError, match=r"a\.tar/1 has the label 2, which is not from 0 to 1: .*names has 2 classes"):
        main([str(tmp_path / "a"), "--classes", str(tmp_path / "names"), *ONE])


def test_tars_of_several_folders_need_a_destination_that_is_empty(tmp_path: Path):
    small(tmp_path / "a", b"0")
    small(tmp_path / "b", b"1")
    words = [str(tmp_path / "a"), str(tmp_path / "b"), *ONE]
    with pytest.raises(ValueError, match=r"there are tars in .*a and in .*b: give --destination FOLDER"):
        main(words)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes").touch()
    with pytest.raises(ValueError, match=r"out contains notes: use a new folder"):
        main([*words, "--destination", str(tmp_path / "out")])
    (tmp_path / "out" / "notes").unlink()
    index(*words[:2], "--destination", tmp_path / "out")
    assert names_of(tmp_path / "out") == {"train": ["a-a.tar", "b-a.tar"]}
    (tmp_path / "b" / "a.tar").unlink()
    assert any("b-a.tar is missing" in problem for problem in verify(tmp_path / "out", 1))


def test_the_tars_of_a_destination_are_not_linked_to_themselves(tmp_path: Path, contents):
    small(tmp_path / "a", b"0")
    index(tmp_path / "a", "--destination", tmp_path / "out")
    before = contents(tmp_path / "out")
    for source in ("a", "out"):
        with pytest.raises(ValueError, match=r"a\.tar is in the destination itself: leave out --destination"):
            main([str(tmp_path / source), "--destination", str(tmp_path / source), *ONE])
    index(tmp_path / "out")
    assert contents(tmp_path / "out") == before


def test_tars_whose_indices_would_have_the_same_name_are_refused(tmp_path: Path):
    small(tmp_path, b"0")
    for name in ("shard.0", "shard.1"):
        (tmp_path / name).write_bytes((tmp_path / "a.tar").read_bytes())
    words = [str(tmp_path / "shard.0"), str(tmp_path / "shard.1"), "--destination", str(tmp_path / "out")]
    with pytest.raises(ValueError, match=r"shard\.0 and shard\.1 would have the same index: end their names in \.tar"):
        main([*words, *ONE])
    assert not (tmp_path / "out").exists()


def test_tars_that_are_packed_or_in_a_folder_below_others_are_said(tmp_path: Path, capsys):
    small(tmp_path, b"0")
    small(tmp_path / "below", b"1")
    (tmp_path / "b.tar.gz").touch()
    index(tmp_path)
    told = capsys.readouterr().out
    assert f"not read: 1 files such as {tmp_path / 'b.tar.gz'}: unpack with gunzip" in told
    assert f"not read: 1 files such as {tmp_path / 'below' / 'a.tar'}: name the folders, too" in told
