"""NeMo-RL's own setup, policy and generation on every experiment's config, without machines.

The engine `nemo_rl_local` replaces NeMo-RL's `Policy`, `VllmGeneration`, cluster and workers, and
with them what those check of the config before a GPU is touched. Here they are called themselves:
`setup()` with its assertions, `Policy.__init__` and `save_checkpoint`, `VllmGeneration.__init__`,
`CheckpointManager`, Megatron's validation. Ray, its workers and Megatron's packages are pretended.
"""

from __future__ import annotations

import contextlib
from functools import cache
from unittest import mock

import pytest
import ray
from nemo_runs import as_nemo_rl_takes_it
from test_experiment_schema import WITHOUT_ANNOTATION, live

from igrpo_nemo.config import load_config, with_problems
from igrpo_nemo.config.checks import check_launch, launch_problems
from igrpo_nemo.config.compose import builtin_config_dir, config_groups
from igrpo_nemo.config.nemo_schema import keys_beyond
from igrpo_nemo.nemo.master_config import without_flash_attention
from igrpo_nemo.nemo.versions import entries
from igrpo_nemo.run.problems import expected_problems

GROUPS = config_groups([builtin_config_dir()])
MODELS = [name for name in GROUPS["model"] if name not in ("demo", "hf")]
CLUSTERS = [name for name in GROUPS["cluster"] if name != "laptop"]
ONE_GPU = ("engine=nemo_rl", "model=qwen2.5_1.5b", "data=gsm8k", "cluster=one_gpu")
V1 = ("policy.dtensor_cfg._v2=false", "checkpointing.model_save_format=null")
EMBEDDED = ("demo", "demo_grpo", "laptop")
"""Experiments of the embedded engine."""
CASES = {
    **{name: (f"experiment={name}",) for name in GROUPS["experiment"] if name not in EMBEDDED},
    **{
        name: (
            "engine=nemo_rl",
            f"cluster={'a100_5x8' if '14b' in name else 'a100_2x8'}",
            f"model={name}",
        )
        for name in MODELS
    },
    **{
        name: ("engine=nemo_rl", f"cluster={name}", "model=openmath_nemotron_7b")
        for name in CLUSTERS
    },
    "dtensor_v1": (
        "experiment=table1_openmath_nemotron_7b_igrpo",
        "model=openmath_nemotron_7b_dtensor",
        *V1,
    ),
    "one_gpu_1.5b": (*ONE_GPU,),
    "one_gpu_v1": (*ONE_GPU, "policy.dtensor_cfg._v2=false"),
    "one_gpu_adapters": (*ONE_GPU, "lora=dtensor"),
    "megatrons_adapters": (*ONE_GPU[:3], "cluster=a100_1x8", "lora=megatron"),
    "no_cluster": ("engine=nemo_rl", "policy.model_name=/models/small"),
    "no_cluster_dtensor": ("engine=nemo_rl", "model=openmath_nemotron_7b_dtensor"),
}


OURS = {
    "policy.megatron_cfg.scheduler.override_opt_param_scheduler",
    "policy.dtensor_cfg.automodel_kwargs.attn_implementation",
}
"""Keys without annotation that are set for Megatron-Bridge and for Automodel, which read them."""


@cache
def composed(case):
    config = load_config([*CASES[case]])
    config = with_problems(config, expected_problems(config) or 7_500)
    check_launch(config)
    return config


class Workers:
    """In the place of `RayWorkerGroup`: notes what its workers are asked."""

    def __init__(self, cluster, builder, *, bundle_indices_list=None, sharding_annotations, **_):
        self.cluster = cluster
        self.builder = builder
        self.sharding_annotations = sharding_annotations
        self.dp_size = sharding_annotations.get_axis_size("data_parallel")
        self.workers = [None] * cluster.world_size()
        self.asked = []

    def run_all_workers_single_data(self, method, **arguments):
        self.asked.append((method, arguments))
        return []

    def run_all_workers_multiple_data(self, method, **arguments):
        return self.run_all_workers_single_data(method, **arguments)

    def shutdown(self, **_):
        return True

    def get_dp_leader_worker_idx(self, _):
        return 0


class Tokenizer:
    pad_token_id, eos_token_id = 0, 1


class Problems(list):
    """In the place of a data set: as many rows as are read."""


@contextlib.contextmanager
def without_machines():
    """NeMo-RL's classes with pretended Ray workers under them."""
    from nemo_rl.distributed.virtual_cluster import RayVirtualCluster
    from nemo_rl.models.generation.vllm import vllm_generation
    from nemo_rl.models.policy import lm_policy

    def refuse(*_):
        raise ValueError("no model is loaded here")

    with contextlib.ExitStack() as stack:
        for module in (lm_policy, vllm_generation):
            stack.enter_context(mock.patch.object(module, "RayWorkerGroup", Workers))
            stack.enter_context(mock.patch.object(module, "RayWorkerBuilder"))
        stack.enter_context(mock.patch.object(lm_policy, "RayQueue"))
        stack.enter_context(mock.patch.object(lm_policy, "get_default_hf_config", refuse))
        stack.enter_context(mock.patch.object(ray, "get", lambda found: found))
        bundles = "_get_tied_worker_bundle_indices"
        stack.enter_context(mock.patch.object(vllm_generation.VllmGeneration, bundles))
        report = vllm_generation.VllmGeneration
        stack.enter_context(mock.patch.object(report, "_report_dp_openai_server_base_urls"))
        stack.enter_context(mock.patch.object(report, "_report_device_id"))
        stack.enter_context(mock.patch.object(report, "prepare_refit_info"))
        stack.enter_context(mock.patch.object(RayVirtualCluster, "_init_placement_groups"))
        address = "get_master_address_and_port"
        stack.enter_context(mock.patch.object(RayVirtualCluster, address, lambda _: ("x", 1)))
        stack.enter_context(mock.patch.object(RayVirtualCluster, "shutdown"))
        stack.enter_context(mock.patch.object(lm_policy.Policy, "print_node_ip_and_gpu_id"))
        stack.enter_context(mock.patch.object(lm_policy.Policy, "prepare_refit_info"))
        yield


