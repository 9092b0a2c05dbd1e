"""The papers' tables: a recipe for each cell, and no constant in two places."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from methods import MULTILABEL, OF_IMAGES, OF_TOKENS

from pipeline.config.compose import compose
from pipeline.config.recipe import load_recipe
from pipeline.config.source import METHODS_FOLDER, OVERLAYS, RecipeSource, known_methods
from pipeline.config.tables import TEACHER, load_tables, table_cells
from pipeline.errors import ROOT

CONFIGS = ROOT / "configs"
CIFAR100 = CONFIGS / "cifar100"
TABLES = load_tables()
CIFAR_PAIRS = TABLES.datasets["cifar100"].pairs
PAIR_FILES = [CONFIGS / dataset / f"{pair}.yaml" for dataset, facts in TABLES.datasets.items() for pair in facts.pairs]


def pair(name: str, method: str, *overrides: str) -> Any:
    """Return the recipe of a CIFAR-100 pair by a method."""
    return load_recipe(CIFAR100 / f"{name}.yaml", [f"method={method}", *overrides]).recipe


def test_every_cell_that_a_paper_prints_has_its_recipe():
    printed = 0
    for dataset, facts in TABLES.datasets.items():
        for name, table in facts.pairs.items():
            methods = {method for numbers in table.published.values() for method in numbers} - {TEACHER}
            assert methods <= set(TABLES.methods_of(table))
            for method in methods:
                assert load_recipe(CONFIGS / dataset / f"{name}.yaml", [f"method={method}"]).recipe.epochs
            printed += sum(len(numbers.keys() - {TEACHER}) for numbers in table.published.values())
    assert (len(CIFAR_PAIRS), printed) == (11, 392)


def test_the_tables_name_every_method_and_every_network():
    others = {"ab_init", "fsp_init", "ft_init", "pad_init", "subclass_auxiliary"}
    others |= {f"sskd_stage{number}" for number in (1, 2, 3, 4)}
    others |= {"ddkd_paper_literal", "perception_paper_literal"}
    others |= {"segmentation", "detection", "box_l1", *MULTILABEL, *OF_TOKENS, *OF_IMAGES}
    assert set(known_methods()) - TABLES.methods.keys() == others
    assert TABLES.methods.keys() <= set(known_methods())
    for facts in TABLES.datasets.values():
        for table in facts.pairs.values():
            assert {table.teacher, table.student} <= TABLES.networks.keys()


def test_the_cells_of_a_pair_are_its_table_and_those_of_a_complete_recipe_itself():
    found = table_cells([CIFAR100 / "vgg13_vgg8.yaml"], ())
    assert [cell.method for cell in found] == list(CIFAR_PAIRS["vgg13_vgg8"].methods)
    assert [cell.method for cell in table_cells([CIFAR100 / "proxy.yaml"], ["kd", "dkd"])] == ["kd", "dkd"]
    assert table_cells([CONFIGS / "demo.yaml"], ()) == [RecipeSource(CONFIGS / "demo.yaml")]


def constants(tree: Any) -> list[float]:
    """Return the numbers that stand under a recipe's losses or constants."""
    if isinstance(tree, dict):
        return [number for value in tree.values() for number in constants(value)]
    return [tree] if isinstance(tree, float | int) and not isinstance(tree, bool) else []


def test_a_pair_has_no_losses_of_its_own_and_an_overlay_changes_the_labels_loss_alone():
    overlays = sorted(CONFIGS.glob(f"*/{OVERLAYS}/*.yaml"))
    assert len([*PAIR_FILES, *overlays]) > 15
    for path in PAIR_FILES:
        assert "losses" not in yaml.safe_load(path.read_text()), path
    for path in overlays:
        assert yaml.safe_load(path.read_text()).get("losses", {}).keys() <= {"ce", "deit"}, path


def names(tree: Any, above: str = "") -> list[str]:
    """Return the dotted names of the values of a tree."""
    if not isinstance(tree, dict):
        return [above]
    return [name for key, value in tree.items() for name in names(value, f"{above}.{key}" if above else key)]


