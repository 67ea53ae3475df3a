#!/usr/bin/env bash
# Runs main.py on Cloud TPU VMs: one slice or several, as one queued resource.
#
#   bash launch/tpu_vm.sh [--dry-run] ACTION [ARGUMENTS...]
#
#   create    asks for the TPUs and waits until they are there
#   wait      waits again, after an interruption
#   copy      brings this checkout to every host; with REPO, clones that instead
#   setup     makes .venv on every host and mounts BUCKET
#   secrets   puts SECRETS into Secret Manager, where the hosts read them
#   run       starts main.py on every host, in the background: ARGUMENTS are its
#   logs      follows main.py on host 0; WORKER=3, SLICE=1 for another
#   status    the TPUs, and whether main.py runs on each host
#   stop      asks main.py on every host to save and to end (SIGTERM)
#   fetch     copies the run's folder from the bucket to runs/NAME
#   delete    gives the TPUs back; deletes SECRETS from Secret Manager
#
# Variables:
#   NAME              of the queued resource and of the run's folder
#   PROJECT, ZONE     where, such as ZONE=us-east5-a
#   TPU               what to create, such as v6e-256 (chips) or v5p-128 (cores,
#                     two a chip: a topology of 4x4x4)
#   RUNTIME           the hosts' image; by default the one that belongs to TPU
#   SLICES=1          so many of TPU; a run spans all of them
#   SPOT=yes          cheaper, and may be taken away at any time
#   RESERVED=yes      from a reservation
#   NETWORK, SUBNETWORK, SERVICE_ACCOUNT   other than the project's defaults
#   BUCKET            keeps the run: the hosts have no disk in common
#   SECRETS           names of variables that main.py is to find there
#   REPO, REF=HEAD    for copy: a git URL that the hosts can read, and a commit

# shellcheck disable=SC2016  # what hosts run is expanded there
# shellcheck disable=SC2153  # variables come from the environment
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/steps.sh "$@"

[[ ${#words[@]} -gt 0 ]] || manual 2
action=${words[0]}
set -- ${words[@]+"${words[@]:1}"}

SLICES=${SLICES:-1} WORKER=${WORKER:-0}
here=("--project=${PROJECT:-}" "--zone=${ZONE:-}")
tpus=(gcloud compute tpus queued-resources)

# ssh and scp to all slices of a queued resource exist as alpha only.
ssh_all() {
  step gcloud alpha compute tpus queued-resources ssh "$NAME" "${here[@]}" \
    --node=all --worker=all "--command=$1"
}

runtime() {
  case $TPU in
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    *) fail "TPU=$TPU: set RUNTIME to an image for it; there are those of" \
      "gcloud compute tpus tpu-vm versions list --zone=$ZONE" ;;
  esac
}

create() {
  need TPU 'what to create, such as v5p-128'
  needed
  number SLICES 1
  [[ -n ${RUNTIME:-} ]] || RUNTIME=$(runtime)
  local options=("--accelerator-type=$TPU" "--runtime-version=$RUNTIME")
  if [[ $SLICES == 1 ]]; then
    options+=("--node-id=$NAME")
  else
    options+=("--node-count=$SLICES" "--node-prefix=$NAME")
  fi
  [[ ${SPOT:-} != yes ]] || options+=(--spot)
  [[ ${RESERVED:-} != yes ]] || options+=(--reserved)
  [[ -z ${NETWORK:-} ]] || options+=("--network=$NETWORK")
  [[ -z ${SUBNETWORK:-} ]] || options+=("--subnetwork=$SUBNETWORK")
  [[ -z ${SERVICE_ACCOUNT:-} ]] ||
    options+=("--service-account=$SERVICE_ACCOUNT")
  step "${tpus[@]}" create "$NAME" "${here[@]}" "${options[@]}"
}

wait_for_it() {
  local ask=("${tpus[@]}" describe "$NAME" "${here[@]}"
    '--format=value(state.state)')
  if [[ $dry == yes ]]; then
    echo "until [[ \$($(quoted "${ask[@]}")) == ACTIVE ]]; do sleep 30; done"
    return
  fi
  local state
  SECONDS=0
  while true; do
    state=$("${ask[@]}") || fail "gcloud cannot say how $NAME is (see above)"
    say "$NAME is $state after $((SECONDS / 60)) minutes"
    case $state in
      ACTIVE) return ;;
      FAILED | SUSPENDING | SUSPENDED | DELETING)
        fail "it will not come any more: delete it, then create it anew" ;;
    esac
    sleep 30
  done
}

