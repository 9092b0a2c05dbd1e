"""The formats of networks: the file alone gives the network's outputs, on real images and for any number of them."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from pipeline.errors import RecipeError
from pipeline.exporting.comparison import compare_outputs
from pipeline.exporting.formats import FORMATS
from pipeline.exporting.onnx import write_onnx
from pipeline.exporting.trained import CARD_FILE, TrainedStudent
from pipeline.models import create_model
from pipeline.models.folding import fold_batchnorms
from pipeline.runs.card import Card

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
STATS = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


def student_of(model: nn.Module, name: str, images_BCHW: Tensor, classes: int, size: int) -> TrainedStudent:
    """A student with the statistics of these images, as if it had been trained."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the mean over all batches, of which there is one
    model.train()(images_BCHW)
    model.eval()
    head = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    with torch.no_grad():
        head.bias -= model(images_BCHW).mean(0)  # without weights that were trained, all images have one first choice
        logits_BK = model(images_BCHW)
    card = Card(
        **{"task": "classification", "model": name, "arguments": {}, "size": size, "identity": "0" * 64, **STATS},
        classes=tuple(f"class {k}" for k in range(classes)),
    )
    return TrainedStudent(model, images_BCHW, logits_BK, card)


def small_student() -> TrainedStudent:
    torch.manual_seed(0)
    return student_of(create_model("cifar_resnet8", 10), "cifar_resnet8", torch.randn(8, 3, 32, 32), 10, 32)


@pytest.fixture(scope="module")
def small() -> TrainedStudent:
    return small_student()


@pytest.mark.parametrize("name", ["pt2", "onnx", "torchscript", "hub"])
def test_a_written_student_answers_as_the_student_does(small: TrainedStudent, tmp_path: Path, name: str):
    chosen = FORMATS[name]
    path = tmp_path / f"student{chosen.ending}"
    if not chosen.ending:
        path.mkdir()
    chosen.write(small, path)
    run = chosen.run(path)
    compared = compare_outputs(small, run)
    assert compared.images == compared.same == 8
    assert compared.largest_difference < 1e-5
    for rows in (1, 3, 7):
        torch.testing.assert_close(run(small.images_BCHW[:rows]), small.logits_BK[:rows], rtol=1e-4, atol=1e-5)


def test_a_file_carries_the_card_and_no_folder_of_this_machine(small: TrainedStudent, tmp_path: Path):
    root = str(Path(__file__).resolve().parents[2]).encode()
    for name in ("pt2", "onnx", "torchscript"):
        path = tmp_path / f"student{FORMATS[name].ending}"
        FORMATS[name].write(small, path)
        content = path.read_bytes()
        if name != "onnx":
            with zipfile.ZipFile(path) as archive:
                members = archive.namelist()
                content = b"".join(archive.read(member) for member in members)
                cards = [archive.read(member) for member in members if member.endswith(CARD_FILE)]
            assert [Card.model_validate_json(card) for card in cards] == [small.card]
        if name != "torchscript":  # torch itself keeps the source lines of a trace, and has no way to leave them out
            assert root not in content
            assert b"site-packages" not in content
    model = onnx.load(tmp_path / "student.onnx")
    assert {entry.key: Card.model_validate_json(entry.value) for entry in model.metadata_props} == {"card": small.card}
    (images,), (logits,) = model.graph.input, model.graph.output
    assert (images.name, logits.name) == ("images", "logits")
    shapes = [[d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim] for value in (images, logits)]
    assert shapes == [["batch", 3, 32, 32], ["batch", 10]]


WRITE = """
import sys, torch
from pathlib import Path
sys.path[:0] = {paths}
from test_formats import small_student
from pipeline.exporting.formats import FORMATS
for name in ("onnx", "pt2"):
    FORMATS[name].write(small_student(), Path({folder!r}) / f"student.{{name}}")
"""


