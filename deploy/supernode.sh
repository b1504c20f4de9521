#!/usr/bin/env bash
# usage: supernode.sh HOST:PORT CA KEY STATE PORT NODE_CONFIG [OPTION...]
#
# Runs a SuperNode in the foreground.
#   HOST:PORT    the SuperLink's
#   CA           its ca.crt
#   KEY          the private key of node-key.sh, whose public half has been registered
#   STATE        a folder for what Flower unpacks here
#   PORT         a free port of this machine, for the node's own processes: on loopback, for this user
#   NODE_CONFIG  such as 'partition-id=0 num-partitions=3'
#   OPTION...    more options of flower-supernode, such as --trusted-entities FILE

. "$(dirname "$0")/common.sh"
[ $# -ge 6 ] || usage
need_flower flower-supernode
superlink=$1
ca=$(absolute "$2")
key=$(absolute "$3")
state=$(absolute "$4")
port=$5
node_config=$6
shift 6
[[ "$superlink" =~ ^[^:]+:[0-9]+$ || "$superlink" =~ ^\[.+\]:[0-9]+$ ]] || fail "'$superlink' is not HOST:PORT"
need_file "$ca" "it is the ca.crt that certificates.sh made"
need_file "$key" "make it with node-key.sh"
need_port "$port"
case " $node_config" in
  *" partition-id="*) ;;
  *) fail "'$node_config' has no partition-id: give e.g. 'partition-id=0 num-partitions=3'" ;;
esac
# Nodes that shared it would read apps that another is just unpacking.
export FLWR_HOME="$state/flwr"
mkdir -p "$state/empty"
# Python looks for modules in the working directory before it looks into an app.
cd "$state/empty"
guarded flower-supernode --superlink "$superlink" --root-certificates "$ca" \
  --auth-supernode-private-key "$key" --port "$port" --node-config "$node_config" "$@"
