#!/usr/bin/env bash
# iGRPO on Nemotron-H-8B (Table 1): one node trains, one samples.
#SBATCH --job-name=igrpo-nemotron-h-8b
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@900
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
EXPERIMENT=table1_nemotron_h_8b_igrpo
# Slurm runs a copy of this file: the launcher is in the checkout that the job was submitted from.
launcher=$(dirname "${BASH_SOURCE[0]}")/ray_cluster.sh
[[ -f $launcher ]] || launcher=${SLURM_SUBMIT_DIR:-.}/slurm/ray_cluster.sh
[[ -f $launcher ]] || { echo "error: submit from the checkout's folder"; exit 2; }
# shellcheck source-path=SCRIPTDIR source=ray_cluster.sh
source "$launcher" train "experiment=$EXPERIMENT" "$@"
