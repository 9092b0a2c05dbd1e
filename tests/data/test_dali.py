from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from nvidia.dali.pipeline import Pipeline
from PIL import Image
from shard_factory import CPU, MEAN, STD, Sample, config_of, encode, open_loader, photograph, write_shards
from torch import Tensor
from torchvision.transforms import functional as reference

from pipeline import nvjpeg
from pipeline.batch import Batch, Progress
from pipeline.data import augment, dali, jpeg_engine
from pipeline.data.config import Config
from pipeline.data.loader_settings import LoaderSettings

ROOT = Path(__file__).resolve().parents[2]
GPU = torch.device("cuda", 0)
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


def decode_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the CPU do what a GPU is asked for."""
    decoding, new_pipeline, run = dali.decoding, dali.new_pipeline, dali.run
    monkeypatch.setattr(dali, "decoding", lambda config, device: decoding(config, CPU))
    monkeypatch.setattr(dali, "new_pipeline", lambda batch, settings, device: new_pipeline(batch, settings, CPU))
    monkeypatch.setattr(dali, "run", lambda pipeline, device: run(pipeline, CPU))


def test_a_box_decoded_alone_has_the_pixels_of_one_cut_out_of_the_whole_image(
    drawn: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode_on_cpu(monkeypatch)
    config = config_of(drawn, size=96)
    inputs = [dali.image_inputs(request) for request in open_loader(config, batch=6).plan.training(Progress(1), 3)]

    def decoded(version: nvjpeg.Version | None) -> list[Tensor]:
        monkeypatch.setattr(nvjpeg, "version", lambda: version)
        remaining = iter(inputs)
        pipeline = dali.create_pipeline(lambda: next(remaining), config, 6, LoaderSettings(threads=1, prefetch=1), GPU)
        images = [dali.run(pipeline, GPU).clone() for _ in inputs]
        assert (b"decoders__ImageSlice" in pipeline.serialize()) == (version == nvjpeg.Version(13, 2, 0))
        return images

    for version in (nvjpeg.Version(13, 1, 9), None):
        for part, whole in zip(decoded(nvjpeg.Version(13, 2, 0)), decoded(version), strict=True):
            assert torch.equal(part, whole)


def test_the_engines_first_batch_is_a_full_one_and_has_its_own_images_alone(
    drawn: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode_on_cpu(monkeypatch)
    monkeypatch.setattr(dali, "uses_engine", lambda config, device: bool(config.hw_decoder_load))
    run, decoded = dali.run, []

    def recording(pipeline: Pipeline, device: torch.device) -> Tensor:
        images = run(pipeline, device)
        decoded.append(len(images))
        return images

    monkeypatch.setattr(dali, "run", recording)
    parts = [(np.array(rows), 0) for rows in ([3, 1], [0, 2, 4, 5], [5])]

    def batches(load: int) -> list[Tensor]:
        decoded.clear()
        plan = open_loader(config_of(drawn), batch=6).plan
        config = config_of(drawn, hw_decoder_load=load)
        decoder = dali.DaliDecoder(plan.readers["train"], config, 6, LoaderSettings(threads=1, prefetch=2), CPU)
        return [batch.images_BCHW.clone() for _ in range(2) for batch in decoder(plan.views(parts))]

    expected = batches(0)
    assert decoded == [2, 4, 1, 2, 4, 1]
    assert all(torch.equal(*pair) for pair in zip(batches(1), expected, strict=True))
    assert decoded == [6, 4, 1, 2, 4, 1]


def test_a_cache_keeps_what_a_gpus_pixels_depend_on(monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config(path="", size=16, mean=MEAN, std=STD)
    monkeypatch.setattr(nvjpeg, "version", lambda: nvjpeg.Version(13, 3, 2))
    monkeypatch.setattr(jpeg_engine, "has_engine", lambda device: device.type == "cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    on_cpu = dali.dali_fingerprint(config, CPU)
    assert on_cpu.keys() == {"backend", "version", "device", "resize"}
    assert dali.dali_fingerprint(config.model_copy(update={"hw_decoder_load": 1}), CPU) == on_cpu
    on_gpu = {**on_cpu, "device": "cuda", "nvjpeg": "13.3.2"}
    assert dali.dali_fingerprint(config, GPU) == {**on_gpu, "hw_decoder_load": 0}
    by_engine = dali.dali_fingerprint(config.model_copy(update={"hw_decoder_load": 1}), GPU)
    assert by_engine == {**on_gpu, "hw_decoder_load": 1, "gpu": "NVIDIA H200"}


def test_a_gpu_without_an_engine_is_told_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jpeg_engine, "has_engine", lambda device: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA L40S")
    config = Config(path="", size=16, mean=MEAN, std=STD, hw_decoder_load=1)
    with pytest.raises(ValueError, match=r"data\.hw_decoder_load: NVIDIA L40S has no JPEG engine"):
        jpeg_engine.uses_engine(config, GPU)
    assert not jpeg_engine.uses_engine(config, CPU)
    assert not jpeg_engine.uses_engine(config.model_copy(update={"hw_decoder_load": 0}), GPU)


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


def view_0(folder: Path, load: int, batch: int, rows: np.ndarray) -> Tensor:
    """Return the training images of view 0 that a GPU decodes in batches of those rows, by row."""
    config = config_of(folder, size=96, hw_decoder_load=load)
    loader = open_loader(config, batch=batch, device=torch.device("cuda"))
    images = torch.empty(len(rows), 3, 96, 96)
    parts = [rows[start : start + batch] for start in range(0, len(rows), batch)]
    for part, decoded in zip(parts, loader.views((part, 0) for part in parts), strict=True):
        images[part] = decoded.images_BCHW.cpu()
    return images


@pytest.mark.gpu
@pytest.mark.parametrize("load", [0, 1])
def test_no_pixel_of_a_gpu_depends_on_the_batch(drawn: Path, load: int) -> None:
    if load and not jpeg_engine.has_engine(torch.device("cuda")):
        pytest.skip("needs a GPU with a JPEG engine")
    rows = np.arange(6)
    expected = view_0(drawn, load, 6, rows)
    for batch, order in ((6, rows[::-1].copy()), (4, rows), (4, np.array([5, 0, 3, 1, 4, 2])), (1, rows)):
        assert torch.equal(view_0(drawn, load, batch, order), expected)
    short_first = open_loader(config_of(drawn, size=96, hw_decoder_load=load), batch=6, device=torch.device("cuda"))
    first, second = short_first.views([(rows[:1], 0), (rows, 0)])
    assert torch.equal(first.images_BCHW.cpu(), expected[:1])
    assert torch.equal(second.images_BCHW.cpu(), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("load", [0, 1])
def test_a_box_that_a_gpu_decodes_alone_is_one_cut_out_of_the_whole_image(
    drawn: Path, load: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not dali.decodes_boxes(torch.device("cuda")):
        pytest.skip(f"nvJPEG {nvjpeg.version()} decodes no boxes")
    if load and not jpeg_engine.has_engine(torch.device("cuda")):
        pytest.skip("needs a GPU with a JPEG engine")
    boxes = view_0(drawn, load, 6, np.arange(6))
    monkeypatch.setattr(dali, "decodes_boxes", lambda device: False)
    assert torch.equal(boxes, view_0(drawn, load, 6, np.arange(6)))
