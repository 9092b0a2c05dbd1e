"""``shards/prepare_masks.py``: pairs of images and masks become shards, and what cannot be used is told."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from masked import PIXEL_CLASSES, draw_masked
from pictures import decode, encode
from PIL import Image

from shards.manifest import read_manifest
from shards.masks import decode_mask, encode_mask
from shards.prepare_masks import main
from shards.read import SplitReader
from shards.verify import verify

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = ("--samples-per-shard", "4", "--jobs", "1")


def write_pair(source: Path, name: str, number: int, kind: str = "PNG") -> None:
    """Write an image and its mask as ``images/<name>`` and ``masks/<name>.png``."""
    image, mask = draw_masked(number)
    ending = "png" if kind == "PNG" else "jpg"
    for path, data in ((f"images/{name}.{ending}", encode(image, kind)), (f"masks/{name}.png", encode_mask(mask))):
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        (source / path).write_bytes(data)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Nine training pairs in two folders, and four of validation, with the list of classes."""
    for number in range(9):
        write_pair(tmp_path, f"train/{'ab'[number % 2]}/{number}", number)
    for number in range(1000, 1004):
        write_pair(tmp_path, f"val/{number}", number)
    (tmp_path / "classes.txt").write_text("\n".join(PIXEL_CLASSES))
    return tmp_path


def arguments(source: Path, out: str, *more: str) -> list[str]:
    folders = [str(source / name) for name in ("images", "masks", out)]
    return [*folders, "--classes", str(source / "classes.txt"), *OPTIONS, *more]


def prepare(source: Path, out: str = "out", *more: str) -> Path:
    assert main(arguments(source, out, *more)) == 0
    return source / out


def read(folder: Path, split: str) -> list[tuple[bytes, np.ndarray]]:
    """Return the image and the mask of each sample, by id."""
    reader = SplitReader(folder, split)
    order = np.argsort(reader.samples["id"])
    pairs = zip(reader.bytes(order), reader.masks(order), strict=True)
    return [(bytes(image), decode_mask(bytes(mask))) for image, mask in pairs]


def test_png_images_keep_their_bytes_and_masks_their_values(source):
    out = prepare(source)
    manifest = read_manifest(out)
    assert (manifest.task, manifest.image, manifest.classes) == ("segmentation", "png", PIXEL_CLASSES)
    expected = [draw_masked(number) for number in (0, 2, 4, 6, 8, 1, 3, 5, 7)]  # by path
    for (image, mask), (pixels, classes) in zip(read(out, "train"), expected, strict=True):
        assert image == encode(pixels, "PNG")
        assert np.array_equal(mask, classes)
    assert [mask.tolist() for _, mask in read(out, "val")] == [
        draw_masked(number)[1].tolist() for number in range(1000, 1004)
    ]
    assert verify(out, 1) == []


def test_jpeg_images_keep_their_bytes_and_may_be_mixed_with_png(source):
    write_pair(source, "train/c/9", 9, "JPEG")
    out = prepare(source)
    assert read_manifest(out).image == "jpg;png"
    assert read(out, "train")[-1][0] == encode(draw_masked(9)[0], "JPEG")
    assert verify(out, 1) == []
    for path in source.glob("images/*/**/*.png"):
        image, path_of_jpeg = Image.open(path), path.with_suffix(".jpeg")
        image.save(path_of_jpeg, "JPEG")
        path.unlink()
    out = prepare(source, "jpegs")
    assert read_manifest(out).image == "jpg"
    assert verify(out, 1) == []


def test_the_number_of_processes_changes_no_byte(source, contents, run):
    assert run("prepare_masks.py", *arguments(source, "two"), "--jobs", 2).returncode == 0
    assert contents(prepare(source)) == contents(source / "two")


