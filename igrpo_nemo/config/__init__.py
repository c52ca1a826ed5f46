"""The configuration: NeMo-RL's own keys plus `igrpo.*`, composed from Hydra groups and typed.

    load_config(["experiment=demo", "grpo.max_num_steps=5"]) -> Config    composed, derived, checked
    with_problems(config, num_problems) -> Config    once the data is loaded: derives the schedule
    read_config(run / "config.yaml") -> Config       what a run was started with

To add a key: one line and its docstring in `igrpo_keys` (ours) or `nemo_keys` (NeMo-RL's), and a
value in `configs/config.yaml` where it has no default.
"""

from igrpo_nemo.config.compose import load_config, read_config
from igrpo_nemo.config.derive import RolloutBudget, rollout_steps, with_problems
from igrpo_nemo.config.schema import Config

__all__ = [
    "Config",
    "RolloutBudget",
    "load_config",
    "read_config",
    "rollout_steps",
    "with_problems",
]
