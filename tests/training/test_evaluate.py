from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline import evaluate
from pipeline.batch import Batch, Outputs
from pipeline.errors import RecipeError
from pipeline.models import create_model
from pipeline.tasks.classification import Classification, count_correct
from pipeline.training.evaluation import measure_split

Train = Callable[..., None]


def batches(logits_NK: torch.Tensor, labels_N: torch.Tensor, size: int) -> Iterator[Batch]:
    for start in range(0, len(labels_N), size):
        rows = slice(start, start + size)
        yield Batch(logits_NK[rows], labels_N[rows], torch.arange(len(labels_N))[rows], {})


def test_accuracy_is_the_share_of_right_rows_whatever_the_batch_size():
    generator = torch.Generator().manual_seed(0)
    logits_NK, labels_N = torch.randn(37, 9, generator=generator), torch.randint(9, (37,), generator=generator)
    order_NK = np.argsort(-logits_NK.numpy(), axis=1)
    top1 = 100 * np.mean(order_NK[:, 0] == labels_N.numpy())
    top5 = 100 * np.mean([label in row[:5] for row, label in zip(order_NK, labels_N.numpy(), strict=True)])
    for size in (1, 8, 37):
        found = measure_split(
            Classification(), lambda batch: Outputs(batch.images_BCHW, {}), batches(logits_NK, labels_N, size)
        )
        assert found.metrics == pytest.approx({"top1": top1, "top5": top5})
        assert found.samples == 37


def test_a_padded_row_is_never_counted():
    logits_BK = torch.tensor([[5.0, 1.0, 0.0], [5.0, 1.0, 0.0], [5.0, 1.0, 0.0]])
    assert count_correct(logits_BK, torch.tensor([0, 1, -1])).tolist() == [1, 2, 2]


def test_a_runs_students_are_measured_as_the_run_measured_them(
    run_train: Train, recipes: Path, capsys: pytest.CaptureFixture[str]
):
    run_train("ce.yaml", "ema.decay=0.5")
    result = json.loads((recipes / "runs" / "ce" / "result.json").read_text())
    for name, expected in (("last", "top1"), ("best", "best_top1"), ("ema", "ema_top1")):
        capsys.readouterr()
        evaluate.main(["runs/ce", f"weights={name}", "speed=no"])
        printed = capsys.readouterr().out
        assert f"top-1 {result[expected]:.2f} " in printed
        assert "(20 images)" in printed


def test_a_network_agrees_with_itself_on_every_image(
    run_train: Train, recipes: Path, capsys: pytest.CaptureFixture[str]
):
    run_train("teacher.yaml")
    run_train("ddkd.yaml", "compare=null", "student.model=cifar_resnet20", "stop.steps=1")
    capsys.readouterr()
    words = ["runs/ddkd", "weights=runs/teacher/student.safetensors", "agreement=yes", "speed=no"]
    evaluate.main(words)
    printed = capsys.readouterr().out
    student, teacher = re.findall(r"top-1 ([\d.]+)", printed)
    assert student == teacher
    assert "agreement: 100.00" in printed


def test_a_teacher_that_cannot_take_the_validation_images_is_one_line(run_train: Train, recipes: Path):
    pytest.importorskip("timm")
    network = {"model": "timm/vit_tiny_patch16_224", "arguments": {"img_size": 32, "depth": 1}}
    torch.save(create_model(network["model"], 20, network["arguments"]).state_dict(), "vit.pt")
    sizes = ["data.size=32", "data.validation_size=40", "compare=null", "losses={ddkd: null, ce: {}}"]
    words = ["ddkd.yaml", *sizes, f"teacher={json.dumps({'recipe': None, **network, 'weights': 'vit.pt'})}"]
    message = r"teacher\.model: VisionTransformer cannot take images of 40 pixels: [^\n]*$"
    with pytest.raises(RecipeError, match=message):
        run_train(*words, "teacher.expect=0")
    torch.save(create_model("cifar_resnet8", 20).state_dict(), "student.pt")
    with pytest.raises(RecipeError, match=message):
        evaluate.main([*words, "weights=student.pt", "agreement=yes"])


def test_a_teacher_that_knows_the_labels_is_not_measured(run_train: Train, recipes: Path):
    run_train("ce.yaml")
    members = "members: [{recipe: ce.yaml}, {recipe: ce.yaml}]"
    teacher = f"teacher={{recipe: null, combine: confidence, temperature: 4, {members}}}"
    words = ["ddkd.yaml", teacher, "losses={ddkd: null, ce: {}}", "compare=null", "weights=runs/ce/student.safetensors"]
    with pytest.raises(RecipeError, match="agreement=yes: combine: confidence uses the labels"):
        evaluate.main([*words, "agreement=yes"])


def test_missing_weights_are_one_line(run_train: Train, recipes: Path):
    with pytest.raises(RecipeError, match="weights: there is no file"):
        evaluate.main(["ce.yaml", "weights=gone.safetensors"])
