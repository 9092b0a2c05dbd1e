from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from pipeline.config.arguments import parse_recipe_args
from pipeline.config.compose import compose
from pipeline.config.recipe import dump_recipe, load_recipe
from pipeline.config.source import RecipeSource
from pipeline.errors import ROOT, RecipeError

IMAGENET, DDKD = ROOT / "configs" / "imagenet" / "r50_mbv1.yaml", "method=ddkd"
CIFAR100 = ROOT / "configs" / "cifar100" / "resnet56_resnet20.yaml"
MINIMAL = """
student: {model: resnet18}
teacher: {model: resnet34, weights: teacher.pt}
losses: {ce: {}, kd: {temperature: 4.0, weight: 0.9}}
data: {path: shards, loader: dali, size: 64, mean: [0.5, 0.5, 0.5], std: [0.2, 0.2, 0.2]}
epochs: 3
batch: 8
schedule: {rate: 0.1}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(MINIMAL)
    return path


def refused(path: Path, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_overrides_are_yaml_and_the_last_one_wins(recipe: Path):
    loaded = load_recipe(
        recipe, ["batch=16", "losses.kd.temperature=2", "schedule.rate=1e-4", "batch=32", "data.mean=[0.1,0.2,0.3]"]
    ).recipe
    assert (loaded.batch, loaded.schedule.rate, loaded.data.mean) == (32, 1e-4, (0.1, 0.2, 0.3))
    assert loaded.losses["kd"].config.temperature == 2.0  # type: ignore[attr-defined]


def test_a_resolved_recipe_reads_back_as_itself(recipe: Path, tmp_path: Path):
    first = load_recipe(recipe, ["losses.kd.ramp={from: 1, linear_epochs: 5}"]).recipe
    again = tmp_path / "again.yaml"
    again.write_text(yaml.safe_dump(dump_recipe(first)))
    assert dump_recipe(load_recipe(again).recipe) == dump_recipe(first)


def test_bases_are_merged_in_order_and_null_deletes(recipe: Path, tmp_path: Path):
    (tmp_path / "more.yaml").write_text("losses: {kd: null, dkd: {alpha: 1, beta: 2, temperature: 4}}\nclip: 5.0\n")
    child = tmp_path / "child.yaml"
    child.write_text("base: [recipe.yaml, more.yaml]\nlosses: {dkd: {beta: 8}}\nclip: null\n")
    loaded = load_recipe(child).recipe
    assert list(loaded.losses) == ["ce", "dkd"]
    assert loaded.losses["dkd"].config.model_dump(include={"alpha", "beta"}) == {"alpha": 1.0, "beta": 8.0}
    assert loaded.clip is None


def test_an_unknown_key_is_named_with_its_file_and_the_known_one(recipe: Path, tmp_path: Path):
    assert refused(recipe, "losses.kd.temprature=3").endswith(
        "command line: losses.kd.temprature: unknown key; did you mean 'temperature'?"
    )
    child = tmp_path / "child.yaml"
    child.write_text("base: recipe.yaml\nschedule: {rat: 0.1}\n")
    assert refused(child).endswith("child.yaml: schedule.rat: unknown key; did you mean 'rate'?")
    assert "did you mean 'batch'?" in refused(recipe, "batsh=3")
    assert "did you mean 'threads'?" in refused(recipe, "data.thread=3")
    assert "did you mean 'weights'?" in refused(recipe, "teacher.weigths=x")
    assert "did you mean 'linear_epochs'?" in refused(recipe, "losses.kd.ramp={linear_epoch: 3}")


def test_the_keys_of_a_nested_loss_are_checked_like_all_others(recipe: Path):
    nested = "losses={perception: {eps: 1e-5, inner: {dkd: {alpha: 1, beta: 8, temperature: 4, gamma: 1}}}}"
    assert "losses.perception.inner.dkd.gamma: unknown key; known here are" in refused(recipe, "losses.kd=null", nested)
    assert "there is no loss 'dkdd'; did you mean 'dkd'?" in refused(recipe, "losses.dkdd={}")
    assert "did you mean 'temperature'?" in refused(IMAGENET, DDKD, "losses.ddkd.logit_distance.dkd.temprature=3")
    assert "did you mean 'latent'?" in refused(IMAGENET, DDKD, "losses.ddkd.feature.latnt=3")


def test_a_wrong_type_says_what_was_given(recipe: Path):
    assert refused(recipe, "batch=many").endswith(
        "command line: batch: should be a valid integer, unable to parse string as an integer, got 'many'"
    )
    assert refused(recipe, "epochs=0").endswith("command line: epochs: should be greater than 0, got 0")
    assert "precision" in refused(recipe, "precision=int8")


@pytest.mark.parametrize("given", ["wide", "{wide: 3}", "[3]"])
def test_where_several_things_may_stand_the_key_is_named_once_and_all_of_them_are_said(given: str):
    message = refused(IMAGENET, DDKD, f"losses.ddkd.feature.latent={given}")
    assert "command line: losses.ddkd.feature.latent: should be a valid integer" in message
    assert ", or should be 'auto', got " in message
    assert not message.endswith("more)")


def test_a_missing_key_is_named(recipe: Path):
    assert refused(recipe, "schedule=null").endswith("schedule: this key is required")
    assert refused(recipe, "losses.kd.temperature=null").endswith("losses.kd.temperature: this key is required")


def test_a_loss_without_its_teacher_is_refused(recipe: Path):
    assert "the loss 'kd' needs a teacher" in refused(recipe, "teacher=null")


def test_a_key_that_stands_twice_is_refused(tmp_path: Path):
    path = tmp_path / "twice.yaml"
    path.write_text("epochs: 3\ndata:\n  size: 32\n  # in pixels\n  'size': 64\n")
    assert refused(path).endswith("twice.yaml: line 5: the key 'size' is repeated; the first one is in line 3")


def test_a_base_that_is_no_file_name_is_refused(tmp_path: Path):
    path = tmp_path / "odd.yaml"
    for base in ("3", "[1, 2]", "{a: b}"):
        path.write_text(f"base: {base}\n")
        assert "odd.yaml: base: expected a file or a list of files" in refused(path)


def test_bad_yaml_is_named_with_its_line(tmp_path: Path):
    path = tmp_path / "bad.yaml"
    path.write_text("epochs: 3\nlosses: {ce: {}\nbatch: 3\n")
    assert "bad.yaml: line " in refused(path)


def test_a_recipe_that_is_not_there_is_one_line(tmp_path: Path):
    assert "no such recipe" in refused(tmp_path / "none.yaml")
    (tmp_path / "child.yaml").write_text("base: none.yaml\n")
    assert "base: there is no file 'none.yaml' beside it" in refused(tmp_path / "child.yaml")


def test_a_recipe_may_not_be_its_own_base(tmp_path: Path):
    (tmp_path / "a.yaml").write_text("base: b.yaml\n")
    (tmp_path / "b.yaml").write_text("base: a.yaml\n")
    assert "its own base" in refused(tmp_path / "a.yaml")


def test_a_recipe_names_others_relative_to_its_own_file(recipe: Path, tmp_path: Path):
    folder = tmp_path / "students"
    folder.mkdir()
    (tmp_path / "pair.yaml").write_text(
        "base: recipe.yaml\nteacher: {recipe: recipe.yaml, weights: null, model: null}\n"
    )
    (folder / "child.yaml").write_text("base: ../pair.yaml\ncompare: [../recipe.yaml]\n")
    loaded = load_recipe(folder / "child.yaml").recipe
    assert loaded.teacher is not None
    assert (loaded.teacher.recipe, [other.recipe for other in loaded.compare]) == (str(recipe), [str(recipe)])
    assert "it names a recipe that does not exist" in refused(folder / "child.yaml", "teacher.recipe=gone.yaml")


def test_a_constant_stands_once_and_is_used_where_it_is_named(recipe: Path, tmp_path: Path):
    (tmp_path / "method.yaml").write_text(
        "constants: {kd: {temperature: 4.0, weight: 0.9}, ce: 0.1}\n"
        'losses: {ce: {weight: "${ce}"}, kd: "${kd}", perception: {inner: {kd: {temperature: "${kd.temperature}"}}}}\n'
    )
    child = tmp_path / "child.yaml"
    child.write_text(
        "base: [recipe.yaml, method.yaml]\nlosses: {kd: null}\nconstants: {kd: {temperature: 2.0}, ce: 0.3}\n"
    )
    losses = dump_recipe(load_recipe(child).recipe)["losses"]
    assert "kd" not in losses
    assert losses["ce"]["weight"] == 0.3
    assert losses["perception"]["inner"]["kd"]["temperature"] == 2.0


def test_a_constant_that_is_a_mapping_may_be_changed_in_part(recipe: Path, tmp_path: Path):
    (tmp_path / "method.yaml").write_text(
        "constants: {dkd: {alpha: 1.0, beta: 8.0, temperature: 4.0}}\nlosses: {kd: null, dkd: '${dkd}'}\n"
    )
    child = tmp_path / "child.yaml"
    child.write_text("base: [recipe.yaml, method.yaml]\nlosses: {dkd: {beta: 2.0}}\n")
    dkd = dump_recipe(load_recipe(child, ["losses.dkd.temperature=1"]).recipe)["losses"]["dkd"]
    assert (dkd["alpha"], dkd["beta"], dkd["temperature"]) == (1.0, 2.0, 1.0)
    assert "losses.dkd.bta: unknown key; did you mean 'beta'?" in refused(child, "losses.dkd.bta=3")
    assert "losses.dkd.temperature: ${dkd.temperature} is a single value, 4.0" in refused(
        recipe,
        "constants={dkd: {temperature: 4.0}}",
        "losses.dkd={alpha: 1, beta: 2, temperature: '${dkd.temperature}'}",
        "losses.dkd.temperature.x=3",
    )
    told = "losses.dkd: ${dkd} is null in this recipe; remove the override, or set all keys by constants.dkd={…}"
    assert told in refused(child, "constants.dkd=null", "losses.dkd.beta=3")
    assert list(load_recipe(child, ["losses.dkd=null"]).recipe.losses) == ["ce"]


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("epochz=null", "epochz: unknown key; did you mean 'epochs'?"),
        ("epochz=", "epochz: unknown key; did you mean 'epochs'?"),
        ("stop.hours=null", "stop.hours: unknown key; known here are epoch, minutes, steps"),
        ("losses.kdd=null", "losses.kdd: unknown key; did you mean 'kd'?"),
        ("losses.kd.wait=null", "losses.kd.wait: unknown key; did you mean 'weight'?"),
        (
            "losses.kd.ramp={linear_epochs: 2, untill: null}",
            "losses.kd.ramp.untill: unknown key; did you mean 'until'?",
        ),
    ],
)
def test_a_null_that_takes_nothing_away_is_no_way_to_hide_a_typo(recipe: Path, tmp_path: Path, word: str, told: str):
    assert refused(recipe, "losses.kd.temperature=4.0", word) == f"command line: {told}"


@pytest.mark.parametrize("word", ["clip=null", "losses.dkd=null", "data.crop=", "losses={'a.b:C': null}"])
def test_a_null_at_a_key_that_may_stand_there_is_taken(recipe: Path, word: str):
    assert load_recipe(recipe, [word]).recipe == load_recipe(recipe).recipe


@pytest.mark.parametrize("word", ["=", "=5", ".epochs=1", "losses..kd={}", "epochs.=3"])
def test_an_override_without_a_key_is_refused(recipe: Path, word: str):
    assert f"command line: {word!r}: no key before the =" in refused(recipe, word)


def test_a_null_deletes_what_a_constant_says_too(recipe: Path, tmp_path: Path):
    (tmp_path / "method.yaml").write_text(
        "constants: {kd: {temperature: 4.0, ramp: {linear_epochs: 20}}}\nlosses: {kd: '${kd}'}\n"
    )
    child = tmp_path / "child.yaml"
    child.write_text("base: [recipe.yaml, method.yaml]\nlosses: {kd: null}\n")
    assert list(load_recipe(child).recipe.losses) == ["ce"]
    child.write_text("base: method.yaml\nconstants: {kd: {weight: 0.5}}\n")
    tree = compose(RecipeSource(child), ["losses.kd.ramp=null"])
    assert tree == {"losses": {"kd": {"temperature": 4.0, "weight": 0.5}}}
    assert (
        "latent"
        not in compose(RecipeSource(CIFAR100, "ddkd"), ["losses.ddkd.feature.latent=null"])["losses"]["ddkd"]["feature"]
    )


def test_constants_may_stand_in_lists_and_in_other_constants(recipe: Path, tmp_path: Path):
    child = tmp_path / "child.yaml"
    child.write_text("base: recipe.yaml\nconstants: {a: 0.5, b: '${a}', c: {x: '${b}'}}\n")
    loaded = load_recipe(child, ["losses.ce.weight='${c.x}'", "data.mean=['${a}', 0, 1]"]).recipe
    assert loaded.losses["ce"].config.weight == 0.5
    assert loaded.data.mean == (0.5, 0.0, 1.0)
    child.write_text("base: recipe.yaml\nconstants: {a: '${b}', b: '${a}'}\n")
    assert "the constant 'a' refers to itself" in refused(child, "batch='${a}'")


def test_the_command_line_sets_the_key_that_uses_a_constant_and_not_the_constant():
    kd = load_recipe(CIFAR100, ["method=kd", "losses.kd.temperature=2"]).recipe.losses["kd"].config.model_dump()
    assert (kd["temperature"], kd["weight"]) == (2.0, 0.9)
    for words, hint in {
        ("method=kd", "constants.kd.temperature=2"): "constants are for files; set losses.kd.temperature instead",
        (DDKD, "constants.dkd.beta=2"): "set losses.ddkd.logit_distance.dkd.beta instead",
        (DDKD, "constants={dkd: {beta: 2}}"): "set losses.ddkd.logit_distance.dkd.beta instead",
        ("method=kd", "constants.kd.temprature=2"): "nothing here uses this constant",
        ("method=kd", "constants.dkd.beta=2"): "nothing here uses this constant",
    }.items():
        message = refused(CIFAR100, *words)
        assert message.startswith("command line: constants.")
        assert message.endswith(hint)


def test_a_bad_constant_names_the_file_that_sets_it_and_the_key_that_uses_it(recipe: Path, tmp_path: Path):
    child = tmp_path / "child.yaml"
    child.write_text("base: recipe.yaml\nconstants: {t: many}\nlosses: {kd: {temperature: '${t}'}}\n")
    assert refused(child).startswith(f"{child}: losses.kd.temperature: ")
    assert "constants: expected a mapping, got 3" in refused(recipe, "constants=3")
    assert "expected losses by name" in refused(recipe, "losses={3: {}}", "losses.ce=null", "losses.kd=null")
    child.write_text("base: recipe.yaml\nconstants: {a: 1}\nfolder: runs/${a}\n")
    assert "'runs/${a}': a constant must be the complete value" in refused(child)


def test_a_constant_that_is_not_there_is_named(recipe: Path, tmp_path: Path):
    child = tmp_path / "child.yaml"
    child.write_text("base: recipe.yaml\nconstants: {dkd: {beta: 8.0}}\nlosses: {kd: {temperature: '${dkd.T}'}}\n")
    assert refused(child).endswith("child.yaml: losses.kd.temperature: there is no constant 'dkd.T'; known are dkd")
    assert refused(recipe, "losses.kd='${kd}'").endswith("losses.kd: there is no constant 'kd'; there are none")


def test_a_users_own_model_may_be_written_as_one_mapping(recipe: Path):
    own = "{path: 'mine.networks:small', stages: {stage1: body.0}}"
    loaded = load_recipe(recipe, [f"student.model={own}", f"teacher.model={own}"]).recipe
    assert loaded.teacher is not None
    for section in (loaded.student, loaded.teacher):
        assert (section.model, section.stages) == ("mine.networks:small", {"stage1": "body.0"})
    assert "student.model: should be a valid string" in refused(recipe, "student.model={file: x}")


def test_the_command_line_is_a_recipe_and_overrides():
    assert parse_recipe_args(["a.yaml", "batch=3"]) == (Path("a.yaml"), ["batch=3"])
    assert parse_recipe_args(["batch=3"])[0] == ROOT / "configs" / "demo.yaml"
    with pytest.raises(RecipeError, match="expected one recipe"):
        parse_recipe_args(["a.yaml", "b.yaml"])
