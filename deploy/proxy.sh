#!/usr/bin/env bash
# usage: proxy.sh CERTIFICATES STATE HOST PORT SUPERLINK_PORT
#
# Runs nginx in the foreground, as nginx.conf beside this script says: nodes reach by it the
# SuperLink that listens on this machine's loopback, and nobody reaches anything else.
#   CERTIFICATES    the folder that certificates.sh made
#   STATE           a folder for what nginx writes
#   HOST PORT       where to listen: 0.0.0.0 for all interfaces
#   SUPERLINK_PORT  the SuperLink's

. "$(dirname "$0")/common.sh"
[ $# -eq 5 ] || usage
need_command nginx "install it (Debian: apt-get install nginx-light)"
certificates=$(absolute "$1")
state=$(absolute "$2")
need_port "$4"
need_port "$5"
case "$3" in
  *[!A-Za-z0-9.:-]* | "") fail "'$3' is no address to listen on" ;;
  *:*) listen="[$3]:$4" ;;
  *) listen="$3:$4" ;;
esac
for name in ca.crt server.crt server.key; do
  need_file "$certificates/$name" "make it with certificates.sh $certificates HOST..."
done
case "$certificates$state" in
  *[\"\$\\\|]*) fail "$certificates, $state: paths with a \", \$, | or \\ cannot be written into nginx.conf" ;;
esac
mkdir -p "$state"
sed -e "s|@CERTIFICATES@|$certificates|" -e "s|@STATE@|$state|" -e "s|@LISTEN@|$listen|" \
  -e "s|@SUPERLINK@|127.0.0.1:$5|" "$(dirname "$0")/nginx.conf" >"$state/nginx.conf"
exec nginx -p "$state" -e stderr -c "$state/nginx.conf"
