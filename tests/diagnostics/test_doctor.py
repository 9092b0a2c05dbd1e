"""Every check of the doctor: that it passes where all is well, and that it fails where it is not."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from commands import BIN, ROOT, run
from gloo_ranks import Ranks

from pipeline import doctor
from pipeline.config.recipe import LoadedRecipe, load_recipe
from pipeline.diagnostics import inputs, machine, network
from pipeline.diagnostics.result import Finding, fail, line, ok, run_check, skip
from pipeline.distributed import collectives, rendezvous
from pipeline.distributed.launcher import Launch, read_launch

CHECKS = {
    *("world", "versions", "same versions", "clocks", "GPU", "precision", "cores", "memory", "/dev/shm"),
    *("all-reduce", "latency", "decoding", "run folder"),
    *("data.path", "shards", "checksums", "reading", "teacher", "batch"),
}


@pytest.fixture
def load(
    place: Path, main_job: subprocess.CompletedProcess[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., LoadedRecipe]:
    """``load("ddkd.yaml", "batch=7")`` beside a copy of the shards that may be damaged."""
    shutil.copytree(place / "shards", tmp_path / "shards")
    for recipe in place.glob("*.yaml"):
        shutil.copy(recipe, tmp_path)
    monkeypatch.chdir(tmp_path)
    return lambda path, *words: load_recipe(path, words)


def failing(finding: Finding, value: str, advice: str) -> None:
    assert finding.status == "FAIL", finding
    assert value in finding.value
    assert advice in finding.advice


# -- the command ------------------------------------------------------------------------------------------------------


def table(printed: str) -> dict[str, str]:
    """Return each line's status by its check."""
    return {text[6:22].strip(): text[:5].strip() for text in printed.splitlines()}


def test_one_rank_passes_on_whole_shards(
    place: Path,
    main_job: subprocess.CompletedProcess[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(place)
    doctor.main(["ddkd.yaml"])
    found = table(capsys.readouterr().out)
    assert found.keys() == CHECKS
    assert set(found.values()) == {"ok", "skip"}
    always = CHECKS - {"same versions", "clocks", "GPU", "all-reduce", "latency"}
    assert all(found[name] == "ok" for name in always)


def test_two_ranks_pass_together(place: Path, main_job: subprocess.CompletedProcess[str]):
    torchrun = [str(BIN / "torchrun"), "--standalone", "--nproc_per_node", "2"]
    done = run(*torchrun, str(ROOT / "pipeline" / "doctor.py"), "ddkd.yaml", folder=place)
    assert done.returncode == 0, done.stdout + done.stderr
    found = table(done.stdout)
    assert found.keys() == CHECKS
    assert {name for name, status in found.items() if status != "ok"} <= {"GPU"}
    assert " × 2" in done.stdout.splitlines()[0]


def test_a_failure_ends_the_command_with_1_and_wrong_usage_with_2(
    load: Callable[..., LoadedRecipe], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    with pytest.raises(SystemExit) as ended:
        doctor.main(["ce.yaml", "data.path=gone", "data.prepare=[]"])
    assert ended.value.code == 1
    assert "FAIL  shards" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["doctor.py", "ce.yaml", "batsh=1"])
    with pytest.raises(SystemExit) as ended:
        doctor.entry(doctor.main)
    assert ended.value.code == 2


def test_a_line_names_the_worst_rank_and_says_what_to_do():
    hosts = ["n1", "n1", "n2"]
    findings = [ok("5 GiB", badness=-5), fail("1 GiB", "delete", badness=-1), fail("0 GiB", "delete", badness=0)]
    told = line("run folder", findings, hosts)
    assert told == "FAIL  run folder      0 GiB [rank 2 on n2] [2 of 3 ranks] → delete"
    assert line("GPU", [skip("none")] * 3, hosts) == "skip  GPU             none"
    assert "2 GiB [rank 1 on n1]" in line("memory", [ok("9 GiB", badness=-9), ok("2 GiB", badness=-2)], hosts[:2])


def test_what_a_check_raises_is_its_finding():
    failing(run_check(lambda: Finding(str(1 / 0), "")), "ZeroDivisionError: division by zero", "PIPELINE_TRACEBACK=1")


# -- the machine ------------------------------------------------------------------------------------------------------


def test_a_driver_that_torch_cannot_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    if torch.cuda.is_available():
        pytest.skip("torch can use this machine's driver")
    assert machine.check_versions().status == "ok"
    told = tmp_path / "version"
    told.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  470.82.01  Wed Oct 27 21:21:55 UTC 2021\n")
    monkeypatch.setattr(machine, "DRIVER", told)
    failing(machine.check_versions(), "driver 470.82.01", "torch cannot use this driver")


def test_a_gpu_whose_memory_another_has(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "H200")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (10 * machine.GIB, 139 * machine.GIB))
    failing(machine.check_gpu(), "H200, 10.0 of 139.0 GiB free, 8 visible", "nvidia-smi")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (138 * machine.GIB, 139 * machine.GIB))
    assert machine.check_gpu().status == "ok"


