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

# find_address [HOST]: fills ADDRESS with this node's as the others see it, HOST among them. The step ends where
# it has none.
find_address() {
  ADDRESS=$(own_address "$@")
  [[ -n $ADDRESS ]] || die 69 "$(hostname) has no IPv4 address${IGRPO_INTERFACE:+ on $IGRPO_INTERFACE} that other" \
    "nodes could reach: igrpo.site.interface (IGRPO_INTERFACE) names the network interface to use"
}

# The address that this node sends from to HOST, or else what its own name and its interfaces give. Of no use to
# the others are loopback, where a host may find its own name, and link-local; the bridges of Docker and libvirt
# come last.
own_address() {
  local program
  program=$(dirname "${BASH_SOURCE[0]}")/address.py
  if [[ -n ${IGRPO_INTERFACE:-} ]]; then
    python3 "$program" of "$IGRPO_INTERFACE"
    return
  fi
  {
    [[ -z ${1:-} ]] || python3 "$program" towards "$1"
    getent ahostsv4 "$(hostname)"
    hostname -I 2>/dev/null | tr ' ' '\n'
  } | awk '
    $1 !~ /^[0-9]+(\.[0-9]+)+$/ || $1 ~ /^(127|169\.254)\./ { next }
    $1 ~ /^(172\.(1[6-9]|2[0-9]|3[01])\.0\.1|192\.168\.122\.1)$/ { bridge = bridge ? bridge : $1; next }
    !found { found = $1 }
    END { print found ? found : bridge }'
}
