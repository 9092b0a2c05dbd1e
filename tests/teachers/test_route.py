"""A teacher that takes its student along its own route: its anchors, the run that keeps them, and its refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import training_on_ranks
import yaml
from gloo_ranks import Ranks
from resolved import run_of
from safetensors.torch import load_file
from tiny_runs import DATA, STRATEGY

from pipeline import evaluate
from pipeline.batch import Batch, Progress
from pipeline.builders.shared import SharedParts
from pipeline.builders.summary import summarize
from pipeline.config.recipe import load_recipe
from pipeline.errors import RecipeError
from pipeline.features.taps import FeatureTaps
from pipeline.models import create_model
from pipeline.models.stages import stages
from pipeline.teachers.frozen import Teacher
from pipeline.teachers.route import RouteTeacher
from pipeline.training.journal import trace
from shards.manifest import sha256_of

Train = Callable[..., None]
CPU = torch.device("cpu")
ROUTE = {"epochs": [1, 2, 3], "each": 1}
KD = {"ce": {}, "kd": {"temperature": 4.0}}


def anchor(seed: int) -> Teacher:
    """Return a network, with BatchNorm statistics of its own, as a frozen teacher whose BatchNorms are folded."""
    torch.manual_seed(seed)
    network = create_model("cifar_resnet8", 10)
    network.train()(torch.randn(8, 3, 16, 16) + seed)
    taps = FeatureTaps(network, stages(network), ("stage2",))
    return Teacher(taps, batch=4, image_size=16, dtype=torch.float32, device=CPU)


def batch() -> Batch:
    images = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return Batch(images, torch.arange(6), torch.arange(6), {})


def test_each_epoch_of_the_student_has_the_answers_of_its_anchor_bit_for_bit():
    expected = [anchor(seed)(batch()) for seed in range(3)]
    route = RouteTeacher([anchor(seed) for seed in range(3)], each=2)
    found = {}
    for step in (0, 9, 10, 19, 20, 25, 40, 70, 5, 21):  # a resumed run begins anywhere
        route.at(Progress(steps_per_epoch=5, step=step))
        answers = route(batch())
        found[step] = next(
            number
            for number, own in enumerate(expected)
            if torch.equal(answers.logits, own.logits)
            and torch.equal(answers.features["stage2"], own.features["stage2"])
        )
    assert found == {0: 0, 9: 0, 10: 1, 19: 1, 20: 2, 25: 2, 40: 2, 70: 2, 5: 0, 21: 2}


def test_an_anchor_changes_its_weights_in_place_and_its_statistics_never():
    route = RouteTeacher([anchor(0), anchor(1)], each=1)
    torch.nn.ModuleList([route]).train()
    places = {name: x.data_ptr() for name, x in route.state_dict().items()}
    for epoch, own in enumerate((anchor(0), anchor(1))):
        route.at(Progress(steps_per_epoch=1, step=epoch))
        route(batch())
        state = route.state_dict()
        assert {name: x.data_ptr() for name, x in state.items()} == places
        assert all(torch.equal(x, state[f"network.{name}"]) for name, x in own.state_dict().items())
    assert not any(module.training for module in route.network.modules())


@pytest.fixture
def place(recipes: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of ``teacher.yaml``, which keeps three epochs, and ``rco.yaml``, whose teacher takes that route."""
    monkeypatch.chdir(recipes)
    own = {"epochs": 3, "checkpoints": {"export_epochs": [1, 2, 3]}, "student": {"model": "cifar_resnet8"}}
    write("teacher.yaml", {"base": "ce.yaml", **own, "folder": "runs/teacher"})
    write("rco.yaml", {"base": "ce.yaml", "epochs": 4, "losses": KD, "teacher": taught(ROUTE), "folder": "runs/rco"})
    return recipes


def write(name: str, recipe: object) -> None:
    Path(name).write_text(yaml.safe_dump(recipe))


def taught(route: dict[str, object]) -> dict[str, object]:
    return {"recipe": "teacher.yaml", "route": route}


def test_a_run_along_a_route_resumes_inside_an_anchor_bit_for_bit(run_train: Train, place: Path):
    run_train("rco.yaml", "folder=runs/whole")
    run_train("rco.yaml", "folder=runs/parts", "stop.steps=7")
    run_train("rco.yaml", "folder=runs/parts")
    assert trace(Path("runs/whole/journal.jsonl")) == trace(Path("runs/parts/journal.jsonl"))
    whole, parts = (Path("runs", name, "student.safetensors") for name in ("whole", "parts"))
    assert whole.read_bytes() == parts.read_bytes()

    kept = [Path(f"runs/teacher/route/epoch-{epoch:03d}.safetensors") for epoch in ROUTE["epochs"]]  # type: ignore[attr-defined]
    run, folder = run_of("rco.yaml"), Path("runs/teacher")
    assert run.identity["teacher"]["route"] == {**ROUTE, "sha256": [sha256_of(path) for path in kept]}
    assert kept[-1].read_bytes() == (folder / "student.safetensors").read_bytes()
    assert len({path.read_bytes() for path in kept}) == 3
    plain = run_of("teacher.yaml", ["checkpoints.export_epochs=[]"])
    assert plain.fingerprint == run_of("teacher.yaml").fingerprint
    with pytest.raises(RecipeError, match="the teacher is not one network, but moves with the run"):
        evaluate.main(["rco.yaml", "folder=runs/whole", "agreement=yes"])

    kept[1].write_bytes(kept[2].read_bytes())
    with pytest.raises(RecipeError, match=r"route/epoch-002.safetensors: not the weights that this run wrote"):
        run_train("rco.yaml", "folder=runs/third")
    # The teacher's command, repeated elsewhere, need not end with the same bits.
    result = json.loads((folder / "result.json").read_text())
    result["sha256"]["route/epoch-002.safetensors"] = sha256_of(kept[1])
    (folder / "result.json").write_text(json.dumps(result))
    with pytest.raises(RecipeError, match=r"another recipe \(different teacher.route.sha256\)"):
        run_train("rco.yaml", "folder=runs/whole")
    kept[1].unlink()
    with pytest.raises(RecipeError, match=r": teacher.route: runs/teacher kept no weights of epoch 2; set [^\n]*$"):
        run_train("rco.yaml", "folder=runs/third")


