"""Values that would hang or fill a machine, and values that mean nothing: one line at once, with file and key."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import yaml
from smallest_recipe import RECIPE

from pipeline.config import paths
from pipeline.config.arguments import parse_command_args
from pipeline.config.compose import MAX_FILES, compose
from pipeline.config.reading import MAX_DEPTH, MAX_LENGTH, MAX_VALUES, read_yaml
from pipeline.config.recipe import load_recipe
from pipeline.config.source import RecipeSource
from pipeline.errors import RecipeError
from shards import prepare_demo


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path / "recipe.yaml"


def compose_path(path: Path) -> object:
    return compose(RecipeSource(path))


def refused(load: Callable[..., object], *given: object) -> str:
    with pytest.raises(RecipeError) as caught:
        load(*given)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
    return str(caught.value)


def aliases(deep: int, wide: int) -> str:
    lines = [f"a0: &a0 [{', '.join('x' * wide)}]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * wide)}]" for n in range(1, deep)]
    return "\n".join(lines)


# -- what a file says -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (aliases(9, 9), f"more than {MAX_VALUES:,} values"),
        ("[" * 900, f"line 1: deeper than {MAX_DEPTH} levels"),
        ("a: " + "{b: " * 60 + "}" * 60, f"line 1: deeper than {MAX_DEPTH} levels"),
        ("a: &a [*a]", "line 1: there is no anchor &a above"),
        ("\n".join(f"k{n}: 1" for n in range(MAX_VALUES)), f"more than {MAX_VALUES:,} values"),
        ("#" * (MAX_LENGTH + 1), f"more than {MAX_LENGTH:,} bytes"),
        ("a: " + "9" * 5000, "not a YAML file"),
        ("a: 2024-13-45", "not a YAML file"),
    ],
)
def test_a_file_that_stands_for_more_than_a_recipe_is_refused(tmp_path: Path, text: str, said: str):
    (tmp_path / "bomb.yaml").write_text(text)
    assert said in refused(read_yaml, tmp_path / "bomb.yaml")


def test_aliases_that_stand_for_little_are_what_yaml_says(tmp_path: Path):
    (tmp_path / "few.yaml").write_text("a: &a {b: [1, 2]}\nc: [*a, *a]\nd: {f: *a, e: 1}\n")
    assert read_yaml(tmp_path / "few.yaml") == yaml.safe_load((tmp_path / "few.yaml").read_text())


def test_constants_that_stand_for_constants_are_counted(tmp_path: Path):
    constants = {f"c{n}": {f"k{i}": f"${{c{n - 1}}}" for i in range(9)} if n else 1 for n in range(9)}
    (tmp_path / "wide.yaml").write_text(yaml.safe_dump({"constants": constants, "value": "${c8}"}))
    message = refused(compose_path, tmp_path / "wide.yaml")
    assert f": the constants expand to more than {MAX_VALUES:,} values" in message
    chain = {f"c{n}": f"${{c{n - 1}}}" if n else 1 for n in range(2000)}
    (tmp_path / "deep.yaml").write_text(yaml.safe_dump({"constants": chain, "value": "${c1999}"}))
    assert f"more than {MAX_DEPTH} levels" in refused(compose_path, tmp_path / "deep.yaml")


def test_bases_that_stand_on_bases_are_counted(tmp_path: Path):
    for n in range(9):
        (tmp_path / f"b{n}.yaml").write_text(yaml.safe_dump({"base": [f"b{n - 1}.yaml"] * 9} if n else {"a": 1}))
    assert f"it has more than {MAX_FILES} files below it" in refused(compose_path, tmp_path / "b8.yaml")


def test_the_command_lines_keys_and_values_have_the_same_bounds(recipe: Path):
    assert f"deeper than {MAX_DEPTH} levels" in refused(load_recipe, recipe, [".".join("a" * 5000) + "=1"])
    assert f"deeper than {MAX_DEPTH} levels" in refused(load_recipe, recipe, ["losses=" + "[" * 900])


# -- what a key holds -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["data.threads=100000"], "data.threads"),
        (["data.prefetch=100000000"], "data.prefetch"),
        (["data.views=1000000000"], "data.views"),
        (["data.size=1000000"], "data.size"),
        (["data.pad=1000000"], "data.pad"),
        (["data.validation_batch=1000000000"], "data.validation_batch"),
        (["batch=1000000000000"], "batch"),
        (["epochs=1000000000000"], "epochs"),
        (["seed=100000000000000000000"], "seed"),
        (["losses.crd={dim: 128, negatives: 1000000000000}"], "losses.crd.negatives"),
        (["schedule.rate=.inf"], "schedule.rate"),
        (["schedule.rate=.nan"], "schedule.rate"),
        (["losses.ce.weight=.inf"], "losses.ce.weight"),
        (["data.mean=[0.5, .nan, 0.5]"], "data.mean.1"),
        (["stop.minutes=.inf"], "stop.minutes"),
        (["optimizer.momentum=5"], "optimizer.momentum"),
        (["batch=true"], "batch"),
        (["data.hw_decoder_load=true"], "data.hw_decoder_load"),
        (["data.hw_decoder_load=0.5"], "data.hw_decoder_load"),
        (["optimizer.weight_decay=yes"], "optimizer.weight_decay"),
        (["data.std=[true, 1, 1]"], "data.std.0"),
        (["losses.ce.weight=true"], "losses.ce.weight"),
        (["schedule.warmup_epochs=7"], "schedule.warmup_epochs"),
    ],
)
def test_a_value_out_of_bounds_is_one_line_that_names_its_key(recipe: Path, words: Sequence[str], key: str):
    message = refused(load_recipe, recipe, words)
    assert f"{key}: " in message
    assert ("command line: " in message) or key == "schedule.warmup_epochs"


def test_the_file_is_named_where_the_file_says_it(recipe: Path):
    recipe.write_text(RECIPE.replace("rate: 0.1", "rate: .inf"))
    assert refused(load_recipe, recipe) == f"{recipe}: schedule.rate: expected a finite number, got inf"


def test_a_warm_up_as_long_as_the_run_and_switches_that_are_switches_are_taken(recipe: Path):
    words = ["schedule.warmup_epochs=3", "optimizer.nesterov=true", "graph=false", "stop.steps=1000000000"]
    assert load_recipe(recipe, words).recipe.optimizer.nesterov


@pytest.mark.parametrize("option", ["--train", "--val", "--size", "--jobs", "--samples-per-shard"])
def test_a_preparation_of_more_than_there_can_be_is_refused(option: str, tmp_path: Path):
    with pytest.raises(ValueError, match=f"argument {option}: expected a whole number from 1 to"):
        prepare_demo.main([str(tmp_path / "demo"), option, "1000000000", "--dry-run"])


def test_commands_own_words_have_bounds_too():
    from pipeline import bench
    from pipeline.caching.write import CacheArguments

    for own, kind in (({"repeats": "1000000000"}, bench.BenchArguments), ({"views": "1000000000"}, CacheArguments)):
        assert "less than or equal to" in refused(parse_command_args, own, kind)


# -- text that YAML reads otherwise -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["2024", "1e3", "on", "2024-01-01", "0x10", "1_000", "runs/a #1", "#1", "12:30:00"])
def test_a_name_on_the_command_line_is_kept_as_it_was_typed(recipe: Path, name: str):
    loaded = load_recipe(recipe, [f"folder={name}", f"data.path={name}"]).recipe
    assert (loaded.folder, loaded.data.path) == (name, name)


def test_quotes_and_null_mean_what_they_do_in_yaml(recipe: Path):
    assert load_recipe(recipe, ["folder=\"runs/a: 'b' #1\""]).recipe.folder == "runs/a: 'b' #1"
    assert load_recipe(recipe, ["folder=null"]).recipe.folder is None


def test_a_comment_in_a_value_is_no_comment(recipe: Path):
    assert "got '64 #1'" in refused(load_recipe, recipe, ["batch=64 #1"])


def test_what_is_no_yaml_says_how_to_quote_it_and_that_works(recipe: Path):
    message = refused(load_recipe, recipe, ["folder={a"])
    assert message.endswith("""write text in quotes: 'folder="{a"'""")
    assert load_recipe(recipe, ['folder="{a"']).recipe.folder == "{a"


def test_a_number_in_a_file_where_text_belongs_says_how_to_write_it(recipe: Path):
    recipe.write_text(RECIPE + "folder: 2024\n")
    assert refused(load_recipe, recipe) == f"{recipe}: folder: YAML reads 2024 here; write text in quotes"


def test_a_script_that_asks_for_paths_is_told_so_before_any_task_starts(recipe: Path):
    recipe.write_text(RECIPE + "folder: 2024\n")
    message = refused(paths.main, [str(recipe)])
    assert message == f"{recipe}: folder: expected one line of text, got 2024; write it in quotes"
    recipe.write_text(RECIPE + 'folder: "2024"\n')
    paths.main([str(recipe)])
