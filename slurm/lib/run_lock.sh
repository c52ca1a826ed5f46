# shellcheck shell=bash
# One job at a time writes a run folder. The lock names the job, and Slurm knows whether it lives:
# igrpo_nemo/run/lock.py describes it beside the lock of the job's process.

take_run_lock() {
  local lock=$IGRPO_RUN_DIR/slurm/job holder stale=$IGRPO_RUN_DIR/slurm/job.stale.$SLURM_JOB_ID
  local state said='' tries=100
  [[ $KIND == train ]] || return 0
  mkdir -p "$IGRPO_RUN_DIR/slurm" || die 2 "cannot make the folder $IGRPO_RUN_DIR/slurm"
  while ((tries-- > 0)); do
    # A shell with noclobber creates a file only where there is none, in one operation.
    if (set -C && printf '%s\n' "$SLURM_JOB_ID" >"$lock") 2>/dev/null; then
      RUN_LOCK=$lock
      return
    fi
    holder=
    read -r holder 2>/dev/null <"$lock" || true
    case $holder in
    "$SLURM_JOB_ID")
      RUN_LOCK=$lock
      return
      ;;
    [0-9]*)
      # Nobody takes a lock whose holder may be at work.
      state=$(state_of "$holder") ||
        die 2 "Slurm does not answer: is job $holder at work on $IGRPO_RUN_DIR?"
      case $state in
      '' | PENDING | REQUEUED | REQUEUE_HOLD | SPECIAL_EXIT) ;;
      COMPLETING)
        [[ -n $said ]] || say "waiting for job $holder, which ends, to leave $IGRPO_RUN_DIR"
        # For as long as it takes: a node that hangs may keep a job in this state for hours.
        said=yes tries=100
        pause 3
        continue
        ;;
      *) die 2 "job $holder is at work on $IGRPO_RUN_DIR: two jobs never share a run folder" ;;
      esac
      ;;
    esac
    # Its holder is gone. Another job may have seen that too and be first: then put its lock back.
    if mv "$lock" "$stale" 2>/dev/null; then
      [[ $(cat "$stale") == "$holder" ]] || mv -n "$stale" "$lock"
      rm -f "$stale"
    fi
    pause 0.2
  done
  die 2 "cannot take the lock $lock: is $IGRPO_RUN_DIR writable?"
}

release_run_lock() {
  local holder=
  [[ -n ${RUN_LOCK:-} ]] || return 0
  read -r holder 2>/dev/null <"$RUN_LOCK" || true
  [[ $holder != "$SLURM_JOB_ID" ]] || rm -f "$RUN_LOCK"
  RUN_LOCK=
}
