"""From a config and a cluster profile to a job: what `igrpo launch` does.

config, site ─ sbatch.sbatch_command ─> sbatch slurm/X.sh ... ─> job ids     (submit)
             ─ settings.job_settings ─> NAME='value' lines that slurm/*.sh reads in the job
             ─ settings.exports      ─> export lines for plain sbatch
"""
