# Sourced by the scripts beside it: how they complain, and how they run Flower.
# shellcheck shell=bash

set -euo pipefail
# Keys, the database and logs are their owner's alone.
umask 077

# Flower would build a second environment of several gigabytes for each run.
export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1
export FLWR_DISABLE_UPDATE_CHECK=1
export FLWR_TELEMETRY_ENABLED=0

# What is on this machine is asked of no proxy.
for name in no_proxy NO_PROXY; do
  export "$name=${!name:+${!name},}127.0.0.1,localhost"
done

fail() {
  echo "error: $*" >&2
  exit 1
}

# The comment at the top of the script, without its marks.
usage() {
  sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0" >&2
  exit 2
}

need_command() {
  command -v "$1" >/dev/null || fail "the command $1 is not there: $2"
}

need_flower() {
  need_command "$1" "activate the environment in which fedzge-flwr is installed (. .venv/bin/activate)"
}

need_file() {
  [ -f "$1" ] || fail "$1 is not there: $2"
}

refuse_to_overwrite() {
  local path
  for path in "$@"; do
    [ ! -e "$path" ] || fail "$path exists already: choose another folder or name, or remove it"
  done
}

need_port() {
  [[ "$1" =~ ^[0-9]{1,5}$ ]] && [ "$1" -ge 1 ] && [ "$1" -le 65535 ] ||
    fail "'$1' is not a port: give a number from 1 to 65535"
}

# Runs a server of Flower's in the place of the script, closed to other users.
guarded() {
  exec "$(dirname "$(command -v flwr)")/python" -m fedzge_flwr.launch.guarded "$@"
}

# Flower's processes run in a folder of their own, where a relative path would not follow.
absolute() {
  case "$1" in
    /*) echo "$1" ;;
    *) echo "$PWD/$1" ;;
  esac
}