@pytest.mark.endurance
def test_two_processes_write_the_same_bytes(tmp_path: Path):
    for seed in ("1", "2"):
        (tmp_path / seed).mkdir()
        paths = [str(ROOT), str(ROOT / "tests" / "exporting"), str(ROOT / "tests" / "support")]
        code = WRITE.format(paths=paths, folder=str(tmp_path / seed))
        subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONHASHSEED": seed}, check=True)
    for name in ("onnx", "pt2"):
        assert (tmp_path / "1" / f"student.{name}").read_bytes() == (tmp_path / "2" / f"student.{name}").read_bytes()


def test_a_file_that_answers_otherwise_is_refused(small: TrainedStudent):
    with pytest.raises(RecipeError, match=r"other outputs than the student: a logit differs by 0\.5"):
        compare_outputs(small, lambda images_BCHW: small.logits_BK[: len(images_BCHW)] + 0.5)
    with pytest.raises(RecipeError, match="a logit differs by nan"):
        compare_outputs(small, lambda images_BCHW: small.logits_BK[: len(images_BCHW)] * float("nan"))


def test_a_student_of_several_classes_is_compared_by_its_decisions(small: TrainedStudent):
    several = small._replace(card=small.card.model_copy(update={"task": "multilabel"}))
    logits_BK = torch.tensor([[3.0, -1e-4], [3.0, 1.0]])  # the first image has one decision at its border
    images_BCHW, moved_BK = small.images_BCHW[:2], logits_BK + 2e-4
    border = several._replace(images_BCHW=images_BCHW, logits_BK=logits_BK)
    compared = compare_outputs(border, lambda images_BCHW: moved_BK[: len(images_BCHW)])
    assert str(compared).endswith("the same decisions on 1 of 2 validation images")
    compared = compare_outputs(several, lambda images_BCHW: small.model(images_BCHW).detach())
    assert str(compared).endswith("the same decisions on 8 of 8 validation images")


def test_more_images_than_fit_at_once_are_compared_piece_by_piece(small: TrainedStudent):
    many, seen = torch.arange(150.0)[:, None, None, None].expand(150, 3, 1, 1), []

    def run(images_BCHW: Tensor) -> Tensor:
        seen.append(len(images_BCHW))
        return images_BCHW[:, :2, 0, 0]

    compared = compare_outputs(small._replace(images_BCHW=many, logits_BK=many[:, :2, 0, 0]), run)
    assert (compared.images, compared.same) == (150, 150)
    assert sum(seen) == 151
    assert max(seen) <= 64


@pytest.mark.parametrize("name", ["pt2", "onnx", "torchscript"])
def test_one_validation_image_is_enough(small: TrainedStudent, tmp_path: Path, name: str):
    path = tmp_path / f"student{FORMATS[name].ending}"
    one = small._replace(images_BCHW=small.images_BCHW[:1], logits_BK=small.logits_BK[:1])
    FORMATS[name].write(one, path)
    run = FORMATS[name].run(path)
    assert compare_outputs(one, run).images == 1
    torch.testing.assert_close(run(small.images_BCHW), small.logits_BK, rtol=1e-4, atol=1e-5)


def test_a_file_for_one_number_of_images_is_refused(small: TrainedStudent):
    def run(images_BCHW: Tensor) -> Tensor:
        if len(images_BCHW) != 8:
            raise RuntimeError("expected 8 images\nand more")
        return small.logits_BK

    with pytest.raises(RecipeError, match=r"the exported file cannot take 1 images: expected 8 images$"):
        compare_outputs(small, run)


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 4)


class Branching(Odd):
    def forward(self, images_BCHW: Tensor) -> Tensor:
        logits_BK = self.head(images_BCHW.mean((2, 3)))
        return logits_BK * 2 if logits_BK.sum() > 0 else logits_BK


class Counting(Odd):
    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self.head(images_BCHW.mean((2, 3)))[:, : max(4, int(images_BCHW.abs().max().item()))]


class Spectral(Odd):
    def forward(self, images_BCHW: Tensor) -> Tensor:
        square_B33 = images_BCHW[:, :, :3, 0]
        return self.head(torch.linalg.eigvalsh(square_B33 @ square_B33.mT))


