# shellcheck shell=bash
# Ray on one node. All ports are below the ephemeral range, where the kernel could hand them to
# somebody else first: 9900-9915 here, 10002-11000 Ray's workers, 11001-15000 vLLM,
# 25000-28000 torch's rendezvous (the last two are NeMo-RL's own).

: "${IGRPO_RAY_PORT:=9900}" "${IGRPO_RAY_TMP:=/tmp}"
: "${IGRPO_HEAD_TIMEOUT_S:=300}" "${IGRPO_JOIN_TIMEOUT_S:=900}"
# Ray puts sockets below this folder, whose names may have 107 characters at most: it is short. Its
# logs can hold environment variables: nobody else may read them.
RAY_FOLDER=$IGRPO_RAY_TMP/igrpo-ray-$SLURM_JOB_ID

prepare_ray() {
  # NeMo-RL makes its own environments, once per node; Ray would make one per worker.
  export RAY_ENABLE_UV_RUN_RUNTIME_ENV=0
  ulimit -Sn 65535 2>/dev/null || ulimit -Sn "$(ulimit -Hn)" 2>/dev/null || true
  rm -rf "$RAY_FOLDER"
  mkdir -m 700 "$RAY_FOLDER" || die 69 "cannot make $RAY_FOLDER on $(hostname)"
  RAY_NODE_ARGS=(
    --block --disable-usage-stats "--node-ip-address=$1"
    "--num-cpus=$CPUS_PER_NODE" "--num-gpus=$IGRPO_GPUS_PER_NODE" "--resources=$(ray_resources)"
    --min-worker-port=10002 --max-worker-port=11000
    "--node-manager-port=$((IGRPO_RAY_PORT + 10))" "--object-manager-port=$((IGRPO_RAY_PORT + 11))"
    "--runtime-env-agent-port=$((IGRPO_RAY_PORT + 12))"
    "--dashboard-agent-grpc-port=$((IGRPO_RAY_PORT + 13))"
    "--dashboard-agent-listen-port=$((IGRPO_RAY_PORT + 14))"
    "--metrics-export-port=$((IGRPO_RAY_PORT + 15))"
  )
}

# NeMo-RL looks for these: it takes a Ray with slurm_managed_ray_cluster as it is, and orders
# nodes by topo_rank. Ray drops resources of value 0: ranks count from 1.
ray_resources() {
  local rank=1 node
  for node in $IGRPO_NODES; do
    [[ $node != "$SLURMD_NODENAME" ]] || break
    rank=$((rank + 1))
  done
  printf '{"worker_units": %d, "slurm_managed_ray_cluster": 1, "topo_rank": %d}\n' \
    "$(units_per_node)" "$rank"
}

# NeMo-RL counts in GPUs; a node without one still has to be counted.
units_per_node() {
  printf '%d\n' $((IGRPO_GPUS_PER_NODE > 0 ? IGRPO_GPUS_PER_NODE : 1))
}

start_ray_head() {
  local address=$1
  # What `ray status` says is at most that many seconds old; 5 by default.
  AUTOSCALER_UPDATE_INTERVAL_S=1 ray start --head "--port=$IGRPO_RAY_PORT" "--ray-client-server-port=$((IGRPO_RAY_PORT + 1))" \
    "--include-dashboard=${IGRPO_RAY_DASHBOARD:-false}" "--temp-dir=$RAY_FOLDER" \
    "${RAY_NODE_ARGS[@]}" &
  RAY=$!
  until is_listening "$address" "$IGRPO_RAY_PORT"; do
    is_alive "$RAY" || die 69 "Ray's head did not start on $(hostname): see the lines above"
    ((SECONDS < IGRPO_HEAD_TIMEOUT_S)) || die 69 "Ray's head is not up after $SECONDS s"
    pause 0.2
  done
}

is_listening() {
  (exec 9<>"/dev/tcp/$1/$2") 2>/dev/null
}

# Waits until all nodes are in; ends the step where one is missing at the deadline.
wait_for_nodes() {
  local expected=$(($(units_per_node) * IGRPO_NUM_NODES)) units=0 start=$SECONDS missing
  while :; do
    missing=$(missing_nodes)
    # Asking Ray takes a second of CPU time: only when it can say yes.
    [[ -n $missing ]] || units=$(ray_units)
    ((units < expected)) || break
    leave_when_over
    is_alive "$RAY" || die 69 "Ray's head died while its workers were joining"
    if ((SECONDS - start >= IGRPO_JOIN_TIMEOUT_S)); then
      [[ -n $missing ]] || missing="a node"
      die 69 "after $((SECONDS - start)) s ${missing// /, } did not join Ray at $RAY_ADDRESS" \
        "(IGRPO_JOIN_TIMEOUT_S; see worker-*.log). igrpo.site.interface names another network," \
        "sbatch --exclude=NODE leaves a node out"
    fi
    pause 1
  done
  say "Ray is up: $units GPUs on $IGRPO_NUM_NODES nodes after $SECONDS s"
}

# The worker_units that have joined; 0 while Ray does not answer.
ray_units() {
  local status
  status=$(timeout 60 ray status "--address=$RAY_ADDRESS" 2>/dev/null) || status=
  awk '$2 == "worker_units" { split($1, of, "/"); units = int(of[2]) } END { print units + 0 }' \
    <<<"$status"
}

# A worker says so once its raylet listens.
say_joined() {
  is_listening "$1" $((IGRPO_RAY_PORT + 10)) && : >"$IGRPO_LOG_DIR/joined-$SLURMD_NODENAME"
}

# The nodes that have not said so, by name.
missing_nodes() {
  local node missing=()
  for node in $IGRPO_NODES; do
    [[ $node == "$IGRPO_HEAD_NODE" || -e $IGRPO_LOG_DIR/joined-$node ]] || missing+=("$node")
  done
  printf '%s\n' "${missing[*]}"
}

stop_ray() {
  end_process "${RAY:-}" 10
  rm -rf "$RAY_FOLDER"
}

# What explains a death of Ray's; not the log of its runtime environments, which holds variables.
keep_ray_logs() {
  local name folder=$IGRPO_LOG_DIR/ray-$SLURMD_NODENAME
  mkdir -p "$folder" 2>/dev/null || return 0
  for name in gcs_server.out gcs_server.err raylet.out raylet.err; do
    tail -n 200 "$RAY_FOLDER/session_latest/logs/$name" 2>/dev/null | log_pump "$folder/$name"
  done
}
