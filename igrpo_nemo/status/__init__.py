"""Where a run stands: `igrpo status`.

run folder (metrics, plan, checkpoints, marker, lock) ─┐
squeue, where there is Slurm                           ├─ facts.run_status ─> text | JSON
logs of the newest start                               ┘
"""
