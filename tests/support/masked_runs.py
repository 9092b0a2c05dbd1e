"""A tiny trained pair of segmenters, for what a user does with runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from masked import draw_masked, write_masked
from safetensors.torch import load_file
from tiny_runs import STRATEGY, training_in

from pipeline.models import create_model

SIZE = (48, 40)
"""Width and height of the images."""
IMAGES = 5
WIDTHS = {"teacher": 8, "student": 4}
_DATA = {"path": "shards", "size": [32, 48], "validation_size": [40, 48], "crop": "scaled", "validation_batch": 1}
_NORMAL = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}


@pytest.fixture(scope="module")
def masked_pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with ``shards``, ``runs/teacher``, and ``runs/student``, which it taught."""
    folder = tmp_path_factory.mktemp("masked")
    write_masked(folder / "shards", 12, IMAGES, size=SIZE)
    for name, width in WIDTHS.items():
        recipe = {
            **STRATEGY,
            "task": "segmentation",
            "student": {"model": "plain_fpn", "arguments": {"width": width}},
            "losses": {"segmentation": {}} | ({"kd": {"temperature": 1.0}} if name == "student" else {}),
            "data": _DATA | _NORMAL,
            "batch": 4,
            "epochs": 4 if name == "teacher" else 3,
            "folder": f"runs/{name}",
            "journal": {"every_steps": 1, "trackers": [], "report": False},
        }
        taught = {"teacher": {"recipe": "teacher.yaml"}} if name == "student" else {}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe | taught))
    with pytest.MonkeyPatch.context() as monkeypatch, training_in(folder, monkeypatch) as run:
        run("student.yaml")
        yield folder


@torch.no_grad()
def predicted_masks(weights: Path) -> list[np.ndarray]:
    """Return the mask of each validation image by a run's network, each image alone, from the definition."""
    network = create_model("plain_fpn", 3, {"width": WIDTHS[weights.parent.name]}).eval()
    network.load_state_dict(load_file(weights))
    return [scores.argmax(0) for scores in (score_map(network, number) for number in range(IMAGES))]


def score_map(network: torch.nn.Module, number: int) -> np.ndarray:
    """Return the logits of an image at its size, float32 [K, H, W]."""
    image, _ = draw_masked(1000 + number, *SIZE)
    x_1CHW = (torch.from_numpy(image).permute(2, 0, 1)[None] / 255 - 0.5) / 0.25
    return F.interpolate(network(x_1CHW), SIZE[::-1], mode="bilinear", align_corners=True)[0].numpy()
