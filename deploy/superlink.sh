#!/usr/bin/env bash
# usage: superlink.sh CERTIFICATES STATE HOST PORT [OPTION...]
#
# Runs the SuperLink in the foreground, with TLS and with authentication of SuperNodes. Runs are
# taken from this user on this machine alone; others reach the paths of nodes.
#   CERTIFICATES  the folder that certificates.sh made
#   STATE         a folder for the database of registered nodes and of runs
#   HOST PORT     where to listen: 0.0.0.0 for all interfaces
#   OPTION...     more options of flower-superlink, such as --log-file FILE

. "$(dirname "$0")/common.sh"
[ $# -ge 4 ] || usage
need_flower flower-superlink
certificates=$(absolute "$1")
state=$(absolute "$2")
host=$3
port=$4
shift 4
need_port "$port"
for name in ca.crt server.crt server.key; do
  need_file "$certificates/$name" "make it with certificates.sh $certificates HOST..."
done
mkdir -p "$state"
export FLWR_HOME="$state/flwr"
# Python looks for modules in the working directory before it looks into an app.
mkdir -p "$state/empty"
cd "$state/empty"
guarded flower-superlink --host "$host" --port "$port" --database "$state/superlink.db" \
  --enable-supernode-auth --disable-runtime-dependency-installation \
  --ssl-ca-certfile "$certificates/ca.crt" --ssl-certfile "$certificates/server.crt" \
  --ssl-keyfile "$certificates/server.key" "$@"
