#!/usr/bin/env bash
# usage: submit.sh CONNECTION RUN_CONFIG [OPTION...]
#
# Submits this app. CONNECTION is a name given to connection.sh; RUN_CONFIG is a TOML file of
# settings or 'KEY=VALUE ...'; more OPTIONs are flwr run's, such as --stream.

. "$(dirname "$0")/common.sh"
[ $# -ge 2 ] || usage
need_flower flwr
connection=$1
run_config=$2
shift 2
# Flower would look at every file below the checkout, a virtual environment's too.
staged=$(mktemp -d)
trap 'rm -rf "$staged"' EXIT
"$(dirname "$(command -v flwr)")/python" -m fedzge_flwr.launch.staging \
  "$(cd "$(dirname "$0")/.." && pwd)" "$staged" >/dev/null
flwr run "$staged" "$connection" --run-config "$run_config" "$@"
