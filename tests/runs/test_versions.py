from __future__ import annotations

import pytest

from pipeline.runs.versions import versions


def test_on_a_machine_without_git_the_commit_is_not_known(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", "")
    found = versions()
    assert found["commit"] is None
    assert found["torch"]
