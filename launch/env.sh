#!/usr/bin/env bash
# Makes .venv in the repository with everything main.py needs; takes well under
# two seconds when nothing changed since the last call.
#
#   bash launch/env.sh [cpu|cuda|tpu] [REQUIREMENTS...]
#
# Without a kind: the one .venv was made for, at first cpu. Further requirement
# files (tests/requirements.txt) go into the same .venv.
# Settings, all optional:
#   M2_PYTHON=PATH      the interpreter to build on; otherwise the first Python
#                       >= 3.12 on PATH, in pyenv, or from uv.
#   PIP_INDEX_URL, PIP_NO_INDEX, PIP_FIND_LINKS ... are pip's own.
# On cuda and tpu hosts whose own Python already has the pinned jax with its
# accelerator plugin, .venv is laid over that Python and keeps its jax.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=.venv
case ${1:-} in
  cpu | cuda | tpu) kind=$1; shift ;;
  '' | *.txt) kind=$(cat $venv/.m2/kind 2>/dev/null || true) kind=${kind:-cpu} ;;
  *) echo "launch/env.sh: '$1' is not a kind; choose cpu, cuda or tpu" >&2
     exit 2 ;;
esac
python=$venv/bin/python
constraints=launch/constraints.txt
jax_pin=$(sed -n 's/^jax==//p' requirements.txt)
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1
looked=()  # what was tried and why it will not do, for the message at the end

say() { echo "launch/env.sh: $*" >&2; }

