"""One GPU on NeMo-RL: its own MasterConfig, with and without FlashAttention, with adapters."""

from __future__ import annotations

import pytest
from nemo_runs import as_nemo_rl_takes_it

from igrpo_nemo.config import load_config, with_problems
from igrpo_nemo.config.checks import launch_problems
from igrpo_nemo.config.nemo_schema import keys_beyond
from igrpo_nemo.config.nemo_schema import nemo_schema as snapshot
from igrpo_nemo.nemo.master_config import WORKERS, has_flash_attention, without_flash_attention

SMALL = ["engine=nemo_rl", "model=qwen2.5_1.5b", "data=gsm8k", "cluster=one_gpu"]
V1 = "policy.dtensor_cfg._v2=false"
OURS = {
    "policy.megatron_cfg.scheduler.override_opt_param_scheduler",
    "policy.dtensor_cfg.automodel_kwargs.attn_implementation",
}
"""Keys without annotation that are set for Megatron-Bridge and for Automodel, which read them."""
MEGATRON = ["model=qwen2.5_1.5b", "data=gsm8k", "engine=nemo_rl", "cluster=a100_1x8"]


def config_of(*overrides: str):
    return with_problems(load_config([*overrides]), 7473)


@pytest.mark.parametrize(
    "words",
    [
        [*SMALL],
        [*SMALL, V1],
        [*SMALL[:3], "cluster=one_gpu_48gb"],
        [*SMALL[:3], "cluster=one_gpu_24gb"],
        [*SMALL, "lora=dtensor"],
        [*MEGATRON, "lora=megatron"],
    ],
    ids=["v2", "v1", "48gb", "24gb", "adapters", "megatrons adapters"],
)
def test_nemo_rl_takes_the_config_of_a_machine_without_flash_attention(
    words, tmp_path, monkeypatch
):
    """With it the config is left as it is, which test_real_setup.py has."""
    monkeypatch.setattr("igrpo_nemo.nemo.master_config.has_flash_attention", lambda v2: False)
    config = without_flash_attention(config_of(*words))
    assert launch_problems(config) == []
    master = as_nemo_rl_takes_it(config, tmp_path)
    known = snapshot().annotated | snapshot().open | snapshot().used
    assert set(keys_beyond({"policy": master.policy}, known)) <= OURS
    adapters = ("dtensor_cfg", "lora_cfg") if "lora=dtensor" in words else ("megatron_cfg", "peft")
    section = master.policy[adapters[0]][adapters[1]]
    assert section["enabled"] is any(word.startswith("lora=") for word in words)


def test_without_flash_attention_rows_are_batched_instead_of_packed(monkeypatch, capsys):
    monkeypatch.setattr("igrpo_nemo.nemo.master_config.has_flash_attention", lambda v2: False)
    for words, kwargs in ((SMALL, {"attn_implementation": "sdpa"}), ([*SMALL, V1], {})):
        policy = without_flash_attention(config_of(*words)).policy
        assert policy.dtensor["automodel_kwargs"] == kwargs
        assert not policy.sequence_packing.enabled and policy.dynamic["enabled"]
        assert policy.dynamic["train_mb_tokens"] == policy.dynamic["logprob_mb_tokens"] == 3072
        [line] = capsys.readouterr().out.splitlines()
        assert line.startswith("flash-attn is not installed where DTensor trains: sequence packing")
    megatron = config_of(*MEGATRON)
    assert without_flash_attention(megatron) is megatron
    assert capsys.readouterr().out == ""


def test_it_is_looked_for_where_the_workers_run(tmp_path, monkeypatch):
    from nemo_rl.distributed.ray_actor_environment_registry import ACTOR_ENVIRONMENT_REGISTRY

    for v2, name in (
        (False, f"{WORKERS}.dtensor_policy_worker.DTensorPolicyWorker"),
        (True, f"{WORKERS}.dtensor_policy_worker_v2.DTensorPolicyWorkerV2"),
    ):
        assert name in ACTOR_ENVIRONMENT_REGISTRY
        monkeypatch.setenv("NEMO_RL_VENV_DIR", str(tmp_path))
        monkeypatch.setenv("NEMO_RL_PY_EXECUTABLES_SYSTEM", "0")
        assert has_flash_attention(v2)  # `uv` will make the environment, with flash-attn
        site = tmp_path / name / "lib" / "python3.13" / "site-packages"
        site.mkdir(parents=True)
        assert not has_flash_attention(v2)
        (site / "flash_attn").mkdir()
        assert has_flash_attention(v2)
        monkeypatch.setenv("NEMO_RL_PY_EXECUTABLES_SYSTEM", "1")
        assert not has_flash_attention(v2)  # this Python has none


def test_nemo_rl_reads_what_stands_in_for_flash_attention():
    import nemo_rl

    [folder] = nemo_rl.__path__
    with open(f"{folder}/models/automodel/setup.py", encoding="utf-8") as file:
        assert 'automodel_kwargs.pop("attn_implementation")' in file.read()