@pytest.mark.parametrize(
    ("network", "names", "operation"),
    [
        (Branching, ("pt2", "onnx", "torchscript"), r"the operation aten\.item"),
        (Counting, ("pt2", "onnx", "torchscript"), r"the operation aten\.item \(\S*test_formats\.py:\d+ in forward\)"),
        (Spectral, ("onnx",), r"the operation aten\._linalg_eigh"),
    ],
)
def test_a_network_that_cannot_be_exported_is_refused_by_its_operation(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], network: type[Odd], names: tuple[str, ...], operation: str
):
    student = student_of(network(), "odd", torch.randn(4, 3, 8, 8), 4, 8)
    for name in names:
        path = tmp_path / f"student{FORMATS[name].ending}"
        with pytest.raises(RecipeError, match=operation) as raised:
            FORMATS[name].write(student, path)
        assert "\n" not in str(raised.value)
        assert not path.exists()
    assert capfd.readouterr() == ("", "")


def test_folded_batchnorms_are_gone_from_the_file_and_change_nothing(tmp_path: Path):
    torch.manual_seed(0)
    model = create_model("mobilenet_v1", 10)
    student = student_of(model, "mobilenet_v1", torch.randn(6, 3, 64, 64), 10, 64)
    assert fold_batchnorms(model, student.images_BCHW[:2]) == 27
    folded = student._replace(model=model, folded=True)
    write_onnx(folded, tmp_path / "student.onnx")
    kinds = {node.op_type for node in onnx.load(tmp_path / "student.onnx").graph.node}
    assert "Conv" in kinds
    assert "BatchNormalization" not in kinds
    assert compare_outputs(folded, FORMATS["onnx"].run(tmp_path / "student.onnx")).same == 6
    for name in ("timm", "hub"):
        with pytest.raises(RecipeError, match=r"leave out fold=yes|is none of timm's networks"):
            FORMATS[name].write(folded, tmp_path)


def own_network(num_classes: int) -> nn.Module:
    """A module of one's own, with an attention and a pooling."""

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.Hardswish())
            self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
            self.head = nn.Linear(16, num_classes)

        def forward(self, images_BCHW: Tensor) -> Tensor:
            tokens_BNC = nn.functional.adaptive_avg_pool2d(self.stem(images_BCHW), 4).flatten(2).mT
            return self.head(tokens_BNC + self.attention(tokens_BNC, tokens_BNC, tokens_BNC)[0]).mean(1)

    return Own()


@pytest.fixture(scope="module")
def photographs() -> list[Image.Image]:
    with tarfile.open(DATA / "imagenet-sample-300.tar") as archive:
        members = [member for member in archive.getmembers() if member.isfile()][:16]
        files = [archive.extractfile(member) for member in members]
        return [Image.open(file).convert("RGB").resize((224, 224)) for file in files if file]


@pytest.mark.shared
@pytest.mark.endurance
@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("mobilenet_v1", 224),
        ("resnet18", 224),
        ("cifar_shufflenet_v2", 32),
        ("mobilenet_v3_small", 224),
        ("timm/vit_tiny_patch16_224", 224),
        ("own", 64),
    ],
)
def test_six_networks_keep_their_first_choice_on_real_images(
    photographs: list[Image.Image], tmp_path: Path, name: str, size: int
):
    torch.manual_seed(0)
    mean, std = (torch.tensor(STATS[key])[:, None, None] for key in ("mean", "std"))
    pixels = [torch.from_numpy(np.array(each.resize((size, size)))).permute(2, 0, 1) / 255 for each in photographs]
    images_BCHW = torch.stack([(image - mean) / std for image in pixels])
    model = own_network(20) if name == "own" else create_model(name, 20)
    student = student_of(model, name, images_BCHW, 20, size)
    formats = ("onnx", "pt2", *(("timm",) if name.startswith("timm/") else ()))
    for chosen in formats:
        path = tmp_path / f"student-{chosen}{FORMATS[chosen].ending}"
        if not FORMATS[chosen].ending:
            path.mkdir()
        FORMATS[chosen].write(student, path)
        compared = compare_outputs(student, FORMATS[chosen].run(path))
        assert compared.same == compared.images == 16, chosen
    assert len(set(student.logits_BK.argmax(1).tolist())) > 1
