#!/usr/bin/env bash
# The step on the head node: Ray's head, then the driver, whose exit code is the step's.
# Arguments: the driver's command. It runs in the container where there is one.

# shellcheck source-path=SCRIPTDIR

set -uo pipefail

lib=$IGRPO_HOME/slurm/lib
STEP='head'
source "$lib/messages.sh"
source "$lib/secrets.sh"
source "$lib/nodes.sh"
source "$lib/time_left.sh"
source "$lib/ray.sh"
source "$lib/driver.sh"

run_head() {
  { : >"$IGRPO_LOG_DIR/head.started"; } 2>/dev/null || true
  trap on_step_terminated TERM
  trap leave EXIT
  set_paths
  if ((IGRPO_USE_RAY)); then
    bring_up_ray
  fi
  start_driver "$@"
  watch_driver
  exit_code "$DRIVER"
  DRIVER_CODE=$?
  finish_driver_log
  ((DRIVER_CODE == 0 || ! IGRPO_USE_RAY)) || await_ray_end
  { printf '%s\n' "$DRIVER_CODE" >"$IGRPO_LOG_DIR/driver.exit"; } 2>/dev/null || true
  say "the driver ended with exit code $DRIVER_CODE"
  exit "$DRIVER_CODE"
}

bring_up_ray() {
  local nodes
  read -ra nodes <<<"$IGRPO_NODES"
  find_address "${nodes[1]:-}"
  # Without it NeMo-RL would start a Ray of its own on this node, and train there alone.
  export RAY_ADDRESS=$ADDRESS:$IGRPO_RAY_PORT
  prepare_ray "$ADDRESS"
  start_ray_head "$ADDRESS"
  # Renamed, so that no worker reads half of it.
  if ! { printf '%s\n' "$RAY_ADDRESS" >"$IGRPO_LOG_DIR/head.ready.tmp" &&
    mv "$IGRPO_LOG_DIR/head.ready.tmp" "$IGRPO_LOG_DIR/head.ready"; }; then
    die 74 "cannot write to $IGRPO_LOG_DIR"
  fi
  wait_for_nodes
}

# shellcheck disable=SC2317 # called by the trap
leave() {
  trap - EXIT
  end_process "${DRIVER:-}" 10
  { : >"$IGRPO_LOG_DIR/over"; } 2>/dev/null || true
  ((IGRPO_USE_RAY)) && stop_ray
}

run_head "$@"
