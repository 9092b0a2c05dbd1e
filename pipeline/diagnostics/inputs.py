"""Checks of a run's inputs: image decoding, shards, teacher and batch."""

from __future__ import annotations

import hashlib
import io
import os
import random
import shlex
import time
from pathlib import Path

import numpy as np
import torch
import torchvision.models
from PIL import Image

from pipeline import nvjpeg
from pipeline.builders.teacher import teacher_networks, views_read
from pipeline.config.recipe import LoadedRecipe, Recipe
from pipeline.data.config import Config
from pipeline.data.loader_settings import LoaderSettings
from pipeline.diagnostics.result import Finding, fail, ok, skip
from pipeline.distributed import collectives
from pipeline.distributed.launcher import Launch
from pipeline.models.coco_weights import torchvision_name
from pipeline.models.segmentation import backbone_network
from pipeline.models.weights_file import is_file
from pipeline.runs.identity import Run, resolve
from pipeline.teachers.cache import LOGITS, Cache
from pipeline.teachers.config import Config as TeacherConfig
from shards.manifest import MANIFEST, Shard, read_manifest
from shards.read import SplitReader

_SIDE = 64
_LARGEST_DIFFERENCE = 8.0
"""Largest difference of a pixel, in 0 … 255: JPEG decoders round alike but interpolate colours at edges differently."""
_SECONDS = 3.0
"""Time limit of a check that reads shards."""
CHUNK = 4 * 2**20
"""Bytes per read."""


def check_decoding(device: torch.device) -> Finding:
    """Decode a JPEG with DALI on the device of training, and compare the pixels with Pillow's."""
    try:
        from pipeline.data.dali import Inputs, create_pipeline, decodes_boxes
    except ModuleNotFoundError as error:
        return fail(
            f"DALI is not installed ({error})", "install the extra cu13, or cu12 for a driver of CUDA 12 (Linux only)"
        )
    encoded, expected = _jpeg()
    zero, side = np.zeros((1, 2), np.int32), np.full((1, 2), _SIDE)
    inputs = Inputs([encoded], zero, side.astype(np.int32), side.astype(np.float32), zero, np.zeros(1, np.int32))
    # A mean of 0 and a std of 1/255 leave the pixels in 0 … 255.
    config = Config(path="", size=_SIDE, mean=(0, 0, 0), std=(1 / 255, 1 / 255, 1 / 255))
    pipeline = create_pipeline(lambda: inputs, config, 1, LoaderSettings(threads=1, prefetch=1), device)
    (images,) = pipeline.run()
    decoded = torch.from_dlpack(images.as_cpu().as_tensor()).numpy()[0]
    whole = "" if decodes_boxes(device) else f", whole images (nvJPEG {nvjpeg.version()} is older than 13.2),"
    return decoded_alike(decoded, expected, f"DALI on {device.type}{whole}")


def decoded_alike(decoded: np.ndarray, expected: np.ndarray, decoder: str) -> Finding:
    """Compare the pixels of a decoder with Pillow's, in 0 … 255, and return a finding."""
    difference = float(np.abs(decoded - expected).max())
    value = f"{decoder} differs from Pillow by {difference:.1f} of 255"
    if difference > _LARGEST_DIFFERENCE:
        return fail(value, "install DALI for this driver's CUDA, or set data.loader: memory")
    return ok(value, badness=difference)


def _jpeg() -> tuple[np.ndarray, np.ndarray]:
    """Return a JPEG of a smooth image, encoded and as Pillow decodes it."""
    y, x = np.mgrid[:_SIDE, :_SIDE] / _SIDE
    pixels = 255 * np.stack([x, y, 0.5 + 0.5 * np.sin(6 * x * y)], axis=-1)
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(file, "JPEG", quality=95)
    decoded = np.asarray(Image.open(file).convert("RGB")).astype(np.float32)
    return np.frombuffer(file.getvalue(), np.uint8), decoded


def check_shards(loaded: LoadedRecipe) -> Finding:
    """Read the manifest and the sample tables, and compare the sizes of all shards."""
    folder = Path(loaded.recipe.data.path)
    if not (folder / MANIFEST).is_file() and loaded.recipe.data.prepare:
        return _prepared_first(
            f"{folder} contains no shards", shlex.join(["python", *loaded.recipe.data.prepare, str(folder)])
        )
    manifest = read_manifest(folder)
    splits = [SplitReader(folder, name) for name in ("train", "val") if name in manifest.splits]
    for split in splits:
        split.check_sizes()
    images = " and ".join(f"{len(split.samples):,} of {split.split.name}" for split in splits)
    return ok(f"{images}, {manifest.num_classes:,} classes, in {sum(len(s.split.shards) for s in splits):,} shards")


def check_checksums(recipe: Recipe, count: int = 3, seconds: float = _SECONDS) -> Finding:
    """Compare the sha256 of up to ``count`` shards, different ones on each rank, for about ``seconds``."""
    folder = Path(recipe.data.path)
    if not (folder / MANIFEST).is_file():
        return skip("no shards")
    shards = [shard for split in read_manifest(folder).splits.values() for shard in split.shards]
    deadline, checked = time.monotonic() + seconds, 0
    # Seeded by rank, so that together the ranks check more shards.
    for shard in random.Random(collectives.rank()).sample(shards, min(count, len(shards))):
        sha256 = _sha256(folder / shard.url, deadline)
        if sha256 is None:
            break
        if sha256 != shard.sha256:
            advice = f"copy it again; python shards/verify.py {folder} lists everything that is wrong"
            return fail(f"{folder / shard.url} has a sha256 that differs from the manifest", advice)
        checked += 1
    if not checked:
        return skip(f"no shard was read within {seconds:g} s")
    return ok(f"correct for {checked} of {len(shards):,} shards", badness=-checked)


