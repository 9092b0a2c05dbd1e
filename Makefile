# A list of commands; .ci/run is made of them.
.PHONY: install lint types test everything quick demo format

install:
	launchers/uv sync --quiet --compile-bytecode

lint:
	launchers/uv run ruff check .
	launchers/uv run ruff format --check .
	for script in launchers/uv launchers/*.sh slurm/*.sh .ci/run; do bash -n $$script || exit; done

types:
	launchers/uv run pyright

test:
	launchers/uv run pytest

everything: install lint types
	launchers/uv run pytest --endurance

quick:
	launchers/uv run pytest -q tests/losses tests/data tests/models

demo:
	launchers/uv run accelerate launch pipeline/train.py

format:
	launchers/uv run ruff format .
	launchers/uv run ruff check --fix .