def test_every_constant_of_a_data_set_is_one_of_a_method():
    used = set(re.findall(r"\$\{([a-z_0-9.]+)\}", "".join(path.read_text() for path in METHODS_FOLDER.glob("*.yaml"))))
    for dataset in TABLES.datasets:
        tree = yaml.safe_load((CONFIGS / dataset / f"{dataset}.yaml").read_text())
        for name in names(tree.get("constants", {})):
            parts = name.split(".")
            assert used & {".".join(parts[:end]) for end in range(1, len(parts) + 1)}, f"{dataset}: {name}"


@pytest.mark.parametrize("overlay", sorted(path.stem for path in (CONFIGS / "imagenet" / OVERLAYS).glob("*.yaml")))
@pytest.mark.parametrize("pair", ["r34_r18", "r50_mbv1", "swin_l_swin_t", "regnety_deit_tiny"])
def test_every_overlay_of_imagenet_lies_over_every_pair(pair: str, overlay: str):
    overlay, _, own = overlay.partition("_")  # cached_ddkd is cached for the method ddkd
    method = own or "kd"
    recipe = load_recipe(CONFIGS / "imagenet" / f"{pair}.yaml", [f"method={method}", f"with={overlay}"]).recipe
    plain = load_recipe(CONFIGS / "imagenet" / f"{pair}.yaml", [f"method={method}"]).recipe
    assert recipe != plain
    seen = recipe.epochs * recipe.data.repeat
    lengths = {"torchvision": 600, "b2": 450, "b3": 300, "deit": 300, "patient": 1200}
    assert seen == lengths.get(overlay, 100)


@pytest.mark.parametrize("method", ["ddkd", "ddkd_perception", "perception", "kd_perception", "review_dkd"])
def test_methods_that_share_constants_do_not_repeat_them(method: str):
    own = yaml.safe_load((METHODS_FOLDER / f"{method}.yaml").read_text())
    assert constants(own.get("losses", {})) == []


def test_a_pair_repeats_no_constant_of_a_method():
    defaults: dict[str, Any] = {}
    for path in METHODS_FOLDER.glob("*.yaml"):
        defaults |= yaml.safe_load(path.read_text()).get("constants", {})
    for file in PAIR_FILES:
        for name, values in yaml.safe_load(file.read_text()).get("constants", {}).items():
            for key, value in values.items():
                assert value is None or defaults.get(name, {}).get(key) != value, f"{file}: constants.{name}.{key}"


def test_a_pairs_constant_reaches_every_method_that_uses_it():
    for method, keys in {"dkd": ("dkd",), "ddkd": ("ddkd", "logit_distance", "dkd"), "review_dkd": ("dkd",)}.items():
        found: Any = compose(RecipeSource(CIFAR100 / "resnet56_resnet20.yaml", method))["losses"]
        for key in keys:
            found = found[key]
        assert (found["beta"], found["ramp"]) == (2.0, {"linear_epochs": 20})
    perceived = compose(RecipeSource(CIFAR100 / "resnet56_resnet20.yaml", "perception"))["losses"]["perception"]
    assert (perceived["inner"]["dkd"]["alpha"], perceived["inner"]["dkd"]["beta"]) == (1.0, 8.0)


BETAS = {
    **{"resnet56_resnet20": 2, "resnet110_resnet32": 2, "resnet32x4_resnet8x4": 8, "wrn_40_2_wrn_16_2": 6},
    **{"wrn_40_2_wrn_40_1": 6, "vgg13_vgg8": 6, "resnet32x4_shufflenet_v1": 8, "resnet32x4_shufflenet_v2": 8},
    **{"wrn_40_2_shufflenet_v1": 8, "resnet50_mobilenet_v2": 8, "vgg13_mobilenet_v2": 6},
}


def test_dkds_beta_and_the_rate_of_every_pair_are_the_published_ones():
    assert BETAS.keys() == CIFAR_PAIRS.keys()
    for name, beta in BETAS.items():
        recipe = pair(name, "dkd")
        assert recipe.losses["dkd"].config.model_dump()["beta"] == beta
        assert recipe.schedule.rate == (0.01 if re.search("net_v[12]$", name) else 0.05)
        assert (recipe.batch, recipe.epochs, recipe.schedule.milestones) == (64, 240, (150, 180, 210))