def _sha256(path: Path, deadline: float) -> str | None:
    """Return a file's sha256, None if it takes too long."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            if time.monotonic() > deadline:
                return None
    return digest.hexdigest()


def check_reading(recipe: Recipe, seconds: float = _SECONDS) -> Finding:
    """Measure how fast this rank reads one shard, without the page cache if the file system allows it."""
    folder = Path(recipe.data.path)
    if not (folder / MANIFEST).is_file():
        return skip("no shards")
    # Not the seed of ``check_checksums``: the shards that it read are in the page cache now.
    shard = random.Random(-1 - collectives.rank()).choice(read_manifest(folder).splits["train"].shards)
    speed = _speed(folder / shard.url, seconds)
    return ok(f"{speed / 1e6:,.0f} MB/s of one shard, {speed / _image_bytes(shard):,.0f} images/s", badness=-speed)


def _image_bytes(shard: Shard) -> float:
    return shard.filesize / max(shard.nsamples, 1)


def _speed(path: Path, seconds: float) -> float:
    """Return the bytes per second of reading a file from its beginning, for at most ``seconds``."""
    with path.open("rb", buffering=0) as file:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        started, read = time.perf_counter(), 0
        while time.perf_counter() - started < seconds and (chunk := file.read(CHUNK)):
            read += len(chunk)
    return read / (time.perf_counter() - started)


def check_teacher_source(loaded: LoadedRecipe, launch: Launch) -> Finding:
    """Check that the weights, the cache and the finished runs named by the recipe exist."""
    recipe, config = loaded.recipe, loaded.recipe.teacher
    networks = teacher_networks(config).values() if config and config.uses_live_model else ()
    named = [(network.model or "", network.weights) for network in networks]
    student, start = recipe.student.model, recipe.student.start
    named += [(backbone_network(student) if start.part == "backbone" else student, start.weights)] if start else []
    findings = [_find_weights(model, source) for model, source in named if source]
    findings += [_find_cache(recipe, config, config.cache)] if config and config.cache else []
    if _needs_runs(recipe) and not any(finding.status == "FAIL" for finding in findings):
        # A run's folder is found by its identity, which contains the manifest's digest.
        if not (Path(recipe.data.path) / MANIFEST).is_file():
            return skip("no shards, which are needed to find the other runs")
        findings += [_find_finished(run) for run in resolve(loaded, launch).needed]
    if not findings:
        return skip("the recipe names no weights and no other run")
    worst_first = (finding for status in ("FAIL", "skip") for finding in findings if finding.status == status)
    return next(worst_first, _join(findings))


def _needs_runs(recipe: Recipe) -> bool:
    """Return whether other runs must be finished before this one; the run of a cached teacher is not needed."""
    teacher, start = recipe.teacher, recipe.student.start
    return bool((teacher and teacher.uses_live_model and teacher.runs) or (start and start.recipe) or recipe.compare)


def _join(findings: list[Finding]) -> Finding:
    return ok(", ".join(finding.value for finding in findings))


def _find_weights(model: str, source: str) -> Finding:
    if is_file(source):
        if Path(source).is_file():
            return ok(source)
        return fail(f"there is no file {source}", "correct the path in the recipe, or copy the file there")
    try:
        url = torchvision.models.get_model_weights(torchvision_name(model))[source].url
    except (ValueError, KeyError):
        return skip(f"{source} of {model} are downloaded when the run begins")
    cached = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    return ok(str(cached)) if cached.is_file() else skip(f"{source} of {model}: the run downloads {url} to {cached}")


def _find_cache(recipe: Recipe, config: TeacherConfig, folder: str) -> Finding:
    advice = "write it: python pipeline/cache_teacher.py with this recipe"
    try:
        cache = Cache(Path(folder))
        missing = set(cache.missing(recipe.taps.teacher).values())
        available = {LOGITS, *cache.kinds(recipe.taps.teacher).values()} & cache.header.kinds.keys()
        cache.complete_views(available, views_read(recipe, cache))
    except (OSError, ValueError) as error:
        return fail(str(error), advice)
    if missing and not config.uses_live_model:
        return fail(f"{folder} has no {', '.join(sorted(missing))}, which a loss reads", advice)
    return ok(f"{folder}: {', '.join(sorted(available))} of {cache.header.views} views")


def _find_finished(run: Run) -> Finding:
    return ok(str(run.folder)) if run.result else _prepared_first(f"{run.folder} contains no finished run", run.command)


def _prepared_first(problem: str, command: str) -> Finding:
    """Return a finding for an input that a single process makes before training, but several ranks do not."""
    if collectives.world_size() == 1:
        return skip(f"{problem}; one process makes it first, several ranks must find it: {command}")
    return fail(problem, f"one process must make it first: {command}")


def check_batch(recipe: Recipe) -> Finding:
    """Check that the global batch divides evenly by ranks and accumulation."""
    world = collectives.world_size()
    shares = world * recipe.accumulation
    if recipe.batch % shares:
        nearest = -(-recipe.batch // shares) * shares
        value = f"{recipe.batch} does not divide by {world} ranks × accumulation: {recipe.accumulation}"
        return fail(value, f"give batch={nearest}, or another number of ranks")
    return ok(
        f"{recipe.batch} = ranks: {world} × accumulation: {recipe.accumulation} × images: {recipe.batch // shares}"
    )
