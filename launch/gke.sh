#!/usr/bin/env bash
# Runs main.py on Google Kubernetes Engine, on TPU slices or GPU nodes.
#
#   bash launch/gke.sh [--dry-run] ACTION [ARGUMENTS...]
#
#   image     builds launch/Dockerfile for KIND and pushes it as IMAGE
#   secrets   makes the Kubernetes secret NAME of the variables in SECRETS
#   apply     starts main.py with ARGUMENTS, by launch/jobset.yaml
#   xpk       the same through xpk, on a cluster that xpk made
#   status    the jobset and its pods
#   logs      follows main.py on host 0; WORKER=3, SLICE=1 for another
#   fetch     copies the run's folder from the bucket to runs/NAME
#   delete    ends the run (SIGTERM, time to save); deletes what `secrets` made
#
# kubectl goes to its current context: gcloud container clusters
# get-credentials CLUSTER. Variables:
#   NAME              of the jobset and of the run's folder
#   NAMESPACE=default
#   IMAGE             with a tag or, better, a digest
#   KIND=tpu          for image: tpu or cuda
#   ACCELERATOR       as the nodes are labelled: tpu-v5p-slice, tpu-v6e-slice,
#                     nvidia-h100-mega-80gb, ...
#   TOPOLOGY          TPUs: 4x4x4, 16x16, ...; leave it out for GPUs
#   CHIPS             on a host; default 4 with TOPOLOGY, else 8
#   HOSTS             GPUs: nodes of the run (for TPUs, TOPOLOGY says it)
#   SLICES=1          TPUs: so many of TOPOLOGY; a run spans all of them
#   SPOT=yes          on spot nodes only
#   RESTARTS=10       after failures and preemptions; each resumes
#   BUCKET            keeps the run; mounted on every host as /bucket
#   SERVICE_ACCOUNT   of Kubernetes, which may write BUCKET
#   SECRETS           names of variables that main.py is to find there
#   CLUSTER, PROJECT, ZONE, TPU, STORAGE   for xpk: TPU such as v5p-128; STORAGE
#                     is what `xpk storage attach` mounts BUCKET as, on /bucket

# shellcheck disable=SC2153  # variables come from the environment
# shellcheck disable=SC2034  # some are read by `render` only
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/steps.sh "$@"

