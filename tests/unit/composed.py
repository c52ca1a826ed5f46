"""Configs and plans that several tests read, made once a process."""

from __future__ import annotations

from functools import cache

from igrpo_nemo.config import Config, load_config
from igrpo_nemo.preflight import Plan, preflight

PLENTY = 2**60
"""Free bytes of a disk that never lacks any."""


@cache
def config_of(*overrides: str) -> Config:
    return load_config(overrides)


@cache
def plan_of(experiment: str) -> Plan:
    """The plan of an experiment as it is shipped, whatever this machine holds."""
    config = config_of(f"experiment={experiment}")
    return preflight(config, environ={}, free=lambda folder: PLENTY)
