"""DTensor's packed rows need FlashAttention 2; without it, batches of rows of like length.

NeMo-RL's containers have it in the workers' environments. Elsewhere NeMo-RL would end while it
loads the model.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from igrpo_nemo.config import Config
from igrpo_nemo.nemo.processes import ONE_PYTHON

WORKERS = "nemo_rl.models.policy.workers"
"""Where NeMo-RL's DTensor workers are; each has an environment of its class's full name."""

ROUND = 64
"""Tokens to a multiple of which dynamic batching pads, as in NeMo-RL's example."""


def without_flash_attention(config: Config) -> Config:
    """The config as this machine can run it, and a line about what differs.

    Sequence packing becomes dynamic batching with as many tokens a micro-batch; DTensor v2, which
    asks for FlashAttention even without packing, gets PyTorch's attention.
    """
    dtensor = config.policy.dtensor
    if config.igrpo.engine != "nemo_rl" or not dtensor.get("enabled"):
        return config
    if has_flash_attention(v2 := bool(dtensor.get("_v2"))):
        return config
    changes = {}
    packing = config.policy.sequence_packing
    if v2 and not (dtensor.get("automodel_kwargs") or {}).get("attn_implementation"):
        kwargs = {**(dtensor.get("automodel_kwargs") or {}), "attn_implementation": "sdpa"}
        changes["dtensor_cfg"] = {**dtensor, "automodel_kwargs": kwargs}
    if packing.enabled:
        print(
            "flash-attn is not installed where DTensor trains: sequence packing is off, "
            f"dynamic batching of {packing.train_mb_tokens} tokens in its place"
        )
        changes["sequence_packing"] = packing.model_copy(update={"enabled": False})
        changes["dynamic_batching"] = {
            "enabled": True,
            "train_mb_tokens": packing.train_mb_tokens,
            "logprob_mb_tokens": packing.logprob_mb_tokens or packing.train_mb_tokens,
            "sequence_length_round": ROUND,
        }
    return config.replaced("policy", **changes) if changes else config


def has_flash_attention(v2: bool) -> bool:
    """Whether the Python of DTensor's worker has it. An environment that is yet to be made will."""
    if os.environ.get(ONE_PYTHON) == "1":
        return importlib.util.find_spec("flash_attn") is not None
    module, name = "dtensor_policy_worker", "DTensorPolicyWorker"
    worker = f"{WORKERS}.{module}_v2.{name}V2" if v2 else f"{WORKERS}.{module}.{name}"
    nemo_rl = importlib.util.find_spec("nemo_rl")
    beside = Path(nemo_rl.origin or "").parents[1] / "venvs" if nemo_rl else Path("venvs")
    environment = Path(os.environ.get("NEMO_RL_VENV_DIR", beside)) / worker
    return not environment.is_dir() or any(environment.glob("lib/python*/*/flash_attn"))
