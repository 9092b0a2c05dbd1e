"""The rows of the papers' tables: one recipe each, written by a generator, no constant in two places."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config.compose import compose
from pipeline.config.recipe import load_recipe
from pipeline.errors import ROOT

CONFIGS = ROOT / "configs"
GENERATOR = runpy.run_path(str(CONFIGS / "generate.py"))
TABLES = yaml.safe_load((CONFIGS / "tables.yaml").read_text())
CIFAR_PAIRS = TABLES["datasets"]["cifar100"]["pairs"]


def test_the_generated_files_are_what_the_generator_writes():
    stale = [path for path, text in GENERATOR["files"](TABLES).items() if (CONFIGS / path).read_text() != text]
    assert stale == []


def test_every_row_in_the_tree_is_a_cell_of_the_tables():
    written = {CONFIGS / path for path in GENERATOR["files"](TABLES)}
    beside = [path for pair in CONFIGS.rglob("pair.yaml") for path in pair.parent.glob("*.yaml")]
    assert [path for path in beside if path.name != "pair.yaml" and path not in written] == []


def test_every_cell_that_a_paper_prints_has_its_recipe():
    for dataset, facts in TABLES["datasets"].items():
        for pair, cells in facts["pairs"].items():
            for source, numbers in cells["published"].items():
                for method in numbers.keys() - {"teacher"}:
                    assert (CONFIGS / dataset / pair / f"{method}.yaml").is_file(), (pair, source, method)
    assert len(CIFAR_PAIRS) == 11


def constants(tree: Any) -> list[float]:
    """Return the numbers that stand under a recipe's losses or constants."""
    if isinstance(tree, dict):
        return [number for value in tree.values() for number in constants(value)]
    return [tree] if isinstance(tree, float | int) and not isinstance(tree, bool) else []


def test_a_row_holds_no_constant_of_its_own():
    for path in GENERATOR["files"](TABLES):
        if path.suffix == ".yaml":
            own = yaml.safe_load((CONFIGS / path).read_text())
            assert not {"losses", "constants"} & own.keys(), path


@pytest.mark.parametrize("method", ["ddkd", "ddkd_perception", "perception", "kd_perception", "review_dkd"])
def test_methods_that_share_constants_do_not_repeat_them(method: str):
    """What DDKD takes from DiffKD and from DKD, say, stands in their files alone."""
    own = yaml.safe_load((CONFIGS / "methods" / f"{method}.yaml").read_text())
    assert constants(own.get("losses", {})) == []


def test_a_pair_repeats_no_constant_of_a_method():
    defaults: dict[str, Any] = {}
    for path in (CONFIGS / "methods").glob("*.yaml"):
        defaults |= yaml.safe_load(path.read_text()).get("constants", {})
    for pair in CONFIGS.rglob("pair.yaml"):
        for name, values in yaml.safe_load(pair.read_text()).get("constants", {}).items():
            for key, value in values.items():
                assert defaults.get(name, {}).get(key) != value, f"{pair}: constants.{name}.{key}"


def test_the_commands_of_the_readmes_name_recipes_that_load():
    for readme in (ROOT / "README.md", CONFIGS / "README.md"):
        named = re.findall(r"configs/[\w./*{},]+\.yaml", readme.read_text())
        assert named
        for pattern in named:
            before, brace, rest = pattern.partition("{")
            inside, _, after = rest.partition("}")
            for choice in inside.split(",") if brace else [""]:
                paths = sorted(ROOT.glob(before + choice + after))
                assert paths, pattern
                for path in paths:
                    assert load_recipe(path).recipe.epochs


def test_a_pairs_constant_reaches_every_method_that_uses_it():
    folder = CONFIGS / "cifar100" / "resnet56_resnet20"
    for method, place in {
        "dkd": ("dkd",),
        "ddkd": ("ddkd", "logit_distance", "dkd"),
        "review_dkd": ("dkd",),
    }.items():
        found: Any = compose(folder / f"{method}.yaml", ["constants.dkd.beta=3.5"])["losses"]
        for key in place:
            found = found[key]
        assert found["beta"] == 3.5
        assert found["ramp"] == {"linear_epochs": 20}
    perceived = compose(folder / "perception.yaml")["losses"]["perception"]["inner"]["dkd"]
    assert (perceived["alpha"], perceived["beta"]) == (1.0, 8.0)


BETAS = {
    **{"resnet56_resnet20": 2, "resnet110_resnet32": 2, "resnet32x4_resnet8x4": 8, "wrn_40_2_wrn_16_2": 6},
    **{"wrn_40_2_wrn_40_1": 6, "vgg13_vgg8": 6, "resnet32x4_shufflenet_v1": 8, "resnet32x4_shufflenet_v2": 8},
    **{"wrn_40_2_shufflenet_v1": 8, "resnet50_mobilenet_v2": 8, "vgg13_mobilenet_v2": 6},
}


def test_dkds_beta_and_the_rate_of_every_pair_are_the_published_ones():
    assert BETAS.keys() == CIFAR_PAIRS.keys()
    for pair, beta in BETAS.items():
        recipe = load_recipe(CONFIGS / "cifar100" / pair / "dkd.yaml").recipe
        assert recipe.losses["dkd"].config.model_dump()["beta"] == beta
        assert recipe.schedule.rate == (0.01 if re.search("net_v[12]$", pair) else 0.05)
        assert (recipe.batch, recipe.epochs, recipe.schedule.milestones) == (64, 240, (150, 180, 210))


