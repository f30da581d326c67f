#!/usr/bin/env bash
# A recipe on a Slurm cluster, from the repository's root:
#   sbatch --nodes 8 recipes/accelerate/slurm.sh runs/1b
#   sbatch --nodes 8 recipes/accelerate/slurm.sh runs/13b --config recipes/grow_7b_13b.yaml
# The first argument is the run directory, on a file system shared by all nodes; the others go to recipes/grow_1b.py.
# Five minutes before the time limit, the run saves a checkpoint and ends, and the job is requeued until the run is
# finished. Partition, account and processor cores depend on the cluster: give them to sbatch, or add them here.
#SBATCH --job-name=slop
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slop-%j.log
set -euo pipefail

export RUN=${1:?missing the run directory, such as runs/1b}
shift
export LAUNCH_CONFIG=${LAUNCH_CONFIG:-recipes/accelerate/multi_node_zero3.yaml}
export PROCESSES_PER_NODE=${PROCESSES_PER_NODE:-${SLURM_GPUS_ON_NODE:?run this with sbatch --gpus-per-node}}
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
MAIN_IP=${nodes[0]}
MAIN_PORT=$((20000 + SLURM_JOB_ID % 10000)) # jobs that share a node must not share a port
export MAIN_IP MAIN_PORT

on_node() {
  # After a SIGTERM the launcher kills its ranks within 30 seconds, too soon for a large checkpoint. So the launcher
  # ignores the signal, and the ranks get it directly.
  (
    trap '' TERM
    export PET_SIGNALS_TO_HANDLE=SIGINT # like torchrun's --signals-to-handle, which would undo the trap
    exec accelerate launch --config_file "$LAUNCH_CONFIG" \
      --num_machines "$SLURM_JOB_NUM_NODES" --num_processes $((SLURM_JOB_NUM_NODES * PROCESSES_PER_NODE)) \
      --machine_rank "$SLURM_NODEID" --main_process_ip "$MAIN_IP" --main_process_port "$MAIN_PORT" \
      recipes/grow_1b.py --output-dir "$RUN" --resume "$@"
  ) &
  local launcher=$! code=0 signalled=false
  trap 'signalled=true; pkill -TERM -P "$launcher"' TERM
  wait "$launcher" || code=$?
  if $signalled; then # the signal ended the wait, not the run
    code=0
    wait "$launcher" || code=$?
  fi
  return "$code"
}
export -f on_node

srun bash -c 'on_node "$@"' on_node "$@"

finished='import sys; from slop_hf import RunDirectory; sys.exit(not RunDirectory(sys.argv[1]).is_finished)'
python -c "$finished" "$RUN" || scontrol requeue "$SLURM_JOB_ID"