copy() {
  if [[ -n ${REPO:-} ]]; then
    ssh_all "$(all_of 'rm -rf m2-jax' "git clone $(quoted "$REPO") m2-jax" \
      "git -C m2-jax checkout $(quoted "${REF:-HEAD}")")"
    return
  fi
  local packed=runs/$NAME.tar.gz
  step mkdir -p runs
  # What git has and what it would take: no .venv, no runs. It also lists files
  # that were deleted.
  local there='while IFS= read -r -d "" file; do
  if [[ -e $file || -L $file ]]; then printf "%s\0" "$file"; fi
done'
  shell_step "git ls-files -z --cached --others --exclude-standard | $there \
| tar --null --files-from=- -czf $packed"
  step gcloud alpha compute tpus queued-resources scp "$packed" \
    "$NAME:m2-jax.tar.gz" "${here[@]}" --node=all --worker=all
  ssh_all "$(all_of 'mkdir -p m2-jax' 'tar -xzf m2-jax.tar.gz -C m2-jax')"
}

setup() {
  # The images' own Python is older than 3.12; uv, which env.sh asks, has one.
  local uv='curl -LsSf https://astral.sh/uv/install.sh | sh'
  ssh_all "command -v uv ~/.local/bin/uv || $uv"
  ssh_all 'cd m2-jax && PATH=$PATH:~/.local/bin bash launch/env.sh tpu'
  # As gcsfuse's own guide installs it.
  local from=https://packages.cloud.google.com/apt
  local key=/usr/share/keyrings/cloud.google.asc
  ssh_all "command -v gcsfuse || { $(all_of \
    "curl -fsS $from/doc/apt-key.gpg | sudo tee $key >/dev/null" \
    "echo \"deb [signed-by=$key] $from gcsfuse-\$(lsb_release -cs) main\" \
| sudo tee /etc/apt/sources.list.d/gcsfuse.list" \
    'sudo apt-get update -q' 'sudo apt-get install -qy gcsfuse'); }"
  ssh_all "$(all_of 'mkdir -p bucket' \
    "{ mountpoint -q bucket || gcsfuse --implicit-dirs $BUCKET bucket; }")"
}

secrets() {
  need SECRETS 'names of variables, such as "HF_TOKEN AWS_SECRET_ACCESS_KEY"'
  check_secrets values
  needed
  local name secret
  for name in $SECRETS; do
    secret=$(quoted "$NAME-$name" "--project=$PROJECT")
    shell_step "gcloud secrets describe $secret >/dev/null \
|| gcloud secrets create $secret"
    shell_step "printf %s \"\$$name\" \
| gcloud secrets versions add $secret --data-file=-"
  done
}

run() {
  [[ $# -gt 0 ]] || fail 'run what? Such as: run --config=configs/m2.py'
  check_secrets
  local name commands=('cd m2-jax' 'mountpoint ../bucket' 'mkdir -p logs'
    '{ ! kill -0 $(cat logs/pid) || { echo main.py runs already; false; }; } \
2>/dev/null')
  for name in ${SECRETS:-}; do  # each host reads them by itself
    # Two commands: `export` succeeds whatever becomes of what it is given.
    commands+=("$name=\"\$(gcloud secrets versions access latest \
--secret=$NAME-$name --project=$PROJECT)\"" "export $name")
  done
  # M2_HOSTS: jax finds the other hosts by the TPU's metadata server.
  ssh_all "$(all_of "${commands[@]}" "{ M2_HOSTS=auto setsid nohup \
.venv/bin/python main.py --workdir=../bucket/$NAME $(quoted "$@") \
>>logs/out 2>&1 </dev/null & echo \$! >logs/pid; }")"
}

case $action in
  create | wait | copy | setup | secrets | run | logs | status | stop | fetch | \
    delete) ;;
  help | -h | --help) manual 0 ;;
  *) fail "'$action' is no action; without one, it says what there is" ;;
esac
need NAME 'of the queued resource and the run, such as m2'
need PROJECT 'the Google Cloud project'
need ZONE 'where, such as us-east5-a'
case $action in
  setup | run | fetch) need BUCKET 'a bucket that keeps the run; no gs://' ;;
esac
needed
check_bucket
program gcloud https://cloud.google.com/sdk/docs/install
case $action in
  create)
    create
    wait_for_it
    ;;
  wait) wait_for_it ;;
  copy) copy ;;
  setup) setup ;;
  secrets) secrets ;;
  run) run "$@" ;;
  logs)
    step gcloud alpha compute tpus queued-resources ssh "$NAME" "${here[@]}" \
      "--node=${SLICE:-0}" "--worker=$WORKER" \
      '--command=tail -n 100 -F m2-jax/logs/out'
    ;;
  status)
    step "${tpus[@]}" describe "$NAME" "${here[@]}"
    ssh_all 'hostname; ps -o pid,etime,args -p $(cat m2-jax/logs/pid)'
    ;;
  stop) ssh_all 'kill -TERM $(cat m2-jax/logs/pid)' ;;
  fetch)
    step mkdir -p "runs/$NAME"
    step gcloud storage rsync --recursive "gs://$BUCKET/$NAME" "runs/$NAME"
    ;;
  delete)
    check_secrets
    step "${tpus[@]}" delete "$NAME" "${here[@]}" --force
    for name in ${SECRETS:-}; do
      step gcloud secrets delete "$NAME-$name" "--project=$PROJECT"
    done
    ;;
esac
