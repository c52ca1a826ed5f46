#!/usr/bin/env bash
# The step on every other node: one worker of Ray, until the head says that it is over.

# shellcheck source-path=SCRIPTDIR

set -uo pipefail

lib=$IGRPO_HOME/slurm/lib
STEP='worker'
source "$lib/messages.sh"
source "$lib/secrets.sh"
source "$lib/nodes.sh"
source "$lib/ray.sh"
source "$lib/driver.sh"

run_worker() {
  trap on_step_terminated TERM
  trap 'stop_ray' EXIT
  set_paths
  local joined=''
  wait_for_head
  find_address "${HEAD_ADDRESS%:*}"
  prepare_ray "$ADDRESS"
  ray start "--address=$HEAD_ADDRESS" "${RAY_NODE_ARGS[@]}" &
  RAY=$!
  while is_alive "$RAY"; do
    pause 0.5
    [[ ! -e $IGRPO_LOG_DIR/over && -z ${TERMINATED:-} ]] || leave_quietly
    [[ -n $joined ]] || ! say_joined "$ADDRESS" || joined=yes
  done
  [[ ! -e $IGRPO_LOG_DIR/over && -z ${TERMINATED:-} ]] || leave_quietly
  keep_ray_logs
  die 69 "Ray's worker on $(hostname) ended by itself"
}

# Where all steps were told to end, the head's step says so first: a worker that is gone before that
# would be taken for lost.
leave_quietly() {
  [[ -z ${TERMINATED:-} ]] || pause 2
  exit 0
}

wait_for_head() {
  [[ -d $IGRPO_LOG_DIR ]] ||
    die 69 "$(hostname) does not see $IGRPO_LOG_DIR: the run folder must be on a shared disk"
  until [[ -s $IGRPO_LOG_DIR/head.ready ]]; do
    [[ ! -e $IGRPO_LOG_DIR/over ]] || exit 0
    ((SECONDS < IGRPO_HEAD_TIMEOUT_S + IGRPO_JOIN_TIMEOUT_S)) || die 69 "there is no head after $SECONDS s"
    pause 0.5
  done
  read -r HEAD_ADDRESS <"$IGRPO_LOG_DIR/head.ready"
}

run_worker
