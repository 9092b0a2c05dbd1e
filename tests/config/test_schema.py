"""The JSON schema for editors: it accepts every recipe file of the project, and finds what a recipe refuses."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest
import yaml

from pipeline.config.reading import load_yaml
from pipeline.errors import ROOT

CONFIGS = ROOT / "configs"
SCHEMA = json.loads((CONFIGS / "recipe.schema.json").read_text())
FILES = sorted(path for path in CONFIGS.rglob("*.yaml") if path.name != "tables.yaml")


def problems(content: Any) -> list[str]:
    """Return the messages of what the schema finds wrong."""
    validator = jsonschema.Draft7Validator(SCHEMA)
    return [error.message for error in validator.iter_errors(content)]


def test_the_schema_is_one():
    jsonschema.Draft7Validator.check_schema(SCHEMA)


def test_every_recipe_of_the_project_fits():
    assert len(FILES) > 50
    found = {str(path.relative_to(ROOT)): problems(load_yaml(path.read_text())) for path in FILES}
    assert {path: lines for path, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    "text",
    [
        "epochz: 3",
        "epochs: many",
        "epochs: 0",
        "epochs: 2.5",
        "batch: true",
        "precision: int8",
        "data: {sise: 32}",
        "data: {mean: [0.5, 0.5]}",
        "data: {flip: 1.5}",
        "schedule: {milestones: 30}",
        "teacher: {average: {decay: 1}}",
        "teacher: {members: [{modle: resnet34}]}",
        "student: {model: {file: x}}",
        "losses: {kdd: {}}",
        "losses: {kd: {temprature: 4.0}}",
        "losses: {kd: {ramp: {linear_epoch: 3}}}",
        "losses: {ddkd: {logit_distance: {dkd: {bta: 3}}}}",
        "losses: {ddkd: {feature: {latent: wide}}}",
        "losses: 3",
        "base: 3",
        "constants: [1]",
        "overrides: {epochz: 3}",
        "journal: every",
    ],
)
def test_what_a_recipe_refuses_is_found(text: str):
    assert problems(yaml.safe_load(text))


@pytest.mark.parametrize(
    "text",
    [
        "epochs: 3",
        "epochs: ${ab.epochs}",
        "epochs: null",
        "data: {mean: ['${a}', 0, 1], views: '${views}'}",
        "data: ${data}",
        "graph: false",
        "graph: ${graph}",
        "teacher: null",
        "teacher: {members: [{model: resnet34, weights: a.pt}, {recipe: b.yaml}], combine: mean}",
        "student: {model: {path: 'mine.networks:small', stages: {stage1: body.0}}}",
        "losses: {kd: null, ce: '${ce}', fitnet: {stage: {student: stage2, teacher: stage3}}}",
        "losses: {'mine.losses:Margin': {margin: 3}}",
        "losses: {ddkd: {logit_distance: {dkd: '${dkd}', kd: null}}}",
        "losses: {ddkd: {feature: {latent: auto}}}",
        "constants: {a: 1, b: {c: '${a}'}}",
        "base: [a.yaml, b.yaml]",
        "method: ddkd",
        "compare: [demo_ce.yaml]",
        "overrides: {teacher: null, schedule: {rate: 0.05}}",
    ],
)
def test_what_a_file_may_say_fits(text: str):
    assert problems(yaml.safe_load(text)) == []


def test_a_key_has_its_description_for_the_editor():
    data = SCHEMA["definitions"]["recipe"]["properties"]["data"]["properties"]
    assert data["path"]["description"] == "Folder of shards, with its `manifest.json`."
    kd = SCHEMA["definitions"]["losses"]["properties"]["kd"]
    assert kd["description"].startswith("Knowledge distillation, Hinton et al.")
