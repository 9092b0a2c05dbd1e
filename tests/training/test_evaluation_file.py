"""``evaluation.json``, and an evaluation of images that are not the run's own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from gloo_ranks import Ranks
from lost_loss import lose, write_own_loss
from safetensors.torch import load_file
from shard_factory import open_loader
from training_on_ranks import run

from pipeline import evaluate
from pipeline.benchmarks import inference
from pipeline.benchmarks.inference import TimedNetwork, measure_rounds, measure_speed
from pipeline.errors import RecipeError
from pipeline.features.taps import FeatureTaps
from pipeline.models import create_model
from pipeline.runs.evaluation_file import EvaluationFile, read_evaluation
from pipeline.runs.folder import load_run
from shards import prepare_folder
from shards.documents import DamagedFile
from shards.manifest import read_manifest
from shards.read import SplitReader

Train = Callable[..., None]
WEIGHTS = "runs/ce/student.safetensors"


def evaluated(*words: str, out: str = "out.json") -> EvaluationFile:
    """Return what the command writes."""
    evaluate.main([*words, "speed=no", f"out={out}"])
    return read_evaluation(Path(out))


def class_folders(shards: Path, folder: Path, names: dict[str, str]) -> Path:
    """Write the validation images of some classes into class folders of other names, and those as shards."""
    reader = SplitReader(shards, "val")
    for sample, image in zip(reader.samples, reader.bytes(range(len(reader.samples))), strict=True):  # type: ignore[arg-type]
        name = names.get(reader.manifest.classes[sample["label"]])
        if name is not None:
            path = folder / name / f"{sample['id']}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(image.tobytes())
    made = folder.with_name(f"{folder.name}-shards")
    assert prepare_folder.main([str(folder), str(made), "--split", "val", "--jobs", "1"]) == 0
    return made


def test_the_file_of_a_run_is_complete_and_only_its_own_figures_are_written_there(
    run_train: Train, recipes: Path, capsys: pytest.CaptureFixture[str]
):
    run_train("ce.yaml", "epochs=1")
    result = json.loads(Path("runs/ce/result.json").read_text())
    evaluate.main(["runs/ce"])
    assert "written to runs/ce/evaluation.json" in capsys.readouterr().out
    found = read_evaluation(Path("runs/ce/evaluation.json"))
    assert {key: found.metrics[key] for key in ("top1", "top5")} == {key: result[key] for key in ("top1", "top5")}
    assert found.sha256 == result["sha256"]["student.safetensors"]
    assert (found.samples, len(found.classes), found.teacher, found.kl) == (20, 20, None, None)
    assert found.confusion is not None
    assert found.per_class is not None
    assert found.reliability is not None
    assert sum(count for _, _, count in found.confusion) == sum(found.per_class.samples) == 20
    assert sum(found.reliability.samples) == 20
    assert (found.network.parameters, found.network.bytes) == (result["parameters"], Path(WEIGHTS).stat().st_size)
    assert found.network.macs > 0
    assert found.speed is not None
    assert [speed.batch for speed in found.speed] == [1, 128]
    assert all(speed.low_ms <= speed.latency_ms <= speed.high_ms for speed in found.speed)
    evaluate.main(["runs/ce", "weights=best", "speed=no"])
    assert read_evaluation(Path("runs/ce/evaluation_best.json")).weights == "student_best.safetensors"
    for words in (["runs/ce", "data.validation_size=24"], ["runs/ce", f"weights={WEIGHTS}"]):
        evaluate.main([*words, "speed=no"])
        assert "not written" in capsys.readouterr().out
    assert read_evaluation(Path("runs/ce/evaluation.json")) == found
    Path("runs/ce/evaluation.json").write_text('{"weights": 3}')
    with pytest.raises(DamagedFile, match=r"evaluation.json: weights: .*; evaluate the weights again"):
        read_evaluation(Path("runs/ce/evaluation.json"))


def evaluate_on_rank(rank: int, world: int, folder: Path, words: list[str]) -> None:
    run(evaluate.main, rank, world, folder, words)


def test_ranks_write_the_file_of_one_process(run_train: Train, recipes: Path, several_ranks: Ranks):
    run_train("ce.yaml", "epochs=1")
    words = ["runs/ce", "speed=no", "data.validation_batch=4"]
    evaluate_on_rank(0, 1, recipes, [*words, "out=one.json"])
    several_ranks(evaluate_on_rank, recipes, [*words, "out=several.json"])
    one, several = (read_evaluation(Path(name)) for name in ("one.json", "several.json"))
    assert several.metrics == pytest.approx(one.metrics, rel=1e-6)
    assert (several.samples, several.confusion, several.per_class) == (20, one.confusion, one.per_class)


def test_a_run_is_evaluated_where_the_file_of_its_own_loss_is_gone(
    run_train: Train, recipes: Path, monkeypatch: pytest.MonkeyPatch
):
    file = write_own_loss(recipes, "gone_loss", monkeypatch)
    recipe = yaml.safe_load(Path("ce.yaml").read_text()) | {"losses": {"gone_loss:Own": {}}, "folder": "runs/own"}
    Path("own.yaml").write_text(yaml.safe_dump(recipe))
    run_train("own.yaml", "epochs=1")
    lose(file)
    with pytest.raises(RecipeError, match="no loss at 'gone_loss:Own'"):
        run_train("own.yaml", "epochs=1")
    assert evaluated("runs/own").metrics["top1"] == json.loads(Path("runs/own/result.json").read_text())["top1"]


def test_other_classes_are_found_by_name_by_a_map_and_by_number_and_other_logits_are_left_out(
    run_train: Train, recipes: Path, shards: Path, capsys: pytest.CaptureFixture[str]
):
    run_train("ce.yaml", "epochs=1")
    classes = read_manifest(shards).classes
    chosen = [classes[number] for number in (11, 3, 17, 8, 2, 10)]
    by_name = class_folders(shards, recipes / "named", {name: name for name in chosen})
    by_number = class_folders(shards, recipes / "numbered", {name: str(classes.index(name)) for name in chosen})
    by_map = class_folders(shards, recipes / "mapped", {name: f"f {index}" for index, name in enumerate(chosen)})
    lines = [f"f {index}\t{name if index % 2 else classes.index(name)}" for index, name in enumerate(chosen)]
    Path("map.txt").write_text("\n".join(lines))
    found = [
        evaluated("runs/ce", f"data.path={by_name}"),
        evaluated("runs/ce", f"data.path={by_number}", "class_map=index"),
        evaluated("runs/ce", f"data.path={by_map}", "class_map=map.txt"),
    ]
    assert "among 6 of the network's 20 classes" in capsys.readouterr().out
    assert found[0].classes == tuple(sorted(chosen, key=classes.index))
    keys = {"classes", "confusion", "per_class"}
    assert [each.model_dump(include=keys) for each in found] == [found[0].model_dump(include=keys)] * 3
    for each in found:  # the folders' order is that of the images, whose sum may end in another bit
        assert each.metrics == pytest.approx(found[0].metrics, rel=1e-12)
    assert found[0].metrics["nll"] == pytest.approx(likelihood(by_name, classes), rel=1e-4)
    refuse_other_classes(by_name, by_number, by_map)


def refuse_other_classes(by_name: Path, by_number: Path, by_map: Path) -> None:
    """Check that classes and files that do not fit are one line each."""
    for words, message in (
        (
            [f"data.path={by_map}"],
            r"the class 'f 0' \(and 5 more\) of .* is none of the network's 20, such as .*; give cl",
        ),
        ([f"data.path={by_number}", "class_map=gone.txt"], r"class_map: gone.txt cannot be read"),
        (
            [f"data.path={by_number}", "class_map=map.txt"],
            r"the class '10' \(and 5 more\) of .* has no line in class_map",
        ),
        (
            [f"data.path={by_name.with_name('named')}"],
            r"is no folder of shards \(no manifest.json\); make them from class folders",
        ),
        ([f"data.path={by_name}", "real_labels=real.json"], r"real_labels: it is for images with the network's own cl"),
        (["real_labels=gone.json"], r"real_labels: gone.json: there is no such file; download it again"),
        (["val_labels=gone.txt"], r"val_labels: it is the order of the images of real_labels=FILE; give both, or none"),
        (["out=gone/out.json"], r"out: there is no folder gone for gone/out.json; create it first"),
        (["out=runs"], r"out: runs is a folder; name a file"),
    ):
        with pytest.raises(RecipeError, match=message) as refused:
            evaluate.main(["runs/ce", "speed=no", *words])
        assert "\n" not in str(refused.value)
    Path("bad.txt").write_text("f 0\tno such class\n")
    with pytest.raises(RecipeError, match=r"class_map: bad.txt: line 1: .* is no folder with one of the network's 20"):
        evaluate.main(["runs/ce", f"data.path={by_map}", "class_map=bad.txt"])


@torch.no_grad()
def likelihood(shards: Path, classes: tuple[str, ...]) -> float:
    """Return the mean −log probability of the labels among the classes of ``shards``."""
    network = create_model("cifar_resnet8", 20).eval()
    network.load_state_dict(load_file(WEIGHTS))
    data = load_run(Path("runs/ce")).recipe.data.model_copy(update={"path": str(shards)})
    names = read_manifest(shards).classes
    columns, total, images = [classes.index(name) for name in names], 0.0, 0
    for batch in open_loader(data, splits=("val",)).validation():
        real = batch.labels_B >= 0
        logits = network(batch.images_BCHW)[real][:, columns].double()
        total += torch.nn.functional.cross_entropy(logits, batch.labels_B[real], reduction="sum").item()
        images += int(real.sum())
    return total / images


def test_several_labels_are_accepted_in_the_order_of_imagenets_validation_images(
    run_train: Train, recipes: Path, shards: Path
):
    run_train("ce.yaml", "epochs=1")
    shutil.copy(WEIGHTS, "weights.safetensors")
    classes = read_manifest(shards).classes
    wnids = [f"n{number:08d}" for number in range(20)]
    class_folders(shards, recipes / "val", dict(zip(classes, wnids, strict=True)))
    numbered = [wnids[(7 * number) % 20] for number in range(20)]
    for number, wnid in enumerate(numbered, 1):  # an image of each class
        (image,) = (recipes / "val" / wnid).iterdir()
        image.rename(image.with_name(f"ILSVRC2012_val_{number:08d}.JPEG"))
    assert prepare_folder.main([str(recipes / "val"), "real", "--split", "val", "--jobs", "1"]) == 0
    recipe = yaml.safe_load(Path("ce.yaml").read_text())
    Path("real.yaml").write_text(yaml.safe_dump(recipe | {"data": recipe["data"] | {"path": "real"}}))
    Path("order.txt").write_text("\n".join(numbered))
    Path("real.json").write_text(json.dumps([[wnids.index(wnid)] for wnid in numbered[:-1]] + [[]]))
    words = ["real.yaml", "weights=weights.safetensors"]
    plain, real = evaluated(*words), evaluated(*words, "real_labels=real.json", "val_labels=order.txt")
    assert plain.per_class is not None
    assert plain.per_class.correct is not None
    left_out = plain.per_class.correct[wnids.index(numbered[-1])]
    assert (real.samples, real.real_labels, real.confusion) == (19, "real.json", None)
    assert real.metrics["top1"] == pytest.approx(100 * (sum(plain.per_class.correct) - left_out) / 19)
    Path("all.json").write_text(json.dumps([list(range(20))] * 20))
    assert evaluated(*words, "real_labels=all.json", "val_labels=order.txt").metrics["top1"] == 100
    Path("short.json").write_text("[[1]]")
    Path("wrong.json").write_text(json.dumps([[20]] * 20))
    Path("other.txt").write_text("\n".join([*numbered[1:], numbered[1]]))
    for options, message in (
        (["real_labels=real.json"], r"does not keep the names of the images; give val_labels=FILE"),
        (["real_labels=real.json", "val_labels=other.txt"], r"other.txt lists 20 images, which are not the 20 of real"),
        (["real_labels=short.json", "val_labels=order.txt"], r"short.json has 1 images, and real has image 20"),
        (["real_labels=wrong.json", "val_labels=order.txt"], r"wrong.json: image \d+ has the class 20 of 20"),
        (["real_labels=order.txt", "val_labels=order.txt"], r"real_labels: order.txt: .*; download it again"),
    ):
        with pytest.raises(RecipeError, match=message):
            evaluate.main([*words, "speed=no", *options])


SETTINGS = TimedNetwork(
    model="cifar_resnet8",
    arguments={},
    num_classes=2,
    weights="gone.safetensors",
    size=2,
    batches=(1, 128),
    device="cpu",
    threads=1,
    precision="fp32",
    channels_last=False,
)


def small_network() -> FeatureTaps:
    return FeatureTaps(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 2)), {}, frozenset())


def test_a_batch_that_does_not_fit_into_memory_costs_its_speed_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    class Large(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            if len(images) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return images.flatten(1)

    rounds = measure_rounds(FeatureTaps(Large(), {}, frozenset()), SETTINGS)
    assert rounds.keys() == {1}
    processes = iter([{1: [0.01], 128: [0.1]}, rounds, {1: [0.01], 128: [0.1]}])
    monkeypatch.setattr(inference, "_measure_in_a_process", lambda network: next(processes))
    assert [speed.batch for speed in measure_speed(SETTINGS)] == [1]
    assert "note: speed: a batch of 128 images does not fit" in capsys.readouterr().out


def test_a_round_is_the_median_of_a_steady_clock(monkeypatch: pytest.MonkeyPatch):
    ticks = iter(range(10**6))
    monkeypatch.setattr(time, "perf_counter", lambda: 0.01 * next(ticks))
    network = small_network()
    for seconds in measure_rounds(network, SETTINGS).values():
        assert seconds == pytest.approx([0.01] * 4)
    assert network.training


def test_the_rounds_of_a_process_cover_a_machine_that_becomes_slower(monkeypatch: pytest.MonkeyPatch):
    ticks = iter(range(10**6))
    monkeypatch.setattr(time, "perf_counter", lambda: (n := next(ticks)) * 0.01 + max(n - 300, 0) * 0.01)
    for seconds in measure_rounds(small_network(), SETTINGS).values():
        assert (min(seconds), max(seconds)) == pytest.approx((0.01, 0.02))


@pytest.mark.parametrize(("device", "processes"), [("cpu", 4), ("cuda", 1)])
def test_a_round_has_a_process_of_its_own_except_on_a_gpu(
    device: str, processes: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def name_the_process(network: object, settings: TimedNetwork, count: int) -> dict[int, list[float]]:
        return {batch: count * [float(os.getpid())] for batch in settings.batches}

    monkeypatch.setattr(TimedNetwork, "build", lambda settings: None)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    monkeypatch.setattr(inference, "measure_rounds", name_the_process)
    inference.main([SETTINGS.model_copy(update={"device": device}).model_dump_json()])
    rounds = json.loads(capsys.readouterr().out)
    assert rounds.keys() == {"1", "128"}
    for seconds in rounds.values():
        assert (len(seconds), len(set(seconds))) == (4, processes)
        assert (os.getpid() in seconds) == (device == "cuda")


def test_the_spread_of_latency_covers_processes_that_differ(monkeypatch: pytest.MonkeyPatch):
    processes = iter([[20, 21, 22, 22], [25, 26, 26, 27], [23, 23, 24, 24]])
    rounds = iter([{1: times, 128: [10 * time for time in times]} for times in processes])
    monkeypatch.setattr(inference, "_measure_in_a_process", lambda network: next(rounds))
    for speed, scale in zip(measure_speed(SETTINGS), (1, 10), strict=True):
        figures = (speed.low_ms, speed.latency_ms, speed.high_ms)
        assert figures == pytest.approx((20_000 * scale, 23_500 * scale, 27_000 * scale))
        assert speed.images_per_second == pytest.approx(speed.batch / (23.5 * scale))


def test_a_process_that_cannot_measure_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    done = subprocess.CompletedProcess([], 1, stdout="", stderr="Traceback\nRuntimeError: the GPU is taken\n")
    monkeypatch.setattr(inference.subprocess, "run", lambda *args, **options: done)
    assert measure_speed(SETTINGS) == []
    told = "note: speed: a process that measures it failed, and is left out: RuntimeError: the GPU is taken\n"
    assert capsys.readouterr().out == 3 * told