def test_a_route_of_the_last_epoch_alone_is_the_plain_teacher(run_train: Train, place: Path):
    run_train("rco.yaml", "teacher.route={epochs: [3], each: 2}", "epochs=2", "folder=runs/last")
    run_train("rco.yaml", "teacher.route=null", "epochs=2", "folder=runs/plain")
    assert trace(Path("runs/last/journal.jsonl")) == trace(Path("runs/plain/journal.jsonl"))
    plain = load_file("runs/plain/student.safetensors")
    assert all(torch.equal(x, plain[name]) for name, x in load_file("runs/last/student.safetensors").items())
    assert "route" not in run_of("rco.yaml", ["teacher.route=null"]).identity["teacher"]


def test_two_ranks_follow_the_route_that_one_process_does(run_train: Train, place: Path, ranks: Ranks):
    path = yaml.safe_load(Path("ce.yaml").read_text())["data"]["path"]
    data = {**DATA, "path": path, "loader": "memory", "crop": "pad", "size": 24}
    student = {"model": {"path": "witness:plain", "stages": {"last": "1"}}}
    base = {**STRATEGY, "data": data, "student": student, "losses": {"ce": {}}, "epochs": 3}
    write("teacher.yaml", {**base, "folder": "runs/teacher", "checkpoints": {"export_epochs": [1, 2, 3]}})
    write("rco.yaml", {**base, "losses": KD, "teacher": {**taught(ROUTE), "batch": 6}})
    run_train("rco.yaml", "folder=runs/one")
    ranks(training_on_ranks.train, place, ["rco.yaml", "folder=runs/two", "stop.steps=7"], timeout=250)
    ranks(training_on_ranks.train, place, ["rco.yaml", "folder=runs/two"], timeout=250)
    one = load_file("runs/one/student.safetensors")
    for name, x in load_file("runs/two/student.safetensors").items():
        torch.testing.assert_close(x, one[name], rtol=0, atol=1e-11)


def test_runs_side_by_side_have_a_route_each(run_train: Train, place: Path):
    run_train("teacher.yaml")
    runs = [run_of("rco.yaml", [f"seed={seed}"]) for seed in (0, 1)]
    parts = SharedParts(runs)
    first, second = (parts.teacher(run, CPU) for run in runs)
    assert isinstance(first, RouteTeacher)
    assert first is not second


REFUSED = {
    "teacher.cache=caches/some": "teacher: cache cannot be combined with route; remove cache",
    "teacher.members=[{recipe: teacher.yaml}]": "teacher: recipe, route cannot be combined with members",
    "teacher.weights=w.pt": "teacher: weights cannot be combined with route",
    "teacher.expect=50": "teacher: expect cannot be combined with route",
    "teacher.recipe=null": "teacher: route is that of a run; give recipe, which names the run",
    "teacher.route.epochs=[2,1]": r"teacher.route: epochs must be in increasing order, got \[2, 1\]",
    "teacher.route.epochs=[]": "teacher.route.epochs: ",
    "student.inherit=[fc]": "student.inherit takes the weights of a teacher that is one network",
}


@pytest.mark.parametrize(("word", "message"), REFUSED.items())
def test_what_a_route_cannot_be_is_refused_in_one_line(place: Path, word: str, message: str):
    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe("rco.yaml", [word])
    assert "\n" not in str(caught.value)


def test_an_epoch_that_the_teacher_does_not_keep_is_refused_before_it_trains(run_train: Train, place: Path):
    beyond = "rco.yaml: teacher.route.epochs: 9 is beyond the teacher's run, whose epochs are 3;"
    for command in (run_train, lambda *words: summarize(load_recipe(words[0], words[1:]))):
        with pytest.raises(RecipeError, match=beyond.removeprefix("rco.yaml: ")):
            command("rco.yaml", "teacher.route.epochs=[1,9]")
    teacher = yaml.safe_load(Path("teacher.yaml").read_text())
    write("teacher.yaml", teacher | {"checkpoints": {"export_epochs": [1, 3]}})
    message = (
        r"^teacher.route: \S*teacher.yaml will keep no weights of epoch 2; set checkpoints.export_epochs: \[1, 2, 3\]"
    )
    with pytest.raises(RecipeError, match=message):
        run_train("rco.yaml")
    assert not Path("runs/teacher").exists()
