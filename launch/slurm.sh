#!/bin/bash
# Trains under Slurm: one task a GPU, on one node or many; pre-empted, it queues itself again and goes on where it was.
#
#   sbatch --nodes 2 --gpus-per-node 4 --ntasks-per-node 4 launch/slurm.sh --config stage1_1b7 --ds_config zero2.json
#
# What follows the script's name goes to launch/train.py. Give `out=` or `--out` on a file system that all nodes share.
# FVLM_VOLUME=/path, if set, is handed to launch/env.sh on each node. Two minutes before the time limit Slurm signals
# the ranks (USR1, below), and at pre-emption too (TERM): they finish their step, write a checkpoint and exit with 75.
#SBATCH --job-name=fvlm
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
set -uo pipefail

cd "${SLURM_SUBMIT_DIR:?launch/slurm.sh runs under Slurm: sbatch launch/slurm.sh --config ...}" || exit 1
[ $# -gt 0 ] || { echo "slurm.sh: expected arguments of launch/train.py, e.g. --config stage1_135m" >&2; exit 2; }

nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST") || exit 1
export MASTER_ADDR=${nodes%%$'\n'*}
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))  # jobs that share a node do not meet
export PYTHON=${PYTHON:-$PWD/.venv/bin/python}

export FVLM_PREEMPTED=$PWD/.slurm-$SLURM_JOB_ID.preempted
rm -f "$FVLM_PREEMPTED"

# Single quotes: these variables differ from task to task. A task that is to go on later ends with 0 and leaves a mark:
# with 75 Slurm would kill the tasks beside it, and report their deaths instead.
srun --kill-on-bad-exit=1 bash -c '
  if [ -n "${FVLM_VOLUME:-}" ]; then source launch/env.sh "$FVLM_VOLUME" || exit 1; fi
  export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
  export LOCAL_WORLD_SIZE=$((SLURM_NTASKS / SLURM_NNODES))
  "$PYTHON" launch/train.py "$@" & child=$!
  trap "kill -TERM $child" TERM USR1  # Slurm signals all processes of a task, or this one alone
  wait "$child"; code=$?
  while kill -0 "$child" 2>/dev/null; do wait "$child"; code=$?; done  # a signal ends a wait, not the child
  if [ "$code" -eq 75 ]; then touch "$FVLM_PREEMPTED"; exit 0; fi
  exit "$code"' train "$@"
code=$?

if [ "$code" -eq 0 ] && [ -e "$FVLM_PREEMPTED" ]; then
  rm -f "$FVLM_PREEMPTED"
  echo "slurm.sh: pre-empted with a checkpoint written; queueing job $SLURM_JOB_ID again"
  scontrol requeue "$SLURM_JOB_ID" || exit 1
  exit 75
fi
exit "$code"
