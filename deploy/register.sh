#!/usr/bin/env bash
# usage: register.sh CONNECTION KEY.pub
#
# Lets the SuperNode with this key take part. CONNECTION is a name given to connection.sh.

. "$(dirname "$0")/common.sh"
[ $# -eq 2 ] || usage
need_flower flwr
need_file "$2" "make it with node-key.sh"
[[ "$(head -c 20 "$2")" == ecdsa-sha2-nistp384* ]] ||
  fail "$2 is no public key of node-key.sh (give the file that ends in .pub)"
exec flwr supernode register "$2" "$1" --name "$(basename "$2" .pub)"
