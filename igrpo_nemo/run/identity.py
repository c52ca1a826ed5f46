"""Whether a run that goes on in a folder is the run that the folder holds.

config.yaml there                                   the same but for the keys that may change
problems, weights of the base model -> inputs.json  the same: the config only names their files
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from igrpo_nemo.config import Config
from igrpo_nemo.config.section import at
from igrpo_nemo.errors import UserError
from igrpo_nemo.files.atomic import write_or_refuse
from igrpo_nemo.files.scrub import flat, scrub
from igrpo_nemo.run.folder import stored_config
from igrpo_nemo.types import Problem

INPUTS = "inputs.json"
_ENDS = 1 << 16

FREE_KEYS = (
    "logger.",
    "checkpointing.",
    "cluster.",
    "grpo.max_num_steps",
    "grpo.max_num_epochs",
    "policy.scheduler",
    "policy.megatron_cfg.scheduler.lr_decay_iters",
    "policy.megatron_cfg.scheduler.lr_warmup_iters",
    "policy.megatron_cfg.scheduler.lr_warmup_init",
    "grpo.val_",
    "grpo.max_val_samples",
    "igrpo.val_",
    "igrpo.validation.",
    "igrpo.stall_alarm_s",
    "igrpo.sample_table_period",
    "igrpo.row_dump_period",
    "igrpo.threads",
    "env.math.num_workers",
    "igrpo.site.",
    "igrpo.evaluation.",
    "igrpo.architecture.",
    "igrpo.preflight.",
)
"""Keys that may change between the parts of one run: they do not shape what is learned.

`policy.scheduler` and its lengths in Megatron's keys follow from `grpo.max_num_steps` and from
`igrpo.schedule`, which is not free: a run may be made longer, not be given another schedule.
"""

LENGTH = ("grpo.max_num_steps", "grpo.max_num_epochs")
"""The free keys that say how long a run is: a longer one has other weights."""

BUILT_IN_NAMES = ("policy.model_name", "policy.tokenizer.name")


def check_same_run(run_folder: Path, config: Mapping[str, Any]) -> None:
    """Raises `UserError` where the folder's `config.yaml` is another run's, naming a key.

    A built-in small model gets its name, a folder of its own, only when it is made.
    """
    stored = stored_config(run_folder)
    if not stored:
        return
    from igrpo_nemo.config.schema import without_gone

    free = FREE_KEYS + (BUILT_IN_NAMES if at(config, "igrpo.model") else ())
    before = _settings(without_gone(stored))
    # The stored config is scrubbed: secrets neither compare nor show.
    now = _settings(scrub(without_gone(config)))
    for key in sorted(before.keys() | now.keys()):
        if key.startswith(free):
            continue
        if before.get(key) != now.get(key):
            raise UserError(
                f"{run_folder} holds a run with {key}={before.get(key)!r}, this one has "
                f"{now.get(key)!r}: choose another logger.log_dir, or remove that folder"
            )


def _settings(config: object) -> dict[str, object]:
    """Dotted name -> value; an empty section sets nothing."""
    return {name: value for name, value in flat(config) if value != {}}


def check_same_inputs(
    run_folder: Path, config: Config, problems: Sequence[Problem], validation: Sequence[Problem]
) -> None:
    """Raises `UserError` where the folder's run has had other problems or another base model;
    notes these where it is the first time.

    Validation problems are compared where they are as many as before: `grpo.max_val_samples` may
    change within a run. The built-in small model follows from the config.
    """
    now = {
        "data.train": problems_fingerprint(problems),
        f"data.validation[:{len(validation)}]": problems_fingerprint(validation),
    }
    if config.igrpo.model is None:
        now["policy.model_name"] = weights_fingerprint(Path(config.policy.model_name))
    path = run_folder / INPUTS
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for name, fingerprint in now.items():
        if before.get(name, fingerprint) != fingerprint:
            what = "the weights" if name == "policy.model_name" else "the problems"
            raise UserError(
                f"{run_folder} holds a run of another content of {name}: {what} have changed since "
                "it began; put them back, or choose another logger.log_dir"
            )
    if now.items() - before.items():
        write_or_refuse(path, f"{json.dumps({**before, **now}, indent=2)}\n".encode())


def problems_fingerprint(problems: Sequence[Problem]) -> str:
    digest = hashlib.sha256()
    for problem in problems:
        more = [problem.columns] if problem.columns else []
        digest.update(json.dumps([problem.id, problem.question, problem.answer, *more]).encode())
    return digest.hexdigest()[:16]


def weights_fingerprint(model: Path) -> str:
    """Short hash that tells two sets of weights apart: names, sizes and both ends of each file.

    A Hugging Face name that is no folder stands for itself. Training changes every parameter, so
    the ends suffice, and a 14B model need not be read twice.
    """
    if not model.is_dir():
        return str(model)
    digest = hashlib.sha256()
    files = sorted([*model.glob("*.safetensors"), *model.glob("*.bin"), *model.glob("config.json")])
    for path in files:
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(_ENDS))
            file.seek(max(0, path.stat().st_size - _ENDS))
            digest.update(file.read())
    return digest.hexdigest()[:16]
