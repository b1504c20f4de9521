#!/usr/bin/env bash
# usage: node-key.sh DIR NAME
#
# Makes the key pair of a SuperNode: DIR/NAME, which stays on the node's machine, and DIR/NAME.pub,
# which its owner gives to whoever runs the SuperLink.

. "$(dirname "$0")/common.sh"
[ $# -eq 2 ] || usage
need_command ssh-keygen "install OpenSSH's client"
case "$2" in
  *[!A-Za-z0-9._-]* | .* | -* | "") fail "'$2' is no name of a key: use letters, digits, '.', '_' and '-'" ;;
esac
refuse_to_overwrite "$1/$2" "$1/$2.pub"
mkdir -p "$1"
# Flower reads no key that has a passphrase.
ssh-keygen -q -t ecdsa -b 384 -N "" -C "$2" -f "$1/$2"
echo "keys: $1/$2 (keep it), $1/$2.pub (to be registered)"
