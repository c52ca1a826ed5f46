"""One GPU on NeMo-RL without FlashAttention; test_real_setup.py has what NeMo-RL says to it."""

from __future__ import annotations

from igrpo_nemo.config import load_config, with_problems
from igrpo_nemo.nemo.master_config import has_flash_attention, without_flash_attention
from igrpo_nemo.nemo.processes import policy_worker

SMALL = ["engine=nemo_rl", "model=qwen2.5_1.5b", "data=gsm8k", "cluster=one_gpu"]
V1 = "policy.dtensor_cfg._v2=false"
MEGATRON = ["model=qwen2.5_1.5b", "data=gsm8k", "engine=nemo_rl", "cluster=a100_1x8"]


def config_of(*overrides: str):
    return with_problems(load_config([*overrides]), 7473)


def test_without_flash_attention_rows_are_batched_instead_of_packed(monkeypatch, capsys):
    monkeypatch.setattr("igrpo_nemo.nemo.master_config.has_flash_attention", lambda _: False)
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

    for words in ([*SMALL, V1], SMALL):
        config = config_of(*words)
        name = policy_worker(config)
        assert name in ACTOR_ENVIRONMENT_REGISTRY
        monkeypatch.setenv("NEMO_RL_VENV_DIR", str(tmp_path))
        monkeypatch.setenv("NEMO_RL_PY_EXECUTABLES_SYSTEM", "0")
        assert has_flash_attention(config)  # `uv` will make the environment, with flash-attn
        site = tmp_path / name / "lib" / "python3.13" / "site-packages"
        site.mkdir(parents=True)
        assert not has_flash_attention(config)
        (site / "flash_attn").mkdir()
        assert has_flash_attention(config)
        monkeypatch.setenv("NEMO_RL_PY_EXECUTABLES_SYSTEM", "1")
        assert not has_flash_attention(config)  # this Python has none


def test_nemo_rl_reads_what_stands_in_for_flash_attention():
    import nemo_rl

    [folder] = nemo_rl.__path__
    with open(f"{folder}/models/automodel/setup.py", encoding="utf-8") as file:
        assert 'automodel_kwargs.pop("attn_implementation")' in file.read()
