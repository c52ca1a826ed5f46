"""The launcher: what it refuses, what NeMo-RL is given, and plain GRPO through it."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import time

import nemo_runs
import pytest

from igrpo_nemo.config import load_config, with_problems
from igrpo_nemo.config.checks import check_launch
from igrpo_nemo.errors import UserError
from igrpo_nemo.nemo.cpu.generation import LocalGeneration
from igrpo_nemo.nemo.versions import entries

CLUSTER = ["engine=nemo_rl", "cluster=a100_2x8", "policy.model_name=/models/7b"]
TRAINED_DRAFTS = "igrpo.train_stages=[draft,refine]"


def test_the_cluster_preset_is_what_nemo_rl_takes(tmp_path):
    """Every value of `engine=nemo_rl` survives NeMo-RL's own schema, and its schedule is set."""
    config = with_problems(load_config(CLUSTER), 7_500)
    check_launch(config)
    master = nemo_runs.as_nemo_rl_takes_it(config, tmp_path)
    grpo = entries(master.grpo)
    assert grpo["num_generations_per_prompt"] == 4
    assert (grpo["max_val_samples"], grpo["val_batch_size"]) == (256, 256)
    assert master.policy["generation"]["vllm_cfg"]["async_engine"] is True
    megatron = master.policy["megatron_cfg"]
    assert megatron["optimizer"]["min_lr"] == pytest.approx(0.1 * megatron["optimizer"]["lr"])
    steps = 7_500 // 128
    assert (megatron["scheduler"]["lr_decay_iters"], megatron["scheduler"]["lr_warmup_iters"]) == (
        steps,
        6,
    )
    assert master.loss_fn.token_level_loss is False
    assert master.data["train"]["dataset_name"] == "igrpo_nemo.nemo.data.ProblemDataset"


@pytest.mark.either_tree
@pytest.mark.parametrize("objective", ["grpo", "dapo", "gspo", "dr_grpo"])
def test_every_objective_reaches_nemo_rl(tmp_path, objective):
    from nemo_rl.algorithms.grpo import _create_advantage_estimator

    config = with_problems(load_config([*CLUSTER, f"objective={objective}"]), 7_500)
    check_launch(config)
    master = nemo_runs.as_nemo_rl_takes_it(config, tmp_path, num_validation=0)
    assert master.loss_fn.sequence_level_importance_ratios is (objective == "gspo")
    assert entries(master.grpo)["use_dynamic_sampling"] is (objective == "dapo")
    assert entries(master.grpo)["normalize_rewards"] is (objective != "dr_grpo")
    estimator = _create_advantage_estimator(master)
    assert estimator.normalize_rewards is (objective != "dr_grpo")
    assert estimator.use_leave_one_out_baseline is config.grpo.use_leave_one_out_baseline


ASYNC_TRAINING = "grpo.async_grpo.enabled=true"
CORRECTED = "loss_fn.use_importance_sampling_correction"
FUSED = "igrpo.draft_prefetch=fused"
MEGATRON = "policy.megatron_cfg"
REFUSALS = [
    ("igrpo.advantage_delta=0.0", "NeMo-RL adds 1e-06"),
    (f"objective=dapo {TRAINED_DRAFTS}", "filters groups by the bare prompt"),
    (f"{TRAINED_DRAFTS} igrpo.draft_dropout=0.5", "groups rows by their prompt"),
    (f"{FUSED} data.use_multiple_dataloader=true", "use_multiple_dataloader"),
    (f"{FUSED} {TRAINED_DRAFTS}", "too old to be trained on"),
    (f"{FUSED} feedback=self_verification", "too old to be trained on"),
    (
        "feedback=self_verification igrpo.feedback_options.buffer_age=60",
        "set igrpo.feedback_options.buffer_age=0, or use engine=local",
    ),
    ("objective=dapo feedback=critique", "set grpo.use_dynamic_sampling=false"),
    ("feedback=critique grpo.seq_logprob_error_threshold=2.0", "threshold=null"),
    ("igrpo.val_draft_conditioned=true data_plane.enabled=true", "set data_plane.enabled=false"),
    ("igrpo.validation.temperature=1.0", "or greedily.*: set igrpo.validation.temperature=0.6"),
    ("igrpo.validation.samples=4 data_plane.enabled=true", "set igrpo.validation.samples=1"),
    ("igrpo.validation.temperature=0 data_plane.enabled=true", "as it trains"),
    (f"objective=gspo {CORRECTED}=true", f"set {CORRECTED}=false"),
    (
        f"objective=gspo {ASYNC_TRAINING} {CORRECTED}=true",
        "set grpo.async_grpo.enabled=false and loss_fn",
    ),
    (f"{ASYNC_TRAINING} objective=dapo", "use_dynamic_sampling=true does not go"),
    (ASYNC_TRAINING, "use_importance_sampling_correction=true"),
    (
        f"{ASYNC_TRAINING} policy.generation.vllm_cfg.async_engine=false",
        "needs the asynchronous engine",
    ),
    ("policy.generation.top_p=0.9", "filtered log-probs"),
    (f"{MEGATRON}.context_parallel_size=2", "context_parallel_size above 1"),
    ("policy.sequence_packing.fuse_loss=true", "fuse_loss=true"),
    ("policy.dtensor_cfg.enabled=true", "exactly one of"),
    ("cluster.num_nodes=1 cluster.gpus_per_node=8", "no GPU is left for training"),
    (f"{MEGATRON}.tensor_model_parallel_size=3", "no multiple of the 3"),
    ("checkpointing.model_save_format=safetensors", "set checkpointing.model_save_format=null"),
    (
        "model=openmath_nemotron_7b_dtensor checkpointing.model_save_format=null",
        "set checkpointing.model_save_format=safetensors",
    ),
    (
        f"grpo.num_prompts_per_step=125 {MEGATRON}.tensor_model_parallel_size=1",
        "data-parallel replicas",
    ),
]


