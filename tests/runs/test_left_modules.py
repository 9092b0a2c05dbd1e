"""A run leaves a module of its losses, and another begins with it: factor transfer and its paraphraser."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from methods import losses_of
from resolved import run_of
from safetensors.torch import load_file, save_file

from pipeline.errors import RecipeError
from shards.manifest import sha256_of

Train = Callable[..., None]
FILE = "runs/first/auxiliary.safetensors"


@pytest.fixture
def trained(run_train: Train, recipes: Path) -> Path:
    """``second.yaml`` is finished; its loss began with what ``first.yaml``, made before it, left."""
    ft = losses_of("ft")["ft"] | {"paraphraser": {"recipe": "first.yaml"}}
    stages = {"first": losses_of("ft_init"), "second": {"ce": {}, "ft": ft}}
    for name, losses in stages.items():
        own = {"teacher": {"recipe": "teacher.yaml"}, "losses": {"ce": None, **losses}, "epochs": 1}
        (recipes / f"{name}.yaml").write_text(yaml.safe_dump({"base": "ce.yaml", **own, "folder": f"runs/{name}"}))
    run_train("second.yaml", "schedule.rate=1e-3")
    return recipes


def test_a_module_is_left_by_one_run_and_part_of_the_identity_of_the_next(
    run_train: Train, trained: Path, capfd: pytest.CaptureFixture[str]
):
    left = load_file(trained / FILE)
    assert {key.rpartition(".")[0] for key in left} == {
        f"ft_paraphraser.paraphraser.{half}.{layer}" for half in ("encoder", "decoder") for layer in (0, 2, 4)
    }
    state = load_file(trained / "runs/second/checkpoints/step-5/distiller.safetensors")
    kept = {key.removeprefix("losses.ft.encoder"): x for key, x in state.items() if key.startswith("losses.ft.encoder")}
    for key, x in kept.items():
        assert torch.equal(x, left[f"ft_paraphraser.paraphraser.encoder.{key.replace('_', '.')}"])
    assert len(kept) == 6

    first, second = (run_of(f"{name}.yaml") for name in ("first", "second"))
    named = run_of("second.yaml", ["schedule.rate=1e-3"]).identity["losses"]["ft"]["paraphraser"]
    assert named == {"recipe": first.fingerprint, "sha256": sha256_of(trained / FILE)}
    assert second.identity["losses"]["ft"]["paraphraser"] == named
    capfd.readouterr()
    run_train("second.yaml", "schedule.rate=1e-3")
    assert "$ " not in capfd.readouterr().out  # all is there

    result, path = json.loads((trained / "runs/first/result.json").read_text()), trained / FILE
    save_file({key: x + 1 for key, x in left.items()}, path)
    with pytest.raises(RecipeError, match=r"auxiliary.safetensors: not the weights that this run wrote"):
        run_train("second.yaml", "folder=runs/third")
    # The first run's command, repeated elsewhere, need not end with the same bits.
    result["sha256"][path.name] = sha256_of(path)
    (trained / "runs/first/result.json").write_text(json.dumps(result))
    with pytest.raises(RecipeError, match=r"another recipe \(different losses.ft.paraphraser.sha256\)"):
        run_train("second.yaml", "schedule.rate=1e-3")


def test_exits_are_left_beside_the_student_where_the_recipe_asks_for_them(run_train: Train, recipes: Path):
    own = {"base": "ce.yaml", "losses": losses_of("byot"), "epochs": 1, "folder": "runs/byot"}
    (recipes / "byot.yaml").write_text(yaml.safe_dump(own))
    run_train("byot.yaml")
    assert not (recipes / "runs/byot/auxiliary.safetensors").exists()
    run_train("byot.yaml", "losses.byot.export_exits=true", "folder=runs/exits")
    left = load_file(recipes / "runs/exits/auxiliary.safetensors")
    (saved,) = (recipes / "runs/exits/checkpoints").glob("step-*/distiller.safetensors")
    trained = {key.removeprefix("losses."): x for key, x in load_file(saved).items() if ".exits." in key}
    torch.testing.assert_close(left, trained, rtol=0, atol=0)
    assert {key.split(".")[2] for key in left} == {"0", "1"}
    students = [load_file(recipes / folder / "student.safetensors") for folder in ("runs/byot", "runs/exits")]
    torch.testing.assert_close(*students, rtol=0, atol=0)


REFUSED = {
    "losses.ft.share=0.25": r"losses.ft.paraphraser: runs/first/auxiliary.safetensors: its paraphraser has a",
    "losses.ft.paraphraser.recipe=teacher.yaml": r"runs/teacher/auxiliary.safetensors: there is no such file;",
    "losses.ft.paraphraser.recipe=nowhere.yaml": r"it names a recipe that does not exist",
    "losses.ft.paraphraser.recipe=second.yaml": r"the recipe depends on itself",
}


def test_a_run_that_left_no_such_module_is_refused_in_one_line(run_train: Train, trained: Path):
    for word, message in REFUSED.items():
        with pytest.raises(RecipeError, match=message) as caught:
            run_train("second.yaml", "folder=runs/other", word)
        assert "\n" not in str(caught.value)
