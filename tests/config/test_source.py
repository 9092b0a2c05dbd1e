"""Recipes are a pair and a method: how they are named, composed and refused, and where their runs are."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.config.compose import read_source
from pipeline.config.recipe import LoadedRecipe, load_recipe
from pipeline.config.source import known_methods
from pipeline.distributed.launcher import read_launch
from pipeline.errors import ROOT, RecipeError
from pipeline.runs import identity
from pipeline.runs.identity import Run, resolve, run_folder

OLD_RUNS: dict[str, tuple[str, str]] = json.loads(Path(__file__).with_name("identities.json").read_text())
"""Folder and first digits of the fingerprint of each recipe when every cell of a table had a file of its own."""
PAIR = "configs/cifar100/resnet56_resnet20.yaml"


def refused(path: str | Path, *overrides: str) -> str:
    """Return the one line with which a recipe is refused."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def resolve_without_data(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Resolve a run as if shards, caches and weights were there; the same substitutes made the stored digests."""
    manifest = SimpleNamespace(sha256="m" * 64, num_classes=100, classes=[str(i) for i in range(100)])
    monkeypatch.setattr(identity, "read_manifest", lambda path: manifest)
    monkeypatch.setattr(identity, "_cache_digest", lambda recipe, cache, folder: f"cache {cache}")
    monkeypatch.setattr(identity, "name_by_content", lambda *_: None)
    return lambda loaded: resolve(loaded, read_launch())


def test_every_run_of_former_versions_is_found_in_its_folder(resolve_without_data: Any):
    assert len(OLD_RUNS) > 360
    for text, (folder, fingerprint) in OLD_RUNS.items():
        path, *selection = text.split()
        run: Run = resolve_without_data(load_recipe(f"configs/{path}", selection))
        assert (str(run.folder), run.fingerprint[:16]) == (folder, fingerprint), text


def test_a_pair_without_a_method_is_one_line_with_the_methods():
    message = refused(PAIR)
    assert message.startswith(f"{PAIR}: it needs a method: method=NAME (compare.py: methods=A,B); methods are ab, ")
    assert all(f" {name}" in message for name in known_methods())
    assert refused(PAIR, "losses.dkd.beta=4") == message
    assert refused(PAIR, "methd=kd") == "command line: methd: unknown key; did you mean 'method'?"
    assert list(load_recipe(PAIR, ["losses.ce={}", "teacher=null"]).recipe.losses) == ["ce"]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("cifar100/resnet56_resnet20/dkd", "cifar100/resnet56_resnet20.yaml method=dkd"),
        ("cifar100/resnet56_resnet20/dkd_cached", "cifar100/resnet56_resnet20.yaml method=dkd with=cached"),
        ("cifar100/vgg13_vgg8/perception_paper_literal", "cifar100/vgg13_vgg8.yaml method=perception_paper_literal"),
        ("cifar100/vgg13_vgg8/pair", "cifar100/vgg13_vgg8.yaml"),
        ("cifar100/proxy/crd", "cifar100/proxy.yaml method=crd"),
        ("imagenet/r50_mbv1/ddkd_cached", "imagenet/r50_mbv1.yaml method=ddkd with=cached"),
        ("demo_ce", "demo.yaml method=ce"),
        ("tiny_imagenet/mobilenet_v1_ddkd", "tiny_imagenet/resnet18_mobilenet_v1.yaml method=ddkd"),
    ],
)
def test_the_path_of_a_former_version_is_one_line_with_the_new_name(old: str, new: str):
    message = f"configs/{old}.yaml: no such recipe; it is now configs/{new}"
    assert refused(f"configs/{old}.yaml") == message
    assert refused(ROOT / "configs" / f"{old}.yaml").endswith(f"no such recipe; it is now configs/{new}")
    path, *selection = f"configs/{new}".split()
    if selection:
        assert load_recipe(path, selection).recipe.epochs


