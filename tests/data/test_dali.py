from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from shard_factory import MEAN, STD, Sample, config_of, encode, open_loader, photograph, write_shards
from torch import Tensor
from torchvision.transforms import functional as reference

from pipeline.batch import Batch, Progress
from pipeline.data import augment, dali
from pipeline.data.config import Config
from pipeline.data.loader_settings import LoaderSettings

ROOT = Path(__file__).resolve().parents[2]
PHOTOGRAPHS = ROOT.parent / "shared" / "data" / "cc-by-images"


def write_photographs(folder: Path, images: list[np.ndarray]) -> Path:
    samples = [Sample(k, k % 7, encode(image), image.shape[1], image.shape[0]) for k, image in enumerate(images)]
    return write_shards(folder, {"train": samples, "val": samples})


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    sides = [(300, 200), (180, 320), (256, 256), (97, 241), (400, 400), (64, 64)]
    return write_photographs(tmp_path_factory.mktemp("drawn"), [photograph(rng, *each) for each in sides])


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not PHOTOGRAPHS.is_dir():
        pytest.skip(f"no photographs at {PHOTOGRAPHS}")
    images = [np.asarray(Image.open(path).convert("RGB")) for path in sorted(PHOTOGRAPHS.glob("*.png"))[:12]]
    return write_photographs(tmp_path_factory.mktemp("real"), images)


def pixels(batch: Batch) -> dict[int, Tensor]:
    """Return each image in 0 … 255, by id."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return dict(zip(batch.ids_B.tolist(), 255 * (batch.images_BCHW * std + mean), strict=True))


def opened(folder: Path, config: Config) -> dict[int, Image.Image]:
    """Decode the training images with Pillow, by id."""
    loader = open_loader(config, batch=1)
    reader = loader.plan.readers["train"]
    encoded = reader.bytes(np.arange(len(reader.samples)))
    images = [Image.open(io.BytesIO(each.tobytes())).convert("RGB") for each in encoded]
    return dict(zip(reader.samples["id"].tolist(), images, strict=True))


def assert_close(ours: Tensor, theirs: Image.Image) -> None:
    """Compare in units of 255. A box decoded by itself lacks the neighbours that its rim's colours blend."""
    difference = (ours - reference.pil_to_tensor(theirs).float()).abs()
    assert difference.mean() < 0.5
    assert difference[:, 2:-2, 2:-2].max() < 2.5


def check_training(folder: Path) -> None:
    config = config_of(folder, size=128)
    images = opened(folder, config)
    loader = open_loader(config, batch=len(images))
    for view, batch in enumerate(loader.stream(Progress(1), 4)):
        for number, ours in pixels(batch).items():
            image = images[number]
            box = augment.random_resized_crop(
                [number], view, [image.width], [image.height], seed=0, scale=config.scale, ratio=config.ratio
            )[0]
            theirs = reference.resized_crop(image, *box.tolist(), [128, 128], reference.InterpolationMode.BILINEAR)
            if augment.flips([number], view, seed=0, probability=config.flip)[0]:
                theirs = reference.hflip(theirs)
            assert_close(ours, theirs)


def check_validation(folder: Path) -> None:
    config = config_of(folder, size=112, resize=128)
    images = opened(folder, config)
    (batch,) = open_loader(config, batch=len(images)).validation()
    for number, ours in pixels(batch).items():
        resized = reference.resize(images[number], [128], reference.InterpolationMode.BILINEAR)
        assert_close(ours, reference.center_crop(resized, [112, 112]))


def test_training_images_are_torchvisions(drawn: Path) -> None:
    check_training(drawn)


def test_validation_images_are_torchvisions(drawn: Path) -> None:
    check_validation(drawn)


@pytest.mark.shared
def test_photographs_are_torchvisions(real: Path) -> None:
    check_training(real)
    check_validation(real)


