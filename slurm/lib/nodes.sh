# shellcheck shell=bash
# The nodes of the job: which one is the head, and how many CPUs each has.

check_nodes() {
  local nodes
  nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sort -V) ||
    die 2 "Slurm does not name the nodes of $SLURM_JOB_NODELIST"
  mapfile -t NODES <<<"$nodes"
  # Sorted, so that a restart on the same nodes gives every node the same part.
  export IGRPO_HEAD_NODE=${NODES[0]} IGRPO_NODES="${NODES[*]}"
  if [[ $KIND == train ]] && ((${#NODES[@]} != IGRPO_NUM_NODES)); then
    die 2 "the config has cluster.num_nodes=$IGRPO_NUM_NODES and the job ${#NODES[@]} node(s):" \
      "give sbatch --nodes=$IGRPO_NUM_NODES, or use 'igrpo launch', which does"
  fi
  find_cpus
}

# The fewest CPUs that Slurm gave on a node; CPUS_PER_NODE may ask for fewer.
find_cpus() {
  local group count fewest=0
  for group in ${SLURM_JOB_CPUS_PER_NODE//,/ }; do
    count=${group%%(*}
    ((fewest == 0 || count < fewest)) && fewest=$count
  done
  if [[ -z ${CPUS_PER_NODE:-} ]]; then
    CPUS_PER_NODE=$fewest
  elif ((CPUS_PER_NODE > fewest)); then
    say "CPUS_PER_NODE=$CPUS_PER_NODE is more than the $fewest that Slurm gave: using $fewest"
    CPUS_PER_NODE=$fewest
  fi
  export CPUS_PER_NODE
}

# The address of this node as the others see it.
own_address() {
  local address
  # A host may resolve its own name to the loopback device, which is of no use to the others.
  address=$(getent ahostsv4 "$(hostname)" | awk '$1 !~ /^127\./ { print $1; exit }')
  [[ -n $address ]] || address=$(hostname -I 2>/dev/null | awk '{ print $1 }')
  printf '%s\n' "$address"
}
