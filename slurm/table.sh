#!/usr/bin/env bash
# Train the cells of a table, pair by method, as a job array with one cell per task, two at a time. By default these are all of ImageNet's.
#   sbatch slurm/table.sh [key=value …]
#   sbatch --array=0-2 slurm/table.sh configs/imagenet/r34_r18.yaml methods=kd,dkd,perception [key=value …]
#SBATCH --job-name=table
#SBATCH --array=0-39%2
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
#SBATCH --open-mode=append
#SBATCH --output=slurm/logs/%x-%A_%a.out
cd "${SLURM_SUBMIT_DIR:-.}" && exec launchers/job.sh table "$@"
