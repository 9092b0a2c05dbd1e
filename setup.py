"""What pyproject.toml cannot say: a wheel keeps a demo's photographs, and recipes and scripts as ``pipeline/files``."""

from setuptools import find_packages, setup

setup(
    script_name="setup.py",  # which is then no module of the package below
    packages=[*find_packages(include=["pipeline*", "shards*"]), "pipeline.files"],
    package_dir={"pipeline.files": "."},
    package_data={
        "shards": ["photographs/*.csv", "photographs/*/*.png"],
        "pipeline.files": [
            "configs/**/*.yaml",
            "configs/**/*.json",
            "configs/**/*.md",
            "configs/results.py",
            "launchers/*.sh",
            "launchers/accelerate/*.yaml",
            "launchers/deepspeed/*.json",
            "slurm/*.sh",
            "slurm/logs/.gitignore",
        ],
    },
)