@pytest.mark.parametrize(("overrides", "reason"), REFUSALS)
def test_what_cannot_work_is_refused_before_the_first_step(overrides, reason):
    config = with_problems(load_config([*CLUSTER, *overrides.split()]), 7_500)
    with pytest.raises(UserError, match=reason) as raised:
        check_launch(config)
    assert "\n" not in str(raised.value)


def test_a_run_of_other_inputs_or_with_tags_that_are_lost_is_not_opened(policy_folder, tmp_path):
    from transformers import AutoTokenizer

    from igrpo_nemo.nemo.master_config import open_run
    from igrpo_nemo.run.folder import RunFolder

    base = shutil.copytree(policy_folder, tmp_path / "base")
    config = nemo_runs.tiny_config(str(base), tmp_path / "run")
    with RunFolder(tmp_path / "run") as folder:
        open_run(config, folder)
        (base / "config.json").write_text((base / "config.json").read_text() + " ")
        with pytest.raises(UserError, match="another content of policy.model_name"):
            open_run(config, folder)
        tokenizer = AutoTokenizer.from_pretrained(base)
        tokenizer.add_special_tokens({"additional_special_tokens": ["<answer>", "</answer>"]})
        tokenizer.save_pretrained(base)
        with pytest.raises(UserError, match="<answer>, </answer> among its control tokens"):
            open_run(config, folder)


def test_megatron_needs_the_architectures(tmp_path, monkeypatch):
    from igrpo_nemo.nemo.launch import train

    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    with pytest.raises(UserError, match="TORCH_CUDA_ARCH_LIST=8.0 for A100"):
        train(load_config([*CLUSTER, f"logger.log_dir={tmp_path}"]))


@nemo_runs.ENGINES
def test_feedback_none_equals_plain_nemo_rl(ray_cluster, policy_folder, tmp_path, engine):
    """The same weights to the last bit as `setup` and `grpo_train` without anything of ours but
    environment and data; exact entropy is on in our run and off in the plain one."""
    changes = ["feedback=none", "igrpo.budget=4", "grpo.max_num_steps=3", engine]
    config = nemo_runs.tiny_config(policy_folder, tmp_path / "ours", *changes)
    [ours] = nemo_runs.train(config).policies
    theirs = _plain_nemo_rl(nemo_runs.tiny_config(policy_folder, tmp_path / "plain", *changes))
    state, expected = ours.model.state_dict(), theirs.model.state_dict()
    assert all(state[name].equal(expected[name]) for name in expected)
    start = nemo_runs.open_weights(policy_folder)
    assert not all(state[name].equal(start[name]) for name in start)


def _plain_nemo_rl(config):
    from nemo_rl.algorithms.grpo import grpo_train, setup
    from nemo_rl.algorithms.utils import get_tokenizer
    from nemo_rl.data.utils import setup_response_data
    from nemo_rl.models.generation import configure_generation_config

    from igrpo_nemo.nemo import data, environment
    from igrpo_nemo.nemo.cpu import local_policy_factory
    from igrpo_nemo.nemo.master_config import open_run
    from igrpo_nemo.run.folder import RunFolder

    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(RunFolder(config.logger.log_dir))
        opened = open_run(config, folder)
        master = opened.master
        environment.register()
        data.configure(opened.config)
        tokenizer = get_tokenizer(master.policy["tokenizer"])
        master.policy["generation"] = configure_generation_config(
            master.policy["generation"], tokenizer
        )
        stack.enter_context(nemo_runs.shared_environments())
        train, val, envs, val_envs = setup_response_data(tokenizer, master.data, master.env)
        with local_policy_factory(master) as factory:
            made = setup(master, tokenizer, train, val, policy_factory=factory)
        policy, generation, _, _, loader, val_loader, loss, logger, saver, state, master, *_ = made
        grpo_train(
            policy, generation, loader, val_loader, tokenizer, loss, envs, val_envs, logger,
            saver, state, master,
        )  # fmt: skip
        return policy