def test_pad_crops_are_the_padded_images_own_pixels(small_shards: Path) -> None:
    config = config_of(small_shards, crop="pad", pad=3)
    images = opened(small_shards, config)
    for view, batch in enumerate(open_loader(config, batch=41).stream(Progress(1), 3)):
        for number, ours in pixels(batch).items():
            top, left = augment.pad_crop([number], view, seed=0, pad=3)[0].tolist()
            theirs = reference.crop(reference.pad(images[number], [3]), top, left, 16, 16)
            if augment.flips([number], view, seed=0, probability=0.5)[0]:
                theirs = reference.hflip(theirs)
            torch.testing.assert_close(ours, reference.pil_to_tensor(theirs).float(), atol=1e-3, rtol=0)


def test_an_image_decoded_whole_as_a_gpu_is_asked_to_has_the_pixels_of_the_box_alone(
    drawn: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(drawn, size=96)
    of_cpu, pipeline_of_cpu, cpu = dali.decoding, dali.new_pipeline, torch.device("cpu")
    monkeypatch.setattr(dali, "decoding", lambda config, device: of_cpu(config, cpu))
    monkeypatch.setattr(dali, "new_pipeline", lambda batch, pace, device: pipeline_of_cpu(batch, pace, cpu))
    inputs = [dali._inputs(request) for request in open_loader(config, batch=6).plan.training(Progress(1), 3)]

    def decoded(device: torch.device) -> list[Tensor]:
        remaining = iter(inputs)
        pipeline = dali.create_pipeline(
            lambda: next(remaining), config, 6, LoaderSettings(threads=1, prefetch=1), device
        )
        return [dali.run(pipeline, cpu).clone() for _ in inputs]

    for part, whole in zip(decoded(cpu), decoded(torch.device("cuda", 0)), strict=True):
        assert torch.equal(part, whole)


def test_an_exif_rotation_is_left_alone_and_grey_becomes_colour(tmp_path: Path) -> None:
    """Boxes are of the image as it is stored, whatever a viewer would do with it."""
    rng = np.random.default_rng(0)
    image = Image.fromarray(photograph(rng, 60, 40))
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by a quarter
    rotated, grey = io.BytesIO(), io.BytesIO()
    image.save(rotated, "JPEG", quality=92, exif=exif)
    image.convert("L").save(grey, "JPEG", quality=92)
    samples = [Sample(k, 0, file.getvalue(), 60, 40) for k, file in enumerate([rotated, grey])]
    folder = write_shards(tmp_path, {"train": samples, "val": samples})
    config = config_of(folder, size=32, resize=40)
    (batch,) = open_loader(config, batch=2).validation()
    for number, ours in pixels(batch).items():
        assert_close(ours, reference.center_crop(opened(folder, config)[number], [32, 32]))


def test_a_second_stream_ends_the_first(drawn: Path) -> None:
    loader = open_loader(config_of(drawn), batch=1)
    first = loader.stream(Progress(6), 2)
    next(first)
    second = loader.stream(Progress(6), 2)
    next(second)
    with pytest.raises(RuntimeError, match="one stream at a time"):
        next(first)
    assert len(list(second)) == 11


def test_a_process_may_end_in_the_middle_of_a_stream(drawn: Path) -> None:
    script = f"""
import torch
from pipeline.batch import Progress
from pipeline.data.loader import Config, create_loader
config = Config.model_validate_json({config_of(drawn).model_dump_json()!r})
loader = create_loader(config, batch=1, accumulation=1, seed=0, rank=0, world=1, device=torch.device("cpu"))
stream, validation = loader.stream(Progress(6), 9), loader.validation()
next(stream), next(validation)
raise SystemExit(2)
"""
    ended = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (2, "")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("channels_last", [True, False])
def test_a_gpu_decodes_what_the_cpu_decodes(drawn: Path, channels_last: bool) -> None:
    config = config_of(drawn, size=128, channels_last=channels_last)
    on_cpu, on_gpu = (open_loader(config, batch=6, device=torch.device(name)) for name in ("cpu", "cuda"))
    kept = list(on_gpu.stream(Progress(1), 8))
    for ours, theirs in zip(kept, on_cpu.stream(Progress(1), 8), strict=True):
        assert {tensor.device.type for tensor in ours[:3]} == {"cuda"}
        assert ours.images_BCHW.stride() == theirs.images_BCHW.stride()
        expected = pixels(theirs)
        for number, image in pixels(Batch(*(tensor.cpu() for tensor in ours[:3]), {})).items():
            assert (image - expected[number]).abs().mean() < 1
