# shellcheck shell=bash
# What the job is about: `igrpo launch --job-settings` composes the config and the cluster profile.

# Fills IGRPO with the command that settings, preflight and bare-metal drivers run.
find_igrpo() {
  local folder
  for folder in ${VENV:+"$VENV"} "$IGRPO_HOME/.venv"; do
    if [[ -x $folder/bin/igrpo ]]; then
      IGRPO=("$folder/bin/igrpo")
      return
    fi
  done
  command -v igrpo >/dev/null ||
    die 2 "there is no igrpo in $IGRPO_HOME/.venv: run 'make install' there, or set VENV"
  IGRPO=("$(command -v igrpo)")
}

# Outside a job a script submits itself, by way of the checks of `igrpo launch`.
submit() {
  shift
  # It reads the experiment in the script itself.
  [[ -z ${EXPERIMENT:-} ]] || shift
  find_igrpo
  cd "$IGRPO_HOME" || exit 2
  exec "${IGRPO[@]}" launch --script "slurm/$(basename "$0")" "$@"
}

# Exports what the config and the profile say. Nothing in it is secret.
read_settings() {
  local line name text
  text=$("${IGRPO[@]}" launch --job-settings --script "slurm/$KIND.sh" "$@") ||
    die 2 "the settings of this job cannot be used (see the line above)"
  SETTING_NAMES=()
  while IFS= read -r line; do
    [[ $line =~ ^([A-Za-z_][A-Za-z0-9_]*)= ]] || continue
    name=${BASH_REMATCH[1]}
    # Nothing is known of the GPU: what the user exported stands.
    [[ $line != "TORCH_CUDA_ARCH_LIST=''" ]] || continue
    # The values are quoted for a shell.
    eval "export $line"
    if [[ -z ${!name} ]]; then
      # Empty is not the same as unset to what reads these (HF_HOME, CUDA's variables).
      unset "$name"
    else
      SETTING_NAMES+=("$name")
    fi
  done <<<"$text"
  SETTINGS=$text
  [[ -n ${IGRPO_RUN_DIR:-} ]] || die 2 "'igrpo launch --job-settings' named no run folder"
  [[ $IGRPO_RUN_DIR == /* ]] || export IGRPO_RUN_DIR=$IGRPO_HOME/$IGRPO_RUN_DIR
  : "${IGRPO_NUM_NODES:=$SLURM_JOB_NUM_NODES}" "${IGRPO_GPUS_PER_NODE:=8}"
  export IGRPO_NUM_NODES IGRPO_GPUS_PER_NODE
  # VENV may come from the profile.
  find_igrpo
}

stop_if_finished() {
  if [[ $KIND == train && -f $IGRPO_RUN_DIR/finished ]]; then
    say "$IGRPO_RUN_DIR is finished: nothing to do (remove its file 'finished' to train on)"
    exit 0
  fi
}

# One folder for each job and restart, so that no start overwrites the log of the one before.
open_log_folder() {
  local folder=$IGRPO_RUN_DIR/slurm/$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}
  mkdir -p "$folder" || die 2 "cannot make the log folder $folder"
  # A start that was killed could not remove its token.
  rm -f "$IGRPO_RUN_DIR"/slurm/"$SLURM_JOB_ID"-*/ray.token
  export IGRPO_LOG_DIR=$folder
  # shellcheck disable=SC2034 # say writes there
  LAUNCHER_LOG=$folder/launcher.log
  # A request to stop is a rename: that works on a full disk, where a new file may not.
  rm -f "$folder/stop"
  : >"$folder/stop.not" || true
  export IGRPO_STOP_FILE=$folder/stop
  printf '%s\n' "$SETTINGS" >"$folder/settings.txt" || true
  say "job $SLURM_JOB_ID, restart ${SLURM_RESTART_COUNT:-0}, on $SLURM_JOB_NODELIST; logs in $folder"
}

check_preflight() {
  local code
  [[ $KIND == train ]] || return 0
  "${IGRPO[@]}" preflight "$@" 2>&1 | log_pump "$IGRPO_LOG_DIR/preflight.txt"
  code=${PIPESTATUS[0]}
  if ((code != 0)); then
    cat "$IGRPO_LOG_DIR/preflight.txt" 2>/dev/null || true
    die 2 "the preflight says no (exit code $code): nothing was started"
  fi
}