def test_validation_sees_no_draft_and_the_log_has_our_names(
    ray_cluster, policy_folder, tmp_path, monkeypatch, capsys
):
    """Two greedy answers a problem, beside them those under q'. Every call of the engine lasts
    longer than the alarm's patience, which names what it waits for."""
    sample, keys = LocalGeneration._sample, "igrpo.validation"

    def slow(*args, **options):
        time.sleep(0.5)
        return sample(*args, **options)

    monkeypatch.setattr(LocalGeneration, "_sample", slow)
    config = nemo_runs.tiny_config(
        policy_folder,
        tmp_path / "run",
        "igrpo.sample_table_period=1",
        "igrpo.val_draft_conditioned=true",
        "grpo.max_num_steps=1",
        "grpo.val_at_start=true",
        *[f"{keys}.samples=2", f"{keys}.temperature=0", "igrpo.stall_alarm_s=0.2"],
    )
    seen = nemo_runs.train(config)
    told = capsys.readouterr().out
    for what in ("validation", "draft, sampling", "refine, sampling"):
        assert re.search(rf"^warning: waiting for \d+ s: {what} of \S", told, re.MULTILINE)
    path = tmp_path / "run" / "nemo_rl" / "val_data_step0.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == 2 * 16
    for row in rows:  # single shot on the bare prompt
        [log] = row["content"]
        assert [message["role"] for message in log].count("assistant") == 1
        assert "<draft>" not in log[0]["content"]
    assert [row["content"] for row in rows[::2]] == [row["content"] for row in rows[1::2]]
    [validated] = nemo_runs.metrics(tmp_path / "run", "val")
    assert set(validated) >= {"val/accuracy", "val/accuracy_stderr", "val/format", "val/tokens"}
    assert validated["val/avg_at_2"] == validated["val/pass_at_2"] == validated["val/accuracy"]
    conditioned = validated["val/draft_conditioned_accuracy"]
    refined = [group for rollout in seen.rollouts[0] for group in rollout.refinements]
    right = [score.correct for group in refined for score in group.scores]
    assert len(right) == 16 * 4 and conditioned == pytest.approx(sum(right) / len(right))
    assert validated["val/transfer_gap"] == pytest.approx(conditioned - validated["val/accuracy"])
    [logged] = nemo_runs.metrics(tmp_path / "run")
    assert set(logged) >= {
        "loss", "grad_norm", "lr", "entropy/exact", "entropy/sampled", "policy/ratio_mean",
        "igrpo/draft_reward", "igrpo/refinement_reward", "igrpo/lift", "igrpo/trained_reward",
        "timing/draft", "timing/refine", "timing/reward", "timing/train", "timing/step",
        "perf/samples_per_s", "perf/completions_per_s", "perf/tokens_per_s", "perf/gpu_hours",
    }  # fmt: skip
    assert logged["entropy/exact"] == pytest.approx(logged["entropy/sampled"], rel=0.3)
    assert logged["igrpo/completions"] == 64
    assert (tmp_path / "run" / "samples.jsonl").read_text().count("\n") == 8


@pytest.mark.either_tree
def test_feedback_none_is_described_as_on_the_embedded_engine(ray_cluster, policy_folder, tmp_path):
    """The same names, and figures that agree with the rows that NeMo-RL trained on."""
    from igrpo_nemo.local.trainer import train as train_locally

    changes = ["feedback=none", "igrpo.budget=4", "grpo.max_num_steps=1"]
    changes.append("igrpo.sample_table_period=1")
    nemo_runs.train(nemo_runs.tiny_config(policy_folder, tmp_path / "nemo", *changes))
    local = nemo_runs.tiny_config(policy_folder, tmp_path / "local", *changes, "engine=local")
    assert train_locally(local) == 0
    [logged], [locally] = (nemo_runs.metrics(tmp_path / name) for name in ("nemo", "local"))
    names = {name for name in locally if name.startswith("igrpo/")}
    assert names >= {
        "igrpo/draft_reward", "igrpo/draft_accuracy", "igrpo/draft_format",
        "igrpo/best_draft_accuracy", "igrpo/nonzero_advantage_groups", "igrpo/trained_reward",
    }  # fmt: skip
    ours = {name for name in logged if name.startswith("igrpo/")}
    assert ours - {"igrpo/completions", "igrpo/generated_tokens"} == names
    reasons = [value for name, value in logged.items() if name.startswith("reward/reason/")]
    assert sum(reasons) == pytest.approx(1)
    rows = nemo_runs.dump(tmp_path / "nemo", 1)
    groups = [rows[start : start + 4] for start in range(0, len(rows), 4)]
    assert len(groups) == 8
    rewards = [row["rewards"] for row in rows]
    differing = [any(any(row["advantages"]) for row in group) for group in groups]
    assert logged["igrpo/trained_reward"] == pytest.approx(sum(rewards) / 32)
    assert logged["igrpo/nonzero_advantage_groups"] == sum(differing) / 8
    lengths = [sum(row["token_loss_mask"]) for row in rows]
    assert logged["igrpo/draft_tokens"] == pytest.approx(sum(lengths) / 32)
    assert logged["igrpo/generated_tokens"] == sum(lengths)
    assert logged["igrpo/draft_accuracy"] + logged["igrpo/draft_format"] == pytest.approx(
        logged["igrpo/draft_reward"]
    )
    assert (tmp_path / "nemo" / "samples.jsonl").read_text().count("\n") == 8
