"""The teacher answers like its network does, always in the same bits, and never changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from resolved import run_of
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipeline.batch import Batch, Outputs
from pipeline.builders.teacher import build_teacher
from pipeline.errors import RecipeError
from pipeline.features.taps import FeatureTaps
from pipeline.models import create_model
from pipeline.models.stages import stages
from pipeline.teachers.config import Config
from pipeline.teachers.frozen import Normalization, Teacher

CPU = torch.device("cpu")
TAPS = ("last", "stage1.preact", "embedding")


def network(name: str = "cifar_resnet8") -> nn.Module:
    """Return a network whose BatchNorms have seen something."""
    torch.manual_seed(0)
    model = create_model(name, 10)
    with torch.no_grad():
        for _ in range(3):
            model(2 * images(8) + 1)
    return model.eval()


def taps_of(model: nn.Module, *wanted: str) -> FeatureTaps:
    return FeatureTaps(model, stages(model), wanted)


def teacher_of(model: nn.Module, wanted: tuple[str, ...] = TAPS, **keys: object) -> Teacher:
    defaults: dict = {"batch": 4, "image_size": 32, "dtype": torch.float32, "device": CPU}
    return Teacher(taps_of(model, *wanted), **{**defaults, **keys})


def images(rows: int) -> Tensor:
    return torch.randn(rows, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def batch_of(images_BCHW: Tensor) -> Batch:
    rows = len(images_BCHW)
    return Batch(images_BCHW, torch.zeros(rows, dtype=torch.int64), torch.arange(rows), {})


def tensors(outputs: Outputs) -> dict[str, Tensor]:
    return {**outputs.features, "logits": outputs.logits_BK}


def assert_equal(one: Outputs, other: Outputs, rows: slice = slice(None)) -> None:
    assert one.features.keys() == other.features.keys()
    for name, value in tensors(one).items():
        assert torch.equal(value, tensors(other)[name][rows]), name


def assert_close(one: Outputs, other: Outputs) -> None:
    for name, value in tensors(one).items():
        torch.testing.assert_close(value, tensors(other)[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("name", ["cifar_resnet8", "mobilenet_v1", "resnet18"])
@pytest.mark.parametrize("fold", [True, False])
def test_the_answers_are_the_networks_own(name: str, fold: bool):
    with torch.no_grad():
        expected = taps_of(network(name), *TAPS)(images(6))
    outputs = teacher_of(network(name), fold=fold)(batch_of(images(6)))
    assert outputs.features.keys() == set(TAPS)
    assert_close(outputs, expected)


def test_folding_leaves_no_batchnorm_but_those_that_are_tapped():
    model = network()
    paths = {"normed": "layer1.0.bn1", "raw": "layer2.0.conv1"}
    with torch.no_grad():
        expected = FeatureTaps(network(), paths, paths)(images(4))
    teacher = Teacher(FeatureTaps(model, paths, paths), batch=4, image_size=32, dtype=torch.float32, device=CPU)
    left = [name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]
    assert left == ["layer1.0.bn1", "layer2.0.bn1"]
    assert_close(teacher(batch_of(images(4))), expected)


class Fickle(nn.Module):
    """A network whose second forward is another function: folding cannot be trusted."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 10, 3)
        self.bn = nn.BatchNorm2d(10)

    def forward(self, x: Tensor) -> Tensor:
        self.calls = getattr(self, "calls", 0) + 1
        return self.calls * self.bn(self.conv(x)).mean((2, 3))


def test_a_fold_that_changes_an_answer_is_refused():
    with pytest.raises(ValueError, match=r"^teacher: folding BatchNorm changes logits by .* set fold: false$"):
        teacher_of(Fickle(), ())
    teacher_of(Fickle(), (), fold=False)


def test_every_answer_has_the_same_bits_whatever_the_callers_batch():
    teacher = teacher_of(network())
    whole = teacher(batch_of(images(9)))
    for rows in range(1, 10):
        assert_equal(teacher(batch_of(images(9)[:rows])), whole, slice(rows))


@settings(derandomize=True, deadline=None, max_examples=15)
@given(st.lists(st.integers(0, 8), min_size=1, max_size=9), st.sampled_from([1, 3, 4, 16]))
def test_an_answer_depends_on_its_image_alone(order: list[int], batch: int):
    teacher = teacher_of(network(), batch=batch)
    whole = teacher(batch_of(images(9)))
    assert_equal(teacher(batch_of(images(9)[order])), whole, order)  # type: ignore[arg-type]


def test_the_layout_of_the_images_does_not_matter():
    teacher = teacher_of(network())
    assert_equal(teacher(batch_of(images(5).to(memory_format=torch.channels_last))), teacher(batch_of(images(5))))


