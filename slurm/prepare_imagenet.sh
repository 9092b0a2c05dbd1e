#!/usr/bin/env bash
# Write ImageNet as shards, with all cores of one node.
#   sbatch slurm/prepare_imagenet.sh /data/ILSVRC2012 datasets/imagenet [option …]
#SBATCH --job-name=prepare_imagenet
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=32
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
#SBATCH --open-mode=append
#SBATCH --output=slurm/logs/%x-%j.out
cd "${SLURM_SUBMIT_DIR:-.}" && exec launchers/job.sh run -m shards.prepare_imagenet ${SLURM_CPUS_PER_TASK:+--jobs="$SLURM_CPUS_PER_TASK"} "$@"