def test_a_mistyped_recipe_names_the_nearest():
    assert refused("r50_mbv1") == "r50_mbv1: no such recipe; did you mean configs/imagenet/r50_mbv1.yaml?"
    assert refused("configs/cifar100/resnet56_resnet2.yaml").endswith(f"did you mean {PAIR}?")
    assert refused("xyz.yaml") == "xyz.yaml: no such recipe; recipes are under configs"


def test_a_mistyped_method_or_overlay_names_the_nearest():
    assert refused(PAIR, "method=dkdd") == "method: there is no 'dkdd' under configs/methods; did you mean 'dkd'?"
    assert refused(PAIR, "method=kd", "with=cachd").endswith("under configs/cifar100/overlays; did you mean 'cached'?")
    assert refused(PAIR, "method=xyz").endswith(f"known are {', '.join(known_methods())}")


def test_a_method_over_a_complete_recipe_is_refused():
    assert "has losses of its own" in refused("configs/cifar100/teachers/vgg13.yaml", "method=kd")


def test_a_method_lies_under_its_pair_and_its_overrides_over_it(tmp_path: Path):
    (tmp_path / "pair.yaml").write_text(f"base: {ROOT / PAIR}\nlosses: {{kd: {{temperature: 2.0}}}}\nmethod: kd\n")
    kd = load_recipe(tmp_path / "pair.yaml").recipe
    assert kd.losses["kd"].config.model_dump()["temperature"] == 2.0
    (tmp_path / "own.yaml").write_text("base: m.yaml\noverrides: {epochs: 7, optimizer: {momentum: 0.5}}\nbatch: 2\n")
    (tmp_path / "m.yaml").write_text("losses: {ce: {}}\noverrides: {epochs: 5, teacher: null}\n")
    own = load_recipe(PAIR, [f"method={tmp_path / 'own.yaml'}"]).recipe
    assert (own.epochs, own.batch, own.teacher) == (7, 64, None)
    assert (own.optimizer.momentum, own.optimizer.weight_decay) == (0.5, 5e-4)
    assert load_recipe(PAIR, [f"method={tmp_path / 'own.yaml'}", "epochs=9"]).recipe.epochs == 9


def test_a_wrong_key_is_reported_with_the_file_that_has_it(tmp_path: Path):
    (tmp_path / "m.yaml").write_text("losses: {ce: {}}\noverrides: {epochs: many}\n")
    message = refused(PAIR, f"method={tmp_path / 'm.yaml'}")
    assert message.startswith(f"{tmp_path / 'm.yaml'}: epochs: should be a valid integer")
    (tmp_path / "m.yaml").write_text("losses: {ce: {}}\noverrides: 3\n")
    assert (
        refused(PAIR, f"method={tmp_path / 'm.yaml'}") == f"{tmp_path / 'm.yaml'}: overrides: expected a mapping, got 3"
    )
    (tmp_path / "p.yaml").write_text(f"base: {ROOT / PAIR}\nmethod: [kd]\n")
    assert refused(tmp_path / "p.yaml").endswith("p.yaml: method: expected the name of a method, got ['kd']")


def test_several_overlays_lie_over_each_other_and_one_for_the_method_comes_first(tmp_path: Path):
    (tmp_path / "overlays").mkdir()
    (tmp_path / "p.yaml").write_text(f"base: {ROOT / PAIR}\n")
    (tmp_path / "overlays" / "short.yaml").write_text("epochs: 3\nbatch: 32\n")
    (tmp_path / "overlays" / "short_kd.yaml").write_text("base: short.yaml\nepochs: 4\n")
    (tmp_path / "overlays" / "large.yaml").write_text("batch: 128\n")
    found = {
        (method, names): load_recipe(tmp_path / "p.yaml", [f"method={method}", f"with={names}"]).recipe
        for method in ("kd", "dkd")
        for names in ("short", "short,large", "large,short")
    }
    assert {key: (recipe.epochs, recipe.batch) for key, recipe in found.items()} == {
        **{("kd", "short"): (4, 32), ("kd", "short,large"): (4, 128), ("kd", "large,short"): (4, 32)},
        **{("dkd", "short"): (3, 32), ("dkd", "short,large"): (3, 128), ("dkd", "large,short"): (3, 32)},
    }


