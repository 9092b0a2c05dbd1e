"""The numbers of ImageNet's validation images, from the names that other tools' tars keep."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest
from pictures import jpeg

from shards import index
from shards.image_order import image_numbers
from shards.read import SplitReader

NUMBERS = (7, 2, 50_000, 31)


def indexed(folder: Path, kind: int, name: str = "ILSVRC2012_val_{:08d}") -> SplitReader:
    """Write two tars of validation images in that order, the third no image, list them, and open the split."""
    folder.mkdir()
    for part, numbers in enumerate((NUMBERS[:3], NUMBERS[3:])):
        with tarfile.open(folder / f"val-{part}.tar", "w", format=kind) as tar:
            for number in numbers:
                key = f"val/{name.format(number)}"
                image = b"no image" if number == NUMBERS[2] else jpeg(number)
                for suffix, content in (("cls", str(number % 3).encode()), ("JPEG", image)):
                    member = tarfile.TarInfo(f"{key}.{suffix}")
                    member.size, member.mtime = len(content), 0.5  # type: ignore[assignment]  # a header of its own
                    tar.addfile(member, io.BytesIO(content))
    index.main([str(folder), "--jobs", "1"])
    return SplitReader(folder, "val")


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_the_number_of_an_image_is_in_the_name_of_its_member(tmp_path: Path, kind: int):
    reader = indexed(tmp_path / "tars", kind)
    assert reader.split.id_count == 4
    assert image_numbers(reader, None).tolist() == [7, 2, 0, 31]


def test_a_name_without_a_number_is_one_line(tmp_path: Path):
    reader = indexed(tmp_path / "tars", tarfile.USTAR_FORMAT, "n01440764_{}")
    message = r"val-0.tar: val/n01440764_7.JPEG is not a name such as ILSVRC2012_val_00000001.JPEG; it says no number$"
    with pytest.raises(ValueError, match=message):
        image_numbers(reader, None)
