"""The snapshot of NeMo-RL's key names is current, and finds what NeMo-RL lets through."""

from __future__ import annotations

import importlib
import json
from functools import cache

import nemo_schema
import pytest
from nemo_runs import as_nemo_rl_takes_it

from igrpo_nemo.config import load_config, with_problems
from igrpo_nemo.config.nemo_schema import FILE, keys_beyond
from igrpo_nemo.config.nemo_schema import nemo_schema as snapshot
from igrpo_nemo.nemo.names import RELEASE

WITHOUT_ANNOTATION = {
    "policy.offload_optimizer_for_logprob": "megatron/setup.py",
    "policy.megatron_cfg.moe_router_dtype": "megatron/setup.py",
    "policy.megatron_cfg.moe_router_load_balancing_type": "megatron/setup.py",
    "policy.megatron_cfg.moe_router_bias_update_rate": "megatron/setup.py",
    "policy.megatron_cfg.moe_permute_fusion": "megatron/setup.py",
    "policy.generation.vllm_cfg.enable_prefix_caching": "generation/vllm/vllm_worker.py",
}
"""Keys that NeMo-RL's types leave out but its code needs, and where it reads them."""


@cache
def live() -> dict[str, list[str]]:
    return nemo_schema.schema()


def test_the_snapshot_of_key_names_is_current():
    """`python tests/nemo/nemo_schema.py` writes it again; test_names.py compares it with main."""
    if importlib.import_module("nemo_rl.package_info").VERSION[:2] != RELEASE:
        pytest.skip("the snapshot is NeMo-RL 0.7.0's")
    written = json.loads(FILE.read_text(encoding="utf-8"))
    assert {kind: written[kind] for kind in live()} == live()


def test_the_walk_finds_keys_at_every_depth():
    annotated, opened = set(live()["annotated"]), set(live()["open"])
    assert {
        "grpo.num_prompts_per_step",
        "loss_fn.ratio_clip_min",
        "policy.megatron_cfg.optimizer.adam_beta1",
        "policy.generation.vllm_cfg.async_engine",
        "policy.generation.colocated.resources.num_nodes",
        "data.train.dataset_name",
        "logger.wandb.project",
    } <= annotated
    assert {"policy.generation.vllm_kwargs", "policy.optimizer.kwargs"} <= opened
    assert not any(key.startswith("igrpo") for key in annotated)


@pytest.mark.parametrize("key", WITHOUT_ANNOTATION)
def test_a_key_without_annotation_is_read_by_nemo_rl(key):
    import nemo_rl

    assert key in snapshot().used
    [folder] = nemo_rl.__path__
    with open(f"{folder}/models/{WITHOUT_ANNOTATION[key]}", encoding="utf-8") as file:
        assert f'"{key.rpartition(".")[2]}"' in file.read()


def test_megatrons_scheduler_config_is_made_from_the_whole_section():
    import nemo_rl

    [folder] = nemo_rl.__path__
    with open(f"{folder}/models/megatron/setup.py", encoding="utf-8") as file:
        assert 'SchedulerConfig(**config["megatron_cfg"]["scheduler"])' in file.read()


def test_a_key_that_nemo_rl_lets_through_is_found(tmp_path):
    """`MasterConfig` keeps unknown keys; the walk does not."""
    config = with_problems(load_config(["experiment=table3_judge"]), 7_500)
    megatron = {**(config.policy.megatron_cfg or {}), "tensor_parallel": 2}
    master = as_nemo_rl_takes_it(config.replaced("policy", megatron_cfg=megatron), tmp_path)
    known = snapshot().annotated | snapshot().open
    extra = keys_beyond({"policy": master.policy}, known)
    assert "policy.megatron_cfg.tensor_parallel" in extra
