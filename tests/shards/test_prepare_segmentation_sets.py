"""The preparations of CamVid, Cityscapes, VOC and ADE20K: their folders, their values and their classes."""

from __future__ import annotations

import tarfile
from pathlib import Path

import numpy as np
import pytest
from pictures import decode, encode, pixels
from PIL import Image

from shards import prepare_ade20k, prepare_camvid, prepare_cityscapes, prepare_voc
from shards.manifest import read_manifest
from shards.masks import decode_mask, encode_mask
from shards.read import SplitReader
from shards.verify import verify

CAMVID = Path(__file__).resolve().parents[3] / "shared" / "data" / "camvid.tar"
JOBS = ("--jobs", "1")


def values(number: int, known: list[int]) -> np.ndarray:
    """Return a mask of 20 × 16 pixels of some values."""
    return np.random.default_rng(number).choice(known, (16, 20)).astype(np.uint8)


def write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def masks_of(folder: Path, split: str) -> list[np.ndarray]:
    reader = SplitReader(folder, split)
    return [decode_mask(bytes(mask)) for mask in reader.masks(np.argsort(reader.samples["id"]))]


def write_camvid(source: Path, kind: str = "PNG") -> None:
    for first, split in enumerate(("train", "val", "test")):
        for number in range(10 * first, 10 * first + 3):
            ending = "png" if kind == "PNG" else "jpg"
            write(source / split / f"0001TP_{number}.{ending}", encode(pixels(number), kind))
            write(source / f"{split}annot" / f"0001TP_{number}.png", encode_mask(values(number, [*range(12)])))


def of_camvid(number: int) -> np.ndarray:
    mask = values(number, [*range(12)])
    return np.where(mask == 11, 255, mask)


@pytest.mark.parametrize(("kind", "extension"), [("PNG", "png"), ("JPEG", "jpg")])
def test_camvid_has_eleven_classes_and_the_twelfth_value_is_none(tmp_path, kind, extension):
    write_camvid(tmp_path, kind)
    out = tmp_path / "out"
    assert prepare_camvid.main([str(tmp_path), str(out), *JOBS]) == 0
    manifest = read_manifest(out)
    assert (manifest.image, manifest.num_classes) == (extension, 11)
    assert np.array_equal(masks_of(out, "train"), [of_camvid(number) for number in range(3)])
    assert np.array_equal(masks_of(out, "val"), [of_camvid(number) for number in range(10, 13)])
    assert verify(out, 1) == []


def test_camvid_validates_on_the_test_frames_if_asked_and_trains_on_val(tmp_path):
    write_camvid(tmp_path)
    out = tmp_path / "out"
    assert prepare_camvid.main([str(tmp_path), str(out), "--val", "test", "--with-val", *JOBS]) == 0
    assert np.array_equal(masks_of(out, "train"), [of_camvid(number) for number in (0, 1, 2, 10, 11, 12)])
    assert np.array_equal(masks_of(out, "val"), [of_camvid(number) for number in range(20, 23)])
    with pytest.raises(ValueError, match="--with-val: the frames of val are validation images: give --val test, too"):
        prepare_camvid.main([str(tmp_path), str(tmp_path / "other"), "--with-val", *JOBS])


@pytest.mark.shared
def test_real_camvid_comes_through_with_every_pixel(tmp_path):
    with tarfile.open(CAMVID) as tar:
        members = [each for each in tar.getmembers() if each.isfile() and not each.name.endswith(".txt")]
        some = sorted({Path(each.name).stem for each in members})[::40]
        tar.extractall(tmp_path, [each for each in members if Path(each.name).stem in some], filter="data")
    out, source = tmp_path / "out", tmp_path / "camvid"
    assert prepare_camvid.main([str(source), str(out), "--val", "test", *JOBS]) == 0
    for split, folder in (("train", "train"), ("val", "test")):
        frames = sorted((source / folder).iterdir())
        reader = SplitReader(out, split)
        order = np.argsort(reader.samples["id"])
        assert len(frames) == len(order) > 3
        for frame, image, mask in zip(frames, reader.bytes(order), masks_of(out, split), strict=True):
            assert bytes(image) == frame.read_bytes()
            original = np.asarray(Image.open(source / f"{folder}annot" / f"{frame.stem}.png"))
            assert np.array_equal(mask, np.where(original == 11, 255, original))
    assert verify(out, 1) == []


TRAIN_IDS = {
    **{7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12},
    **{26: 13, 27: 14, 28: 15, 31: 16, 32: 17, 33: 18},
}


def test_cityscapes_has_nineteen_classes_of_its_ids(tmp_path):
    for split, first in (("train", 0), ("val", 10)):
        for number in range(first, first + 2):
            city, name = ("aachen", "bonn")[number % 2], f"city_{number:06d}_000019"
            write(tmp_path / f"leftImg8bit/{split}/{city}/{name}_leftImg8bit.png", encode(pixels(number), "PNG"))
            for ending, mask in (("labelIds", values(number, [*range(34)])), ("instanceIds", values(99, [0]))):
                write(tmp_path / f"gtFine/{split}/{city}/{name}_gtFine_{ending}.png", encode_mask(mask))
            write(tmp_path / f"gtFine/{split}/{city}/{name}_gtFine_polygons.json", b"{}")
    out = tmp_path / "out"
    assert prepare_cityscapes.main([str(tmp_path), str(out), *JOBS]) == 0
    manifest = read_manifest(out)
    assert (manifest.image, manifest.num_classes) == ("png", 19)
    assert (manifest.classes[0], manifest.classes[13], manifest.classes[18]) == ("road", "car", "bicycle")
    to_train_id = np.vectorize(lambda value: TRAIN_IDS.get(value, 255))
    for split, first in (("train", 0), ("val", 10)):
        expected = [to_train_id(values(number, [*range(34)])) for number in (first, first + 1)]
        assert np.array_equal(masks_of(out, split), expected)
    assert verify(out, 1) == []


