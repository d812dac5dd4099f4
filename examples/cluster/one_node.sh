#!/bin/bash
# One run on the eight GPUs of a node: sbatch one_node.sh RUN [options of openmm-tsf run]
#SBATCH --job-name=tsf
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=32
#SBATCH --time=04:00:00
#SBATCH --signal=TERM@120
#SBATCH --output=%x-%j.log

set -euo pipefail
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # srun takes one otherwise
run=${1:?expected the run directory}
shift
gpus=${SLURM_GPUS_ON_NODE:-8}

# One process for each GPU. They train together, and then each samples its own shards: a shard is a
# part of the walkers, and there have to be as many as processes, or a multiple of that.
# srun starts torchrun, so that it gets the signal.
srun torchrun --standalone --nproc-per-node "$gpus" -m openmm_tsf \
    run --output "$run" --device "${DEVICE:-cuda}" --shards "$gpus" --resume "$@"
