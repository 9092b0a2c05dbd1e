"""What a search searches, as the file of its folder says it."""

from __future__ import annotations

import shlex
from pathlib import Path

from pipeline.config.recipe import load_recipe
from pipeline.frozen_model import FrozenModel
from pipeline.multirun.space import Categorical, Range, overrides_of
from pipeline.multirun.study import Trial
from pipeline.runs.files import NEW_FOLDER_HINT
from pipeline.runs.ownership import SEARCH_FILE
from shards.documents import parse_document


class SearchRecord(FrozenModel):
    """A recipe with overrides, and the space that is searched."""

    recipe: str
    overrides: tuple[str, ...]
    space: dict[str, Range | Categorical]
    seeds: tuple[int, ...]
    digest: str
    """Digest of the recipe's name and all that stands above."""

    def command(self, trial: Trial) -> str:
        """Return the command that trains with a trial's values on all training images."""
        words = [word for word in self.overrides if not word.startswith("data.holdout")]
        if load_recipe(Path(self.recipe), words).recipe.data.holdout is not None:  # the recipe's own
            words.append("data.holdout=null")
        return shlex.join(["python", "pipeline/train.py", self.recipe, *words, *overrides_of(trial.values)])


def read_search_record(folder: Path) -> SearchRecord | None:
    """Return the record of the search in a folder, None if there is none. Raises DamagedFile."""
    file = folder / SEARCH_FILE
    if not file.exists():
        return None
    advice = f"search again in a new folder: {NEW_FOLDER_HINT}"
    return parse_document(file.read_bytes(), str(file), SearchRecord, advice)
