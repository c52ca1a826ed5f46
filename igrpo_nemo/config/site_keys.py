"""`igrpo.site`: machines and account of a run; nothing of it shapes what is learned."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from igrpo_nemo.config.section import NonNegative, Positive, Section, Text

SECRET_NAMES = re.compile(
    r"TOKEN(?!S|IZ)|SECRET|PASSWORD|CREDENTIAL|(^|_)KEY($|_)|API_?KEY", re.IGNORECASE
)
"""Environment variables with such a name are handed on by the shell, never by a config."""

TimeLimit = Annotated[
    str, Field(pattern=r"^(\d+-)?\d{1,2}:\d{2}:\d{2}$", description="HH:MM:SS or D-HH:MM:SS")
]
Mount = Annotated[str, Field(pattern=r"^[^:,\s]+:[^:,\s]+(:(ro|rw))?$")]
"""SOURCE:DESTINATION, or SOURCE:DESTINATION:ro."""
SbatchOption = Annotated[str, Field(pattern=r"^-[^\n\r]*$")]
VariableName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]


def _without_secrets(variables: dict[str, str]) -> dict[str, str]:
    for name in variables:
        if SECRET_NAMES.search(name):
            raise ValueError(
                f"names {name}, which looks like a secret: export it in the shell, it is handed on"
            )
    return variables


def time_in_seconds(text: str) -> int:
    """Seconds of a time limit in the form HH:MM:SS or D-HH:MM:SS."""
    days, _, clock = text.rpartition("-")
    hours, minutes, seconds = (int(part) for part in clock.split(":"))
    return 86400 * int(days or 0) + 3600 * hours + 60 * minutes + seconds


class Site(Section):
    """`igrpo.site`: read by `igrpo launch`, `igrpo preflight` and the pipelines."""

    gpu: Literal["cpu", "a100_40gb", "a100_80gb", "h100_80gb"] = "cpu"
    """The kind of GPU, for memory and speed estimates and TORCH_CUDA_ARCH_LIST."""
    account: Text | None = None
    """Slurm account."""
    partition: Text | None = None
    """Slurm partition."""
    qos: Text | None = None
    """Slurm quality of service."""
    constraint: Text | None = None
    """Slurm node features."""
    reservation: Text | None = None
    """Slurm reservation."""
    time: TimeLimit | None = None
    """Time limit of a job, HH:MM:SS or D-HH:MM:SS; null is the script's own."""
    save_margin_s: Positive = 900
    """Seconds before the time limit at which a run saves and stops."""
    cpus_per_node: Positive | None = None
    """CPU cores of a node; null detects them."""
    container: Text | None = None
    """Container image for pyxis; null runs on bare metal."""
    mounts: list[Mount] = []
    """Container mounts, SOURCE:DESTINATION[:ro]."""
    venv: Text | None = None
    """Virtual environment for bare metal; null is the checkout's .venv."""
    hf_home: Text | None = None
    """Hugging Face's folder of models and data sets (HF_HOME)."""
    offline: bool = True
    """Compute nodes do not ask the hub (HF_HUB_OFFLINE, TRANSFORMERS_OFFLINE, WANDB_MODE)."""
    env: Annotated[dict[VariableName, str], AfterValidator(_without_secrets)] = {}
    """Further environment variables, such as NCCL_SOCKET_IFNAME; no secrets."""
    max_restarts: NonNegative = 50
    """A job that was requeued this often is not requeued again."""
    sbatch: list[SbatchOption] = []
    """Further options of sbatch, which win over all others, such as `--gres=gpu:8`."""
