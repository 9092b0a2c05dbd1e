"""What a recipe with mixed images may hold, and what ``--check`` says of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from loss_cases import NAMES
from methods import config_of

from pipeline.builders.summary import summarize
from pipeline.config.recipe import dump_recipe, load_recipe
from pipeline.errors import RecipeError
from pipeline.losses._registry import load_spec

MIXING = "data.augment=[{mixup: {alpha: 0.8}}, {cutmix: {alpha: 1.0}}]"
SPECS = {name: load_spec(name, config_of(name)) for name in NAMES}
OF_ONE_CLASS = [name for name, spec in SPECS.items() if not spec.targets]
"""The losses of images that have a class; those of other tasks are never mixed."""
REFUSED = {name for name, spec in SPECS.items() if spec.refuses_mixed}


@pytest.fixture
def write(recipes: Path) -> Callable[[dict], Path]:
    """``write({"kd": {…}})`` is a recipe with those losses and a teacher."""

    def written(losses: dict) -> Path:
        tree = yaml.safe_load((recipes / "ddkd.yaml").read_text()) | {"losses": losses, "compare": []}
        path = recipes / "one.yaml"
        path.write_text(yaml.safe_dump(tree))
        return path

    return written


@pytest.mark.parametrize("name", OF_ONE_CLASS)
def test_each_loss_takes_mixed_images_or_ends_the_command_in_one_line(name: str, write: Callable[[dict], Path]):
    of_labels = {} if SPECS[name].has_label_loss else {"ce": {}}
    path = write({**of_labels, name: config_of(name)})
    load_recipe(path)
    if name not in REFUSED:
        assert load_recipe(path, [MIXING]).recipe.data.mixes
        return
    line = (
        f"the loss '{name}' reads the class of an image, but data.augment mixes images of two classes; "
        "remove the loss, or mixup and cutmix"
    )
    with pytest.raises(RecipeError, match=line) as refusal:
        load_recipe(path, [MIXING])
    assert "\n" not in str(refusal.value)


def test_a_loss_of_ones_own_is_refused_until_it_says_what_it_takes(
    write: Callable[[dict], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "mixed_losses.py").write_text(
        "from pipeline.losses import Loss\n\n\nclass Silent(Loss):\n    needs_teacher = False\n\n\n"
        "class Saying(Silent):\n    mixed_labels = 'dominant'\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    load_recipe(write({"ce": {}, "mixed_losses:Saying": {}}), [MIXING])
    with pytest.raises(RecipeError, match="remove the loss, or mixup and cutmix, or set mixed_labels of the loss"):
        load_recipe(write({"ce": {}, "mixed_losses:Silent": {}}), [MIXING])


def test_a_task_without_classes_of_images_has_none_to_mix(write: Callable[[dict], Path]):
    with pytest.raises(RecipeError, match="mixes images by their class, which those of task: multilabel have not"):
        load_recipe(write({"kd": {"temperature": 4.0}}), [MIXING, "task=multilabel"])


def test_a_resolved_recipe_reads_back_as_itself(write: Callable[[dict], Path], tmp_path: Path):
    first = load_recipe(write({"ce": {}}), ["data.augment=[{cutmix: {alpha: 1.0}}]"]).recipe
    again = tmp_path / "again.yaml"
    again.write_text(yaml.safe_dump(dump_recipe(first)))
    assert dump_recipe(load_recipe(again).recipe) == dump_recipe(first)


def test_a_check_tries_the_losses_on_shares_of_classes(write: Callable[[dict], Path]):
    path = write({"ce": {"label_smoothing": 0.1}, "dkd": config_of("dkd"), "kd": config_of("kd")})
    plain, mixed = (summarize(load_recipe(path, words)) for words in ([], [MIXING]))
    assert mixed.parts == plain.parts
    assert mixed.student.parameters == plain.student.parameters
