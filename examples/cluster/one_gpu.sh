#!/bin/bash
# A whole run on one GPU: sbatch one_gpu.sh RUN [options of openmm-tsf run]
#SBATCH --job-name=tsf
#SBATCH --gpus=1
#SBATCH --cpus-per-task=4
#SBATCH --time=04:00:00
# SIGTERM to the program two minutes before the end: it saves, and --resume goes on from there.
#SBATCH --signal=TERM@120
#SBATCH --output=%x-%j.log

set -euo pipefail
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # srun takes one otherwise
run=${1:?expected the run directory}
shift

# --resume starts where there is nothing yet, so that the same line can be submitted again.
srun openmm-tsf run --output "$run" --device "${DEVICE:-cuda}" --resume "$@"
