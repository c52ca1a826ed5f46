#!/usr/bin/env bash
# A Slurm cluster inside one set of namespaces: it ends, with its network and mounts, when its first
# process ends. Usage: virtual_cluster.sh ROOT NODES. slurm.conf and the munge key are in ROOT.
set -euo pipefail

root=$1 nodes=$2
export SLURM_CONF=$root/slurm.conf

start_network() {
  ip link set lo up
  ip link add bridge type bridge
  ip addr add 10.77.0.254/24 dev bridge
  ip link set bridge up
  # `ip netns` keeps its names in a folder of the host's; this one is private.
  mkdir -p /run/netns
  mount -t tmpfs tmpfs /run/netns
}

# A disk that a test can fill. All nodes share it; this machine reaches it through /proc/PID/root.
mount_small_disk() {
  mount -t tmpfs -o size=24m tmpfs "$root/small"
}

start_controller() {
  hostname controller
  mount --bind "$root/hosts" /etc/hosts
  munged --key-file="$root/munge.key" --socket="$root/munge.socket" --num-threads=2 \
    --pid-file="$root/munged.pid" --log-file="$root/log/munged.log" --seed-file="$root/munged.seed"
  slurmctld -i
}

start_node() {
  local number=$1
  local name=node$number
  ip netns add "$name"
  ip link add "veth$number" type veth peer name eth0 netns "$name"
  ip link set "veth$number" master bridge up
  ip -n "$name" link set lo up
  ip -n "$name" addr add "10.77.0.$number/24" dev eth0
  ip -n "$name" link set eth0 up
  nsenter --net="/run/netns/$name" unshare --uts --ipc --mount --pid --fork --kill-child=KILL \
    --mount-proc bash "$0" --node "$root" "$name" &
}

# The first process of a node, in namespaces of its own.
run_node() {
  local name=$1
  hostname "$name"
  mount -t tmpfs tmpfs /dev/shm
  mount -t tmpfs tmpfs "$root/local"
  readlink /proc/self/ns/pid >"$root/nodes/$name.pidns"
  # Not exec: the first process of a PID namespace has to reap orphans, which slurmd does not do.
  slurmd -D -N "$name" >>"$root/log/slurmd-$name.out" 2>&1 &
  wait
}

if [[ $root == --node ]]; then
  root=$2
  export SLURM_CONF=$root/slurm.conf
  run_node "$3"
else
  start_network
  mount_small_disk
  start_controller
  for ((number = 1; number <= nodes; number++)); do
    start_node "$number"
  done
  touch "$root/started"
  wait
fi
