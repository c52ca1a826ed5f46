# shellcheck shell=bash
# The driver: started, watched, its output logged without secrets.

# The project is found in the checkout inside a container, and in VENV on bare metal. What stands in a
# container's PYTHONPATH already is the image's own, or the profile's.
set_paths() {
  if [[ -n ${CONTAINER_IMAGE:-} ]]; then
    export PYTHONPATH=$IGRPO_HOME${PYTHONPATH:+:$PYTHONPATH}
  else
    PATH=${VENV:-$IGRPO_HOME/.venv}/bin:$PATH
  fi
}

start_driver() {
  local command=("$@") limit
  limit=$(must_save_by)
  if [[ ${IGRPO_ENGINE:-} == nemo_rl* && -n $limit ]]; then
    command+=("checkpointing.checkpoint_must_save_by='$limit'")
  fi
  { printf '%q ' "${command[@]}" && echo; } >"$IGRPO_LOG_DIR/driver.sh" 2>/dev/null || true
  # Not the file itself: a driver that prints to a full disk would die of it.
  exec {PUMP_IN}> >(log_pump "$IGRPO_LOG_DIR/driver.log")
  PUMP=$!
  "${command[@]}" >&"$PUMP_IN" 2>&1 {PUMP_IN}>&- &
  DRIVER=$!
  exec {PUMP_IN}>&-
}

# Returns when the driver has ended; a driver whose Ray died is ended, since it would wait for ever.
watch_driver() {
  while is_alive "$DRIVER"; do
    pause 0.5
    leave_when_over
    if ((IGRPO_USE_RAY)) && ! is_alive "$RAY" && [[ -z ${TERMINATED:-} ]] && is_alive "$DRIVER"; then
      say "Ray's head died: ending the driver"
      blame_ray
    fi
  done
}

# The batch shell wants the step to end. Not so where Slurm does: then the driver saves by itself.
leave_when_over() {
  if [[ -e $IGRPO_LOG_DIR/over && -z ${TERMINATED:-} ]]; then
    end_process "${DRIVER:-}" 10
    exit 70
  fi
}

# A driver whose Ray breaks may fail of it before anybody has seen that Ray is gone. Some seconds are
# for Ray's head to be seen to end here, and for the batch shell to see a worker end: it must not
# find the workers sent home by then.
await_ray_end() {
  local tries=25
  while ((tries-- > 0)) && [[ -z ${TERMINATED:-} ]]; do
    leave_when_over
    if ! is_alive "$RAY"; then
      say "the driver ended with exit code $DRIVER_CODE, and Ray's head died"
      blame_ray
    fi
    pause 0.2
  done
}

# Ends the step without an exit code of the driver's: it was not its fault.
blame_ray() {
  keep_ray_logs
  end_process "$DRIVER" 10
  exit 70
}

# The pump ends with the last process that holds the pipe, which need not be the driver.
finish_driver_log() {
  await_end "$PUMP" 5
}

# Slurm signals every process of a step: the driver saves by itself. A worker's word counts for
# nothing: the others of its step are told to end where one has died.
on_step_terminated() {
  TERMINATED=1
  [[ $STEP != head || -e $IGRPO_LOG_DIR/over ]] || { : >"$IGRPO_LOG_DIR/terminated"; } 2>/dev/null || true
}
