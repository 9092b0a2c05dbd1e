"""From other tools' files to training: tars in place, and Parquet files that were prepared."""

from __future__ import annotations

import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from foreign_tars import write_as_timm, write_by_img2dataset, write_by_webdataset, write_tar
from hf_parquet import images, write_parquet, write_table
from pictures import decode
from shard_factory import config_of, join, open_loader
from torch import Tensor

from pipeline.batch import Batch, Progress
from shards import index, prepare_parquet
from shards.read import SplitReader
from shards.verify import verify

DESTINATION = "out"
SHARED = Path(__file__).resolve().parents[3] / "shared"


def from_webdataset(folder: Path) -> Path:
    index.main([str(write_by_webdataset(folder / "tars")), "--jobs", "1"])
    return folder / "tars"


def from_img2dataset(folder: Path) -> Path:
    source = write_by_img2dataset(folder / "tars")
    index.main([str(source), "--destination", str(folder / DESTINATION), "--jobs", "1"])
    return folder / DESTINATION


def from_timm(folder: Path) -> Path:
    index.main([str(write_as_timm(folder / "tars")), "--jobs", "1"])
    return folder / "tars"


def from_parquet(folder: Path) -> Path:
    prepare_parquet.main([str(write_parquet(folder / "source")), str(folder / DESTINATION), "--jobs", "1"])
    return folder / DESTINATION


@pytest.fixture(scope="module", params=[from_webdataset, from_img2dataset, from_timm, from_parquet])
def foreign(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 26 training and 7 validation images that verify accepts."""
    folder = request.param(tmp_path_factory.mktemp("foreign"))
    assert verify(folder, 1) == []
    return folder


def everything(folder: Path, rank: int, world: int) -> Batch:
    config = config_of(folder, resize=20, validation_batch=4)
    loader = open_loader(config, batch=12, rank=rank, world=world)
    return join(loader.stream(Progress(loader.steps_per_epoch), 2))


def interleaved(shares: list[Tensor]) -> Tensor:
    """Put two ranks' rows of six back in the order of the global batches."""
    return torch.stack([share.unflatten(0, (-1, 6)) for share in shares], dim=2).flatten(0, 2)


def test_the_global_batches_of_two_ranks_are_those_of_one(foreign: Path):
    alone = everything(foreign, 0, 1)
    shares = [everything(foreign, rank, 2) for rank in range(2)]
    assert len(alone.ids_B) == 48
    labels = SplitReader(foreign, "train").labels_by_id()
    assert alone.labels_B.tolist() == labels[alone.ids_B.numpy()].tolist()
    for name in ("ids_B", "labels_B", "images_BCHW"):
        assert torch.equal(interleaved([getattr(share, name) for share in shares]), getattr(alone, name))


def test_a_validation_image_is_what_pillow_decodes(foreign: Path):
    """Images of 20 × 16, whose centre of 16 × 16 is neither resized nor padded."""
    config = config_of(foreign, size=16, resize=16, validation_batch=4, mean=[0.0] * 3, std=[1.0] * 3)
    batch = join(open_loader(config, batch=12).validation())
    reader = SplitReader(foreign, "val")
    for image_CHW, number in zip(batch.images_BCHW, batch.ids_B.tolist(), strict=True):
        row = int(np.flatnonzero(reader.samples["id"] == number)[0])
        pixels_HWC = decode(reader.bytes(np.array([row]))[0])[:, 2:18].astype(np.float32) / 255
        assert np.abs(image_CHW.permute(1, 2, 0).numpy() - pixels_HWC).max() < 0.02


def test_training_learns_from_it(foreign: Path, run_train: Callable[..., None], recipes: Path):
    run_train("ce.yaml", f"data.path={foreign}", "epochs=1", "folder=runs/foreign")
    assert (recipes / "runs/foreign/result.json").is_file()


@pytest.mark.shared
def test_photographs_in_tars_and_in_parquet_have_the_same_pixels_by_id(tmp_path: Path):
    """Real JPEGs of many sizes, some grey; an image's crop follows its id, which both ways give alike."""
    with tarfile.open(SHARED / "data" / "imagenet-sample-300.tar") as archive:
        members = [member for member in archive if member.name.endswith(".JPEG")][:32]
        jpegs = [archive.extractfile(member).read() for member in members]  # type: ignore[union-attr]
    entries = [(f"{n:03d}.{end}", data) for n, each in enumerate(jpegs) for end, data in (("jpg", each), ("cls", b"0"))]
    write_tar(tmp_path / "tars" / "0.tar", entries)
    index.main([str(tmp_path / "tars"), "--jobs", "1"])
    write_table(tmp_path / "source" / "a.parquet", {"image": images(jpegs), "label": [0] * len(jpegs)})
    prepare_parquet.main([str(tmp_path / "source"), str(tmp_path / "out"), "--jobs", "1"])
    found = []
    for folder in (tmp_path / "tars", tmp_path / "out"):
        assert verify(folder, 1) == []
        loader = open_loader(config_of(folder, size=32), batch=8, splits=("train",))
        batch = join(loader.stream(Progress(loader.steps_per_epoch), 1))
        found.append(batch.images_BCHW[batch.ids_B.argsort()])
    assert len(found[0]) == 32
    assert torch.equal(*found)


@pytest.mark.gpu
def test_a_gpu_decodes_png_and_webp_without_loss(tmp_path: Path):
    folder = from_timm(tmp_path)
    config = config_of(folder, size=16, resize=16, validation_batch=8, mean=[0.0] * 3, std=[1.0] * 3)
    on = [join(open_loader(config, batch=12, device=torch.device(name)).validation()) for name in ("cpu", "cuda")]
    lossless = torch.tensor([n % 4 in (1, 2) for n in on[0].ids_B.tolist()])
    images_BCHW = [batch.images_BCHW.cpu() for batch in on]
    assert torch.equal(images_BCHW[0][lossless], images_BCHW[1][lossless])
    torch.testing.assert_close(*images_BCHW, atol=0.03, rtol=0)
