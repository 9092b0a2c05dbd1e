"""One network of each of torchvision's families passes ``--check`` of all methods, as student and as teacher."""

from __future__ import annotations

from pathlib import Path

import pytest
import torchvision

from pipeline.builders.summary import summarize
from pipeline.config.recipe import load_recipe
from pipeline.errors import RecipeError

FAMILIES = (
    *("alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "googlenet", "inception_v3", "maxvit_t"),
    *("mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small", "regnet_x_400mf", "resnet18", "shufflenet_v2_x0_5"),
    *("squeezenet1_1", "swin_t", "vgg11", "vit_b_32"),
)
# They read logits, their columns, the last map, all maps and, of ReviewKD, all pre-activations and the embedding.
METHODS = ("kd", "dkd", "perception", "ddkd", "at", "review")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a recipe with the losses of all methods at once, which builds each network only once."""
    pair = Path("configs/imagenet/r50_mbv1.yaml").resolve()
    methods = [str(Path(f"configs/methods/{name}.yaml").resolve()) for name in ("ddkd", *METHODS)]
    file = tmp_path_factory.mktemp("every_network") / "all.yaml"
    file.write_text(
        f"base: [{pair}, {', '.join(methods)}]\nlosses: {{dkd: {{alpha: 1.0, beta: 8.0, temperature: 4.0}}}}\n"
    )
    return file


def check(recipe: Path, student: str, teacher: str, *more: str) -> set[str]:
    networks = (f"student.model={student}", f"teacher.model={teacher}", "teacher.weights=none.pt")
    sizes = ("data.classes=1000", "data.samples=2000", "data.path=no/shards", "data.resize=320", "data.size=299")
    sizes = sizes if "inception_v3" in (student, teacher) else sizes[:3]
    loaded = load_recipe(recipe, [*networks, *sizes, "teacher.expect=null", "batch=8", *more])
    return {part.partition("/")[0] for part in summarize(loaded).parts}


def test_every_family_of_torchvision_is_here():
    modules = {
        torchvision.models.get_model_builder(name).__module__
        for name in torchvision.models.list_models(torchvision.models)
    }
    assert {torchvision.models.get_model_builder(name).__module__ for name in FAMILIES} == modules


@pytest.mark.parametrize("name", FAMILIES)
def test_a_network_of_each_family_learns_and_teaches_by_every_method(recipe: Path, name: str):
    # A SqueezeNet has no embedding, which ReviewKD compares.
    more = ("losses.review=null",) if name.startswith("squeezenet") else ()
    expected = {"ce", *METHODS} - ({"review"} if more else set())
    assert check(recipe, name, "resnet18", *more) == expected
    assert check(recipe, "mobilenet_v1", name, *more) == expected


def test_a_network_without_an_embedding_is_refused_with_the_reason(recipe: Path):
    with pytest.raises(RecipeError, match=r"^student.stages: the network has no stage 'embedding', because no known "):
        check(recipe, "squeezenet1_1", "resnet18")
