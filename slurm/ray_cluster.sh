#!/usr/bin/env bash
# The launcher that the scripts of this folder share. They source it with what is to be done:
#
#   train WORDS       igrpo train WORDS              WORDS: Hydra overrides
#   evaluate WORDS    python pipelines/evaluate.py WORDS
#
#   login node:  exec igrpo launch --script slurm/X.sh WORDS
#   in a job:    settings, preflight -> Ray's head and the driver in one step, Ray's workers in another
#                -> watched until the driver ends -> done, requeued, or failed with a reason
#
# What stops a job before Ray starts ends it with exit code 2.

# shellcheck source-path=SCRIPTDIR/lib

set -uo pipefail

if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
  echo "error: this file is what slurm/train_*.sh and slurm/evaluate.sh share: run one of those" >&2
  exit 2
fi

IGRPO_HOME=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export IGRPO_HOME
lib=$IGRPO_HOME/slurm/lib
source "$lib/messages.sh"
source "$lib/queue.sh"
source "$lib/secrets.sh"
source "$lib/settings.sh"
source "$lib/nodes.sh"
source "$lib/container.sh"
source "$lib/run_lock.sh"
source "$lib/time_left.sh"
source "$lib/requeue.sh"
source "$lib/steps.sh"
source "$lib/watch.sh"

# Runs the job. Arguments: KIND WORDS.
run_job() {
  KIND=$1
  shift
  cd "$IGRPO_HOME" || exit 2
  trap 'clean_up' EXIT
  trap 'on_time_limit' USR1
  trap 'on_terminated' TERM INT
  find_igrpo
  read_settings "$@"
  stop_if_finished
  # First: a job that is refused here leaves no logs in the run's folder.
  take_run_lock
  open_log_folder
  check_preflight "$@"
  check_nodes
  prepare_container
  find_time_limit
  note_progress
  driver_command "$@"
  start_steps
  watch_steps
  conclude
}

# The variables alone do not tell: a shell in an allocation has them too. What Slurm runs is its copy
# of the script, which always has this name.
if [[ -z ${SLURM_JOB_ID:-} || ${0##*/} != slurm_script ]]; then
  submit "$@"
fi
run_job "$@"
