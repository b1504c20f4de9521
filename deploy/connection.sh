#!/usr/bin/env bash
# usage: connection.sh NAME HOST:PORT CA
#
# Tells flwr on this machine of a SuperLink: writes the connection NAME into config.toml below
# $FLWR_HOME (by default ~/.flwr). CA is the SuperLink's ca.crt.

. "$(dirname "$0")/common.sh"
[ $# -eq 3 ] || usage
need_flower flwr
case "$1" in
  *[!A-Za-z0-9_-]* | "" | default) fail "'$1' is no name of a connection: use letters, digits, '_' and '-'" ;;
esac
case "$2" in
  *[!A-Za-z0-9.:_-]* | *: | :*) fail "'$2' is not HOST:PORT" ;;
  *:*) need_port "${2##*:}" ;;
  *) fail "'$2' is not HOST:PORT" ;;
esac
ca=$(absolute "$3")
need_file "$ca" "it is the ca.crt that certificates.sh made"
case "$ca" in
  *\'*) fail "$ca: a path with a ' cannot be written into config.toml" ;;
esac
config=${FLWR_HOME:-$HOME/.flwr}/config.toml
# Flower writes its own connections into a file that it makes, not into one that is there.
[ -f "$config" ] || flwr config list >/dev/null
need_file "$config" "flwr config list did not make it; look what that says"
! grep -qF "[superlink.$1]" "$config" ||
  fail "$config has a connection '$1' already: choose another name, or remove the entry"
cat >>"$config" <<END

[superlink.$1]
address = "$2"
root-certificates = '$ca'
END
echo "connection $1: $2, in $config"
