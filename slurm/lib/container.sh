# shellcheck shell=bash
# srun's arguments for a container by pyxis; none where CONTAINER_IMAGE is not set.

# Where the host finds its Python and its libraries: of no use in an image, or worse.
readonly HOST_PATHS=(
  PYTHONPATH PYTHONHOME PYTHONUSERBASE VIRTUAL_ENV CONDA_PREFIX LD_LIBRARY_PATH LD_PRELOAD
)

# Fills CONTAINER_ARGS, and STEP_ENV with the command that srun is started by.
prepare_container() {
  local help names
  CONTAINER_ARGS=() STEP_ENV=()
  [[ -n ${CONTAINER_IMAGE:-} ]] || return 0
  help=$(srun --help 2>&1) || true
  if [[ $help != *--container-image* ]]; then
    die 2 "CONTAINER_IMAGE is set, but this Slurm has no pyxis (srun knows no --container-image):" \
      "unset it and set VENV to run on bare metal"
  fi
  find_own_folders
  check_container_files
  CONTAINER_ARGS=(
    "--container-image=$CONTAINER_IMAGE"
    "--container-mounts=$(container_mounts)"
    "--container-workdir=$IGRPO_HOME"
    --no-container-mount-home
  )
  keep_host_paths_out
  # An image's own value of a variable wins over the job's, unless the variable is named here.
  if [[ $help == *--container-env* ]]; then
    names=$(container_variables)
    CONTAINER_ARGS+=("--container-env=$names")
  fi
}

# Fills OWN_FOLDERS with the folders that the training writes outside of the run folder: what is not
# mounted is lost with the container, or is another one on each node. Only what is there can be mounted.
find_own_folders() {
  local folder
  OWN_FOLDERS=()
  [[ $KIND == train ]] || return 0
  for folder in "${IGRPO_CHECKPOINT_DIR:-}" "${NRL_MEGATRON_CHECKPOINT_DIR:-}"; do
    [[ -n $folder && $folder != "$IGRPO_RUN_DIR"/* ]] || continue
    mkdir -p "$folder" || die 2 "cannot make $folder"
    OWN_FOLDERS+=("$folder")
  done
}

# What is mistyped fails here, once; in the step it would look like a lost node. An image without a
# slash in front is a registry's.
check_container_files() {
  local mount sources
  [[ $CONTAINER_IMAGE != [./]* || -e $CONTAINER_IMAGE ]] ||
    die 2 "CONTAINER_IMAGE: there is no $CONTAINER_IMAGE on $(hostname)"
  IFS=, read -ra sources <<<"$(container_mounts)"
  for mount in "${sources[@]}"; do
    [[ $mount != /* || -e ${mount%%:*} ]] ||
      die 2 "CONTAINER_MOUNTS, HF_HOME: there is no ${mount%%:*} on $(hostname) to be mounted"
  done
}

# The profile's mounts, and what every job needs at the same place as outside.
container_mounts() {
  local mounts=${CONTAINER_MOUNTS:-} folder
  for folder in "$IGRPO_HOME" "$IGRPO_RUN_DIR" ${OWN_FOLDERS[@]+"${OWN_FOLDERS[@]}"} "${HF_HOME:-}"; do
    [[ -n $folder ]] || continue
    [[ "$mounts," =~ :"$folder"[,:] ]] || mounts+=${mounts:+,}$folder:$folder
  done
  printf '%s\n' "$mounts"
}

# A container inherits what its image does not set. What the profile names is meant for the image.
keep_host_paths_out() {
  local name
  STEP_ENV=(env)
  for name in "${HOST_PATHS[@]}"; do
    [[ " ${SETTING_NAMES[*]-} " == *" $name "* ]] || STEP_ENV+=(-u "$name")
  done
}

# Names, never values: this becomes an argument.
container_variables() {
  local name
  {
    printf '%s\n' "${SETTING_NAMES[@]}"
    while IFS= read -r name; do
      case $name in
      IGRPO_* | NCCL_* | UCX_* | GLOO_* | FI_* | HF_* | WANDB_* | OMP_NUM_THREADS | CPUS_PER_NODE | \
        RAY_AUTH_* | TRANSFORMERS_OFFLINE | TORCH_CUDA_ARCH_LIST)
        printf '%s\n' "$name"
        ;;
      esac
    done < <(compgen -e)
  } | grep -vE '^(CONTAINER_IMAGE|CONTAINER_MOUNTS|VENV)$' | sort -u | paste -sd, -
}
