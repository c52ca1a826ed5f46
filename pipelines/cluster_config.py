"""Prints a cluster profile of NeMo-Skills, made from the project's own cluster profile.

    python pipelines/cluster_config.py cluster=a100_2x8 > configs/cluster_configs/slurm_a100.yaml
    python pipelines/cluster_config.py --workspace /lustre/me --name mine cluster=h100_2x8

Account, partition, time limit, container, mounts and environment are `igrpo.site`: from
cluster.local.yaml, from environment variables such as SBATCH_ACCOUNT, or igrpo.site.account=...
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from igrpo_nemo.chain.script import DONE, ScriptParser, exit_code, overrides_of
from igrpo_nemo.cluster.launch import NO_RUN, composed
from igrpo_nemo.evaluation.skills.cluster import WORKSPACE, cluster_text, cluster_values

CHECKOUT = Path(__file__).resolve().parents[1]


def main(words: Sequence[str]) -> int:
    parser = ScriptParser(__doc__, "cluster_config.py [flags] [key=value ...]")
    parser.add_argument("--name", default="slurm_a100", help="the profile's name (slurm_a100)")
    parser.add_argument(
        "--workspace", default=WORKSPACE, metavar="DIR", help=f"shared folder ({WORKSPACE})"
    )
    parser.add_argument("--images", metavar="DIR", help="container images (WORKSPACE/images)")
    flags, rest = parser.parse_known_args(list(words))
    overrides = overrides_of(rest)
    site = composed([*NO_RUN, *overrides], CHECKOUT, os.environ).igrpo.site
    values = cluster_values(site, workspace=flags.workspace, images=flags.images)
    print(cluster_text(flags.name, words, values), end="")
    return DONE


if __name__ == "__main__":
    sys.exit(exit_code(main))
