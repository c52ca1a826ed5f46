# shellcheck shell=bash
# Watches the steps, then says how the job ends.

# EX_SOFTWARE: the driver's code, or the head step's, where Ray broke under it.
readonly EX_UNAVAILABLE=69 EX_SOFTWARE=70 EX_IOERR=74 EX_TEMPFAIL=75

# Returns when the head step has ended, or when there is nothing more to hope for from it.
watch_steps() {
  local rounds=0
  LOST=''
  while is_alive "$HEAD_STEP"; do
    pause 0.5
    if [[ -n $WORKER_STEP ]] && ! is_alive "$WORKER_STEP" && [[ ! -e $IGRPO_LOG_DIR/over ]]; then
      LOST="a worker of Ray is gone"
      break
    fi
    if ((++rounds % 20 == 0)) && is_disk_full; then
      request_stop "the disk of $IGRPO_LOG_DIR is full"
    fi
  done
  if [[ -n $LOST ]] && ! is_ending; then
    say "$LOST: ending the driver"
    end_steps
  fi
  exit_code "$HEAD_STEP"
  STEP_CODE=$?
}

# Whether Slurm has told the job, or its steps alone (the grace time of a preemption), to end: then
# Ray is gone, and the driver gets the time that is left.
is_ending() {
  [[ -n ${TERMINATED:-} || -e $IGRPO_LOG_DIR/terminated ]]
}

# Whether nothing can be written any more. Asked of the disk itself: quotas do not show in df.
is_disk_full() {
  local probe=$IGRPO_LOG_DIR/.probe full=0
  { printf '%65536s' ' ' >"$probe"; } 2>/dev/null || full=1
  rm -f "$probe"
  ((full))
}

# The driver's exit code decides; where it has none, the step broke under it.
conclude() {
  local code=$STEP_CODE driver=''
  read -r driver 2>/dev/null <"$IGRPO_LOG_DIR/driver.exit" || true
  [[ -n $LOST || -z $driver ]] || code=$driver
  if [[ $KIND != train ]]; then
    ((code == 0)) || show_tail
    finish "$code"
  fi
  if ((code == 0)) && [[ -f $IGRPO_RUN_DIR/finished ]]; then
    say "finished; results in $IGRPO_RUN_DIR"
    finish 0
  fi
  if is_disk_full; then
    leave_comment "the disk of $IGRPO_RUN_DIR is full; free some space, then: scontrol requeue $SLURM_JOB_ID"
    show_tail
    say "error: the disk of $IGRPO_RUN_DIR is full; checkpoints up to step $(saved_step) are intact." \
      "Free some space, then: scontrol requeue $SLURM_JOB_ID"
    finish "$EX_IOERR"
  fi
  [[ -z ${LATE:-} ]] || exit "$EX_TEMPFAIL"
  if is_ending; then
    requeue "$EX_TEMPFAIL" "the job was told to end"
  elif is_container_refused; then
    show_tail
    say "error: $CONTAINER_IMAGE did not start (exit code $code): look at its name and the mounts"
    finish "$EX_UNAVAILABLE"
  elif [[ -n $LOST ]]; then
    requeue "$EX_UNAVAILABLE" "$LOST: $(reasons "it said nothing")"
  elif ((code == EX_SOFTWARE)); then
    requeue "$EX_UNAVAILABLE" "Ray lost a process of the run: $(reasons "exit code $code")"
  elif ((code == EX_TEMPFAIL || code == 0)); then
    requeue "$EX_TEMPFAIL" "the driver stopped with its state saved"
  elif [[ -z $driver ]] && ((code != EX_UNAVAILABLE)); then
    requeue "$EX_UNAVAILABLE" "the head step is gone: $(reasons "exit code $code")"
  elif ((code > 128 && code != 130)); then
    requeue "$code" "the driver was killed by signal $((code - 128))"
  fi
  show_tail
  say "error: $(reasons "the driver ended with exit code $code")"
  finish "$code"
}

# Whether the container never started for this run: rather its name, or a mount, than a lost node.
is_container_refused() {
  [[ -n ${CONTAINER_IMAGE:-} && ! -e $IGRPO_LOG_DIR/head.started ]] &&
    ((${SLURM_RESTART_COUNT:-0} == 0 && $(saved_step) == 0))
}

# What the steps said of their end, or else $1.
reasons() {
  local file said=()
  for file in "$IGRPO_LOG_DIR"/error-*; do
    [[ ! -s $file ]] || said+=("$(<"$file")")
  done
  printf '%s\n' "${said[*]:-$1}"
}

finish() {
  end_steps
  exit "$1"
}

# The end of the driver's log, which has no secrets in it, in the job's own output.
show_tail() {
  local log=$IGRPO_LOG_DIR/driver.log
  [[ -s $log ]] || log=$IGRPO_LOG_DIR/head.log
  say "the end of $log:"
  tail -n 20 "$log" 2>/dev/null || true
}

# A full disk takes no message: this one is kept by Slurm (scontrol show job).
leave_comment() {
  scontrol update "JobId=$SLURM_JOB_ID" "Comment=igrpo: $1" 2>/dev/null || true
}
