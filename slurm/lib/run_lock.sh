# shellcheck shell=bash
# One job at a time writes a run folder. The lock names the job, and Slurm knows whether it lives.

take_run_lock() {
  local lock=$IGRPO_RUN_DIR/slurm/job holder stale=$IGRPO_RUN_DIR/slurm/job.stale.$SLURM_JOB_ID try
  [[ $KIND == train ]] || return 0
  for try in 1 2 3 4 5; do
    # A shell with noclobber creates a file only where there is none, in one operation.
    if (set -C && printf '%s\n' "$SLURM_JOB_ID" >"$lock") 2>/dev/null; then
      RUN_LOCK=$lock
      return
    fi
    holder=
    read -r holder <"$lock" 2>/dev/null || true
    if [[ $holder == "$SLURM_JOB_ID" ]]; then
      RUN_LOCK=$lock
      return
    fi
    if [[ -n $holder ]] && is_running_job "$holder"; then
      die 2 "job $holder is at work on $IGRPO_RUN_DIR: two jobs never share a run folder"
    fi
    # Its holder is gone. Another job may have seen that too and be first: then put its lock back.
    if mv "$lock" "$stale" 2>/dev/null; then
      [[ $(cat "$stale") == "$holder" ]] || mv -n "$stale" "$lock"
      rm -f "$stale"
    fi
    pause "0.$try"
  done
  die 2 "cannot take the lock $lock: is $IGRPO_RUN_DIR writable?"
}

is_running_job() {
  local states=RUNNING,COMPLETING,CONFIGURING,SUSPENDED,STOPPED,RESIZING,SIGNALING,STAGE_OUT
  [[ -n $(squeue -h -j "$1" -t "$states" -o %i 2>/dev/null) ]]
}

release_run_lock() {
  local holder=
  [[ -n ${RUN_LOCK:-} ]] || return 0
  read -r holder <"$RUN_LOCK" 2>/dev/null || true
  [[ $holder != "$SLURM_JOB_ID" ]] || rm -f "$RUN_LOCK"
  RUN_LOCK=
}
