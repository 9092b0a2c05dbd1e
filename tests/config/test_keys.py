"""Every key of a recipe is documented: by ``train.py --keys``, and by a page of tables."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field, PositiveInt

from pipeline import train
from pipeline.config.keys import KeyRow, key_rows, keys_text
from pipeline.config.recipe import Recipe
from pipeline.config.reference import generated_files
from pipeline.config.reference import main as write_reference
from pipeline.config.schema import loss_schema, model_schema
from pipeline.errors import ROOT, RecipeError
from pipeline.frozen_model import FrozenModel
from pipeline.losses._base import Loss
from pipeline.losses._registry import InnerLoss, Losses, find_loss, known_losses


class Inner(FrozenModel):
    """A section."""

    rate: float
    """Learning rate. It has no unit."""


class Sample(FrozenModel):
    """A model with a key of every kind."""

    count: PositiveInt
    share: Annotated[float, Field(ge=0, lt=1)] = 0.25
    seed: int = Field(default=0, ge=0, lt=2**63)
    size: int = Field(default=3, le=1_000_000)
    kind: Literal["step", "cosine"] = "step"
    only: Literal["sgd"] = "sgd"
    latent: PositiveInt | Literal["auto"] | None = None
    switch: bool = True
    names: tuple[str, ...] = ("a", "b")
    pair: tuple[float, float] = (0.5, 4 / 3)
    paths: dict[str, str] | None = None
    stages: Literal["all"] | tuple[str | Inner, ...] = "all"
    section: Inner = Inner(rate=0.1)
    several: tuple[Inner, ...] = ()
    distance: InnerLoss | None = None
    losses: Losses


def test_types_and_defaults_are_short_texts():
    found = {row.key: (row.type, row.default) for row in key_rows(model_schema(Sample))}
    assert found == {
        "count": ("int > 0", "required"),
        "share": ("0 <= float < 1", "0.25"),
        "seed": ("0 <= int < 2**63", "0"),
        "size": ("int <= 1,000,000", "3"),
        "kind": ('"step" | "cosine"', "step"),
        "only": ('"sgd"', "sgd"),
        "latent": ('int > 0 | "auto"', "null"),
        "switch": ("bool", "true"),
        "names": ("list of str", "[a, b]"),
        "pair": ("[float, float]", "[0.5, 1.33333]"),
        "paths": ("{name: str}", "null"),
        "stages": ('"all" | list of (str | {rate})', "all"),
        "section": ("{rate}", ""),
        "section.rate": ("float", "required"),
        "several": ("list of {rate}", "[]"),
        "several[].rate": ("float", "required"),
        "distance": ("{name: {…}}", "null"),
        "losses": ("{name: {…}, …}", "required"),
    }


def all_rows() -> list[KeyRow]:
    """Return the rows of the recipe's keys, and of those of every loss."""
    losses = [row for name in known_losses() for row in key_rows(loss_schema(name), f"losses.{name}.")]
    return [*key_rows(model_schema(Recipe)), *losses]


def test_every_key_has_a_description_of_sentences():
    rows = all_rows()
    assert len(rows) > 200
    assert [row.key for row in rows if not re.search(r"\w.*\.$", row.description)] == []


def test_a_key_without_a_description_would_be_found():
    assert not next(row for row in key_rows(model_schema(Sample)) if row.key == "count").description


def test_without_a_section_all_keys_at_the_top_level_are_printed(capsys: pytest.CaptureFixture[str]):
    train.main(["--keys"])
    printed = capsys.readouterr().out
    for name, field in Recipe.model_fields.items():
        assert re.search(rf"^  {field.alias or name} ", printed, re.MULTILINE), name
    for name in ("base", "method", "with", "constants"):
        assert re.search(rf"^  {name} ", printed, re.MULTILINE), name
    assert "``" not in printed


