#!/usr/bin/env bash
# Makes .oracle/ at the repository root: torch (CPU) and transformers under
# Python 3.11, apart from the product's .venv. Prints its python's path.
# Quick when it is already there and the pins have not changed.
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
root="$(cd "$here/../.." && pwd)"
home="$root/.oracle"
pins="$here/requirements.txt"
python="$home/bin/python"

if [[ -x "$python" ]] && cmp -s "$pins" "$home/installed.txt"; then
  echo "$python"
  exit 0
fi

# A candidate counts only if it runs as 3.11 and can make an environment:
# pyenv's shims exist for versions that are switched off.
usable() {
  "$1" -c 'import ensurepip, sys, venv
sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null
}

base=''
shopt -s nullglob
for candidate in $(type -ap python3.11 || true) \
  "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.11*/bin/python3.11; do
  if usable "$candidate"; then
    base="$candidate"
    break
  fi
done
if [[ -z "$base" ]]; then
  echo 'tests/oracle/env.sh: no Python 3.11 with venv on PATH or in pyenv.' \
    'Install one (pyenv install 3.11, or apt-get install python3.11-venv)' \
    'or run the tests without --all or --exhaustive.' >&2
  exit 1
fi

rm -rf "$home"
"$base" -m venv "$home"
echo '*' > "$home/.gitignore" # the folder ignores itself
"$python" -m pip install --quiet --disable-pip-version-check -r "$pins" >&2
cp "$pins" "$home/installed.txt" # last: a broken install is made again
echo "$python"