def test_a_surrounding_autocast_does_not_matter():
    teacher = teacher_of(network())
    expected = teacher(batch_of(images(4)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_equal(teacher(batch_of(images(4))), expected)


def test_answers_may_enter_autograd():
    outputs = teacher_of(network())(batch_of(images(5)))
    for value in tensors(outputs).values():
        assert not value.is_inference()
        assert not value.requires_grad
        student = torch.zeros_like(value, requires_grad=True)
        connector = nn.Linear(value.shape[-1], 3)
        (nn.functional.mse_loss(student, value) + connector(value).sum()).backward()
        assert student.grad is not None
        assert student.grad.abs().sum() > 0


def test_nothing_of_the_teacher_ever_changes():
    teacher = teacher_of(network(), fold=False)
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    nn.ModuleList([teacher]).train()
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    teacher(batch_of(images(4)))
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())


def test_it_computes_in_its_own_precision():
    exact = teacher_of(network())(batch_of(images(5)))
    half = teacher_of(network(), dtype=torch.bfloat16)(batch_of(images(5)))
    assert {value.dtype for value in tensors(half).values()} == {torch.bfloat16}
    assert (half.logits_BK - exact.logits_BK).abs().max() < 0.1 * exact.logits_BK.abs().max()


def test_images_are_brought_to_the_teachers_own_normalisation():
    ours, theirs = Normalization((0.5, 0.4, 0.3), (0.2, 0.25, 0.3)), Normalization((0.1, 0.2, 0.6), (0.5, 0.4, 0.3))

    def normalised(pixels_BCHW: Tensor, by: Normalization) -> Batch:
        mean, std = (torch.tensor(value).view(3, 1, 1) for value in by)
        return batch_of((pixels_BCHW - mean) / std)

    pixels_BCHW = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    teacher = teacher_of(network(), given=ours, expected=theirs)
    assert_close(teacher(normalised(pixels_BCHW, ours)), teacher_of(network())(normalised(pixels_BCHW, theirs)))


def test_a_teacher_with_the_recipes_normalisation_takes_images_as_they_are():
    same = Normalization((0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
    assert_equal(
        teacher_of(network(), given=same, expected=same)(batch_of(images(4))),
        teacher_of(network())(batch_of(images(4))),
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_it_answers_in_half_precision_on_a_gpu():
    device = torch.device("cuda")
    exact = teacher_of(network())(batch_of(images(6)))
    teacher = teacher_of(network(), dtype=Config(recipe="x").torch_dtype(device), device=device)
    outputs = teacher(batch_of(images(6).to(device)))
    assert outputs.logits_BK.dtype == torch.float16
    for name, value in tensors(outputs).items():
        expected = tensors(exact)[name]
        assert (value.float().cpu() - expected).abs().max() < 0.02 * expected.abs().max()


def test_the_precision_follows_the_device():
    auto = Config(recipe="x")
    assert auto.torch_dtype(CPU) == torch.float32
    assert auto.torch_dtype(torch.device("cuda")) == torch.float16
    assert Config(recipe="x", dtype="bf16").torch_dtype(CPU) == torch.bfloat16


@pytest.mark.parametrize(
    "keys", [{}, {"model": "resnet18"}, {"weights": "w.pt"}, {"recipe": "r.yaml", "model": "resnet18"}]
)
def test_a_teacher_has_exactly_one_source(keys: dict[str, str]):
    with pytest.raises(ValidationError, match=r"give either model and weights|both model and recipe"):
        Config.model_validate(keys)
    Config.model_validate({"model": "resnet18", "weights": "IMAGENET1K_V1"})
    Config.model_validate({"recipe": "r.yaml"})


def test_a_runs_network_may_be_given_other_weights(
    run_train: Callable[..., None], recipes: Path, capsys: pytest.CaptureFixture[str]
):
    words = ("teacher.weights=best.safetensors", "teacher.fold=false", "data.mean=[0.1, 0.2, 0.3]")
    with pytest.raises(RecipeError, match=r"holds no finished run of .*teacher\.yaml; train it: "):
        build_teacher(run_of("ddkd.yaml", words), CPU)
    run_train("teacher.yaml")
    last = load_file("runs/teacher/student.safetensors")
    best = {key: value + 1 if value.is_floating_point() else value for key, value in last.items()}
    save_file(best, "best.safetensors")
    teacher = build_teacher(run_of("ddkd.yaml", words), CPU)
    assert isinstance(teacher, Teacher)
    assert all(torch.equal(value, best[key]) for key, value in teacher.taps.model.state_dict().items())
    assert teacher.renormalization is not None  # to what the run's images were normalised with
    capsys.readouterr()
    run_train("ddkd.yaml", "compare=[]", "teacher.weights=runs/teacher/student_best.safetensors")
    assert "note: the teacher's weights are runs/teacher/student_best.safetensors, and" in capsys.readouterr().out
