# A list of commands; .ci/run is made of them.
.PHONY: install lint types test everything quick timings long campaign oldest demo release format

install:
	launchers/uv sync --quiet --compile-bytecode

lint:
	launchers/uv run ruff check .
	launchers/uv run ruff format --check .
	for script in launchers/uv launchers/*.sh slurm/*.sh .ci/run; do bash -n $$script || exit; done

types:
	launchers/uv run pyright

test:
	launchers/uv run pytest -n 2

everything: install lint types
	launchers/uv run pytest -n 2 --endurance

quick:
	launchers/uv run pytest -q -n 2 tests/losses tests/diffusion tests/data tests/models

# The thirty slowest tests, alone on the machine.
timings:
	launchers/uv run pytest -q --durations=30

# The same with the oldest torch that pyproject.toml promises, in an environment of its own.
OLDEST := launchers/uv run --isolated --with "torch==2.11.*" --with "torchvision==0.26.*" pytest -q
oldest:
	$(OLDEST) --endurance tests/nullgpu
	$(OLDEST) -n 2 tests/losses tests/diffusion tests/distributed tests/runs tests/training/test_train.py

# What CI leaves out.
long:
	launchers/uv run pytest --long -m long

# Kills, storage errors, bad input and damaged files, hundreds of each kind: ten minutes. ROOT names another checkout.
ROOT ?= .
campaign:
	launchers/uv run python tests/faults/campaign.py --root $(ROOT)

demo:
	launchers/uv run accelerate launch pipeline/train.py

# Wheel and source distribution of the commit in dist/; the wheel is tried in a new environment.
release:
	launchers/release.sh

format:
	launchers/uv run ruff format .
	launchers/uv run ruff check --fix .