def palette_png(mask: np.ndarray) -> bytes:
    image = Image.fromarray(mask)
    image.putpalette(np.random.default_rng(1).integers(0, 256, 768).tolist())
    return encode(image, "PNG")


KNOWN_OF_VOC = [*range(21), 255]


def write_voc(source: Path) -> None:
    names = {"train": [1, 2], "val": [3, 4]}
    for number in range(1, 7):
        write(source / f"JPEGImages/2007_{number}.jpg", encode(pixels(number)))
    for split, numbers in names.items():
        write(
            source / f"ImageSets/Segmentation/{split}.txt", "".join(f"2007_{number}\n" for number in numbers).encode()
        )
        for number in numbers:
            write(source / f"SegmentationClass/2007_{number}.png", palette_png(values(number, KNOWN_OF_VOC)))


def test_voc_masks_are_the_indices_of_their_palettes(tmp_path):
    write_voc(tmp_path / "VOCdevkit/VOC2012")
    out = tmp_path / "out"
    assert prepare_voc.main([str(tmp_path / "VOCdevkit"), str(out), *JOBS]) == 0
    manifest = read_manifest(out)
    assert (manifest.image, manifest.num_classes, manifest.classes[15]) == ("jpg", 21, "person")
    assert np.array_equal(masks_of(out, "train"), [values(number, KNOWN_OF_VOC) for number in (1, 2)])
    assert np.array_equal(masks_of(out, "val"), [values(number, KNOWN_OF_VOC) for number in (3, 4)])
    assert verify(out, 1) == []


def test_more_masks_of_voc_are_for_training_except_those_of_validation(tmp_path, capsys):
    write_voc(tmp_path / "voc")
    for number in (1, 2, 3, 5, 6):
        write(tmp_path / f"aug/2007_{number}.png", encode_mask(values(50 + number, KNOWN_OF_VOC)))
    arguments = [str(tmp_path / "voc"), str(tmp_path / "out"), "--augmented", str(tmp_path / "aug"), *JOBS]
    assert prepare_voc.main(arguments) == 0
    assert f"train: 4 images with a mask in {tmp_path / 'aug'}\n" in capsys.readouterr().out
    expected = [values(50 + number, KNOWN_OF_VOC) for number in (1, 2, 5, 6)]
    assert np.array_equal(masks_of(tmp_path / "out", "train"), expected)
    assert np.array_equal(masks_of(tmp_path / "out", "val"), [values(number, KNOWN_OF_VOC) for number in (3, 4)])


def test_ade20k_counts_from_one_and_zero_is_no_class(tmp_path):
    known = [0, 1, 2, 13, 149, 150]
    for folder, numbers in (("training", range(3)), ("validation", range(10, 12))):
        for number in numbers:
            write(tmp_path / f"images/{folder}/ADE_{number}.jpg", encode(pixels(number)))
            write(tmp_path / f"annotations/{folder}/ADE_{number}.png", encode_mask(values(number, known)))
    out = tmp_path / "out"
    assert prepare_ade20k.main([str(tmp_path), str(out), *JOBS]) == 0
    manifest = read_manifest(out)
    assert (manifest.num_classes, len(set(manifest.classes))) == (150, 150)
    assert (manifest.classes[0], manifest.classes[12], manifest.classes[149]) == ("wall", "person", "flag")
    for split, numbers in (("train", range(3)), ("val", range(10, 12))):
        # Zero wraps round to 255, the value of no class.
        assert np.array_equal(masks_of(out, split), [values(number, known) - np.uint8(1) for number in numbers])
    assert verify(out, 1) == []


@pytest.mark.parametrize(
    ("main", "message"),
    [
        (prepare_camvid.main, r"train is not a folder: name the folders of images and of masks"),
        (prepare_cityscapes.main, r"leftImg8bit/train is not a folder: name the folders"),
        (prepare_voc.main, r"has no ImageSets/Segmentation: name the folder VOC2012"),
        (prepare_ade20k.main, r"images/training is not a folder: name the folders"),
    ],
)
def test_another_folder_is_refused_in_one_line(tmp_path, main, message):
    with pytest.raises(FileNotFoundError, match=message) as refused:
        main([str(tmp_path), str(tmp_path / "out"), *JOBS])
    assert "\n" not in str(refused.value)


def test_a_missing_mask_of_voc_is_one_line(tmp_path):
    write_voc(tmp_path)
    (tmp_path / "SegmentationClass/2007_2.png").unlink()
    with pytest.raises(ValueError, match=r"SegmentationClass has no mask 2007_2: add it, or take the name off"):
        prepare_voc.main([str(tmp_path), str(tmp_path / "out"), *JOBS])


def test_a_grey_image_is_kept_grey(tmp_path):
    write_camvid(tmp_path)
    grey = encode(pixels(0)[..., 0], "PNG")
    write(tmp_path / "train/0001TP_0.png", grey)
    assert prepare_camvid.main([str(tmp_path), str(tmp_path / "out"), *JOBS]) == 0
    reader = SplitReader(tmp_path / "out", "train")
    (row,) = np.flatnonzero(reader.samples["id"] == 0)
    (image,) = reader.bytes(np.array([row]))
    assert bytes(image) == grey
    assert decode(image).shape == (16, 20)
