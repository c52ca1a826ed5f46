#!/usr/bin/env bash
# GRPO on OpenMath-Nemotron-14B with iGRPO's budget (Table 1): the matched baseline.
#SBATCH --job-name=grpo-14b
#SBATCH --nodes=5
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@900
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
EXPERIMENT=table1_openmath_nemotron_14b_grpo
# Slurm runs a copy of this file: the launcher is in the checkout that the job was submitted from.
launcher=$(dirname "${BASH_SOURCE[0]}")/ray_cluster.sh
[[ -f $launcher ]] || launcher=${SLURM_SUBMIT_DIR:-.}/slurm/ray_cluster.sh
[[ -f $launcher ]] || { echo "error: submit from the checkout's folder"; exit 2; }
# shellcheck source-path=SCRIPTDIR source=ray_cluster.sh
source "$launcher" train "experiment=$EXPERIMENT" "$@"
