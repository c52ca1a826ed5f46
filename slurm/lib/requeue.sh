# shellcheck shell=bash
# Stopping with the state saved, and going back to the queue.

# USR1 to the batch shell (#SBATCH --signal=B:USR1@...): the time limit is near.
on_time_limit() {
  [[ -n ${IGRPO_STOP_FILE:-} ]] || go_back_unstarted
  request_stop "the time limit is near"
}

# The job has waited for another one of its run to end, and has nothing to save.
go_back_unstarted() {
  say "the time limit is near, and nothing was started: back to the queue"
  send_back "$SLURM_JOB_ID" && wait_for_slurm
  exit "$EX_TEMPFAIL"
}

# Slurm ends this shell. Were it to end by itself, that could count as the end of the job.
wait_for_slurm() {
  trap - TERM USR1 INT
  pause 120
  exit 0
}

# TERM: Slurm ends the job: preemption, a lost node, scancel, the time limit. Until it kills, the
# driver may save. Slurm requeues the job itself where that is due, but not at the time limit.
on_terminated() {
  [[ -z ${TERMINATED:-} ]] || return 0
  TERMINATED=1
  request_stop "Slurm ends this job"
  # Slurm's KillWait may be short.
  # shellcheck disable=SC2034 # ask_queue and send_back read these
  local ASK_TRIES=3 ASK_PAUSE=1
  if [[ $(ask_queue -j "$SLURM_JOB_ID" -o %r) == TimeLimit ]]; then
    LATE=1
    requeue "$EX_TEMPFAIL" "the time limit came before the run had stopped"
  fi
}

request_stop() {
  [[ -n ${IGRPO_STOP_FILE:-} ]] || exit 143
  if [[ ! -e $IGRPO_STOP_FILE ]]; then
    say "$1: asking the driver to save and stop"
    mv "$IGRPO_LOG_DIR/stop.not" "$IGRPO_STOP_FILE" 2>/dev/null || : >"$IGRPO_STOP_FILE" || true
  fi
}

# The newest checkpoint's step, or 0.
saved_step() {
  local folder step newest=0
  for folder in "${IGRPO_CHECKPOINT_DIR:-$IGRPO_RUN_DIR/checkpoints}"/step_*; do
    step=${folder##*/step_}
    [[ $step =~ ^[0-9]+$ ]] || continue
    ((10#$step > newest)) && newest=$((10#$step))
  done
  printf '%s\n' "$newest"
}

note_progress() {
  FIRST_STEP=$(saved_step)
}

# Counts restarts in a row that saved nothing new. Prints the count with this one.
idle_restarts() {
  local file=$IGRPO_RUN_DIR/slurm/idle job='' count=0
  read -r job count 2>/dev/null <"$file" || true
  [[ $job == "$SLURM_JOB_ID" && $count =~ ^[0-9]+$ ]] || count=0
  if (($(saved_step) > FIRST_STEP)); then
    count=0
  else
    count=$((count + 1))
  fi
  { printf '%s %s\n' "$SLURM_JOB_ID" "$count" >"$file"; } 2>/dev/null || true
  printf '%s\n' "$count"
}

# requeue CODE REASON: back to the queue; where that is not possible the job ends with CODE.
# Returns only at the time limit (LATE), where the driver still has its last seconds to save.
requeue() {
  local code=$1 reason=$2 idle state=RUNNING
  # Where Slurm does not say, it may still take the job back.
  [[ -n ${LATE:-} ]] || state=$(state_of "$SLURM_JOB_ID") || state=RUNNING
  if [[ $state != RUNNING ]]; then
    # scancel, preemption, a lost node: requeued by Slurm, or not to be requeued.
    say "$reason; Slurm is ending this job (${state:-unknown state})"
    exit "$code"
  fi
  idle=$(idle_restarts)
  if ((idle >= ${IGRPO_MAX_IDLE_RESTARTS:-3})); then
    die "$code" "$reason; $idle starts in a row saved no new checkpoint: not requeued"
  fi
  if ((${SLURM_RESTART_COUNT:-0} >= ${IGRPO_MAX_RESTARTS:-50})); then
    die "$code" "$reason; requeued ${SLURM_RESTART_COUNT:-0} times already (max_restarts): not requeued"
  fi
  say "$reason; saved up to step $(saved_step): back to the queue"
  if [[ -z ${LATE:-} ]]; then
    end_steps
    release_run_lock
  fi
  if send_back "$SLURM_JOB_ID"; then
    [[ -z ${LATE:-} ]] || return 0
    wait_for_slurm
  fi
  if has_successor; then
    say "this Slurm does not requeue the job: the next job of the chain goes on"
    exit 0
  fi
  die "$code" "this Slurm does not requeue the job: submit it again to go on"
}

# Whether another job of this run's chain waits for this one to succeed; they share its name. What
# evaluates the run waits too, but trains nothing.
has_successor() {
  ask_queue -t PENDING -n "$SLURM_JOB_NAME" -o %E | grep -qE "afterok:$SLURM_JOB_ID([^0-9]|\$)"
}
