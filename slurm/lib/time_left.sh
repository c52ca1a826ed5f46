# shellcheck shell=bash
# The job's time limit, and what NeMo-RL is told of it.

# seconds_of D-HH:MM:SS | HH:MM:SS | MM:SS: prints seconds, nothing for UNLIMITED and the like.
seconds_of() {
  local days=0 clock=$1 a b c
  [[ $clock =~ ^([0-9]+-)?([0-9]+:)?[0-9]+:[0-9]+$ ]] || return 0
  if [[ $clock == *-* ]]; then
    days=${clock%%-*} clock=${clock#*-}
  fi
  IFS=: read -r a b c <<<"$clock"
  [[ -n $c ]] || { c=$b b=$a a=0; }
  printf '%s\n' $((10#$days * 86400 + 10#$a * 3600 + 10#$b * 60 + 10#$c))
}

# days_clock SECONDS: prints DD:HH:MM:SS, the format of checkpointing.checkpoint_must_save_by.
days_clock() {
  printf '%02d:%02d:%02d:%02d\n' $(($1 / 86400)) $(($1 / 3600 % 24)) $(($1 / 60 % 60)) $(($1 % 60))
}

# Exports IGRPO_END_EPOCH, the second at which Slurm ends the job, unless it has no limit.
find_time_limit() {
  local left
  left=$(ask_queue -j "$SLURM_JOB_ID" -o %L) ||
    say "Slurm does not say how long this job may run: NeMo-RL is not told when it has to save"
  left=$(seconds_of "$left")
  [[ -z $left ]] || export IGRPO_END_EPOCH=$(($(date +%s) + left))
}

# Prints how long NeMo-RL may train before it has to save, or nothing without a time limit.
# It counts from the start of its training loop, which comes after the policy and vLLM are up: that
# start is taken off too, and so is the time that saving takes.
must_save_by() {
  local left
  [[ -n ${IGRPO_END_EPOCH:-} ]] || return 0
  left=$((IGRPO_END_EPOCH - $(date +%s) - ${IGRPO_SAVE_MARGIN_S:-900} - ${IGRPO_STARTUP_MARGIN_S:-600}))
  ((left >= 60)) || left=60
  days_clock "$left"
}
