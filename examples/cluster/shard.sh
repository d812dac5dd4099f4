#!/bin/bash
# The second: an array of jobs, each of which samples one shard on one GPU of any node.
# sbatch --array=0-63 shard.sh RUN
#SBATCH --job-name=tsf-shard
#SBATCH --ntasks=1
#SBATCH --gpus=1
#SBATCH --cpus-per-task=4
#SBATCH --time=02:00:00
#SBATCH --signal=TERM@120
#SBATCH --output=%x-%A_%a.log

set -euo pipefail
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # srun takes one otherwise
run=${1:?expected the run directory}

# The jobs need nothing of each other: one that fails can be submitted again alone, with
# --array=K, and a shard that is complete is left as it is.
srun openmm-tsf run --output "$run" --device "${DEVICE:-cuda}" --resume \
    --shard "${SLURM_ARRAY_TASK_ID:?expected a job array, sbatch --array=0-63}"
