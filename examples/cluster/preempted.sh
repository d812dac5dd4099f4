#!/bin/bash
# One run on several GPUs, also of several nodes, where jobs are preempted or too short: it is put
# back into the queue until it is complete. sbatch preempted.sh RUN [options of openmm-tsf run]
#SBATCH --job-name=tsf
#SBATCH --ntasks=8
#SBATCH --gpus-per-task=1
#SBATCH --cpus-per-task=4
#SBATCH --time=01:00:00
# SIGTERM to all tasks, not to this shell, two minutes before the end of the time limit; a preempted
# job gets it from Slurm, if the partition has a GraceTime.
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

set -euo pipefail
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # srun takes one otherwise
run=${1:?expected the run directory}
shift

# Each task is a rank. All of them stop after the same step of the training, or each after its
# iteration of production, with everything written; the status of the job is then 130.
status=0
srun openmm-tsf run --output "$run" --device "${DEVICE:-cuda}" --shards "$SLURM_NTASKS" \
    --resume "$@" || status=$?

if ((status == 130)); then
    echo "stopped with everything written: requeued"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