def test_imagenet_recipes_have_a_temperature_of_one_and_one_epoch_of_warm_up():
    for name, beta in {"r34_r18": 0.5, "r50_mbv1": 2.0}.items():
        path = CONFIGS / "imagenet" / f"{name}.yaml"
        for method in ("dkd", "ddkd", "perception", "ddkd_perception"):
            text = yaml.safe_dump(compose(RecipeSource(path, method))["losses"])
            assert "temperature: 4.0" not in text
            assert f"beta: {beta}" in text
            assert "linear_epochs: 1\n" in text
        teacher = load_recipe(path, ["method=dkd"]).recipe.teacher
        assert teacher is not None
        assert teacher.weights == "IMAGENET1K_V1"


def test_a_paper_literal_method_differs_from_its_method_in_what_the_paper_says():
    plain, literal = pair("resnet56_resnet20", "perception"), pair("resnet56_resnet20", "perception_paper_literal")
    assert (literal.batch, literal.epochs, literal.schedule.factor) == (256, 270, 0.01)
    assert literal.schedule.milestones == (150, 180, 210, 240)
    assert literal.losses == plain.losses
    assert pair("vgg13_mobilenet_v2", "ddkd_paper_literal").schedule.rate == 0.05
    assert pair("vgg13_mobilenet_v2", "perception_paper_literal").schedule.factor == 0.1


def test_the_second_stage_of_ab_begins_from_the_first():
    second = load_recipe(CIFAR100 / "vgg13_vgg8.yaml", ["method=ab"])
    assert (list(second.recipe.losses), second.recipe.teacher) == (["ce"], None)
    first = second.start
    assert first is not None
    assert str(first.source) == "configs/cifar100/vgg13_vgg8.yaml method=ab_init"
    assert (list(first.recipe.losses), first.recipe.epochs) == (["ab"], 30)
    assert first.recipe.teacher is not None


PROXY = ("ce", "kd", "dkd", "perception", "diffkd", "ddkd", "ddkd_perception", "crd", "review", "dist")


def test_the_proxy_has_one_strategy_for_all_methods():
    recipes = [load_recipe(CIFAR100 / "proxy.yaml", [f"method={method}"]).recipe for method in PROXY]
    for recipe in recipes:
        assert (recipe.epochs, recipe.batch, recipe.schedule) == (12, 64, recipes[0].schedule)
        assert (recipe.teacher is None) == (list(recipe.losses) == ["ce"])
        for spec in recipe.losses.values():
            assert "linear_epochs: 20" not in yaml.safe_dump(spec.config.model_dump(mode="json"))


CACHED = [
    *(
        RecipeSource(path, method, ("cached",))
        for path in PAIR_FILES
        if path.parent.name != "coco"  # the maps of detectors differ in size, and are terabytes
        for method in ("kd", "dkd", "perception", "ddkd")
    ),
    RecipeSource(CONFIGS / "tiny_imagenet" / "resnet18_mobilenet_v1.yaml", "ddkd", ("cached",)),
]


@pytest.mark.parametrize("source", CACHED, ids=str)
def test_a_recipe_with_a_cache_differs_only_in_the_cache_and_its_views(source: RecipeSource):
    tree = compose(source)
    views, folder = tree["data"].pop("views"), Path(tree["teacher"].pop("cache"))
    tree["teacher"].pop("encode", None)
    assert views > 0
    assert tree == compose(RecipeSource(source.path, source.method))
    assert folder.parts[:2] == ("caches", source.path.parent.name)


def test_recipes_that_share_a_cache_have_the_same_teacher_and_the_same_views():
    by_folder: dict[str, list[dict[str, Any]]] = {}
    for source in CACHED:
        tree = compose(source)
        by_folder.setdefault(tree["teacher"]["cache"], []).append({key: tree[key] for key in ("teacher", "data")})
    assert len(by_folder) == 19  # eight teachers with a folder of logits and one of maps, and three more of logits
    for found in by_folder.values():
        assert found == [found[0]] * len(found)
