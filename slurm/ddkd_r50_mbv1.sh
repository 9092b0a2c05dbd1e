#!/usr/bin/env bash
# Train DDKD, ResNet-50 to MobileNetV1, on ImageNet, on one node with eight GPUs.
#   sbatch slurm/ddkd_r50_mbv1.sh [key=value …]          sbatch --nodes=2 slurm/ddkd_r50_mbv1.sh batch=512 schedule.rate=0.2
#SBATCH --job-name=ddkd_r50_mbv1
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
#SBATCH --open-mode=append
#SBATCH --output=slurm/logs/%x-%j.out
cd "${SLURM_SUBMIT_DIR:-.}" && exec launchers/job.sh train configs/imagenet/r50_mbv1.yaml method=ddkd "$@"
