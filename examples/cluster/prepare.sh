#!/bin/bash
# The first of three jobs for many nodes: MD, training and tuning, on one GPU.
# sbatch prepare.sh RUN SHARDS [options of openmm-tsf run]
#SBATCH --job-name=tsf-prepare
#SBATCH --gpus=1
#SBATCH --cpus-per-task=4
#SBATCH --time=02:00:00
#SBATCH --signal=TERM@120
#SBATCH --output=%x-%j.log

set -euo pipefail
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # srun takes one otherwise
run=${1:?expected the run directory}
shards=${2:?expected the number of shards}
shift 2

srun openmm-tsf run --output "$run" --device "${DEVICE:-cuda}" --shards "$shards" --prepare \
    --resume "$@"