def test_a_section_is_printed_with_type_default_and_one_line(capsys: pytest.CaptureFixture[str]):
    train.main(["--keys", "schedule"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "schedule: The learning rate over the epochs."
    kinds = " | ".join(f'"{kind}"' for kind in ("step", "cosine", "constant", "poly", "one_cycle"))
    kind = lines.index(f"  schedule.kind           {kinds}  default constant")
    assert lines[kind + 1] == "      Course of the learning rate after the warm-up."
    assert f"  schedule.rate           {'float > 0':<{len(kinds)}}  required" in lines


@pytest.mark.parametrize("name", known_losses())
def test_the_keys_of_a_loss_include_its_weight_and_its_ramp(name: str):
    text = keys_text([f"losses.{name}"])
    for key in (
        "weight",
        "ramp",
        "ramp.linear_epochs",
        "ramp.from",
        "ramp.until",
        *(field.alias or key for key, field in find_loss(name).Config.model_fields.items()),
    ):
        assert f"  losses.{name}.{key} " in text


def test_losses_are_listed_with_their_papers_and_nested_ones_are_found():
    listed = keys_text(["losses"])
    assert re.search(r"^  dkd +Decoupled knowledge distillation, Zhao et al\., CVPR 2022", listed, re.MULTILINE)
    assert keys_text(["losses.ddkd.logit_distance"]).count("\n  dkd ") == 1
    assert "losses.ddkd.logit_distance.dkd.beta " in keys_text(["losses.ddkd.logit_distance.dkd"])
    assert "losses.ddkd.diffusion.sampler_steps " in keys_text(["losses.ddkd"])


def test_one_key_is_printed_with_all_sentences():
    text = keys_text(["data.threads"])
    assert text.splitlines()[0] == "  data.threads  0 < int <= 1024  default null"
    assert text.endswith("Without a result it is the rank's share of the cores.")
    assert "required" in keys_text(["data.size"])


def test_the_members_of_a_list_have_their_keys():
    assert "  teacher.members[].weights " in keys_text(["teacher.members"])
    assert keys_text(["teacher.members[].weights"]).startswith("  teacher.members.weights ")
    assert "members[]" not in keys_text(["teacher"])


def test_a_loss_of_the_users_own_is_documented_from_its_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "users_losses.py").write_text(
        "from pipeline.losses import Loss\n\n\nclass Margin(Loss):\n"
        '    """Hinge of the logits."""\n\n    class Config(Loss.Config):\n'
        '        margin: float\n        """Distance that is enough."""\n'
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    text = keys_text(["losses.users_losses:Margin"])
    assert text.startswith("losses.users_losses:Margin: Hinge of the logits.\n")
    assert re.search(r"losses\.users_losses:Margin\.margin +float +required\n +Distance that is enough\.", text)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["dta"], "command line: --keys: there is no key 'dta' at the top level; did you mean data?"),
        (["data.thread"], "command line: --keys: there is no key 'thread' in data; did you mean data.threads?"),
        (["losses.kdd"], "command line: --keys: there is no loss 'kdd'; did you mean 'kd'?"),
        (["losses.kd.temprature"], "there is no key 'temprature' in losses.kd; did you mean losses.kd.temperature?"),
        (["warmup_epochs"], "there is no key 'warmup_epochs' at the top level; did you mean schedule.warmup_epochs?"),
        (["stop.hours"], "there is no key 'hours' in stop; known are epoch, minutes, steps"),
        (["data", "teacher"], "command line: --keys: expected one section, got data and teacher"),
    ],
)
def test_an_unknown_section_is_one_line(words: list[str], message: str):
    with pytest.raises(RecipeError) as caught:
        train.main(["--keys", *words])
    assert str(caught.value).endswith(message)
    assert "\n" not in str(caught.value)


def test_the_page_and_the_schema_are_what_the_command_writes():
    stale = [str(path) for path, text in generated_files().items() if (ROOT / path).read_text() != text]
    assert stale == [], "run python pipeline/config/reference.py"


def test_the_page_has_every_key(capsys: pytest.CaptureFixture[str]):
    page = (ROOT / "docs" / "recipe.md").read_text()
    common = {row.key for row in key_rows(model_schema(Loss.Config))}
    for row in all_rows():
        is_common = row.key.startswith("losses.") and row.key.split(".", 2)[2] in common
        assert f"| `{row.key}` |" in page or (is_common and f"| `losses.NAME.{row.key.split('.', 2)[2]}` |" in page)
    assert write_reference(check=True) == 0
    assert capsys.readouterr().out == ""