def made(case, folder, monkeypatch):
    """The real `setup()` of a case, as the launcher calls it."""
    from nemo_rl.algorithms import grpo
    from nemo_rl.models.generation import configure_generation_config

    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0")
    # `setup()` sets it for `force_on_policy_ratio`.
    monkeypatch.setenv("NRL_IGNORE_TP_ACCURACY_CHECK", "")
    config = without_flash_attention(composed(case))  # this machine has none
    config = config.replaced("logger", log_dir=str(folder), monitor_gpus=False)
    config = config.replaced("logger", tensorboard_enabled=False)
    config = config.replaced("checkpointing", checkpoint_dir=str(folder / "checkpoints"))
    config = config.replaced("data", num_workers=0)
    master = as_nemo_rl_takes_it(config, folder)
    master.policy["generation"] = configure_generation_config(
        master.policy["generation"],
        Tokenizer(),  # type: ignore[arg-type]
        has_refit_draft_weights=bool(master.policy["draft"]["enabled"]),
        trains_mtp=bool((master.policy.get("megatron_cfg") or {}).get("mtp_num_layers")),
    )
    problems = Problems(range(expected_problems(composed(case)) or 7_500))
    with mock.patch.object(grpo, "set_seed"):
        return grpo.setup(master, Tokenizer(), problems, problems[:500])  # type: ignore[arg-type]


@pytest.mark.either_tree
@pytest.mark.parametrize("case", CASES)
def test_a_config_is_what_nemo_rl_takes(case, tmp_path, monkeypatch):
    """No key that it would let through unread, with and without FlashAttention; rows, schedule,
    adapters and backend are what they say."""
    monkeypatch.setattr("igrpo_nemo.nemo.master_config.has_flash_attention", lambda _: False)
    config = composed(case)
    assert launch_problems(without_flash_attention(config)) == []
    for each in (without_flash_attention(config), config):
        master = as_nemo_rl_takes_it(each, tmp_path)
        given = {k: v for k, v in master.model_dump().items() if k not in ("igrpo", "env")}
        known = frozenset({*live()["annotated"], *live()["open"]})
        extra = set(keys_beyond(given, known, own_sections=()))
        assert extra <= set(WITHOUT_ANNOTATION) | OURS
    low_rank = {"dtensor_cfg": "lora_cfg", "megatron_cfg": "peft"}
    adapters = tuple(
        master.policy[backend].get(name, {}).get("enabled", False)
        for backend, name in low_rank.items()
    )
    assert adapters == (case == "one_gpu_adapters", case == "megatrons_adapters")
    grpo = entries(master.grpo)
    rows = grpo["num_prompts_per_step"] * grpo["num_generations_per_prompt"]
    assert rows == config.igrpo.updates_per_rollout * master.policy["train_global_batch_size"]
    megatron = master.policy["megatron_cfg"]
    assert megatron["enabled"] is not master.policy["dtensor_cfg"]["enabled"]
    alone = case.startswith("one_gpu")
    assert megatron["enabled"] is not (alone or "dtensor" in case)
    if case in CLUSTERS:
        assert master.cluster["gpus_per_node"] == (1 if alone else 8)
    if megatron["enabled"]:
        scheduler = megatron["scheduler"]
        assert scheduler["override_opt_param_scheduler"] is True
        assert 0 < scheduler["lr_warmup_init"] < megatron["optimizer"]["lr"]
        assert 0 < scheduler["lr_warmup_iters"] < scheduler["lr_decay_iters"]


@pytest.mark.either_tree
@pytest.mark.parametrize("case", [case for case in CASES if case not in CLUSTERS])
def test_nemo_rl_sets_up_and_saves(case, tmp_path, monkeypatch):
    with without_machines():
        parts = made(case, tmp_path, monkeypatch)
        policy, generation, checkpointer, master = parts[0], parts[1], parts[8], parts[10]
        config = composed(case)
        from igrpo_nemo.config.machines import machines, replicas

        assert policy.data_parallel_size == replicas(config)
        assert policy.worker_group.cluster.world_size() == machines(config).training
        assert generation.worker_group.cluster.world_size() == machines(config).generation
        folder = checkpointer.init_tmp_checkpoint(1, {"val:accuracy": 0.5}, master)
        policy.worker_group.asked.clear()
        policy.save_checkpoint(
            weights_path=f"{folder}/policy/weights",
            optimizer_path=f"{folder}/policy/optimizer" if checkpointer.save_optimizer else None,
            tokenizer_path=f"{folder}/policy/tokenizer",
            checkpointing_cfg=master.checkpointing,
        )
        [(method, arguments)] = policy.worker_group.asked
        assert method == "save_checkpoint"
        assert arguments["optimizer_path"] is not None
        if "checkpointing_cfg" in arguments:
            # Automodel's checkpointer takes a name of its own formats, and never null.
            assert arguments["checkpointing_cfg"]["model_save_format"] == "safetensors"
            assert arguments["checkpointing_cfg"]["save_consolidated"] is True
        checkpointer.finalize_checkpoint(folder)
        assert checkpointer.get_best_checkpoint_path() == str(tmp_path / "checkpoints" / "step_1")
