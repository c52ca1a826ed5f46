"""Configs and plans that several tests read, made once a process.

Hydra takes a third of a second for a config. Here it composes the groups of a command line once;
its keys are laid over a copy of that, as Hydra would, and what follows is the project's own code.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cache

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from igrpo_nemo.config import Config
from igrpo_nemo.config.compose import RESOLVERS, builtin_config_dir, config_groups, finished
from igrpo_nemo.preflight import Plan, preflight

CONFIGS = builtin_config_dir()
GROUPS = config_groups([CONFIGS])
PLENTY = 2**60
"""Free bytes of a disk that never lacks any."""


@cache
def _composed(*groups: str) -> DictConfig:
    """The groups with their interpolations, which keys still reach."""
    for name, resolver in RESOLVERS.items():
        OmegaConf.register_new_resolver(name, resolver, replace=True)
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose("config", overrides=[*groups])
    OmegaConf.set_struct(config, False)
    return config


def made(*overrides: str) -> Config:
    """What `load_config` makes of these overrides; raises `UserError` as it does."""
    groups = [word for word in overrides if word.partition("=")[0] in GROUPS]
    base = _composed(*groups)
    config = copy.deepcopy(base)
    keys = [word for word in overrides if word not in groups]
    for override in OverridesParser.create().parse_overrides([*keys]):
        OmegaConf.update(config, override.key_or_group, override.value(), force_add=True)
    values = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    assert isinstance(values, dict)
    plain = {str(key): value for key, value in values.items()}
    return finished(plain, GROUPS, lambda path: OmegaConf.select(base, path))


config_of = cache(made)


def load_config(overrides: Sequence[str]) -> Config:
    """In the place of `igrpo_nemo.config.load_config`, for what is not about Hydra's own part."""
    return made(*overrides)


@cache
def plan_of(experiment: str) -> Plan:
    """The plan of an experiment as it is shipped, whatever this machine holds."""
    config = config_of(f"experiment={experiment}")
    return preflight(config, environ={}, free=lambda folder: PLENTY)
