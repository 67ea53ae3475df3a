# What the launch scripts share; sourced by them.
#
# A script is a list of steps. A step is a command: it is run, or, with
# --dry-run, printed as a line that can be pasted into a shell. Settings are
# environment variables; a missing one is an error that names it. Secrets are
# named (SECRETS="HF_TOKEN ..."), and their values go from the environment
# through a pipe: never into an argument, a file or a log.
# shellcheck shell=bash
# Works with bash 3.2, which macOS has.

script=$(basename "$0")
dry=no
missing=()
words=()  # the script's arguments but --dry-run, which may stand anywhere
for word; do
  if [[ $word == --dry-run ]]; then dry=yes; else words+=("$word"); fi
done

say() { echo "launch/$script: $*" >&2; }

fail() {
  say "$*"
  exit 2
}

# Prints the comment at the top of the script, which is its manual, and ends.
manual() {
  sed -n '2,${/^#/!q;s/^# \{0,1\}//p;}' "launch/$script"
  exit "$1"
}

# Notes that variable $1 is needed, if it is empty; $2 says what for.
need() { [[ -n ${!1:-} ]] || missing+=("  $1: $2"); }

# Ends the script if something was needed and is missing.
needed() {
  [[ ${#missing[@]} == 0 ]] && return 0
  say 'set these variables first (launch/README.md explains them):'
  printf '%s\n' "${missing[@]}" >&2
  exit 2
}

# Fails unless variable $1 is a whole number from $2 upwards; zeros before it,
# with which it would be octal, are taken away.
number() {
  [[ ${!1} =~ ^[0-9]+$ && $((10#${!1})) -ge $2 ]] ||
    fail "$1='${!1}' is not a whole number from $2 upwards"
  printf -v "$1" %d "$((10#${!1}))"
}

# Fails unless BUCKET, if there is one, is a name alone.
check_bucket() {
  [[ ${BUCKET:-} =~ ^[A-Za-z0-9._-]*$ ]] ||
    fail "BUCKET='$BUCKET': give the bucket's name alone, without gs:// or folder"
}

# Fails unless program $1 is here; a dry run needs none. $2 is how to get it.
program() {
  [[ $dry == yes ]] || command -v "$1" >/dev/null ||
    fail "$1 is not installed: $2"
}

# Fails unless SECRETS are names. With `values`, they need values, too.
check_secrets() {
  local name
  for name in ${SECRETS:-}; do
    [[ $name =~ ^[A-Za-z_][A-Za-z0-9_]*$ ]] ||
      fail 'SECRETS has a word that is no name of a variable; it takes names,' \
        'such as "HF_TOKEN AWS_SECRET_ACCESS_KEY", and no values'
    [[ ${1:-} != values || $dry == yes ]] || need "$name" 'a secret; its value'
  done
}

# Prints words as a shell reads them, quoted where it needs that.
quoted() {
  local word separator=''
  for word; do
    printf %s "$separator"
    separator=' '
    if [[ $word =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]]; then
      printf %s "$word"
    else
      printf "'%s'" "$(printf %s "$word" | sed "s/'/'\\\\''/g")"
    fi
  done
}

# Runs a command, or prints it.
step() {
  if [[ $dry == yes ]]; then
    quoted "$@"
    echo
  else
    "$@"
  fi
}

# The last step takes the script's place: signals reach it.
last_step() {
  [[ $dry == yes ]] || exec "$@"
  step "$@"
}

# A step for a line of shell: with a pipe, or with a secret's variable.
shell_step() {
  if [[ $dry == yes ]]; then echo "$1"; else eval "$1"; fi
}

# Joins shell commands, so that each runs if those before it have succeeded.
all_of() {
  local command joined=''
  for command; do joined+="${joined:+ && }$command"; done
  printf %s "$joined"
}
