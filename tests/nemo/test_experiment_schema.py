"""The paper's experiments under NeMo-RL's own types; the snapshot of its key names is current."""

from __future__ import annotations

import json
from functools import cache

import nemo_schema
import pytest

from igrpo_nemo.config import load_config, with_problems
from igrpo_nemo.config.compose import builtin_config_dir, config_groups
from igrpo_nemo.config.launch_checks import check_launch
from igrpo_nemo.config.nemo_schema import FILE, keys_beyond
from igrpo_nemo.config.nemo_schema import nemo_schema as snapshot
from igrpo_nemo.nemo.master_config import master_config
from igrpo_nemo.run.problems import expected_problems

GROUPS = config_groups([builtin_config_dir()])
EXPERIMENTS = [name for name in GROUPS["experiment"] if not name.startswith("demo")]
MODELS = [name for name in GROUPS["model"] if name not in ("demo", "hf")]

WITHOUT_ANNOTATION = {
    "policy.offload_optimizer_for_logprob": "megatron/setup.py",
    "policy.megatron_cfg.moe_router_dtype": "megatron/setup.py",
    "policy.megatron_cfg.moe_router_load_balancing_type": "megatron/setup.py",
    "policy.megatron_cfg.moe_router_bias_update_rate": "megatron/setup.py",
    "policy.megatron_cfg.moe_permute_fusion": "megatron/setup.py",
    "policy.generation.vllm_cfg.enable_prefix_caching": "generation/vllm/vllm_worker.py",
}
"""Keys that NeMo-RL's types leave out but its code needs, and where it reads them."""

MEGATRONS = {"policy.megatron_cfg.scheduler.override_opt_param_scheduler"}
"""Keys of Megatron's own scheduler config, which is made from NeMo-RL's section as a whole."""


@cache
def live() -> dict[str, list[str]]:
    return nemo_schema.schema()


def test_the_snapshot_of_key_names_is_current():
    """`python tests/nemo/nemo_schema.py` writes it again."""
    assert json.loads(FILE.read_text(encoding="utf-8")) == live()


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


def _master(config, tmp_path):
    """What NeMo-RL is given for a config, through its own types."""
    return master_config(
        config,
        train_path=tmp_path / "train.jsonl",
        validation_path=tmp_path / "validation.jsonl",
        num_validation=500,
    )


def _check(overrides, tmp_path):
    config = load_config(overrides)
    problems = expected_problems(config)
    assert problems is not None
    config = with_problems(config, problems)
    check_launch(config)
    master = _master(config, tmp_path)
    known = snapshot().annotated | snapshot().open
    given = master.model_dump()
    for section in ("igrpo", "env"):
        del given[section]
    extra = set(keys_beyond(given, known, own_sections=()))
    assert extra <= set(WITHOUT_ANNOTATION) | MEGATRONS
    return config, master


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_an_experiment_is_what_nemo_rl_takes(experiment, tmp_path):
    config, master = _check([f"experiment={experiment}"], tmp_path)
    scheduler = master.policy["megatron_cfg"]["scheduler"]
    assert scheduler["override_opt_param_scheduler"] is True
    assert 0 < scheduler["lr_warmup_init"] < master.policy["megatron_cfg"]["optimizer"]["lr"]
    assert 0 < scheduler["lr_warmup_iters"] < scheduler["lr_decay_iters"]
    rows = master.grpo["num_prompts_per_step"] * master.grpo["num_generations_per_prompt"]
    assert rows % master.policy["train_global_batch_size"] == 0
    assert rows // master.policy["train_global_batch_size"] == config.igrpo.updates_per_rollout
    assert master.data["train"]["dataset_name"] == "igrpo_nemo.nemo.data.ProblemDataset"


@pytest.mark.parametrize("model", MODELS)
def test_a_model_is_what_nemo_rl_takes(model, tmp_path):
    nodes = "a100_5x8" if "14b" in model else "a100_2x8"
    _, master = _check(["engine=nemo_rl", f"cluster={nodes}", f"model={model}"], tmp_path)
    dtensor = master.policy["dtensor_cfg"]["enabled"]
    assert dtensor is model.endswith("_dtensor")
    assert master.policy["megatron_cfg"]["enabled"] is not dtensor


@pytest.mark.parametrize("cluster", [name for name in GROUPS["cluster"] if name != "laptop"])
def test_a_cluster_is_what_nemo_rl_takes(cluster, tmp_path):
    model = "model=openmath_nemotron_7b"
    _, master = _check(["engine=nemo_rl", f"cluster={cluster}", model], tmp_path)
    assert master.cluster["gpus_per_node"] == 8


def test_a_key_that_nemo_rl_lets_through_is_found(tmp_path):
    """`MasterConfig` keeps unknown keys; the walk does not."""
    config = with_problems(load_config(["experiment=table3_judge"]), 7_500)
    megatron = {**(config.policy.megatron_cfg or {}), "tensor_parallel": 2}
    master = _master(config.replaced("policy", megatron_cfg=megatron), tmp_path)
    known = snapshot().annotated | snapshot().open
    extra = keys_beyond({"policy": master.policy}, known)
    assert "policy.megatron_cfg.tensor_parallel" in extra
