"""Noisy student: a teacher labels images, a student learns from them and from labelled ones, and teaches in turn."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import noisy_chain
import numpy as np
import pytest
import torch
import witness
from gloo_ranks import Ranks
from noisy_chain import BATCH, RATIO
from PIL import Image
from resolved import run_of
from safetensors.torch import load_file

from pipeline.caching import blocks
from pipeline.caching import write as writing
from pipeline.config.recipe import load_recipe
from pipeline.distributed import signals
from pipeline.errors import RecipeError
from pipeline.training.journal import trace
from shards.read import SplitReader

ROUNDING = 1e-11
LABEL = ["ns1.yaml", "others", "pseudo/ns1", "keep=0.0", "per_class=30", "block=12"]


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the trained teacher, its pseudo-labels and the first student's run; nothing in it is changed."""
    folder = tmp_path_factory.mktemp("noisy")
    noisy_chain.prepare(folder)
    noisy_chain.train(0, 1, folder, ["supervised.yaml"])
    noisy_chain.label(0, 1, folder, LABEL)
    noisy_chain.train(0, 1, folder, ["ns1.yaml"])
    return folder


@pytest.fixture
def place(chain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the teacher, its pseudo-labels and the recipes, to change; the current folder."""
    for name in ("runs/supervised", "pseudo"):
        shutil.copytree(chain / name, tmp_path / name)
    for name in ("shards", "others", "fewer"):
        (tmp_path / name).symlink_to(chain / name)
    noisy_chain.write_recipes(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != ".lock"}


def train(place: Path, *words: str) -> Path:
    """Train ``ns1`` in this process, in the folder that the words name, and return it."""
    noisy_chain.train(0, 1, place, ["ns1.yaml", *words])
    return place / next((word.removeprefix("folder=") for word in words if word.startswith("folder=")), "runs/ns1")


def test_the_logits_are_the_teachers_answers_to_the_whole_images_and_the_ids_are_those_it_is_surest_of(chain: Path):
    logits, kept = np.load(chain / "pseudo/ns1/view-00.logits.npy"), np.load(chain / "pseudo/ns1/kept.npy")
    network = witness.plain(20)
    network.load_state_dict(load_file(chain / "runs/supervised/student.safetensors"))
    reader = SplitReader(chain / "others", "train")
    for sample, encoded in zip(reader.samples, reader.bytes(np.arange(len(reader.samples))), strict=True):
        (chain / "one.jpg").write_bytes(encoded.tobytes())
        pixels = np.asarray(Image.open(chain / "one.jpg").convert("RGB"))
        image = (torch.from_numpy(pixels.astype(np.float64)).permute(2, 0, 1)[None] / 255 - 0.5) / 0.25
        np.testing.assert_allclose(logits[sample["id"]], network(image)[0].detach().numpy(), rtol=2e-3, atol=2e-3)
    counts = np.bincount(logits[kept].argmax(1))
    assert len(set(counts[counts > 0].tolist())) == 1
    assert len(kept) >= 24


def test_a_student_teaches_the_next_one(chain: Path, place: Path, capsys: pytest.CaptureFixture[str]):
    shutil.copytree(chain / "runs/ns1", place / "runs/ns1")
    noisy_chain.label(0, 1, place, ["ns2.yaml", "others", "pseudo/ns2", *LABEL[3:]])
    noisy_chain.train(0, 1, place, ["ns2.yaml"])
    steps = [line for line in trace(place / "runs/ns2/journal.jsonl") if "soft_ce" in line]
    assert len(steps) == 10
    assert steps[-1]["total"] == pytest.approx(steps[-1]["ce"] + steps[-1]["soft_ce"])
    told = capsys.readouterr().out
    assert "teacher    pseudo-labels pseudo/ns2" in told
    assert "accumulation 1, and 24 without labels" in told


def test_stopped_anywhere_the_command_goes_on_to_the_same_bytes(
    chain: Path, place: Path, monkeypatch: pytest.MonkeyPatch
):
    words = ["ns1.yaml", "others", "pseudo/parts", *LABEL[3:]]
    write, written = blocks.write_block, []

    def write_and_be_told(*args: object) -> None:
        written.append(args)
        write(*args)  # type: ignore[arg-type]
        os.kill(os.getpid(), signal.SIGUSR1)

    monkeypatch.setattr(writing, "write_block", write_and_be_told)
    with pytest.raises(SystemExit) as end:
        noisy_chain.label(0, 1, place, words)
    assert (end.value.code, len(written)) == (143, 1)
    with pytest.raises(RecipeError, match="there are no pseudo-labels here, or not all"):
        train(place, "data.unlabelled.pseudo=pseudo/parts")
    monkeypatch.setattr(signals, "_requested", False)
    monkeypatch.setattr(writing, "write_block", write)
    noisy_chain.label(0, 1, place, words)
    assert content(place / "pseudo/parts") == content(chain / "pseudo/ns1")


def test_another_choice_of_the_same_answers_needs_no_teacher(chain: Path, place: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(writing, "write_block", lambda *_: pytest.fail("the answers are there"))
    before = run_of("ns1.yaml").identity
    noisy_chain.label(0, 1, place, ["ns1.yaml", "others", "pseudo/ns1", "keep=0.0", "per_class=20"])
    logits, kept = np.load(place / "pseudo/ns1/view-00.logits.npy"), np.load(place / "pseudo/ns1/kept.npy")
    counts = np.bincount(logits[kept].argmax(1))
    assert set(counts[counts > 0].tolist()) == {20}
    assert run_of("ns1.yaml").identity != before
    with pytest.raises(RecipeError, match="keep: no image has a class with a probability of 1 or more; lower keep"):
        noisy_chain.label(0, 1, place, ["ns1.yaml", "others", "pseudo/ns1", "keep=1"])


def test_two_ranks_write_the_same_labels_and_train_as_one_process(chain: Path, place: Path, ranks: Ranks):
    ranks(noisy_chain.label, place, ["ns1.yaml", "others", "pseudo/two", *LABEL[3:]])
    assert content(place / "pseudo/two") == content(chain / "pseudo/ns1")
    noted = "losses.witness:Witness={}"
    (one,) = [noisy_chain.train(0, 1, place, ["ns1.yaml", "folder=runs/one", noted])]
    two = ranks(noisy_chain.train, place, ["ns1.yaml", "folder=runs/two", noted])
    for whole, *shares in zip(one, *two, strict=True):
        labelled = [number for row in zip(*(share[: BATCH // 2] for share in shares), strict=True) for number in row]
        others = [number for row in zip(*(share[BATCH // 2 :] for share in shares), strict=True) for number in row]
        assert labelled + others == whole
        assert len(whole) == BATCH * (1 + RATIO)
    weights, same = (load_file(place / "runs" / name / "student.safetensors") for name in ("one", "two"))
    for key, value in weights.items():
        torch.testing.assert_close(same[key], value, rtol=0, atol=ROUNDING)
    losses = [[line["total"] for line in trace(place / "runs" / name / "journal.jsonl")[:5]] for name in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=ROUNDING)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_run_stopped_in_the_middle_of_an_epoch_goes_on_bit_for_bit(place: Path, accumulation: int):
    words = (f"accumulation={accumulation}", "epochs=3")
    whole = train(place, "folder=runs/whole", *words)
    for stop in ("stop.steps=3", "stop.steps=8", "stop.steps=null"):
        parts = train(place, "folder=runs/parts", stop, *words)
    assert trace(parts / "journal.jsonl") == trace(whole / "journal.jsonl")
    assert (parts / "student.safetensors").read_bytes() == (whole / "student.safetensors").read_bytes()


def test_no_unlabelled_image_is_the_plain_run_bit_for_bit(chain: Path, place: Path):
    off = ["data.unlabelled={path: nowhere, ratio: 0}", "folder=runs/off"]
    noisy_chain.train(0, 1, place, ["supervised.yaml", *off])
    plain = chain / "runs/supervised"
    assert trace(place / "runs/off/journal.jsonl") == trace(plain / "journal.jsonl")
    assert (place / "runs/off/identity.json").read_bytes() == (plain / "identity.json").read_bytes()
    silent = train(place, "data.unlabelled.ratio=0", "folder=runs/silent")
    weights, same = (load_file(folder / "student.safetensors") for folder in (plain, silent))
    assert all(weights[key].equal(same[key]) for key in weights)
    assert {line["soft_ce"] for line in trace(silent / "journal.jsonl") if "soft_ce" in line} == {0.0}


def test_a_live_teacher_answers_all_rows_where_a_loss_asks_it(place: Path):
    words = ["data.unlabelled.pseudo=null", "losses={soft_ce: null, kd: {temperature: 4.0}}", "epochs=1"]
    run = train(place, "folder=runs/kd", *words)
    kd = [line["kd"] for line in trace(run / "journal.jsonl") if "kd" in line]
    assert len(kd) == 5
    assert min(kd) > 0


def test_a_finished_student_teaches_though_its_pseudo_labels_are_gone(chain: Path, place: Path):
    shutil.copytree(chain / "runs/ns1", place / "runs/ns1")
    before = run_of("ns1.yaml").fingerprint
    shutil.rmtree(place / "pseudo")
    assert run_of("ns1.yaml").fingerprint == before
    assert run_of("ns1.yaml").result is not None


def test_pseudo_labels_of_another_teacher_or_of_other_images_are_refused(place: Path):
    for words, told in (
        (
            ["teacher={recipe: null, model: cifar_resnet8, weights: x.pt}"],
            r"different settings: teacher\.network\.model",
        ),
        (["data.unlabelled.path=fewer"], r"different settings: shards"),
    ):
        with pytest.raises(RecipeError, match=told) as refusal:
            train(place, *words)
        assert "\n" not in str(refusal.value)
        assert "pipeline/pseudo_label.py RECIPE SHARDS ANOTHER_FOLDER" in str(refusal.value)
    noisy_chain.train(0, 1, place, ["supervised.yaml", "seed=1", "folder=runs/other"])
    other = (
        "{recipe: null, model: {path: 'witness:plain', stages: {last: '1'}}, weights: runs/other/student.safetensors}"
    )
    with pytest.raises(RecipeError, match=r"different settings: teacher\.network\.weights"):
        train(place, f"teacher={other}")
    with pytest.raises(RecipeError, match=r"different settings: teacher\.network\.weights"):
        noisy_chain.label(0, 1, place, [*LABEL, f"teacher={other}"])


def test_damaged_pseudo_labels_are_refused(place: Path):
    path = place / "pseudo/ns1/kept.npy"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(RecipeError, match=r"kept\.npy is missing or does not match the sha256 in kept\.json"):
        train(place)
    logits = place / "pseudo/ns1/view-00.logits.npy"
    logits.write_bytes(logits.read_bytes()[:-2] + b"\0\1")
    with pytest.raises(RecipeError, match=r"view-00\.logits\.npy"):
        train(place)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["data.unlabelled=null"], "the loss 'soft_ce' learns from images without labels, and the recipe has none"),
        (["data.unlabelled.pseudo=null"], "reads pseudo-labels, and the recipe names none; set data.unlabelled.pseudo"),
        (["teacher=null", "losses.soft_ce=null"], r"data\.unlabelled\.pseudo needs the teacher that answered"),
        (
            ["teacher={recipe: null, average: {decay: 0.9}}"],
            r"data\.unlabelled\.pseudo needs the teacher that answered",
        ),
        (["teacher.cache=x"], r"data\.unlabelled has images that a cache has not"),
        (
            ["task=multilabel", "losses.ce=null"],
            r"data\.unlabelled is for task: classification, and this is task: multilabel",
        ),
        (["data.unlabelled.ratio=-1"], r"data\.unlabelled\.ratio: should be greater than or equal to 0"),
        (["data.unlabelled.keep=0.3"], r"data\.unlabelled\.keep"),
        (["losses.soft_ce.rows=all"], "from: batch has logits for images without labels alone; set rows: unlabelled"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line_when_the_recipe_is_read(place: Path, words: list[str], told: str):
    with pytest.raises(RecipeError, match=told) as refusal:
        load_recipe("ns1.yaml", words)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["ns1.yaml", "others"], "expected RECIPE SHARDS FOLDER, got ns1.yaml others"),
        (["ns1.yaml", "nowhere", "new"], "SHARDS: nowhere/manifest.json does not exist"),
        (["supervised.yaml", "others", "new"], "teacher: there is no frozen network to run"),
        (
            ["ns1.yaml", "others", "new", "teacher.head=none", "data.unlabelled=null"],
            "teacher: head: none has no answers, and combine:",
        ),
        (["ns1.yaml", "others", "new", "keep=2"], "keep: Input should be less than or equal to 1"),
        (["ns1.yaml", "others", "new", "per_clas=2"], "per_clas: unknown key; did you mean 'per_class'?"),
        (["ns1.yaml", "others", "shards"], "shards: holds shards, and not a teacher's cache"),
    ],
)
def test_what_the_command_cannot_do_is_one_line(place: Path, words: list[str], told: str):
    with pytest.raises(RecipeError, match=told.replace("?", r"\?")) as refusal:
        noisy_chain.label(0, 1, place, words)
    assert "\n" not in str(refusal.value)
    assert not (place / "new").exists()


def test_images_without_labels_are_no_training_images_and_too_few_are_refused(place: Path):
    with pytest.raises(RecipeError, match=r"the images in others have no labels; give them as data\.unlabelled\.path"):
        noisy_chain.train(0, 1, place, ["supervised.yaml", "data.path=others", "folder=runs/none"])
    with pytest.raises(RecipeError, match=r"data\.unlabelled: .* fewer than one global batch: 480"):
        train(place, "data.unlabelled.ratio=40")


def test_labels_of_shards_that_have_some_are_not_read(place: Path):
    noisy_chain.label(0, 1, place, ["ns1.yaml", "shards", "pseudo/labelled", *LABEL[3:]])
    words = ["data.unlabelled.path=shards", "data.unlabelled.pseudo=pseudo/labelled", "stop.steps=1"]
    train(place, *words, "folder=runs/labelled")
    state = json.loads((place / "runs/labelled/identity.json").read_text())["data"]["unlabelled"]
    assert state["manifest"] == run_of("ns1.yaml").manifest.sha256