def test_imagenet_rows_have_a_temperature_of_one_and_one_epoch_of_warm_up():
    for pair, beta in {"r34_r18": 0.5, "r50_mbv1": 2.0}.items():
        for method in ("dkd", "ddkd", "perception", "ddkd_perception"):
            found: Any = compose(CONFIGS / "imagenet" / pair / f"{method}.yaml")["losses"]
            text = yaml.safe_dump(found)
            assert "temperature: 4.0" not in text
            assert f"beta: {beta}" in text
            assert "linear_epochs: 1\n" in text
        teacher = load_recipe(CONFIGS / "imagenet" / pair / "dkd.yaml").recipe.teacher
        assert teacher is not None
        assert teacher.weights == "IMAGENET1K_V1"


def test_a_letter_by_letter_variant_differs_from_its_row_in_what_the_paper_says():
    pair = CONFIGS / "cifar100" / "resnet56_resnet20"
    plain, literal = (load_recipe(pair / f"perception{end}.yaml").recipe for end in ("", "_paper_literal"))
    assert (literal.batch, literal.epochs, literal.schedule.factor) == (256, 270, 0.01)
    assert literal.schedule.milestones == (150, 180, 210, 240)
    assert literal.losses == plain.losses
    mobile = CONFIGS / "cifar100" / "vgg13_mobilenet_v2"
    assert load_recipe(mobile / "ddkd_paper_literal.yaml").recipe.schedule.rate == 0.05
    assert load_recipe(mobile / "perception_paper_literal.yaml").recipe.schedule.factor == 0.1


def test_the_second_stage_of_ab_begins_from_the_first():
    recipe = load_recipe(CONFIGS / "cifar100" / "vgg13_vgg8" / "ab.yaml").recipe
    assert list(recipe.losses) == ["ce"]
    assert recipe.teacher is None
    assert recipe.student.start is not None
    assert recipe.student.start.recipe == str(Path("configs", "cifar100", "vgg13_vgg8", "ab_init.yaml"))
    first = load_recipe(recipe.student.start.recipe).recipe
    assert (list(first.losses), first.epochs) == (["ab"], 30)


def test_the_proxy_is_every_compared_method_under_one_strategy():
    methods = TABLES["variants"]["proxy"]["methods"]
    assert len(methods) == 10
    recipes = [load_recipe(CONFIGS / "cifar100" / "proxy" / f"{method}.yaml").recipe for method in methods]
    for recipe in recipes:
        assert (recipe.epochs, recipe.batch, recipe.schedule) == (12, 64, recipes[0].schedule)
        assert (recipe.teacher is None) == (list(recipe.losses) == ["ce"])
        for spec in recipe.losses.values():
            assert "linear_epochs: 20" not in yaml.safe_dump(spec.config.model_dump(mode="json"))


CACHED = sorted(CONFIGS.rglob("*_cached.yaml"))


@pytest.mark.parametrize("path", CACHED, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_a_cached_row_is_its_row_with_a_cache_that_its_head_says_how_to_write(path: Path):
    tree = compose(path)
    views, folder = tree["data"].pop("views"), Path(tree["teacher"].pop("cache"))
    tree["teacher"].pop("encode", None)
    assert views > 0
    assert tree == compose(path.with_name(f"{path.stem.removesuffix('_cached')}.yaml"))
    assert folder.parts[:2] == ("caches", path.relative_to(CONFIGS).parts[0])
    _, write, train, *_ = path.read_text().splitlines()
    assert f"pipeline/cache_teacher.py {path.relative_to(ROOT)}" in write
    assert f"pipeline/train.py {path.relative_to(ROOT)}" in train


def test_rows_that_share_a_cache_ask_the_same_teacher_for_the_same_views():
    by_folder: dict[str, list[dict[str, Any]]] = {}
    for path in CACHED:
        tree = compose(path)
        by_folder.setdefault(tree["teacher"]["cache"], []).append({key: tree[key] for key in ("teacher", "data")})
    assert len(by_folder) == 7
    for asked in by_folder.values():
        assert asked == [asked[0]] * len(asked)


def test_what_a_view_takes_on_disk_is_two_bytes_a_number():
    for row, told in {
        "imagenet/r50_mbv1/kd": "10 views of 2.56 GB.",  # 1,281,167 · 1000 · 2
        "imagenet/r50_mbv1/ddkd": "4 views of 34.7 GB.",  # 1,281,167 · (1000 + 256·7·7) · 2
        "imagenet/r34_r18/ddkd": "4 views of 66.8 GB.",  # 1,281,167 · (1000 + 512·7·7) · 2
        "cifar100/resnet56_resnet20/perception": "10 views of 10 MB.",  # 50,000 · 100 · 2
        "cifar100/resnet56_resnet20/ddkd": "10 views of 420 MB.",  # 50,000 · (100 + 64·8·8) · 2
        "tiny_imagenet/mobilenet_v1_ddkd": "4 views of 41.4 MB,",  # 10,000 · (20 + 512·2·2) · 2
    }.items():
        assert f"\n# Cache: {told} " in (CONFIGS / f"{row}_cached.yaml").read_text()
