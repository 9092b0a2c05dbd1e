"""Modules with the parts of wandb and mlflow that Accelerate's trackers call; they note what they are told."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any


class FakeWandb(ModuleType):
    """W&B: a run per id, which ``init`` continues."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.inits: list[dict[str, Any]] = []
        self.runs: dict[str, dict[str, Any]] = {}

    def init(self, **options: Any) -> Any:
        self.inits.append(options)
        run = self.runs.setdefault(options["id"], {"config": {}, "values": {}, "finished": 0})

        def log(values: dict[str, float], step: int) -> None:
            run["values"].update({(step, name): value for name, value in values.items()})

        def update(values: dict[str, Any], allow_val_change: bool) -> None:
            assert allow_val_change
            run["config"].update(values)

        def finish() -> None:
            run["finished"] += 1

        return SimpleNamespace(log=log, finish=finish, config=SimpleNamespace(update=update))


class FakeMlflow(ModuleType):
    """MLflow: experiments by name, and runs whose parameters never change; only one may be active."""

    def __init__(self) -> None:
        super().__init__("mlflow")
        self.experiments: list[str] = []
        self.runs: dict[str, Any] = {}
        self.active: Any = None
        self.utils = SimpleNamespace(
            validation=SimpleNamespace(MAX_PARAM_VAL_LENGTH=6000, MAX_PARAMS_TAGS_PER_BATCH=100)
        )

    def search_experiments(self, filter_string: str) -> list[Any]:
        found = [name for name in self.experiments if filter_string == f"name = '{name}'"]
        return [SimpleNamespace(experiment_id=name) for name in found]

    def create_experiment(self, name: str, **_: Any) -> str:
        self.experiments.append(name)
        return name

    def start_run(self, run_id: str | None, experiment_id: str, run_name: str, tags: Any, **_: Any) -> Any:
        assert self.active is None
        if run_id is None:
            run_id = f"run-{len(self.runs)}"
            data, info = SimpleNamespace(params={}, values={}), SimpleNamespace(run_id=run_id)
            self.runs[run_id] = SimpleNamespace(
                info=info, data=data, experiment=experiment_id, name=run_name, tags=tags
            )
        self.active = self.runs[run_id]
        return self.active

    def log_params(self, values: dict[str, Any]) -> None:
        assert all(self.active.data.params.setdefault(name, value) == value for name, value in values.items())

    def log_metrics(self, values: dict[str, float], step: int) -> None:
        self.active.data.values.update({(step, name): value for name, value in values.items()})

    def end_run(self) -> None:
        self.active = None
