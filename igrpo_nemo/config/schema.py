"""The root of the typed config tree."""

from __future__ import annotations

from typing import Any

import yaml

from igrpo_nemo.config import nemo_keys as nemo
from igrpo_nemo.config.igrpo_keys import IGRPO
from igrpo_nemo.config.section import Section
from igrpo_nemo.feedback import FEEDBACKS, Feedback


class Config(Section):
    """A resolved run: NeMo-RL's sections and `igrpo`. Frozen; `derive` returns changed copies."""

    igrpo: IGRPO
    """The two stages."""
    grpo: nemo.GRPO
    """The loop."""
    loss_fn: nemo.Loss
    """The objective."""
    policy: nemo.Policy
    """Model, optimizer, sampling."""
    data: nemo.Data
    """The problems."""
    env: nemo.Env
    """Environments."""
    checkpointing: nemo.Checkpointing
    """Checkpoints."""
    logger: nemo.Logger
    """Run folder and loggers."""
    cluster: nemo.Cluster
    """Machines."""

    data_plane: nemo.Only[nemo.Open] = None
    """NeMo-RL's transfer queue."""
    on_policy_distillation: nemo.Only[nemo.Open] = None
    """NeMo-RL's on-policy distillation."""

    @property
    def feedback(self) -> Feedback:
        """`igrpo.feedback` with its options: what Stage 2 sees, which rows are trained."""
        return FEEDBACKS[self.igrpo.feedback].of(self.igrpo, self.grpo.seed)

    def to_dict(self) -> dict[str, Any]:
        """Plain values under NeMo-RL's keys and `igrpo`; optional keys nobody set are absent."""
        return self.model_dump()

    def to_yaml(self) -> str:
        """The same as YAML, which `read_config` takes back."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True, width=100)

    def replaced(self, section: str, **values: Any) -> Config:
        """A copy with other values in a section (a dotted path); the values are not checked."""
        return _replaced(self, section.split("."), values)


def _replaced(node: Any, path: list[str], values: dict[str, Any]) -> Any:
    if not path:
        return node.model_copy(update=values)
    child = _replaced(getattr(node, path[0]), path[1:], values)
    return node.model_copy(update={path[0]: child})
