"""What the machines hold: memory, bandwidth and arithmetic of a GPU, and the disk for what a run
writes: checkpoints, and NeMo-RL's dumps of trained rows."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import yaml

from igrpo_nemo.config import Config
from igrpo_nemo.config.machines import parallel

GIB = 2**30
GB = 10**9


@dataclass(frozen=True, slots=True)
class GPU:
    """One GPU: bytes, bytes a second, bf16 operations a second; `gpus.yaml` has the figures."""

    name: str
    memory: int
    bandwidth: float
    bf16_flops: float
    scheduled: Sequence[int]


GPUS: dict[str, GPU] = {
    kind: GPU(**{**facts, "memory": round(facts["memory"] * GIB)})
    for kind, facts in yaml.safe_load(Path(__file__).with_name("gpus.yaml").read_text()).items()
}
"""By the values of `igrpo.site.gpu`."""

CUDA_CONTEXT = round(0.6 * GIB)
"""Driver context, kernels and cuBLAS workspaces of a process. An allowance, not a measurement."""
NCCL_BUFFERS = round(1.4 * GIB)
"""Channels of the process groups of one rank: data, tensor, refit. An allowance likewise."""

CHECKPOINT_BYTES = {"megatron": (2, 12), "dtensor": (4, 8), "local": (4, 8)}
"""A parameter in a checkpoint: its weight, and the optimizer's. Megatron-Core saves bf16 weights,
fp32 weights and two moments; the others fp32 weights and two moments."""

DUMPED_PLACE, DUMPED_TOKEN = 25, 55
"""Bytes of a dumped row as JSON text: each place up to the longest row has an id, two masks and
three numbers; those of a completion are written out (two log-probs, an advantage, its text)."""

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
    `parameters` are those that are trained: of adapters nothing else is saved.

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


def dumped_bytes(config: Config, mean_completion: float, steps: int | None) -> int:
    """About what `igrpo.row_dump_period` writes to the run folder; 0 where nothing is dumped."""
    period = config.igrpo.row_dump_period
    if not period or steps is None or config.igrpo.engine == "local":
        return 0
    rows = config.grpo.num_prompts_per_step * config.grpo.num_generations_per_prompt
    padded = DUMPED_PLACE * config.policy.max_total_sequence_length
    return round(steps // period * rows * (padded + DUMPED_TOKEN * mean_completion))


def disk_shortages(
    config: Config, space: CheckpointSpace | None, dumps: int, free: FreeSpace
) -> Iterator[tuple[str, bool]]:
    """What the disks lack on this host, each in a line that ends with what to set, and whether the
    run cannot go on: it is here already, and the newest checkpoint does not fit beside the one that
    is being written.
    """
    run_folder = Path(config.logger.log_dir)
    taken = 0
    if space is not None:
        where = _existing(space.folder)
        room = free(where)
        usable = room + _held(space.folder)
        if usable < space.total:
            keep = usable // space.each - 2
            remedy = f"keep_top_k={keep}" if keep >= 1 else "checkpoint_dir to a larger disk"
            line = (
                f"checkpoints take {_gib(space.total)} ({space.count} of {_gib(space.each)}), and "
                f"{where} has {_gib(room)} free: set checkpointing.{remedy}"
            )
            # The root stands for a disk that is not mounted on this host.
            here = space.folder.is_dir() or (run_folder.is_dir() and where.parent != where)
            yield line, here and usable < min(space.count, 2) * space.each
            return
        same = where.stat().st_dev == _existing(run_folder).stat().st_dev
        taken = space.total - _held(space.folder) if same else 0
    where = _existing(run_folder)
    if dumps and (room := free(where)) < taken + dumps:
        beside = f" beside {_gib(taken)} of checkpoints" if taken else ""
        yield (
            (
                f"dumps of trained rows take about {_gib(dumps)}{beside}, and {where} has "
                f"{_gib(room)} free: set igrpo.row_dump_period=0, or a longer period"
            ),
            False,
        )


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return next(each for each in (folder, *folder.absolute().parents) if each.is_dir())


def _held(folder: Path) -> int:
    """Bytes of the files below a folder that a run may be clearing up meanwhile."""
    total = 0
    for file in folder.rglob("*"):
        with suppress(OSError):
            total += file.lstat().st_size
    return total


def _gib(count: int) -> str:
    return f"{count / GIB:,.1f} GiB"
