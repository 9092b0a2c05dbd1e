"""The commands of the project by the names that ``distill`` knows, and how a user starts them here."""

from __future__ import annotations

import re

from pipeline.errors import IS_INSTALLED

_SHARDS = (
    "prepare_folder",
    "prepare_imagenet",
    "prepare_cifar",
    "prepare_parquet",
    "prepare_multilabel",
    "prepare_unlabelled",
    "prepare_masks",
    "prepare_camvid",
    "prepare_cityscapes",
    "prepare_voc",
    "prepare_ade20k",
    "prepare_coco",
    "prepare_super_resolution",
    "prepare_photographs",
    "prepare_demo",
    "prepare_scenes",
    "index",
    "verify",
    "stage",
)
COMMANDS = {
    "train": "pipeline.train",
    "evaluate": "pipeline.evaluate",
    "compare": "pipeline.compare",
    "cache": "pipeline.cache_teacher",
    "pseudo-label": "pipeline.pseudo_label",
    "report": "pipeline.report",
    "search": "pipeline.search",
    "export": "pipeline.export",
    "predict": "pipeline.predict",
    "bench": "pipeline.bench",
    "doctor": "pipeline.doctor",
    **{f"shards {name}": f"shards.{name}" for name in _SHARDS},
}
"""The module of each command. A new one is a line here."""
_NAMES = {module: name for name, module in COMMANDS.items()}
_SCRIPT = re.compile(r"(python |(?:torchrun|accelerate launch)\b[^\n`]*? )?\b(pipeline|shards)/(\w+)\.py\b")


def as_started(text: str, *, installed: bool = IS_INSTALLED) -> str:
    """Return a text with its commands as they are started here.

    In a checkout they stay: ``python pipeline/train.py``. Where a wheel is installed it is ``distill train``, and
    ``torchrun … -m pipeline.train`` for several ranks.
    """
    return _SCRIPT.sub(_as_installed, text) if installed else text


def _as_installed(match: re.Match[str]) -> str:
    launcher, package, file = match.groups()
    module = f"{package}.{file}"
    if module not in _NAMES:
        return match[0]
    if launcher in (None, "python "):
        return f"distill {_NAMES[module]}"
    return f"{launcher}-m {module}"
