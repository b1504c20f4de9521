#!/usr/bin/env bash
# usage: certificates.sh DIR HOST...
#
# Makes a certificate authority and the SuperLink's certificate in DIR. HOSTs are the names and IP
# addresses by which nodes and users reach the SuperLink; localhost is always among them, for
# proxy.sh. Nodes and users get ca.crt, nobody else gets a .key.

. "$(dirname "$0")/common.sh"
[ $# -ge 2 ] || usage
need_command openssl "install OpenSSL"
directory=$1
shift

names=,DNS:localhost
for host in "$@"; do
  case "$host" in
    *[!A-Za-z0-9.:*-]* | "") fail "'$host' is neither a host name nor an IP address (give no port)" ;;
  esac
  if [[ "$host" =~ ^[0-9]+(\.[0-9]+){3}$ || "$host" =~ ^[0-9A-Fa-f]*:[0-9A-Fa-f:]*:[0-9A-Fa-f.]*$ ]]; then
    names+=",IP:$host"
  else
    [[ "$host" != *:* ]] || fail "'$host' is neither a host name nor an IP address (give no port)"
    names+=",DNS:$host"
  fi
done

refuse_to_overwrite "$directory"/{ca,server}.{key,crt}
mkdir -p "$directory"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# What openssl says is shown only if it fails.
quietly() {
  "$@" >"$work/log" 2>&1 || {
    cat "$work/log" >&2
    fail "openssl refused: $* (are the hosts right?)"
  }
}

quietly openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-384 -noenc -days 3650 \
  -subj "/CN=fedzge certificate authority" \
  -addext basicConstraints=critical,CA:TRUE,pathlen:0 -addext keyUsage=critical,keyCertSign,cRLSign \
  -keyout "$work/ca.key" -out "$work/ca.crt"
quietly openssl req -new -newkey ec -pkeyopt ec_paramgen_curve:P-384 -noenc \
  -subj "/CN=fedzge SuperLink" -keyout "$work/server.key" -out "$work/server.csr"
cat >"$work/extensions" <<END
basicConstraints = critical,CA:FALSE
keyUsage = critical,digitalSignature
extendedKeyUsage = serverAuth
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
subjectAltName = ${names#,}
END
quietly openssl x509 -req -in "$work/server.csr" -CA "$work/ca.crt" -CAkey "$work/ca.key" \
  -set_serial "0x$(openssl rand -hex 16)" -days 730 -sha384 -extfile "$work/extensions" \
  -out "$work/server.crt"
quietly openssl verify -CAfile "$work/ca.crt" "$work/server.crt"
mv "$work"/{ca,server}.{key,crt} "$directory"
chmod 644 "$directory"/{ca,server}.crt
echo "certificates: $directory/ca.crt, $directory/server.crt (${names#,}; server.crt ends in 730 days)"
