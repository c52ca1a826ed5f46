# shellcheck shell=bash
# Slurm's word on jobs. A controller that is busy or restarts answers nobody for a while: that is not
# the answer that there is no such job.

# What switches a filter on in the user's shell would hide jobs here.
readonly SQUEUE=(
  env -u SQUEUE_ACCOUNT -u SQUEUE_LICENSES -u SQUEUE_NAMES -u SQUEUE_PARTITION -u SQUEUE_QOS
  -u SQUEUE_STATES -u SQUEUE_USERS squeue -h
)

# ask_queue WORDS: what squeue says, nothing for a job that it does not know. Returns 1 where Slurm
# does not answer in ASK_TRIES tries, ASK_PAUSE seconds apart.
ask_queue() {
  local said try
  for ((try = 1; ; try++)); do
    # The answer is marked, so that it can be told from warnings.
    if said=$({ "${SQUEUE[@]}" "$@" | sed 's/^/>/'; } 2>&1); then
      sed -n 's/^>//p' <<<"$said"
      return 0
    fi
    [[ $said != *"Invalid job id"* ]] || return 0
    ((try > 1)) || say "Slurm does not answer: ${said:-squeue gives no reason}" >&2
    ((try < ${ASK_TRIES:-20})) || return 1
    pause "${ASK_PAUSE:-3}"
  done
}

# The state of a job that has nodes or waits for some; nothing where it has ended.
state_of() {
  ask_queue -j "$1" -o %T
}

# send_back JOB: requeues it. Returns 1 where Slurm refuses, or does not answer (as ask_queue).
send_back() {
  local said try
  for ((try = 1; ; try++)); do
    said=$(scontrol requeue "$1" 2>&1) && return 0
    say "scontrol requeue: ${said:-no reason given}"
    case $said in *disabled* | *denied*) return 1 ;; esac
    ((try < ${ASK_TRIES:-20})) || return 1
    pause "${ASK_PAUSE:-3}"
  done
}
