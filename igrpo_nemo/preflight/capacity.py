"""What the machines hold: GPU memory, bandwidth and arithmetic, and the disk for checkpoints.

Peaks stand in NVIDIA's data sheets of the A100 and the H100, SXM, dense bf16. Memory is what the
driver offers to PyTorch (`torch.cuda.get_device_properties(0).total_memory`), below the name's.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from igrpo_nemo.config import Config
from igrpo_nemo.config.machines import parallel

GIB = 2**30
GB = 10**9


@dataclass(frozen=True, slots=True)
class GPU:
    """One GPU: bytes, bytes a second, bf16 operations a second."""

    name: str
    memory: int
    bandwidth: float
    bf16_flops: float
    cuda_arch: str


GPUS: dict[str, GPU] = {
    "a100_40gb": GPU("A100-40GB", round(39.5 * GIB), 1555e9, 312e12, "8.0"),
    "a100_80gb": GPU("A100-80GB", round(79.2 * GIB), 2039e9, 312e12, "8.0"),
    "h100_80gb": GPU("H100-80GB", round(79.1 * GIB), 3350e9, 989e12, "9.0"),
}

CUDA_CONTEXT = round(0.6 * GIB)
"""Driver context, kernels and cuBLAS workspaces of a process. An allowance, not a measurement."""
NCCL_BUFFERS = round(1.4 * GIB)
"""Channels of the process groups of one rank: data, tensor, refit. An allowance likewise."""

CHECKPOINT_BYTES = {"megatron": (2, 12), "dtensor": (4, 8), "local": (4, 8)}
"""A parameter in a checkpoint: its weight, and the optimizer's. Megatron-Core saves bf16 weights,
fp32 weights and two moments; the others fp32 weights and two moments."""

FreeSpace = Callable[[Path], int]
"""Bytes that may be written to the file system of a folder that exists."""


def free_space(folder: Path) -> int:
    """What this host says."""
    return shutil.disk_usage(folder).free


@dataclass(frozen=True, slots=True)
class CheckpointSpace:
    """The disk that a run's checkpoints take at most: `count` of `each` bytes in `folder`."""

    folder: Path
    each: int
    count: int

    @property
    def total(self) -> int:
        return self.each * self.count


def checkpoint_space(config: Config, parameters: int, steps: int | None) -> CheckpointSpace | None:
    """The `keep_top_k` best, the newest, and the one that is being written; None where none is.

    NeMo-RL and the embedded engine remove what is left over once a checkpoint is whole.
    """
    saving = config.checkpointing
    if not saving.enabled:
        return None
    cluster = config.igrpo.engine == "nemo_rl"
    weight, optimizer = CHECKPOINT_BYTES[parallel(config).backend if cluster else "local"]
    without = cluster and saving.save_optimizer is False
    each = (weight if without else weight + optimizer) * parameters
    counts = [] if saving.keep_top_k is None else [saving.keep_top_k + 2]
    counts += [] if steps is None else [-(-steps // saving.save_period)]
    if not counts:
        return None
    return CheckpointSpace(Path(saving.checkpoint_dir), each, min(counts))


def disk_shortage(space: CheckpointSpace, run_folder: Path, free: FreeSpace) -> tuple[str, bool]:
    """What the disk of the checkpoint folder lacks on this host, in a line that ends with what to
    set (empty where it lacks nothing), and whether the run cannot go on: its own folder is here,
    and the newest checkpoint does not fit beside the one that is being written.
    """
    here = [folder for folder in (space.folder, run_folder) if folder.is_dir()]
    above = [folder for folder in space.folder.absolute().parents if folder.is_dir()]
    where = [*here, *above][0]
    room = free(where)
    usable = room + (_held(space.folder) if here else 0)
    if usable >= space.total:
        return "", False
    keep = usable // space.each - 2
    remedy = f"keep_top_k={keep}" if keep >= 1 else "checkpoint_dir to a larger disk"
    line = (
        f"checkpoints take {space.total / GIB:,.1f} GiB ({space.count} of {space.each / GIB:,.1f} "
        f"GiB), and {where} has {room / GIB:,.1f} GiB free: set checkpointing.{remedy}"
    )
    return line, bool(here) and usable < min(space.count, 2) * space.each


def _held(folder: Path) -> int:
    """Bytes of the files below a folder that a run may be clearing up meanwhile."""
    total = 0
    for file in folder.rglob("*"):
        with suppress(OSError):
            total += file.lstat().st_size
    return total
