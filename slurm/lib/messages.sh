# shellcheck shell=bash
# What the launcher says: to the job's output and to launcher.log; in a step, to the step's log.
# A full disk must not end a job in the middle of a sentence: what cannot be written is dropped.

say() {
  local line
  printf -v line '%(%F %T)T %s' -1 "$*"
  printf '%s\n' "$line" 2>/dev/null || true
  if [[ -n ${LAUNCHER_LOG:-} ]]; then
    { printf '%s\n' "$line" >>"$LAUNCHER_LOG"; } 2>/dev/null || true
  fi
}

# die CODE MESSAGE. In a step the launcher is told why, too.
die() {
  local code=$1
  shift
  say "error: $*"
  if [[ -n ${STEP:-} ]]; then
    { printf '%s\n' "$*" >"$IGRPO_LOG_DIR/error-$SLURMD_NODENAME"; } 2>/dev/null || true
  fi
  exit "$code"
}

# Waits, but lets a signal's handler run at once, which a plain sleep would delay.
pause() {
  local sleeper
  sleep "$1" &
  sleeper=$!
  wait "$sleeper" 2>/dev/null
  kill "$sleeper" 2>/dev/null || true
}

is_alive() {
  [[ -n ${1:-} ]] && kill -0 "$1" 2>/dev/null
}

# exit_code PID: waits for a child and returns its exit code, whatever signals come in between.
exit_code() {
  local code again
  while :; do
    wait "$1" 2>/dev/null
    code=$?
    if ((code > 128)); then
      is_alive "$1" && continue
      # A signal to this shell can end the wait just as the child ends: ask once more.
      wait "$1" 2>/dev/null
      again=$?
      ((again == 127)) || code=$again
    fi
    return "$code"
  done
}

# await_end PID SECONDS: waits for its end, at most that long.
await_end() {
  local tries=$(($2 * 5))
  while is_alive "$1" && ((tries-- > 0)); do
    pause 0.2
  done
}

# end_process PID SECONDS: TERM, then KILL after that time.
end_process() {
  local pid=$1
  is_alive "$pid" || return 0
  kill -TERM "$pid" 2>/dev/null || true
  await_end "$pid" "$2"
  kill -KILL "$pid" 2>/dev/null || true
}