[[ ${#words[@]} -gt 0 ]] || manual 2
action=${words[0]}
set -- ${words[@]+"${words[@]:1}"}
NAMESPACE=${NAMESPACE:-default} SLICES=${SLICES:-1} RESTARTS=${RESTARTS:-10}
label=jobset.sigs.k8s.io

# The words as a list in YAML (and JSON).
list() {
  local word separator=''
  printf '['
  for word; do
    [[ $word != *$'\n'* ]] || fail 'an argument has more than one line'
    printf '%s"%s"' "$separator" \
      "$(printf %s "$word" | sed 's/\\/\\\\/g; s/"/\\"/g')"
    separator=', '
  done
  printf ']\n'
}

# launch/jobset.yaml with its variables filled in; $1 says which lines stay.
render() {
  local line name text
  local variable='^([^$]*)[$][{]([A-Z_]+)[}](.*)$'
  local condition='^(.*[^ ]) +# if ([a-z]+)$'
  while IFS= read -r line; do
    if [[ $line =~ $condition ]]; then
      [[ " $1 " == *" ${BASH_REMATCH[2]} "* ]] || continue
      line=${BASH_REMATCH[1]}
    fi
    [[ $line != '#'* ]] || continue
    text=''
    while [[ $line =~ $variable ]]; do
      name=${BASH_REMATCH[2]}
      text+=${BASH_REMATCH[1]}${!name}
      line=${BASH_REMATCH[3]}
    done
    printf '%s\n' "$text$line"
  done <launch/jobset.yaml
}

# Finds out what the manifest says beside the variables that were given.
manifest() {
  local holds=gpu
  if [[ -n ${TOPOLOGY:-} ]]; then
    [[ $TOPOLOGY =~ ^[0-9]+(x[0-9]+){1,2}$ ]] ||
      fail "TOPOLOGY=$TOPOLOGY: expected such as 4x4x4 or 16x16"
    holds=tpu CHIPS=${CHIPS:-4}
    number CHIPS 1
    local chips=$((${TOPOLOGY//x/*}))
    [[ $((chips % CHIPS)) == 0 ]] ||
      fail "TOPOLOGY=$TOPOLOGY has $chips chips, no multiple of CHIPS=$CHIPS"
    HOSTS=$((chips / CHIPS))
  fi
  CHIPS=${CHIPS:-8}
  for name in CHIPS HOSTS SLICES; do number "$name" 1; done
  number RESTARTS 0
  [[ $holds == tpu || $SLICES == 1 ]] ||
    fail "SLICES=$SLICES is of TPUs: GPUs have HOSTS, and no TOPOLOGY"
  [[ ${SPOT:-} != yes ]] || holds+=' spot'
  [[ -z ${SERVICE_ACCOUNT:-} ]] || holds+=' account'
  [[ -z ${SECRETS:-} ]] || holds+=' secrets'
  ARGUMENTS=$(list "--workdir=/bucket/$NAME" "$@")
  for name in NAME NAMESPACE IMAGE ACCELERATOR BUCKET SERVICE_ACCOUNT; do
    [[ ${!name:-} =~ ^[A-Za-z0-9./:@_-]*$ ]] ||
      fail "$name='${!name}' has characters that no such name has"
  done
  render "$holds"
}

secrets() {
  local name format='' values=''
  for name in $SECRETS; do
    [[ ${!name:-} != *$'\n'* ]] || fail "$name has more than one line"
    format+="$name=%s\\n"
    values+=" \"\$$name\""
  done
  step kubectl delete secret "$NAME" "--namespace=$NAMESPACE" \
    --ignore-not-found
  shell_step "printf '$format'$values | kubectl create secret generic $NAME \
--namespace=$NAMESPACE --from-env-file=/dev/stdin"
}

apply() {
  local text
  text=$(manifest "$@")
  if [[ $dry == yes ]]; then
    printf "kubectl apply --filename=- <<'END'\n%s\nEND\n" "$text"
  else
    kubectl apply --filename=- <<<"$text"
  fi
}

apply_by_xpk() {
  local options=("--project=$PROJECT" "--zone=$ZONE" "--cluster=$CLUSTER"
    "--workload=$NAME" "--tpu-type=$TPU" "--num-slices=$SLICES"
    "--docker-image=$IMAGE" --docker-name=main "--max-restarts=$RESTARTS"
    --termination-grace-period-seconds=600 "--storage=$STORAGE")
  step xpk workload create "${options[@]}" "--command=cd /opt/m2 && \
.venv/bin/python main.py --workdir=/bucket/$NAME $(quoted "$@")"
}

case $action in
  image | secrets | apply | xpk | status | logs | fetch | delete) ;;
  help | -h | --help) manual 0 ;;
  *) fail "'$action' is no action; without one, it says what there is" ;;
esac
[[ $action == image ]] || need NAME 'of the jobset and the run, such as m2'
case $action in
  image | apply | xpk) need IMAGE 'such as REGION-docker.pkg.dev/P/R/m2-jax:1' ;;
esac
case $action in
  apply | xpk)
    [[ $# -gt 0 ]] || fail "$action what? Such as: $action --config=configs/m2.py"
    ;;
esac
case $action in
  apply)
    need ACCELERATOR 'as the nodes are labelled, such as tpu-v5p-slice'
    [[ -n ${TOPOLOGY:-} ]] || need HOSTS 'nodes of GPUs (or TOPOLOGY for TPUs)'
    ;;
  xpk)
    need CLUSTER 'that xpk made'
    need PROJECT 'the Google Cloud project'
    need ZONE 'of the cluster'
    need TPU 'such as v5p-128'
    need STORAGE 'that xpk storage attach made of your bucket, on /bucket'
    [[ -z ${SECRETS:-} ]] || fail 'xpk would write SECRETS into its manifest:' \
      'use apply, which refers to the Kubernetes secret'
    ;;
  secrets) need SECRETS 'names of variables, such as "HF_TOKEN"' ;;
esac
case $action in
  apply | fetch) need BUCKET 'a bucket that keeps the run; no gs://' ;;
esac
if [[ $action == secrets ]]; then check_secrets values; else check_secrets; fi
needed
check_bucket
case $action in
  image) program docker https://docs.docker.com/engine/install ;;
  xpk) program xpk 'pip install xpk, in an environment of its own' ;;
  fetch) program gcloud https://cloud.google.com/sdk/docs/install ;;
  *) program kubectl https://kubernetes.io/docs/tasks/tools ;;
esac
case $action in
  image)
    step docker build --file launch/Dockerfile --build-arg "KIND=${KIND:-tpu}" \
      --tag "$IMAGE" .
    step docker push "$IMAGE"
    ;;
  secrets) secrets ;;
  apply) apply "$@" ;;
  xpk) apply_by_xpk "$@" ;;
  status)
    step kubectl get jobset "$NAME" "--namespace=$NAMESPACE"
    step kubectl get pods "--namespace=$NAMESPACE" \
      "--selector=$label/jobset-name=$NAME" --output=wide
    ;;
  logs)
    pod=$label/jobset-name=$NAME,$label/job-index=${SLICE:-0}
    pod+=,batch.kubernetes.io/job-completion-index=${WORKER:-0}
    step kubectl logs --follow --tail=100 --container=main \
      "--namespace=$NAMESPACE" "--selector=$pod"
    ;;
  fetch)
    step mkdir -p "runs/$NAME"
    step gcloud storage rsync --recursive "gs://$BUCKET/$NAME" "runs/$NAME"
    ;;
  delete)
    step kubectl delete jobset "$NAME" "--namespace=$NAMESPACE"
    [[ -z ${SECRETS:-} ]] ||
      step kubectl delete secret "$NAME" "--namespace=$NAMESPACE"
    ;;
esac
