#!/usr/bin/env bash
# Runs the tests; arguments go to pytest.
#
#   bash tests/run.sh [--all | --exhaustive] [PYTEST ARGUMENTS...]
#
# Light: needs what main.py needs, pytest and ruff. --all adds the heavy ones:
# transformers on torch (an environment of its own, .oracle), compiling for TPUs
# that are not here (libtpu in a folder of its own, .tpu), headless Chromium, Ray.
# --exhaustive adds all cases of what --all samples (every way to cut eight
# devices, every kernel on every TPU, 10,000 tasks, more kills) and what takes
# minutes and seldom breaks: memory and files at full scale. What they need and
# cannot get is an error, never a skipped test.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

level=light
arguments=()
for argument; do
  case $argument in
    --exhaustive) level=exhaustive ;;
    --all) [[ $level == exhaustive ]] || level=all ;;
    *) arguments+=("$argument") ;;
  esac
done

say() { echo "tests/run.sh: $*" >&2; }

find_chromium() {
  local name
  for name in chromium chromium-browser google-chrome google-chrome-stable; do
    command -v "$name" && return 0
  done
  return 1
}

get_chromium() {
  find_chromium >/dev/null && return 0
  if [[ $(id -u) == 0 ]] && command -v apt-get >/dev/null; then
    say 'installing chromium'
    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq \
      -y --no-install-recommends chromium >/dev/null
  fi
  find_chromium >/dev/null && return 0
  say "--$level needs Chromium on PATH: apt install chromium (or any Chrome)"
  return 1
}

# The compiler for TPUs, beside the environment: inside it, jax would look for
# a TPU in every process.
get_libtpu() {
  local pin
  pin=$(sed -n 's/^libtpu==//p' tests/tpu_requirements.txt)
  [[ -f .tpu/$pin ]] && return 0
  say "installing libtpu $pin in .tpu"
  rm -rf .tpu
  .venv/bin/python -m pip install --quiet --no-deps --target .tpu \
    -r tests/tpu_requirements.txt
  touch ".tpu/$pin"
}

bash launch/env.sh tests/requirements.txt
marks='not heavy and not exhaustive and not device'
if [[ $level != light ]]; then
  get_chromium
  # An environment of its own: it is made beside the rest.
  bash tests/oracle/env.sh &
  oracle=$!
  trap 'kill "$oracle" 2>/dev/null || true' EXIT
  get_libtpu
  bash launch/env.sh launch/ray.txt
  wait "$oracle"
  marks='not exhaustive and not device'
fi
[[ $level == exhaustive ]] && marks='not device'
# Two processes: more only divides two cores further. A file stays in one
# process, which compiles its programs once; files run in conftest.py's order.
# A process that crashed ends the run: started again, pytest-xdist 3.8 waits for
# ever with these settings.
exec .venv/bin/python -m pytest -n 2 --dist loadfile \
  --no-loadscope-reorder --max-worker-restart=0 -m "$marks" \
  ${arguments[@]+"${arguments[@]}"}
