"""Small shards written on the spot, and loaders over them."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from pipeline.batch import Batch
from pipeline.data.loader import Config, Loader, create_loader
from shards.manifest import Manifest, Split, write_manifest
from shards.write import ShardWriter, write_samples

CPU = torch.device("cpu")
MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.2, 0.3)
NUM_CLASSES = 7


@dataclass(frozen=True)
class Sample:
    id: int
    label: int
    encoded: bytes
    width: int
    height: int


def photograph(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """Return a smooth colourful image with some texture, which JPEG keeps about as well as a photograph."""
    y, x = np.mgrid[:height, :width]
    image = np.full((height, width, 3), 128.0)
    for _ in range(6):
        fx, fy, phase = rng.uniform(-0.15, 0.15), rng.uniform(-0.15, 0.15), rng.uniform(0, 6)
        image += rng.uniform(-40, 40, 3) * np.sin(fx * x + fy * y + phase)[..., None]
    return np.clip(image + rng.normal(0, 4, image.shape), 0, 255).astype(np.uint8)


def encode(image: np.ndarray, kind: str = "jpg") -> bytes:
    file = io.BytesIO()
    if kind == "jpg":
        Image.fromarray(image).save(file, "JPEG", quality=92)
    else:
        Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def draw_samples(count: int, sides: Sequence[int], kind: str, seed: int) -> list[Sample]:
    """Return samples of random images, in no order of their ids; every third id is a hole."""
    rng = np.random.default_rng(seed)
    ids = rng.permutation([number for number in range(2 * count) if number % 3 != 2][:count])
    samples = []
    for number in ids.tolist():
        width, height = (int(rng.choice(sides)) for _ in range(2))
        samples.append(
            Sample(number, number % NUM_CLASSES, encode(photograph(rng, width, height), kind), width, height)
        )
    return samples


def write_shards(folder: Path, splits: dict[str, list[Sample]], kind: str = "jpg", per_shard: int = 5) -> Path:
    """Write a folder of shards of ``per_shard`` samples each."""
    folder.mkdir(parents=True, exist_ok=True)
    written = {name: _write_split(folder, name, samples, kind, per_shard) for name, samples in splits.items()}
    write_manifest(folder, Manifest("test", kind, tuple(f"class{k}" for k in range(NUM_CLASSES)), splits=written))
    return folder


def _write_split(folder: Path, name: str, samples: list[Sample], kind: str, per_shard: int) -> Split:
    shards, tables = [], []
    for start in range(0, len(samples), per_shard):
        with ShardWriter(folder / f"{name}-{start // per_shard:06d}.tar", kind) as writer:
            for each in samples[start : start + per_shard]:
                writer.add(each.id, each.label, each.encoded, each.width, each.height)
            shard, table = writer.close()
        shards.append(shard)
        tables.append(table)
    table, sha256 = write_samples(folder, name, tables)
    largest = [int(table[field].max(initial=-1)) for field in ("id", "width", "height")]
    return Split(name, len(samples), largest[0] + 1, tuple(shards), sha256, largest[1], largest[2])


def config_of(folder: Path, **keys: object) -> Config:
    return Config.model_validate({"path": str(folder), "size": 16, "mean": MEAN, "std": STD, "threads": 2, **keys})


def open_loader(config: Config, **keys: object) -> Loader:
    defaults: dict = {"batch": 4, "accumulation": 1, "seed": 0, "rank": 0, "world": 1, "device": CPU}
    return create_loader(config, **{**defaults, **keys})


def join(batches: Iterable[Batch]) -> Batch:
    """Return the rows of several batches as one."""
    images, labels, ids, *mappings = zip(*batches, strict=True)
    extra, targets = ({name: torch.cat([each[name] for each in found]) for name in found[0]} for found in mappings)
    return Batch(torch.cat(images), torch.cat(labels), torch.cat(ids), extra, targets)