# Succeeds when "$1" is an interpreter that can carry a virtual environment.
usable() {
  local answer
  answer=$("$1" -c 'import sys
version = "%d.%d.%d" % sys.version_info[:3]
if sys.version_info < (3, 12):
  sys.exit("Python " + version + " is older than 3.12")
try:
  import ctypes, ensurepip, sqlite3, ssl, venv
except ImportError as error:
  sys.exit("Python " + version + ": " + str(error) + " (on Debian and Ubuntu:"
           " apt install python%d.%d-venv)" % sys.version_info[:2])' 2>&1) &&
    return 0
  looked+=("$1: ${answer##*$'\n'}")
  return 1
}

# Prints the interpreter to build on; fails when there is none.
find_python() {
  local name path
  if [[ -n ${M2_PYTHON:-} ]]; then
    path=$(command -v "$M2_PYTHON" || true)
    [[ -n $path ]] || { say "M2_PYTHON=$M2_PYTHON: no such program"; return 1; }
    usable "$path" && echo "$path" && return 0
    say "M2_PYTHON will not do: ${looked[*]}"
    return 1
  fi
  # 3.12 first: it is what the pins were tested with.
  for name in python3.12 python3.13 python3.14 python3 python; do
    path=$(command -v "$name" || true)
    [[ -n $path ]] || { looked+=("$name: not on PATH"); continue; }
    usable "$path" && echo "$path" && return 0
  done
  for path in "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[2-4]*/bin/python; do
    [[ -x $path ]] && usable "$path" && echo "$path" && return 0
  done
  if command -v uv >/dev/null; then
    say 'no Python >= 3.12 here; asking uv for one'
    uv python install 3.12 >&2 && path=$(uv python find 3.12) &&
      usable "$path" && echo "$path" && return 0
    looked+=('uv: could not provide Python 3.12')
  else
    looked+=('uv: not on PATH')
  fi
  say 'found no Python >= 3.12. Looked at:'
  printf '  %s\n' "${looked[@]}" "pyenv: ${PYENV_ROOT:-$HOME/.pyenv}/versions" \
    >&2
  cat >&2 <<'HELP'
Install one, then run this again:
  Debian, Ubuntu   apt install python3.12 python3.12-venv
  Fedora           dnf install python3.12
  macOS            brew install python@3.12
  pyenv            pyenv install 3.12
  without root     curl -LsSf https://astral.sh/uv/install.sh | sh
or name one: M2_PYTHON=/path/to/python3.12 bash launch/env.sh
HELP
  return 1
}

# Prints the folders where "$1" keeps the right jax with its plugin, if it does.
host_jax() {
  [[ $kind != cpu ]] || return 0
  "$1" - "$kind" "$jax_pin" <<'PYTHON'
import importlib.metadata as metadata
import os
import sys

kind, pin = sys.argv[1:]
plugin = {'cuda': 'jax-cuda13-plugin', 'tpu': 'libtpu'}[kind]
try:
  metadata.version(plugin)
  if metadata.version('jax') == pin:
    print('\n'.join(p for p in sys.path if os.path.isdir(p) and 'packages' in p))
except metadata.PackageNotFoundError:
  pass
PYTHON
}

# The words that a finished environment remembers; it is redone when they
# change. Kept as text, so that what differs can be seen.
stamp() {  # FILE
  printf 'kind %s\n%s\n' "$kind" "$("$python" --version 2>&1)"
  cat "$constraints" "$1"
}

installed() {  # FILE
  [[ -f $venv/.m2/$(stamp_name "$1") ]] &&
    stamp "$1" | cmp -s - "$venv/.m2/$(stamp_name "$1")"
}

stamp_name() { echo "${1//\//_}"; }

keep() {  # NAME: standard input as a file that is whole, or not there
  cat >"$venv/.m2/writing"
  mv "$venv/.m2/writing" "$venv/.m2/$1"
}

make_venv() {  # REASON
  local base folders
  if [[ -e $venv/.m2/theirs ]]; then
    say "$venv is your own and will not do ($1): move it away"
    return 1
  fi
  base=$(find_python)
  say "making $venv on $base ($("$base" --version)) for $kind"
  [[ -d $venv && ! -L $venv ]] || rm -f "$venv"
  # A venv with this mark is made anew: it is there before anything is deleted,
  # and the kind that was asked for is not lost, wherever this is killed.
  mkdir -p "$venv/.m2"
  touch "$venv/.m2/unfinished"
  keep kind <<<"$kind"
  keep base <<<"$base"
  find "$venv" -mindepth 1 -maxdepth 1 ! -name .m2 -exec rm -rf {} +
  rm -f "$venv"/.m2/*.txt
  "$base" -m venv "$venv"
  folders=$(host_jax "$base")
  if [[ -n $folders ]]; then
    say "keeping the jax $jax_pin of $base"
    "$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' |
      { read -r site; echo "$folders" >"$site/host.pth"; }
  fi
}

# Succeeds when M2_PYTHON asks for another base than .venv was made on.
another_base() {
  [[ -n ${M2_PYTHON:-} && -f $venv/.m2/base ]] &&
    [[ $(command -v "$M2_PYTHON") != "$(cat "$venv/.m2/base")" ]]
}

# Prints why .venv will not do; nothing when it will.
flaw() {
  local made
  made=$(cat "$venv/.m2/kind" 2>/dev/null || true)
  if [[ ${#looked[@]} -gt 0 ]]; then
    echo "${looked[*]}"
  elif ! "$python" --version >/dev/null 2>&1; then
    echo "$python does not run"
  elif [[ -e $venv/.m2/unfinished && ! -e $venv/.m2/theirs ]]; then
    echo 'it is half made'
  elif [[ $made != "$kind" ]]; then
    echo "it is for ${made:-no kind}, not for $kind"
  elif another_base; then
    echo "it is not on $M2_PYTHON"
  fi
}

# Succeeds when nothing is to do.
finished() {  # FILES
  local file
  [[ ! -e $venv/.m2/unfinished && -z $(flaw) ]] || return 1
  for file; do installed "$file" || return 1; done
}

# Marks somebody's own .venv, which is used as it is and never deleted. One that
# was made here has the mark `unfinished` or names its base.
adopt() {
  [[ -d $venv && ! -e $venv/.m2/base && ! -e $venv/.m2/unfinished ]] || return 0
  [[ -n $(find "$venv/" -mindepth 1 -maxdepth 1 ! -name .m2) ]] || return 0
  mkdir -p "$venv/.m2"
  keep theirs <<<yes
  if [[ ! -e $venv/.m2/kind ]] && usable "$python"; then
    keep kind <<<"$kind"
  fi
}

install_file() {  # FILE
  local extra=() limits=(-c "$constraints") whole=yes
  [[ $kind == cpu || $1 != requirements.txt ]] ||
    extra=("jax[${kind/cuda/cuda13}]==$jax_pin")
  # Over a host's Python, what it has may stay: only our own pins are binding.
  if compgen -G "$venv/lib/python*/site-packages/host.pth" >/dev/null; then
    extra=() limits=()
  fi
  say "installing $1"
  [[ ! -e $venv/.m2/unfinished ]] || whole=no
  rm -f "$venv/.m2/$(stamp_name "$1")"
  touch "$venv/.m2/unfinished"
  # `uv venv` leaves pip out.
  "$python" -m pip --version >/dev/null 2>&1 ||
    "$python" -m ensurepip >/dev/null
  "$python" -m pip install --quiet ${limits[@]+"${limits[@]}"} -r "$1" \
    ${extra[@]+"${extra[@]}"} || {
    say "pip could not install $1 (its reason is above). Without a network," \
      'bring the wheels: PIP_NO_INDEX=1 PIP_FIND_LINKS=FOLDER' \
      "bash launch/env.sh $kind"
    # pip gave up before changing anything: what was whole still is.
    [[ $whole == no ]] || rm -f "$venv/.m2/unfinished"
    return 1
  }
  stamp "$1" | keep "$(stamp_name "$1")"
  rm -f "$venv/.m2/unfinished"
}

for file in requirements.txt "$@"; do
  [[ -f $file ]] || { say "no requirements file $file"; exit 2; }
done
# Before the lock, which a read-only checkout cannot have.
if finished requirements.txt "$@"; then exit 0; fi
# Two callers at once would tear the environment: the second waits.
if command -v flock >/dev/null; then
  exec 9>.venv.lock
  flock 9
fi
adopt
reason=$(flaw)
if [[ -n $reason ]]; then
  make_venv "$reason"
elif [[ -e $venv/.m2/unfinished ]]; then
  rm -f "$venv"/.m2/*.txt  # what is installed in their .venv is not known
fi
for file in requirements.txt "$@"; do
  installed "$file" || install_file "$file"
done
