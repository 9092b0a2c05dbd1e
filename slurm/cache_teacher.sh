#!/usr/bin/env bash
# Cache the outputs of a recipe's teacher, for all runs that use them, on one node with eight GPUs.
#   sbatch slurm/cache_teacher.sh configs/imagenet/r50_mbv1.yaml method=kd with=cached [key=value …]
#SBATCH --job-name=cache_teacher
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
#SBATCH --open-mode=append
#SBATCH --output=slurm/logs/%x-%j.out
cd "${SLURM_SUBMIT_DIR:-.}" && exec launchers/job.sh cache "$@"
