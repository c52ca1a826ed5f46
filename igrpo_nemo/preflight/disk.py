"""The disk for what a run writes: checkpoints, and NeMo-RL's dumps of trained rows."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from igrpo_nemo.config import Config
from igrpo_nemo.config.machines import parallel
from igrpo_nemo.preflight.memory import GIB

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
    `parameters` are those that are trained: of adapters nothing else is saved."""
    saving = config.checkpointing
    cluster = config.igrpo.engine == "nemo_rl"
    weight, optimizer = CHECKPOINT_BYTES[parallel(config).backend if cluster else "local"]
    without = cluster and saving.save_optimizer is False
    counts = [] if saving.keep_top_k is None else [saving.keep_top_k + 2]
    counts += [] if steps is None else [-(-steps // saving.save_period)]
    if not saving.enabled or not counts:
        return None
    each = (weight if without else weight + optimizer) * parameters
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
    is being written."""
    run_folder = Path(config.logger.log_dir)
    beside, missing = "", 0
    if space is not None:
        where, held = _existing(space.folder), _held(space.folder)
        missing = space.total - held
        if free(where) < missing:
            usable = free(where) + held
            keep = usable // space.each - 2
            remedy = f"keep_top_k={keep}" if keep >= 1 else "checkpoint_dir to a larger disk"
            # The root stands for a disk that is not mounted on this host.
            here = space.folder.is_dir() or (run_folder.is_dir() and where.parent != where)
            yield (
                f"checkpoints take {_gib(space.total)} ({space.count} of {_gib(space.each)}), and "
                f"{where} has {_gib(free(where))} free: set checkpointing.{remedy}",
                here and usable < min(space.count, 2) * space.each,
            )
            return
        if where.stat().st_dev != _existing(run_folder).stat().st_dev:
            missing = 0
        beside = f" beside {_gib(missing)} of checkpoints" if missing else ""
    where = _existing(run_folder)
    if dumps and free(where) < missing + dumps:
        line = f"dumps of trained rows take about {_gib(dumps)}{beside}, and {where} has "
        line += f"{_gib(free(where))} free: set igrpo.row_dump_period=0, or a longer period"
        yield line, False


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