def test_a_precision_that_does_not_train_here():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    failing(machine.check_precision("fp16"), "fp16 no", "give precision=fp32")
    assert machine.check_precision("bf16").status == "ok"


def test_cores_that_srun_did_not_give(monkeypatch: pytest.MonkeyPatch):
    assert machine.check_cores().status == "ok"
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "100000")
    failing(machine.check_cores(), "", "export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK")


def test_memory_for_one_rank_and_not_for_many():
    assert machine.check_memory(1).status == "ok"
    failing(machine.check_memory(100_000), "GiB free for 100000", "start fewer")


def test_shared_memory_of_a_container(monkeypatch: pytest.MonkeyPatch):
    assert machine.check_shm(8).status == "ok"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=64 * 2**20))
    failing(machine.check_shm(8), "0.06 GiB", "--shm-size=1g")
    assert machine.check_shm(1).status == "ok"


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "runs" / "not yet"
    assert machine.check_disk(folder).status == "ok"
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**20))
    failing(machine.check_disk(folder), f"0.0 GiB free at {tmp_path}", "1 GiB is needed")
    assert machine.check_disk(folder, least=0).status == "ok"


# -- the ranks --------------------------------------------------------------------------------------------------------


def test_a_world_that_is_not_the_launchers(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as ended:
        doctor.main([])
    assert ended.value.code == 1
    told = capsys.readouterr().out.splitlines()
    missing = "RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"
    assert told[0] == f"FAIL  world           WORLD_SIZE is 2, but these are not set: {missing}"
    assert {text[:5] for text in told[1:]} == {"ok   ", "skip "}
    monkeypatch.setattr(rendezvous, "init_process_group", lambda launch, _, gpus: None)
    failing(network.check_world(read_launch()), "1 rank: ", "the launcher started 2")


def test_software_that_differs(monkeypatch: pytest.MonkeyPatch):
    def two(mine: dict[str, str]) -> list[dict[str, str]]:
        return [mine, {**mine, "torch": "1.0"}]

    assert network.check_same_versions().status == "skip"
    monkeypatch.setattr(collectives, "gather_objects", two)
    told = f"(torch: {machine.software()['torch']} and 1.0)"
    failing(network.check_same_versions(), "rank 1 has another torch than rank 0", told)


def test_clocks_that_disagree():
    assert network.clocks_agree([100.0, 100.5]).status == "ok"
    failing(network.clocks_agree([100.0, 160.0, 100.1]), "rank 1 is 60.0 s ahead of rank 0", "chrony")


def test_bus_bandwidth_is_what_each_link_carries():
    assert network.bus_bandwidth(10**9, 1.0, world=2) == pytest.approx(1e9)
    assert network.bus_bandwidth(10**9, 0.5, world=8) == pytest.approx(3.5e9)


def checked_together(rank: int, world: int) -> dict[str, Finding]:
    checks = {"clocks": network.check_clocks, "all-reduce": network.check_all_reduce, "cores": machine.check_cores}
    found = {name: check() for name, check in checks.items()}
    with mock.patch.object(collectives, "rank", return_value=0):
        found["wrong sum"] = network.check_all_reduce()
    return found


def test_two_ranks_add_up_and_a_wrong_sum_is_seen(ranks: Ranks):
    for found in ranks(checked_together):
        assert {found[name].status for name in ("clocks", "all-reduce", "cores")} == {"ok"}
        assert "GB/s" in found["all-reduce"].value
        assert " for 2 of the ranks" in found["cores"].value
        failing(found["wrong sum"], "a sum of 64 KiB over the ranks is wrong", "NCCL_P2P_DISABLE=1")


# -- what is read -----------------------------------------------------------------------------------------------------


def test_a_decoder_that_sees_other_pixels(monkeypatch: pytest.MonkeyPatch):
    image = np.zeros((4, 4, 3), np.float32)
    assert inputs.decoded_alike(image + 1, image, "DALI").status == "ok"
    failing(inputs.decoded_alike(image + 40, image, "DALI"), "by 40.0 of 255", "data.loader: memory")
    monkeypatch.setitem(sys.modules, "pipeline.data.dali", None)
    failing(inputs.check_decoding(torch.device("cpu")), "DALI is not installed", "install the extra cu13")


def test_shards_that_are_not_there(load: Callable[..., LoadedRecipe], monkeypatch: pytest.MonkeyPatch):
    gone = load("ce.yaml", "data.path=gone")
    found = inputs.check_shards(gone)
    assert found.status == "skip"
    assert "one process makes it first" in found.value
    assert "python shards/prepare_demo.py" in found.value
    monkeypatch.setattr(collectives, "world_size", lambda: 2)
    failing(
        inputs.check_shards(gone),
        "gone contains no shards",
        "one process must make it first: python shards/prepare_demo",
    )
    failing(run_check(lambda: inputs.check_shards(load("ce.yaml", "data.path=gone", "data.prepare=[]"))), "gone", "")


def test_a_corrupt_shard(load: Callable[..., LoadedRecipe]):
    loaded = load("ce.yaml")
    assert inputs.check_checksums(loaded.recipe).status == "ok"
    tar = next(Path("shards").glob("train-*.tar"))
    tar.write_bytes(tar.read_bytes()[:-1] + b"x")
    assert inputs.check_shards(loaded).status == "ok"
    found = inputs.check_checksums(loaded.recipe, count=99)
    failing(found, f"{tar} has a sha256 that differs", "shards/verify.py shards")
    tar.write_bytes(tar.read_bytes()[:-1])
    failing(run_check(lambda: inputs.check_shards(loaded)), str(tar), "")


def test_shards_that_are_read_too_slowly_are_left_out(load: Callable[..., LoadedRecipe]):
    assert "no shard was read within 0 s" in inputs.check_checksums(load("ce.yaml").recipe, seconds=0).value


def test_reading_is_measured(load: Callable[..., LoadedRecipe]):
    found = inputs.check_reading(load("ce.yaml").recipe)
    assert found.status == "ok"
    assert found.badness < 0


def test_a_missing_teacher(load: Callable[..., LoadedRecipe], monkeypatch: pytest.MonkeyPatch):
    own = "teacher={recipe: null, model: cifar_resnet20, weights: gone.pt}"
    failing(
        inputs.check_teacher_source(load("ddkd.yaml", own, "compare=null"), Launch()),
        "there is no file gone.pt",
        "copy the file",
    )
    by_recipe = load("ddkd.yaml", "compare=null")
    assert inputs.check_teacher_source(by_recipe, Launch()).status == "skip"
    monkeypatch.setattr(collectives, "world_size", lambda: 2)
    told = "one process must make it first: python pipeline/train.py"
    failing(inputs.check_teacher_source(by_recipe, Launch()), "runs/teacher contains no finished run", told)


def test_published_weights_that_are_not_fetched_yet(
    load: Callable[..., LoadedRecipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    loaded = load("ddkd.yaml", "teacher={recipe: null, model: resnet18, weights: IMAGENET1K_V1}", "compare=null")
    found = inputs.check_teacher_source(loaded, Launch())
    assert found.status == "skip"
    kept = Path(found.value.rpartition(" to ")[2])
    kept.parent.mkdir()
    kept.touch()
    assert inputs.check_teacher_source(loaded, Launch()) == ok(str(kept))


def test_a_batch_that_does_not_divide(load: Callable[..., LoadedRecipe], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(collectives, "world_size", lambda: 4)
    loaded = load("ce.yaml", "batch=30")
    failing(inputs.check_batch(loaded.recipe), "30 does not divide by 4 ranks × accumulation: 1", "batch=32")
    assert inputs.check_batch(load("ce.yaml").recipe).status == "ok"
