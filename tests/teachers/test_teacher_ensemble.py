"""Several teachers: how they are weighed, and that KD from their mixture is the weighted mean of KD from each."""

from __future__ import annotations

from collections.abc import Callable
from math import exp, log
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from pipeline.batch import Batch
from pipeline.config.recipe import load_recipe
from pipeline.errors import RecipeError
from pipeline.features.taps import FeatureTaps
from pipeline.losses.kd import kd_loss
from pipeline.models import create_model
from pipeline.models.stages import stages
from pipeline.teachers.config import Config
from pipeline.teachers.ensemble import TeacherEnsemble, member_weights
from pipeline.teachers.frozen import Normalization, Teacher

Train = Callable[..., None]
quick = settings(derandomize=True, deadline=None, max_examples=20)
WAYS = ("mean", "entropy", "confidence")


def teacher_of(name: str, seed: int, *wanted: str, expected: Normalization | None = None) -> Teacher:
    torch.manual_seed(seed)
    model = create_model(name, 10)
    given = Normalization((0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
    taps = FeatureTaps(model, stages(model), wanted)
    own: dict = {"batch": 4, "image_size": 16, "dtype": torch.float32, "device": torch.device("cpu")}
    return Teacher(taps, given=given, expected=expected or given, **own)


def batch(rows: int = 6) -> Batch:
    images = torch.randn(rows, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return Batch(images, torch.arange(rows) % 10, torch.arange(rows), {})


def answers(members: int = 3, rows: int = 5, seed: int = 0, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(members, rows, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("combine", WAYS)
def test_kd_from_the_mixture_has_the_gradient_of_the_weighted_mean_of_kd_from_each(combine: str):
    members = [teacher_of("cifar_resnet8", 0, "last"), teacher_of("cifar_resnet20", 1), teacher_of("cifar_resnet8", 2)]
    ensemble = TeacherEnsemble(members, combine=combine, temperature=4.0)
    seen = torch.stack([member(batch()).logits_BK for member in members])
    weights_MB = member_weights(seen, batch().labels_B, combine)
    student = torch.randn(6, 10, generator=torch.Generator().manual_seed(5)).double().requires_grad_()
    (mixed,) = torch.autograd.grad(kd_loss(student, ensemble(batch()).logits_BK.double(), temperature=4.0), student)
    one_by_one = torch.zeros_like(mixed)
    for logits_BK, weight_B in zip(seen.double(), weights_MB.double(), strict=True):
        (own,) = torch.autograd.grad(kd_loss(student, logits_BK, temperature=4.0), student)
        one_by_one += weight_B.unsqueeze(1) * own
    torch.testing.assert_close(mixed, one_by_one, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("combine", WAYS)
def test_one_member_answers_what_that_teacher_does(combine: str):
    teacher = teacher_of("cifar_resnet8", 0, "last")
    ensemble = TeacherEnsemble([teacher], combine=combine, temperature=4.0)
    alone, mixed = teacher(batch()), ensemble(batch())
    torch.testing.assert_close(mixed.logits_BK.softmax(1), alone.logits_BK.softmax(1))
    assert torch.equal(mixed.features["last"], alone.features["last"])
    assert ensemble.taps is teacher.taps


def test_features_are_the_first_members_and_no_other_is_tapped():
    members = [teacher_of("cifar_resnet20", 0, "last", "embedding"), teacher_of("cifar_resnet8", 1)]
    ensemble = TeacherEnsemble(members, combine="mean", temperature=1.0)
    assert ensemble(batch()).features.keys() == {"last", "embedding"}
    assert not members[1](batch()).features


def test_each_member_sees_images_of_its_own_normalisation():
    other = Normalization((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    ensemble = TeacherEnsemble(
        [teacher_of("cifar_resnet8", 0), teacher_of("cifar_resnet8", 0, expected=other)],
        combine="mean",
        temperature=1.0,
    )
    (first, second), rows = ensemble.members, batch()
    assert not torch.allclose(first(rows).logits_BK, second(rows).logits_BK)
    expected = (first(rows).logits_BK.softmax(1) + second(rows).logits_BK.softmax(1)) / 2
    torch.testing.assert_close(ensemble(rows).logits_BK.softmax(1), expected)


@pytest.mark.parametrize("combine", WAYS)
@quick
@given(seed=st.integers(0, 1000), members=st.integers(1, 4), scale=st.floats(0, 1000))
def test_a_rows_weights_sum_to_one_and_none_is_negative(combine: str, seed: int, members: int, scale: float):
    weights_MB = member_weights(answers(members, 5, seed, scale), torch.arange(5), combine)
    torch.testing.assert_close(weights_MB.sum(0), torch.ones(5, dtype=torch.float64))
    assert (weights_MB >= -1e-12).all()


def test_weights_are_those_of_the_papers():
    logits_MBK, labels = answers(3, 4), [3, 1, 0, 9]
    entropy, confidence = (member_weights(logits_MBK, torch.tensor(labels), way) for way in ("entropy", "confidence"))
    for row, label in enumerate(labels):
        p = [[exp(z) / sum(map(exp, member[row])) for z in member[row]] for member in logits_MBK.tolist()]
        h = [-sum(x * log(x) for x in own) for own in p]
        ce = [exp(-log(own[label])) for own in p]
        for member in range(3):
            assert entropy[member, row].item() == pytest.approx((1 - h[member] / sum(h)) / 2)
            assert confidence[member, row].item() == pytest.approx((1 - ce[member] / sum(ce)) / 2)


def test_teachers_that_are_all_sure_count_alike():
    sure = torch.full((3, 2, 4), -1e4)
    sure[:, :, 0] = 1e4
    torch.testing.assert_close(member_weights(sure, torch.tensor([0, 1]), "entropy"), torch.full((3, 2), 1 / 3))


def test_a_padded_row_without_a_label_is_answered():
    ensemble = TeacherEnsemble(
        [teacher_of("cifar_resnet8", seed) for seed in (0, 1)], combine="confidence", temperature=4
    )
    padded = batch()._replace(labels_B=torch.tensor([0, 1, 2, 3, -1, -1]))
    assert ensemble(padded).logits_BK.isfinite().all()


TWO = [{"model": "resnet18", "weights": "a.pt"}, {"recipe": "r.yaml"}]


def test_members_are_a_teacher():
    config = Config.model_validate({"members": TWO, "combine": "entropy", "temperature": 4, "expect": 60})
    assert [run.recipe for run in config.runs] == ["r.yaml"]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"members": TWO}, "members need combine"),
        ({"members": TWO, "combine": "mean"}, "members need combine"),
        ({"members": [], "combine": "mean", "temperature": 4}, "at least 1 item"),
        (
            {"members": TWO, "combine": "mean", "temperature": 4, "recipe": "r.yaml"},
            "recipe cannot be combined with members",
        ),
        ({"members": TWO, "combine": "mean", "temperature": 4, "fold": False}, "fold cannot be combined with members"),
        (
            {"members": TWO, "combine": "mean", "temperature": 4, "average": {"decay": 0.9}},
            "average cannot be combined with",
        ),
        ({"members": [{"model": "x"}], "combine": "mean", "temperature": 4}, "give either model and weights"),
        ({"members": TWO, "combine": "confidence", "temperature": 4, "expect": 60}, "which uses the labels"),
        ({"recipe": "r.yaml", "combine": "mean"}, "combine cannot be combined with a single network"),
        ({"average": {"decay": 0.9}, "mean": (0, 0, 0)}, "mean cannot be combined with average"),
        ({"average": {"decay": 0.9}, "expect": 60}, "expect cannot be combined with average"),
    ],
)
def test_what_does_not_go_together_is_refused(keys: dict[str, object], message: str):
    with pytest.raises(ValidationError, match=message):
        Config.model_validate(keys)


def test_a_misspelt_key_of_a_member_is_told(recipes: Path):
    members = "{recipe: null, combine: mean, temperature: 4, members: [{recipe: ce.yaml, flod: no}]}"
    (recipes / "bad.yaml").write_text(f"base: ddkd.yaml\nteacher: {members}\n")
    with pytest.raises(RecipeError, match=r"teacher.members.0.flod: unknown key; did you mean 'fold'\?"):
        load_recipe(recipes / "bad.yaml")


def test_a_run_stands_on_its_members_runs(run_train: Train, recipes: Path, capfd: pytest.CaptureFixture[str]):
    recipe = yaml.safe_load((recipes / "ddkd.yaml").read_text())
    members = [{"recipe": "teacher.yaml"}, {"recipe": "ce.yaml"}]
    recipe |= {"teacher": {"members": members, "combine": "confidence", "temperature": 4.0}, "folder": "runs/several"}
    recipe |= {"losses": {"ce": {}, "kd": {"temperature": 4.0}}, "epochs": 1, "compare": []}
    below = recipes / "below"
    below.mkdir()
    # Named relative to the file that says it, wherever the command stands.
    recipe["teacher"]["members"] = [{"recipe": f"../{member['recipe']}"} for member in members]
    (below / "several.yaml").write_text(yaml.safe_dump(recipe))
    run_train("below/several.yaml")
    for name in ("teacher", "ce", "several"):
        assert (recipes / "runs" / name / "result.json").is_file()
    told = capfd.readouterr().out
    run_train("below/several.yaml")
    assert "several" in told
    assert "$" not in capfd.readouterr().out
    assert load_recipe("runs/several/recipe.yaml").recipe.teacher is not None
