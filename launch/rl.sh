#!/usr/bin/env bash
# Agentic RL on several hosts: one has the accelerators, the others play.
#
#   bash launch/rl.sh [--dry-run] ROLE [ARGUMENTS...]
#
#   local     all on this host; agents in processes of their own
#   trainer   on the host with accelerators: Ray's head, and main.py, which
#             trains, generates, and answers the agents; ARGUMENTS are main.py's
#   agents    on every other host, before or after: agents and their workspaces,
#             one process a CPU; ends when the trainer does
#
# Variables:
#   PLATFORM=cuda     of the trainer: cuda, tpu or cpu
#   TRAINER           for agents and trainer: the trainer's address, such as node0
#   PORT=6379         there
#   CPUS              for agents: processes on this host; default all its CPUs
#   RAY_AUTH_TOKEN    the same secret on all hosts, such as from openssl rand -hex
#                     32; who has it may run code on them. Read from the
#                     environment, never printed. local needs none.
#
# All hosts need the same commit; the trainer refuses others by name. A host that
# dies costs its episodes, which count as failures of the environment, and another
# may come at any time. One process trains and generates in turn, on the devices
# of one host: a slice of its own for generation, and agents that come over HTTP,
# wait for the engine and gateway that serve apart.

# shellcheck disable=SC2153  # variables come from the environment
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/steps.sh "$@"

[[ ${#words[@]} -gt 0 ]] || manual 2
role=${words[0]}
set -- ${words[@]+"${words[@]:1}"}
PLATFORM=${PLATFORM:-cuda} PORT=${PORT:-6379}
case $PLATFORM in
  cuda | tpu | cpu) ;;
  *) fail "PLATFORM=$PLATFORM: choose cuda, tpu or cpu" ;;
esac
case $role in
  local | trainer)
    [[ $# -gt 0 ]] || fail "$role what? Such as: $role --config=configs/rl.py" \
      '--config.checkpoint.init_from=runs/sft'
    ;;
  agents) [[ $# == 0 ]] || fail 'agents takes no arguments; the trainer does' ;;
  help | -h | --help) manual 0 ;;
  *) fail "'$role' is no role: choose local, trainer or agents" ;;
esac
if [[ $role != local ]]; then
  need TRAINER "the trainer's address, which all hosts reach"
  [[ $dry == yes ]] || need RAY_AUTH_TOKEN 'a secret that all hosts share'
  number PORT 1
fi
[[ -z ${CPUS:-} ]] || number CPUS 1
needed

devices=()
[[ $PLATFORM != cpu ]] || devices=(JAX_PLATFORMS=cpu)
main=(${devices[@]+"${devices[@]}"} .venv/bin/python main.py "$@"
  --config.forge.runner=ray)  # overrides come after --config
ray=(env RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0 "PYTHONPATH=$PWD"
  .venv/bin/ray start --block --disable-usage-stats)
# Whether Ray's head listens.
up="(: >$(quoted "/dev/tcp/${TRAINER:-}/$PORT")) 2>/dev/null"
case $role in
  local)
    step bash launch/env.sh "$PLATFORM" launch/ray.txt
    last_step env "${main[@]}"
    ;;
  trainer)
    step bash launch/env.sh "$PLATFORM" launch/ray.txt
    # No CPUs: agents do not play where the accelerators are fed.
    head=("${ray[@]}" --head "--node-ip-address=$TRAINER" "--port=$PORT"
      --num-cpus=0 --include-dashboard=false)
    main=(env RAY_AUTH_MODE=token "RAY_ADDRESS=$TRAINER:$PORT" "${main[@]}")
    if [[ $dry == yes ]]; then
      echo "$(quoted "${head[@]}") &"
      echo "until $up; do sleep 1; done"
      quoted "${main[@]}"
      echo '; kill $!'
      exit
    fi
    if eval "$up"; then
      fail "something listens at $TRAINER:$PORT already: end it, or set PORT"
    fi
    "${head[@]}" >/dev/null &
    cluster=$!
    trap 'kill "$cluster" 2>/dev/null && wait "$cluster" || true' EXIT
    until eval "$up"; do
      kill -0 "$cluster" 2>/dev/null || fail "Ray did not start (see above)"
      sleep 1
    done
    # Somebody else may have come to listen there.
    kill -0 "$cluster" 2>/dev/null || fail "Ray did not start (see above)"
    "${main[@]}" &
    trainer=$!
    trap 'kill -TERM "$trainer" 2>/dev/null || true' TERM INT
    code=0
    while true; do
      wait "$trainer" && code=0 || code=$?
      kill -0 "$trainer" 2>/dev/null || break  # else a signal ended the wait
    done
    exit "$code"
    ;;
  agents)
    step bash launch/env.sh cpu launch/ray.txt
    [[ $dry == yes ]] || say "waiting for the trainer at $TRAINER:$PORT"
    shell_step "until $up; do sleep 1; done"
    last_step "${ray[@]}" "--address=$TRAINER:$PORT" ${CPUS:+"--num-cpus=$CPUS"}
    ;;
esac
