"""DeiT's distillation token: its head learns from the teacher, that of the class token from the labels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from methods import losses_of
from safetensors.torch import load_file
from torch import Tensor

from pipeline.batch import Batch, Outputs
from pipeline.errors import RecipeError
from pipeline.features.taps import FeatureTaps
from pipeline.losses._base import Facts
from pipeline.losses._registry import load_spec
from pipeline.models import create_model
from pipeline.models.stages import stages
from pipeline.training.journal import trace

pytest.importorskip("timm")
STUDENT = "timm/deit_tiny_distilled_patch16_224"
ARGUMENTS = {"img_size": 16, "patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 2}


def parts(keys: dict, tokens: tuple[Tensor, Tensor], teacher_BK: Tensor, targets: dict | None = None) -> dict:
    loss = load_spec("deit", {"label_share": 0.5, **keys}).build(Facts(5, {"class_head": (5,), "token_head": (5,)}))
    labels_B = torch.tensor([0, 3, 4])
    batch = Batch(torch.empty(3, 0), labels_B, labels_B, {}, targets or {})
    features = dict(zip(("class_head", "token_head"), tokens, strict=True))
    return loss(Outputs(torch.zeros(3, 5), features), Outputs(teacher_BK, {}), batch)


def test_soft_distillation_is_kd_of_the_token_and_mixed_labels_are_the_class_tokens():
    torch.manual_seed(0)
    (one, other), teacher_BK = torch.randn(2, 3, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    soft_BK = torch.softmax(torch.randn(3, 5, dtype=torch.float64), 1)
    found = parts({"temperature": 3.0, "label_share": 0.3}, (one, other), teacher_BK, {"soft_BK": soft_BK})
    p, log_q = (teacher_BK / 3).softmax(1), (other / 3).log_softmax(1)
    assert found["teacher"].item() == pytest.approx(0.7 * 9 * (p * (p.log() - log_q)).sum(1).mean().item(), rel=1e-12)
    assert found["labels"].item() == pytest.approx(
        -0.3 * (soft_BK * one.log_softmax(1)).sum(1).mean().item(), rel=1e-12
    )


def test_the_labels_teach_one_head_and_the_teacher_the_other():
    one, other = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True).unbind()
    found = parts({}, (one, other), torch.randn(3, 5))
    (of_labels,) = torch.autograd.grad(found["labels"], one, retain_graph=True)
    assert of_labels.abs().sum() > 0
    assert torch.autograd.grad(found["labels"], other, retain_graph=True, allow_unused=True) == (None,)
    assert torch.autograd.grad(found["teacher"], one, allow_unused=True) == (None,)


def test_timms_networks_with_the_token_have_both_heads_and_answer_their_mean():
    model = create_model(STUDENT, 20, ARGUMENTS).eval()
    taps = FeatureTaps(model, stages(model), ["class_head", "token_head"])
    outputs = taps(torch.randn(2, 3, 16, 16))
    torch.testing.assert_close(outputs.logits, (outputs.features["class_head"] + outputs.features["token_head"]) / 2)


@pytest.mark.parametrize("augment", [[], [{"mixup": {"alpha": 0.8}}]], ids=["plain", "mixed"])
def test_it_trains_and_goes_on_bit_for_bit_where_it_was_stopped(
    augment: list, run_train: Callable[..., None], recipes: Path
):
    torch.manual_seed(0)
    torch.save(create_model("cifar_resnet20", 20).state_dict(), recipes / "teacher.pt")
    whole = {
        "base": "ce.yaml",
        "student": {"model": STUDENT, "arguments": ARGUMENTS},
        "teacher": {"model": "cifar_resnet20", "weights": "teacher.pt"},
        "losses": {"ce": None, **losses_of("deit")},
        "data": {"augment": augment},
        "epochs": 1,
    }
    (recipes / "deit.yaml").write_text(yaml.safe_dump(whole))
    run_train("deit.yaml", "folder=runs/straight")
    run_train("deit.yaml", "folder=runs/stopped", "stop.steps=3")
    run_train("deit.yaml", "folder=runs/stopped")
    straight, stopped = (trace(recipes / "runs" / name / "journal.jsonl") for name in ("straight", "stopped"))
    assert straight == stopped
    assert {"deit/labels", "deit/teacher"} <= straight[0].keys()
    start, end = (
        load_file(recipes / "runs/stopped/checkpoints" / step / "distiller.safetensors")
        for step in ("step-3", "step-5")
    )
    assert not [key for key in end if "head" in key and torch.equal(start[key], end[key])]


def test_a_student_without_the_token_is_refused(run_train: Callable[..., None], recipes: Path):
    with pytest.raises(RecipeError, match="has no stage 'class_head', because it has no distillation token"):
        run_train("--check", "ddkd.yaml", "losses={deit: {label_share: 0.5}}", "compare=null")