@pytest.mark.parametrize(
    ("words", "folder"),
    [
        ((PAIR, "method=dkd"), "runs/cifar100/resnet56_resnet20/dkd/seed-0"),
        ((PAIR, "method=dkd", "with=cached", "seed=2"), "runs/cifar100/resnet56_resnet20/dkd_cached/seed-2"),
        (("configs/demo.yaml",), "runs/demo/seed-0"),
        (("configs/demo.yaml", "method=ddkd"), "runs/demo/seed-0"),
        (("configs/demo.yaml", "method=kd"), "runs/demo/kd/seed-0"),
        (("configs/cifar100/teachers/vgg13.yaml",), "runs/cifar100/teachers/vgg13/seed-0"),
        ((PAIR, "method=dkd", "folder=mine"), "mine"),
    ],
)
def test_a_run_has_the_folder_of_its_pair_and_method(words: tuple[str, ...], folder: str):
    assert str(run_folder(load_recipe(words[0], words[1:]))) == folder


def names_of(loaded: tuple[LoadedRecipe, ...]) -> list[str]:
    return [str(one.source) for one in loaded]


def test_a_method_alone_names_a_run_of_the_same_recipe_file(tmp_path: Path):
    (tmp_path / "own.yaml").write_text(
        "base: " + str(ROOT / "configs/methods/kd.yaml") + "\n"
        "overrides: {teacher: {recipe: null, method: ce}, compare: [{method: dkd, with: cached}, a.yaml]}\n"
    )
    (tmp_path / "a.yaml").write_text(f"base: {ROOT / PAIR}\nmethod: ce\n")
    loaded = load_recipe(PAIR, [f"method={tmp_path / 'own.yaml'}", "data.path=elsewhere"])
    assert names_of(loaded.teachers) == [f"{PAIR} method=ce"]
    assert names_of(loaded.compare) == [f"{PAIR} method=dkd with=cached", str(tmp_path / "a.yaml")]
    assert {one.recipe.data.path for one in (*loaded.teachers, *loaded.compare)} == {"elsewhere"}


def test_a_recipe_is_not_compared_with_itself():
    assert names_of(load_recipe("configs/demo.yaml").compare) == ["configs/demo.yaml method=ce"]
    assert load_recipe("configs/demo.yaml", ["method=ce"]).compare == ()


def test_a_table_at_the_end_is_no_part_of_a_runs_identity(resolve_without_data: Any):
    with_table, alone = (resolve_without_data(load_recipe("configs/demo.yaml", o)) for o in ((), ("compare=null",)))
    assert with_table.fingerprint == alone.fingerprint


def test_the_arguments_of_a_source_name_it_again():
    for words in ((PAIR, "method=dkd", "with=cached"), ("configs/demo.yaml",), ("configs/demo.yaml", "method=kd")):
        source, rest = read_source(Path(words[0]), [*words[1:], "batch=3"])
        assert (source.shown_args, rest) == (words, ["batch=3"])
        assert read_source(Path(source.args[0]), source.args[1:]) == (source, [])


def test_an_overlay_that_changes_a_loss_which_the_method_has_not_is_refused():
    pair = "configs/imagenet/r34_r18.yaml"
    with pytest.raises(RecipeError, match=r"overlays/b3.yaml: losses.ce: the recipe has no such loss, and an overlay "):
        load_recipe(pair, ["method=ab_init", "with=b3"])
    deit = load_recipe("configs/imagenet/regnety_deit_tiny.yaml", ["method=deit", "with=b3"]).recipe
    assert [*deit.losses] == ["deit"]
