"""``launchers/job.sh`` and ``launchers/node.sh`` without a Slurm: its commands are stand-ins on the PATH."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.config.recipe import load_recipe
from pipeline.config.tables import load_tables

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ("configs/imagenet/r50_mbv1.yaml", "method=ddkd")

# Each writes down how it was called; srun does what the test says instead of its command.
STAND_INS = {
    # The job starts srun deaf, and a bash cannot undo that for itself.
    "srun": '[ -n "${HEARS:-}" ] || HEARS=yes exec env --default-signal=USR1,TERM "$0" "$@"; '
    'echo "srun $*" >> "$CALLS"; eval "$STEP"',
    "scontrol": 'echo "scontrol $*" >> "$CALLS"; case $1 in show) echo 127.0.0.1; echo other;; esac',
    "squeue": 'echo "${STATE:-RUNNING}"',
}

NO_RUN = ("prepare_imagenet", "cache_teacher")
"""Scripts whose work does not lie in a run folder."""

Job = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """A job on two nodes, as Slurm describes it to the batch script."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, script in STAND_INS.items():
        (commands / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
        (commands / name).chmod(0o755)
    unset = ("SLURM_", "MASTER_", "STAGE", "DRY_RUN")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(unset)}
    told = {"SLURM_JOB_ID": "4321", "SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "n[1-2]"}
    own = {"PATH": f"{commands}:{os.environ['PATH']}", "CALLS": str(tmp_path / "calls"), "PYTHON": sys.executable}
    return {**kept, **told, **own, "STEP": "true"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The run folder."""
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


@pytest.fixture
def job(checkout: Path, environment: dict[str, str], folder: Path) -> Job:
    """``job("slurm/ddkd_r50_mbv1.sh", "key=value", STEP="…")`` runs a batch script where it would be submitted."""

    def run(script: str, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
        own_folder = Path(script).stem in NO_RUN or any(word.startswith("folder=") for word in words)
        command = ["bash", str(ROOT / script), *words, *([] if own_folder else [f"folder={folder}"])]
        own = {"SLURM_SUBMIT_DIR": str(checkout), **environment, **more}
        return subprocess.run(command, cwd="/", env=own, capture_output=True, text=True, check=False, timeout=60)

    return run


def calls(environment: dict[str, str]) -> list[str]:
    path = Path(environment["CALLS"])
    return path.read_text().splitlines() if path.exists() else []


def test_the_tasks_are_python_told_the_recipe_and_the_words_of_sbatch(job: Job, environment: dict[str, str]):
    done = job("slurm/ddkd_r50_mbv1.sh", "data.path=/data/imagenet", "batch=512", SLURM_CPUS_PER_TASK="12")
    assert done.returncode == 0, done.stderr
    (call,) = [call for call in calls(environment) if call.startswith("srun")]
    flags, _, task = call.partition(" launchers/node.sh ")
    assert flags == "srun --kill-on-bad-exit=1 --wait=60 --label"
    assert task.startswith(f"-m pipeline.train {' '.join(RECIPE)} data.path=/data/imagenet batch=512 folder=")
    assert "2 nodes, 2 ranks, rendezvous at 127.0.0.1:24321" in done.stderr


@pytest.mark.parametrize("told", ["NONE", "HOME,PATH", "ALL"])
def test_whatever_sbatch_exports_the_tasks_get_what_the_job_exports(
    job: Job, environment: dict[str, str], folder: Path, told: str
):
    names = "SLURM_EXPORT_ENV MASTER_ADDR PYTHON PIPELINE_RENDEZVOUS_SECONDS"
    step = f'for name in {names}; do echo "${{!name}}" >> {folder}/told; done'
    assert job("slurm/ddkd_r50_mbv1.sh", STEP=step, SLURM_EXPORT_ENV=told).returncode == 0
    assert (folder / "told").read_text().split() == ["ALL", "127.0.0.1", sys.executable, "600"]


@pytest.mark.parametrize("name", ["runs/a #1", "2024", "a: b", 'say "no"', r"back\slash", "it's", "null", "runs/plain"])
def test_a_folder_reaches_the_tasks_as_it_was_given(job: Job, environment: dict[str, str], tmp_path: Path, name: str):
    # What srun is told to run is what a task's Python gets; the last folder given is the one that counts.
    step = f'printf "%s\\n" "${{@: -1}}" > {tmp_path}/last'
    given = json.dumps(name, ensure_ascii=False)
    done = job("slurm/table.sh", "configs/demo.yaml", f"folder={given}", STEP=step)
    assert done.returncode == 0, done.stderr
    word = (tmp_path / "last").read_text().removesuffix("\n")
    assert load_recipe("configs/demo.yaml", [word]).recipe.folder == name
    assert (word == f"folder={name}") == (name == "runs/plain")


@pytest.mark.parametrize("status", [0, 1, 2, 137])
def test_the_steps_exit_code_is_the_jobs(job: Job, environment: dict[str, str], status: int):
    assert job("slurm/perception_r34_r18.sh", STEP=f"exit {status}").returncode == status
    assert not [call for call in calls(environment) if "requeue" in call]


def test_a_failure_names_the_first_rank_its_host_and_what_happened_to_it(job: Job):
    told = "srun: error: n2: task 1: Killed\\nsrun: error: n1: task 0: Terminated\\n"
    done = job("slurm/ddkd_r50_mbv1.sh", STEP=f"printf '{told}' >&2; exit 137")
    assert done.stderr.splitlines()[-1].startswith(
        "job 4321: error: rank 1 on n2: Killed; the step ended with exit code 137"
    )


@pytest.mark.parametrize("status", [0, 143])
def test_a_run_that_left_word_of_its_preemption_is_requeued(
    job: Job, environment: dict[str, str], folder: Path, status: int
):
    done = job("slurm/ddkd_r50_mbv1.sh", STEP=f"touch {folder}/preempted; exit {status}")
    assert done.returncode == 0
    assert calls(environment)[-1] == "scontrol requeue 4321"


def test_word_of_an_earlier_preemption_does_not_count(job: Job, environment: dict[str, str], folder: Path):
    (folder / "preempted").touch()
    assert job("slurm/ddkd_r50_mbv1.sh", STEP="exit 2").returncode == 2
    assert not [call for call in calls(environment) if "requeue" in call]


def test_a_task_of_an_array_is_requeued_and_not_the_array(job: Job, environment: dict[str, str], folder: Path):
    array = {"SLURM_ARRAY_JOB_ID": "4321", "SLURM_ARRAY_TASK_ID": "1"}
    job("slurm/table.sh", "configs/demo.yaml", "configs/demo_teacher.yaml", STEP=f"touch {folder}/preempted", **array)
    assert calls(environment)[-1] == "scontrol requeue 4321_1"


def test_a_job_that_its_owner_cancelled_does_not_come_back(job: Job, environment: dict[str, str], folder: Path):
    done = job("slurm/ddkd_r50_mbv1.sh", STEP=f"touch {folder}/preempted", STATE="CANCELLED")
    assert "the job was cancelled" in done.stderr
    assert not [call for call in calls(environment) if "requeue" in call]


def test_a_job_that_began_again_too_often_ends_before_its_step(job: Job, environment: dict[str, str]):
    done = job("slurm/ddkd_r50_mbv1.sh", SLURM_RESTART_COUNT="51")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "restarted 51 times" in done.stderr
    assert not calls(environment)
    assert job("slurm/ddkd_r50_mbv1.sh", SLURM_RESTART_COUNT="51", MAX_RESTARTS="60").returncode == 0


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_to_the_batch_script_reaches_the_tasks_and_is_waited_for(
    checkout: Path, environment: dict[str, str], folder: Path, number: signal.Signals
):
    step = f"trap 'touch {folder}/preempted; sleep 1; exit 0' USR1; touch {folder}/up; while :; do sleep 0.05; done"
    command = ["bash", str(ROOT / "slurm" / "ddkd_r50_mbv1.sh"), f"folder={folder}"]
    own = {**environment, "STEP": step, "SLURM_SUBMIT_DIR": str(checkout)}
    with subprocess.Popen(command, cwd="/", env=own, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not (folder / "up").exists():
            time.sleep(0.01)
        process.send_signal(number)
        assert process.wait(30) == 0
    assert calls(environment)[-1] == "scontrol requeue 4321"


def test_a_signal_while_shards_are_staged_requeues_the_job_before_it_trains(
    job: Job, environment: dict[str, str], folder: Path, tmp_path: Path
):
    # The scheduler tells the batch script, which tells the tasks.
    step = 'trap "exit 138" USR1; kill -USR1 $PPID; for _ in {1..200}; do sleep 0.05; done'
    assert job("slurm/ddkd_r50_mbv1.sh", STEP=step, STAGE=str(tmp_path)).returncode == 0
    assert not [call for call in calls(environment) if "pipeline.train" in call]
    assert calls(environment)[-1] == "scontrol requeue 4321"
    assert (folder / "preempted").exists()


def test_a_preparation_that_was_stopped_is_requeued_and_one_that_failed_is_not(job: Job, environment: dict[str, str]):
    assert job("slurm/prepare_imagenet.sh", "/source", "shards", STEP="exit 2").returncode == 2
    assert calls(environment)[-1].endswith("launchers/node.sh -m shards.prepare_imagenet /source shards")
    for status in (138, 143):
        job("slurm/prepare_imagenet.sh", "/source", "shards", STEP=f"exit {status}", SLURM_JOB_ID=str(status))
        assert calls(environment)[-1] == f"scontrol requeue {status}"


def test_a_teacher_is_cached_by_a_task_a_gpu_whose_ranks_meet(job: Job, environment: dict[str, str]):
    done = job("slurm/cache_teacher.sh", *RECIPE, "views=10", SLURM_CPUS_PER_TASK="12")
    assert done.returncode == 0, done.stderr
    (call,) = [call for call in calls(environment) if call.startswith("srun")]
    assert call == (
        "srun --kill-on-bad-exit=1 --wait=60 --label launchers/node.sh -m pipeline.cache_teacher "
        f"{' '.join(RECIPE)} views=10"
    )
    start = "start 1 of runs/imagenet/r50_mbv1/ddkd/seed-0 on 2 nodes, 2 ranks, rendezvous at 127.0.0.1:24321"
    assert done.stderr == f"job 4321: {start}\n"


def test_a_cache_whose_writing_was_stopped_is_requeued_and_one_that_failed_is_not(
    job: Job, environment: dict[str, str], folder: Path
):
    for status in (1, 2, 137):
        assert job("slurm/cache_teacher.sh", *RECIPE, "views=10", STEP=f"exit {status}").returncode == status
    assert not [call for call in calls(environment) if "requeue" in call]
    done = job("slurm/cache_teacher.sh", *RECIPE, f"teacher.cache={folder}", STEP=f"touch {folder}/preempted")
    assert "stopped by a signal; requeued" in done.stderr
    assert calls(environment)[-1] == "scontrol requeue 4321"


@pytest.mark.parametrize(("script", "words"), [("ddkd_r50_mbv1", []), ("cache_teacher", [*RECIPE, "views=10"])])
def test_shards_are_staged_once_a_node_before_the_tasks_start(
    job: Job, environment: dict[str, str], tmp_path: Path, script: str, words: list[str]
):
    assert job(f"slurm/{script}.sh", *words, "data.path=/data/tiny", STAGE=str(tmp_path)).returncode == 0
    stage, step = [call for call in calls(environment) if call.startswith("srun")]
    assert stage == (
        f"srun --nodes=2 --ntasks=2 --ntasks-per-node=1 --label {sys.executable} -m shards.stage /data/tiny {tmp_path}"
    )
    assert step.startswith("srun --kill-on-bad-exit=1 --wait=60 --label launchers/node.sh -m pipeline.")


def test_a_taken_port_is_passed_over_and_a_given_one_kept(job: Job):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 24321))
        taken.listen()
        done = job("slurm/ddkd_r50_mbv1.sh")
    assert "port 24321 of 127.0.0.1 is taken" in done.stderr
    assert "rendezvous at 127.0.0.1:24322" in done.stderr
    given = {"MASTER_ADDR": "head", "MASTER_PORT": "29500"}
    assert "rendezvous at head:29500" in job("slurm/ddkd_r50_mbv1.sh", **given).stderr


def test_an_array_has_a_cell_for_each_index_and_says_where_it_ends(job: Job, environment: dict[str, str]):
    pairs = load_tables().datasets["imagenet"].pairs
    cells = [
        f"configs/imagenet/{pair}.yaml method={method}" for pair, table in pairs.items() for method in table.methods
    ]
    header = (ROOT / "slurm" / "table.sh").read_text()
    assert re.search(r"#SBATCH --array=0-(\d+)", header)[1] == str(len(cells) - 1)  # type: ignore[index]
    assert job("slurm/table.sh", "seed=1", SLURM_ARRAY_TASK_ID="33").returncode == 0
    assert f" {cells[33]} seed=1 folder=" in calls(environment)[-1]
    two = ("configs/imagenet/r34_r18.yaml", "methods=kd,dkd")
    assert job("slurm/table.sh", *two, SLURM_ARRAY_TASK_ID="1").returncode == 0
    assert " configs/imagenet/r34_r18.yaml method=dkd folder=" in calls(environment)[-1]
    assert job("slurm/table.sh", "configs/demo.yaml", SLURM_ARRAY_TASK_ID="0").returncode == 0
    assert " configs/demo.yaml folder=" in calls(environment)[-1]
    done = job("slurm/table.sh", "configs/demo.yaml", SLURM_ARRAY_TASK_ID="1")
    assert (done.returncode, done.stderr) == (2, "job 4321: error: there are 1 cells; submit with --array=0-0\n")


def test_a_cache_without_a_recipe_is_one_line(job: Job, environment: dict[str, str]):
    done = job("slurm/cache_teacher.sh", "views=10", STAGE="/local")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "command line: name one recipe" in done.stderr
    assert not calls(environment)


@pytest.mark.parametrize("script", ["ddkd_r50_mbv1", "perception_r34_r18", "table", *NO_RUN])
def test_a_dry_run_prints_what_would_run_and_runs_nothing(job: Job, environment: dict[str, str], script: str):
    done = job(f"slurm/{script}.sh", "a=b", *(RECIPE if script == "cache_teacher" else []), DRY_RUN="1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("$ 'srun' '--kill-on-bad-exit=1' '--wait=60' '--label' 'launchers/node.sh' '")
    assert "WORLD_SIZE=" in done.stdout
    assert not [call for call in calls(environment) if not call.startswith("scontrol show")]


def test_a_recipe_that_is_not_there_is_one_line(job: Job):
    done = job("slurm/table.sh", "configs/none.yaml")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "configs/none.yaml: no such recipe" in done.stderr


def test_an_unknown_word_for_the_job_is_one_line(job: Job):
    done = job("launchers/job.sh", "trian", "configs/demo.yaml")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert (
        "error: expected train RECIPE, table, cache RECIPE or run SCRIPT, got 'trian configs/demo.yaml" in done.stderr
    )


def test_the_folder_of_the_logs_is_there_as_slurm_writes_no_line_without_it():
    assert (ROOT / "slurm" / "logs" / ".gitignore").is_file()
    for path in (ROOT / "slurm").glob("*.sh"):
        assert "#SBATCH --output=slurm/logs/" in path.read_text()


# -- one task ---------------------------------------------------------------------------------------------------------


def task(*words: str, **more: str) -> subprocess.CompletedProcess[str]:
    own = {"SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NTASKS": "4", "SLURM_NNODES": "2", "SLURM_GTIDS": "2,3"}
    command = ["bash", str(ROOT / "launchers" / "node.sh"), *words]
    told = {**os.environ, **own, "PYTHON": sys.executable, "MASTER_ADDR": "localhost", **more}
    return subprocess.run(command, cwd=ROOT, env=told, capture_output=True, text=True, check=False, timeout=60)


def test_a_task_is_told_who_it_is_among_the_ranks():
    done = task(
        "pipeline/train.py", "a.yaml", DRY_RUN="1", MASTER_PORT="20001", OMP_NUM_THREADS="", SLURM_CPUS_PER_TASK="6"
    )
    assert done.stdout == (
        "RANK=3 LOCAL_RANK=1 WORLD_SIZE=4 LOCAL_WORLD_SIZE=2 MASTER_ADDR=localhost MASTER_PORT=20001 OMP_NUM_THREADS=6 "
        f"{sys.executable} 'pipeline/train.py' 'a.yaml'\n"
    )


def test_a_task_ends_as_python_ends_and_gives_deepspeeds_environment_on():
    code = "import os, sys; sys.exit(int(os.environ['ACCELERATE_USE_DEEPSPEED'] == 'true') * int(os.environ['RANK']))"
    assert task("-c", code, ACCELERATE_USE_DEEPSPEED="true").returncode == 3


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"SLURM_NTASKS": "3"}, "error: rank 3 on .*: 2 of 3 tasks on one of 2 nodes; use --nodes and"),
        ({"SLURM_GPUS_ON_NODE": "8"}, "error: rank 3 on .*: 8 GPUs but 2 tasks on this node; set --ntasks-per-node"),
        ({"MASTER_ADDR": ""}, "error: rank 3 on .*: MASTER_ADDR is not set, but 4 tasks need it; start them with"),
        ({"PYTHON": "/no/python"}, "error: rank 3 on .*: there is no Python at '/no/python'; set PYTHON=FILE"),
        (
            {"MASTER_ADDR": "nowhere.invalid"},
            "error: rank 3 on .*: the host name nowhere.invalid cannot be resolved here",
        ),
    ],
)
def test_a_world_that_is_not_what_was_meant_is_one_line(more: dict[str, str], message: str):
    done = task("-c", "raise SystemExit(0)", **more)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert re.match(message, done.stderr)


def test_a_signal_before_python_listens_does_not_end_the_task():
    code = "import os, signal, sys; [os.kill(os.getpid(), n) for n in (signal.SIGTERM, signal.SIGUSR1)]; sys.exit(5)"
    assert task("-c", code).returncode == 5