KILLED = """
import os, runpy, signal, sys
rename, count, last = os.rename, 0, int(sys.argv[1])
def counted(*paths, **options):
    global count
    count += 1
    if count == last:
        os.kill(os.getpid(), signal.SIGKILL)
    return rename(*paths, **options)
os.rename = counted
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("count", [3, 9])
def test_a_killed_preparation_goes_on_to_the_same_bytes(source, contents, count):
    command = [sys.executable, "-c", KILLED, str(count), str(ROOT / "shards/prepare_masks.py")]
    done = subprocess.run([*command, *arguments(source, "killed")], check=False, capture_output=True)
    assert done.returncode == -9
    assert list((source / "killed").glob("*.tar"))
    assert contents(prepare(source, "killed")) == contents(prepare(source))


@pytest.mark.parametrize("name", ["train-000001.tar", "train-000001.idx", "val.samples.npy"])
def test_a_lost_file_comes_back(source, contents, name):
    whole = contents(prepare(source))
    (source / "out" / name).unlink()
    assert contents(prepare(source)) == whole


def test_a_dry_run_counts_images_and_masks_and_writes_nothing(source, capsys):
    prepare(source, "out", "--dry-run")
    assert not (source / "out").exists()
    size = sum(path.stat().st_size for path in source.glob("*/*/**/*.png"))
    assert f"3 classes; {size / 1e9:,.3f} GB to read" in capsys.readouterr().out


def break_mask(mask: np.ndarray) -> bytes:
    return encode_mask(mask[:-1])


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (break_mask, "its mask is 24×19, the image 24×20: they must be equal"),
        (lambda mask: encode_mask(np.where(mask == 2, 7, mask).astype(np.uint8)), "its mask has the value 7 in "),
        (lambda mask: encode(mask.astype(np.uint16), "PNG"), "its mask has 16 bits a pixel: expected a grey PNG"),
        (lambda mask: encode(np.stack([mask] * 3, -1), "PNG"), "its mask has 3 channels: expected a grey PNG"),
        (lambda mask: b"", "its mask is neither a JPEG nor a PNG"),
    ],
)
def test_a_mask_that_does_not_fit_is_left_out_or_with_strict_an_error(source, capsys, broken: Callable, reason: str):
    (source / "masks/train/b/3.png").write_bytes(broken(draw_masked(3)[1]))
    out = prepare(source)
    printed = capsys.readouterr()
    assert f"left out: train/b/3.png: {reason}" in printed.err
    assert "train: 8 images in 3 shards" in printed.out
    (entry,) = read_manifest(out).splits["train"].left_out
    assert reason in entry.reason
    assert verify(out, 1) == []
    with pytest.raises(ValueError, match=r"^train/b/3.png is not a usable image: its mask ") as refused:
        main(arguments(source, "strict", "--strict"))
    assert "\n" not in str(refused.value)


def test_of_a_mask_with_a_palette_the_indices_are_stored_in_grey(source):
    mask = Image.fromarray(draw_masked(0)[1])
    mask.putpalette(np.random.default_rng(0).integers(0, 256, 768).tolist())
    mask.save(source / "masks/train/a/0.png")
    out = prepare(source)
    assert np.array_equal(read(out, "train")[0][1], draw_masked(0)[1])
    assert verify(out, 1) == []


def test_values_are_ignored_moved_or_mapped_as_the_options_say(source):
    numbers = (0, 2, 4, 6, 8, 1, 3, 5, 7)
    masks = [draw_masked(number)[1] for number in numbers]
    ignored = prepare(source, "ignored", "--ignore", "0")
    mapped = prepare(source, "mapped", "--map", "2=1", "255=0")
    for path in source.glob("masks/**/*.png"):
        path.write_bytes(encode_mask(decode_mask(path.read_bytes()) + np.uint8(1)))  # 255 becomes 0
    reduced = prepare(source, "reduced", "--reduce-zero-label")
    for number, mask in enumerate(masks):
        assert np.array_equal(read(ignored, "train")[number][1], np.where(mask == 0, 255, mask))
        assert np.array_equal(read(mapped, "train")[number][1], np.where(mask == 2, 1, mask) % 255)
        assert np.array_equal(read(reduced, "train")[number][1], mask)
    assert read_manifest(reduced).plan["mask_values"] == {"0": 255, "1": 0, "2": 1, "3": 2}


def test_other_meanings_of_values_are_another_preparation(source):
    prepare(source)
    with pytest.raises(ValueError, match=r"was prepared with another plan.mask_values.0 \(null there, 255 here\)"):
        prepare(source, "out", "--ignore", "0")


def test_classes_without_a_pixel_are_told(source, capsys):
    prepare(source)
    assert "have no pixel" not in capsys.readouterr().out
    (source / "classes.txt").write_text("\n".join([*PIXEL_CLASSES, "cloud", "moon"]))
    prepare(source, "more")
    assert "val: 4 masks have no pixel of 2 classes: cloud, moon\n" in capsys.readouterr().out


def flat(source: Path) -> Path:
    """Move all pairs into two folders without splits, where the names have endings."""
    for kind, ending in (("images", "_rgb"), ("masks", "_label")):
        for path in sorted(source.glob(f"{kind}/**/*.png")):
            path.rename(source / kind / f"{path.stem}{ending}.png")
        for folder in ("train/a", "train/b", "train", "val"):
            (source / kind / folder).rmdir()
    return source


def test_splits_may_lie_above_the_folders_of_images_and_masks(source, contents):
    whole = contents(prepare(source))
    for split in ("train", "val"):
        for kind in ("images", "masks"):
            (source / split).mkdir(exist_ok=True)
            (source / kind / split).rename(source / split / kind)
    folders = [str(source / "{split}" / kind) for kind in ("images", "masks")]
    assert main([*folders, str(source / "above"), "--classes", str(source / "classes.txt"), *OPTIONS]) == 0
    assert contents(source / "above") == whole


SUFFIXES = ("--image-suffix", "_rgb", "--mask-suffix", "_label.png")


def test_lists_name_the_images_of_the_splits(source):
    flat(source)
    (source / "train.txt").write_text("3\n1.png\n7\n")
    (source / "val.txt").write_text("1000\n\n")
    lists = ("--train", str(source / "train.txt"), "--val", str(source / "val.txt"))
    out = prepare(source, "out", *lists, *SUFFIXES)
    assert [mask.tolist() for _, mask in read(out, "train")] == [draw_masked(n)[1].tolist() for n in (1, 3, 7)]
    assert [mask.tolist() for _, mask in read(out, "val")] == [draw_masked(1000)[1].tolist()]


def test_a_share_is_set_aside_and_a_subset_taken(source):
    flat(source)
    out = prepare(source, "out", "--val-share", "0.25", "--subset", "6", *SUFFIXES)
    assert [len(SplitReader(out, split).samples) for split in ("train", "val")] == [6, 3]
    assert verify(out, 1) == []


def test_files_without_a_partner_are_counted(source, capsys):
    (source / "masks/train/a/4.png").unlink()
    (source / "masks/train/a/notes.txt").write_text("no mask")
    (source / "images/val/1001.png").unlink()
    prepare(source)
    printed = capsys.readouterr().out
    assert "not used: 1 images without mask, the first is a/4.png\n" in printed
    assert "not used: 1 masks without image, the first is 1001.png\n" in printed
    assert "notes" not in printed


def test_without_a_validation_split_that_is_told(source, capsys):
    for kind in ("images", "masks"):
        for path in source.glob(f"{kind}/val/*"):
            path.unlink()
        (source / kind / "val").rmdir()
    prepare(source)
    assert "there is no validation split: training will not validate" in capsys.readouterr().out


def test_images_and_masks_shrink_together(source):
    out = prepare(source, "out", "--resize-short", "10")
    for number, (image, mask) in zip((0, 2, 4), read(out, "train"), strict=False):
        pixels, classes = draw_masked(number)
        assert np.array_equal(mask, classes[1::2, 1::2])
        assert decode(image).shape == (10, 12, 3)
        assert decode(image).dtype == pixels.dtype
    assert verify(out, 1) == []


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--val", "x"], r"--val: .*images has a folder train/ already: remove the option"),
        (["--val-share", "0.5"], r"--val-share: .*images has a folder train/ already: remove the option"),
        (
            ["--image-suffix", "_rgb"],
            r"no image in .*images/train has a mask in .*: 0 images; 9 masks, such as a/0",
        ),
        (["--map", "2=3"], r"--map 2=3: .*classes.txt has 3 classes, from 0 on"),
        (["--map", "2"], r"argument --map: expected VALUE=CLASS, such as 255=1, got '2'"),
        (["--ignore", "256"], r"argument --ignore: expected a value from 0 to 255, got '256'"),
        (["--classes", "/nowhere"], r"No such file or directory: '/nowhere'"),
    ],
)
def test_options_that_cannot_be_used_are_one_line(source, more, message):
    with pytest.raises((ValueError, OSError), match=message) as refused:
        main(arguments(source, "out", *more))
    assert "\n" not in str(refused.value)
    assert not (source / "out").exists()


@pytest.mark.parametrize(
    ("train", "val", "message"),
    [
        ("1\n77\n", None, r"images has no image 77: add it, or take the name off the list"),
        ("1\n2\n1\n", None, r"train.txt: 1 is in the list twice: remove one of the lines"),
        ("1\n2\n", "1000\n2\n", r"val.txt: 2 is a training image, too; validate on other images"),
        (None, "1000\n", r"--val: give --train, too, the list of the training images"),
    ],
)
def test_lists_that_cannot_be_used_are_one_line(source, train, val, message):
    flat(source)
    lists = []
    for split, text in (("train", train), ("val", val)):
        if text:
            (source / f"{split}.txt").write_text(text)
            lists += [f"--{split}", str(source / f"{split}.txt")]
    with pytest.raises(ValueError, match=message):
        main(arguments(source, "out", *lists, *SUFFIXES))


def test_two_images_of_a_name_are_refused(source):
    write_pair(source, "train/a/0", 5, "JPEG")
    with pytest.raises(ValueError, match=r"images/train has a/0.jpg and 0.png: remove one of them"):
        main(arguments(source, "out"))


def test_too_many_classes_are_refused(source):
    (source / "classes.txt").write_text("\n".join(f"class {number}" for number in range(256)))
    with pytest.raises(ValueError, match="there are 256 classes, but 255 are the most: a mask has one byte for each"):
        main(arguments(source, "out"))
