"""Slurm: from a config and a cluster profile to jobs, and from a run folder to its state.

config, site ── job.sbatch_command ──> sbatch slurm/X.sh ──client──> job ids     (submit)
             ── site.job_settings ──> NAME='value' lines that slurm/*.sh reads in the job
             ── site.exports ──> export lines for plain sbatch
run folder, squeue ── status.run_status ──> text | JSON
"""
