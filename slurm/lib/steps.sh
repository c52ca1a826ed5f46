# shellcheck shell=bash
# The job's steps: Ray's head with the driver on the first node, Ray's workers on the others.

# Fills DRIVER with the command of the driver; the head step runs it.
driver_command() {
  local python
  python=$(dirname "${IGRPO[0]}")/python
  DRIVER=("${IGRPO[@]}" train "$@")
  if ((${#CONTAINER_ARGS[@]})); then
    python=python
    DRIVER=(python -m igrpo_nemo train "$@")
  fi
  [[ $KIND == train ]] || DRIVER=("$python" "pipelines/$KIND.py" "$@")
}

# A single process on one node needs no Ray of ours.
needs_ray() {
  [[ $KIND == train ]] && { ((IGRPO_NUM_NODES > 1)) || [[ ${IGRPO_ENGINE:-} == nemo_rl ]]; }
}

start_steps() {
  local common workers
  common=(
    --export=ALL --overlap --mpi=none --kill-on-bad-exit=1 --unbuffered
    --ntasks-per-node=1 "--cpus-per-task=$CPUS_PER_NODE" ${CONTAINER_ARGS[@]+"${CONTAINER_ARGS[@]}"}
  )
  export IGRPO_USE_RAY=0
  if needs_ray; then
    IGRPO_USE_RAY=1
    make_ray_token
  fi
  say "head on $IGRPO_HEAD_NODE, ${#NODES[@]} node(s), $CPUS_PER_NODE CPUs and" \
    "$IGRPO_GPUS_PER_NODE GPUs each, Ray: $IGRPO_USE_RAY"
  ${STEP_ENV[@]+"${STEP_ENV[@]}"} srun "${common[@]}" --nodes=1 --ntasks=1 "--nodelist=$IGRPO_HEAD_NODE" \
    "--output=$IGRPO_LOG_DIR/head.log" \
    bash "$IGRPO_HOME/slurm/lib/head_step.sh" "${DRIVER[@]}" &
  HEAD_STEP=$!
  WORKER_STEP=
  workers=("${NODES[@]:1}")
  if ((IGRPO_USE_RAY && ${#workers[@]})); then
    ${STEP_ENV[@]+"${STEP_ENV[@]}"} srun "${common[@]}" "--nodes=${#workers[@]}" "--ntasks=${#workers[@]}" \
      "--nodelist=$(IFS=,; printf '%s' "${workers[*]}")" "--output=$IGRPO_LOG_DIR/worker-%N.log" \
      bash "$IGRPO_HOME/slurm/lib/worker_step.sh" &
    WORKER_STEP=$!
  fi
}

# Ray talks to nobody without this; readable by this user alone, and removed at the end.
make_ray_token() {
  export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$IGRPO_LOG_DIR/ray.token
  (umask 077 && od -An -tx1 -N32 /dev/urandom | tr -d ' \n' >"$RAY_AUTH_TOKEN_PATH") ||
    die 74 "cannot write $RAY_AUTH_TOKEN_PATH"
}

# Ends what still runs. A signal to srun kills its step at once: the steps first get the time to see
# the file, to end the driver, and to take Ray's folder off their nodes.
end_steps() {
  { : >"$IGRPO_LOG_DIR/over"; } 2>/dev/null || true
  await_end "${HEAD_STEP:-}" 25
  end_process "${HEAD_STEP:-}" 10
  await_end "${WORKER_STEP:-}" 10
  end_process "${WORKER_STEP:-}" 5
}

# At every exit.
clean_up() {
  trap - EXIT
  trap '' TERM USR1 INT
  [[ -z ${HEAD_STEP:-} ]] || end_steps
  [[ -z ${IGRPO_LOG_DIR:-} ]] || rm -f "$IGRPO_LOG_DIR/ray.token" "$IGRPO_LOG_DIR/stop.not"
  release_run_lock
}
