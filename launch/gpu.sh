#!/usr/bin/env bash
# Runs main.py on GPUs: one host or many. It is started on every host, and
# starts that host's processes; ARGUMENTS are main.py's.
#
#   bash launch/gpu.sh [--dry-run] ARGUMENTS...              one host
#   HOSTS=4 HOST_INDEX=0 COORDINATOR=node0:8476 \
#     bash launch/gpu.sh ARGUMENTS...                        each of four hosts
#   sbatch --nodes=4 --ntasks-per-node=1 --gpus-per-node=8 \
#     --wrap 'srun bash launch/gpu.sh ARGUMENTS...'          SLURM says the rest
#
# Variables:
#   HOSTS=1           hosts of the run
#   HOST_INDEX        which of them this one is, from 0
#   COORDINATOR       ADDRESS:PORT on host 0 that the others reach
#   PROCESSES=1       on each host; more than one share out its GPUs
#   GPUS              of this host, where nvidia-smi does not tell
#   CUDA_VISIBLE_DEVICES  the GPUs to use; all of them where it is not set
#   PLATFORM=cuda     cpu tries the same without GPUs
#   DEVICES           for PLATFORM=cpu: devices of each process
#
# --workdir must be a folder that all hosts share. A process that fails ends the
# others after GRACE=60 seconds, and the script with its exit code. SIGTERM and
# SIGINT go to the processes, which save and end.

# shellcheck disable=SC2153  # variables come from the environment
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/steps.sh "$@"

[[ ${#words[@]} -gt 0 ]] || manual 2
PROCESSES=${PROCESSES:-1} PLATFORM=${PLATFORM:-cuda} GRACE=${GRACE:-60}
case $PLATFORM in
  cuda | cpu) ;;
  *) fail "PLATFORM=$PLATFORM: choose cuda or cpu" ;;
esac

# Inside a step of several nodes, SLURM knows the hosts.
if [[ -n ${SLURM_STEP_NODELIST:-} && -z ${HOSTS:-} ]]; then
  HOSTS=$SLURM_STEP_NUM_NODES HOST_INDEX=$SLURM_NODEID
  [[ $SLURM_STEP_NUM_TASKS == "$HOSTS" ]] ||
    fail "SLURM starts this $SLURM_STEP_NUM_TASKS times on $HOSTS nodes: say" \
      'srun --ntasks-per-node=1; PROCESSES=N starts N on each'
  first=$(scontrol show hostnames "$SLURM_STEP_NODELIST" | head -n 1)
  COORDINATOR=${COORDINATOR:-$first:$((61440 + SLURM_JOB_ID % 4096))}
elif [[ ${SLURM_JOB_NUM_NODES:-1} -gt 1 && -z ${HOSTS:-} ]]; then
  fail "this job has $SLURM_JOB_NUM_NODES nodes and this runs on one: srun it"
fi
HOSTS=${HOSTS:-1}
for name in HOSTS PROCESSES; do number "$name" 1; done
if [[ $HOSTS -gt 1 ]]; then
  need HOST_INDEX "which of the $HOSTS hosts this is: 0 to $((HOSTS - 1))"
  need COORDINATOR 'ADDRESS:PORT on host 0, such as node0:8476'
  needed
fi
HOST_INDEX=${HOST_INDEX:-0}
number HOST_INDEX 0
[[ $HOST_INDEX -lt $HOSTS ]] ||
  fail "HOST_INDEX=$HOST_INDEX: $HOSTS hosts are numbered from 0"
number GRACE 0
total=$((HOSTS * PROCESSES))

# A port of this host that nobody listens on.
free_port() {
  local port
  while true; do
    port=$((20000 + RANDOM % 10000))
    (: >"/dev/tcp/127.0.0.1/$port") 2>/dev/null || break
  done
  echo "$port"
}

# What process $1 of this host finds in its environment.
variables() {
  if [[ $PLATFORM == cpu ]]; then
    echo JAX_PLATFORMS=cpu
    [[ -z ${DEVICES:-} ]] || echo "JAX_NUM_CPU_DEVICES=$DEVICES"
  fi
  [[ $total -gt 1 ]] || return 0
  echo "JAX_COORDINATOR_ADDRESS=$COORDINATOR"
  echo "JAX_NUM_PROCESSES=$total"
  echo "JAX_PROCESS_ID=$((HOST_INDEX * PROCESSES + $1))"
  if [[ $PLATFORM == cuda && $PROCESSES -gt 1 ]]; then
    local each=$((GPUS / PROCESSES)) IFS=,
    local own=("${gpus[@]:$(($1 * each)):each}")
    echo "CUDA_VISIBLE_DEVICES=${own[*]}"
  fi
}

if [[ $total -gt 1 && -z ${COORDINATOR:-} ]]; then
  COORDINATOR=127.0.0.1:$(free_port)
fi
if [[ $PLATFORM == cuda && $PROCESSES -gt 1 ]]; then
  if [[ -n ${CUDA_VISIBLE_DEVICES:-} ]]; then
    IFS=, read -ra gpus <<<"$CUDA_VISIBLE_DEVICES"
    GPUS=${#gpus[@]}
  else
    GPUS=${GPUS:-$(nvidia-smi --list-gpus 2>/dev/null | wc -l)}
    number GPUS 0
    # shellcheck disable=SC2207  # numbers, one a line
    gpus=($(seq 0 $((GPUS - 1))))
  fi
  [[ $GPUS -gt 0 && $((GPUS % PROCESSES)) == 0 ]] ||
    fail "PROCESSES=$PROCESSES cannot share out GPUS=$GPUS evenly"
fi
step bash launch/env.sh "$PLATFORM"
pids=() stopped=no
trap 'stopped=yes' TERM INT  # while not all of them are there to be told
for ((i = 0; i < PROCESSES; i++)); do
  # shellcheck disable=SC2207  # one word a variable
  process=(env $(variables "$i") .venv/bin/python main.py "${words[@]}")
  if [[ $dry == yes ]]; then
    echo "$(quoted "${process[@]}") &"
  else
    "${process[@]}" &
    pids+=($!)
  fi
done
if [[ $dry == yes ]]; then
  echo wait
  exit
fi

trap 'kill -TERM "${pids[@]}" 2>/dev/null || true' TERM INT
[[ $stopped == no ]] || kill -TERM "${pids[@]}" 2>/dev/null || true
code=0 deadline=''
while [[ ${#pids[@]} -gt 0 ]]; do
  sleep 0.5 || true  # a signal to the whole group ends it, too
  running=()
  for pid in "${pids[@]}"; do
    if kill -0 "$pid" 2>/dev/null; then
      running+=("$pid")
    elif wait "$pid"; then
      :
    else
      status=$?
      [[ $code != 0 ]] || code=$status
      say "process $pid ended with $status"
      deadline=${deadline:-$((SECONDS + GRACE))}
    fi
  done
  pids=(${running[@]+"${running[@]}"})
  if [[ -n $deadline && $SECONDS -ge $deadline && ${#pids[@]} -gt 0 ]]; then
    say "the others did not end in $GRACE s; they are killed"
    kill -KILL "${pids[@]}" 2>/dev/null || true
  fi
done
exit "$code"
