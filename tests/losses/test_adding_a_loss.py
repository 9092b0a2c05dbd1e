"""A new loss is one file, one method, one oracle and one line of the tables; the generic tests find it by itself."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.errors import ROOT

NEEDED = ("pipeline", "configs", "tests", "shards", "launchers", "docs", "pyproject.toml", "CONTRIBUTING.md")
LOSS = '''"""Regression of logits, Ba and Caruana, NeurIPS 2014, arXiv:1312.6184, eq. 1.   B batch, K classes."""

from torch import Tensor

from pipeline.batch import Batch, Outputs
from pipeline.losses._base import Loss


def logit_mse(student_BK: Tensor, teacher_BK: Tensor) -> Tensor:
    """Return ½·‖student − teacher‖² of the logits, averaged over the rows. No gradient reaches the teacher."""
    return (student_BK - teacher_BK.detach()).square().sum(1).mean() / 2


class LogitMSE(Loss):
    """Half the squared distance between the logits."""

    reads_labels = False

    class Config(Loss.Config):
        """The config of the regression of logits, such as ``{weight: 0.1}``."""

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Return the loss part ``logit_mse``."""
        return {"logit_mse": logit_mse(student.logits_BK, teacher.logits_BK)}
'''
METHOD = """# Regression of logits, Ba and Caruana, NeurIPS 2014, arXiv:1312.6184, eq. 1: CE + 0.05·‖difference‖².
losses:
  ce: {}
  logit_mse: {weight: 0.1}
"""
ORACLE = '''"""The regression of logits in plain float64 loops."""

PROPERTIES = {"vanishes at the teacher", "never negative", "ignores the order of rows", "reads the logits"}


def parts(config, inputs):
    rows = list(zip(inputs.student_logits, inputs.teacher_logits, strict=True))
    return {"logit_mse": sum((s - t) ** 2 for a, b in rows for s, t in zip(a, b, strict=True)) / 2 / len(rows)}
'''
SUITES = (
    *("tests/losses/test_every_loss.py", "tests/builders/test_check.py", "tests/training/test_every_method.py"),
    *(
        "tests/training/test_graph.py",
        "tests/config/test_tables.py",
        "tests/test_architecture.py",
        "tests/test_words.py",
    ),
)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the project with a loss more."""
    for name in NEEDED:
        source, copy = ROOT / name, tmp_path / name
        if source.is_dir():
            shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__", ".pytest_cache"))
        elif source.is_file():
            shutil.copy(source, copy)
    (tmp_path / "pipeline" / "losses" / "logit_mse.py").write_text(LOSS)
    (tmp_path / "configs" / "methods" / "logit_mse.yaml").write_text(METHOD)
    (tmp_path / "tests" / "oracles" / "logit_mse.py").write_text(ORACLE)
    tables = tmp_path / "configs" / "tables.yaml"
    before, line, after = tables.read_text().partition("  kd: KD\n")
    tables.write_text(before + line + "  logit_mse: regression of logits\n" + after)
    return tmp_path


@pytest.mark.endurance
@pytest.mark.timeout(600)
def test_a_new_loss_needs_one_file_one_method_one_oracle_and_one_line(tree: Path):
    names = "logit_mse or test_tables or test_architecture"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *SUITES, "-k", names]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    shown = subprocess.run(
        [sys.executable, "pipeline/train.py", "--check", "configs/cifar100/vgg13_vgg8.yaml", "method=logit_mse"],
        cwd=tree,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "losses    ce, logit_mse\n" in shown
