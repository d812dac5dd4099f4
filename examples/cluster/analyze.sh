#!/bin/bash
# The third: tables and plots of all shards. It needs no GPU.
# sbatch analyze.sh RUN
#SBATCH --job-name=tsf-analyze
#SBATCH --cpus-per-task=2
#SBATCH --time=00:30:00
#SBATCH --output=%x-%j.log

set -euo pipefail
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # srun takes one otherwise
# The exit status is 0 if the run is converged, 3 if it is not yet, 4 if it is wrong.
srun openmm-tsf analyze "${1:?expected the run directory}"
