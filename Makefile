# A list of commands; each is what CI runs.
.PHONY: install demo quick test lint format types

install:
	launchers/uv sync

demo:
	launchers/uv run accelerate launch pipeline/train.py

quick:
	launchers/uv run pytest -q -m "not endurance" tests/losses tests/data tests/models

test:
	launchers/uv run pytest

lint:
	launchers/uv run ruff check .
	launchers/uv run ruff format --check .
	bash -n launchers/uv

types:
	launchers/uv run pyright

format:
	launchers/uv run ruff format .
	launchers/uv run ruff check --fix .
