"""Ten steps of each kind of run, end to end."""

from __future__ import annotations

import json

import pytest
from command_line import QUICK, SMALL, records

TWO_STAGE = {
    "igrpo/draft_reward",
    "igrpo/best_draft_reward",
    "igrpo/refinement_reward",
    "igrpo/best_draft_predicted",
    "igrpo/lift",
    "igrpo/copy_rate",
    "igrpo/nonzero_advantage_groups",
}
ALWAYS = {
    "loss",
    "grad_norm",
    "lr",
    "entropy/exact",
    "entropy/sampled",
    "policy/clip_fraction",
    "perf/samples_per_s",
    "perf/gpu_hours",
    "perf/peak_memory_gb",
    "timing/draft",
    "timing/reward",
    "timing/train",
    "timing/step",
}


def test_ten_steps_of_igrpo_leave_everything_a_run_promises(igrpo):
    igrpo("train", *SMALL, "logger.log_dir=run")
    run = igrpo.folder / "run"
    train, val = records(run, "train"), records(run, "val")
    assert sorted(train) == list(range(1, 11)) and sorted(val) == [0, 5, 10]
    assert all(ALWAYS | TWO_STAGE <= metrics.keys() for metrics in train.values())
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == 10 and summary["completions"] == 10 * 4 * 8
    assert {"val_accuracy_start", "val_accuracy_end", "seconds"} <= summary.keys()
    assert summary["completions_per_second"] > 0
    assert 2 * summary["trained_rows"] == summary["completions"] == 8 * 4 * summary["steps"]
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert {row["step"] for row in samples} == {5, 10} and samples[0]["refinement"]
    assert list((run / "tensorboard").iterdir())
    assert sorted(p.name for p in (run / "checkpoints").iterdir())[-1] == "step_00000010"
    igrpo("report", "run")
    page = (run / "report.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org", "") and "<script src" not in page
    done = igrpo(
        "evaluate", "--model", "run/checkpoints/step_00000010", "--samples", "2", "--limit", "8"
    )
    assert "pass@1[avg-of-2]" in done.stdout


@pytest.mark.parametrize(
    "options",
    [
        ("feedback=none",),
        ("objective=dapo", "grpo.dynamic_sampling_max_gen_batches=40"),
        ("objective=gspo",),
        ("objective=dr_grpo",),
        ("igrpo.train_stages=[draft,refine]",),
        ("igrpo.num_drafts=2", "igrpo.num_refinements=6"),
        ("igrpo.on_all_zero=skip", "igrpo.tie_break=random"),
        (
            "loss_fn.reference_policy_kl_penalty=0.01",
            "grpo.skip_reference_policy_logprobs_calculation=false",
            "igrpo.updates_per_rollout=2",
        ),
        ("policy.sequence_packing.enabled=false", "policy.train_micro_batch_size=4"),
        ("igrpo.val_draft_conditioned=true", "grpo.overlong_filtering=true"),
    ],
    ids=lambda options: " ".join(options),
)
def test_every_kind_of_run_takes_its_steps(igrpo, options):
    igrpo("train", *QUICK, "grpo.max_num_steps=3", "logger.log_dir=run", *options)
    train = records(igrpo.folder / "run", "train")
    assert sorted(train) == [1, 2, 3]
    assert any(metrics["grad_norm"] > 0 for metrics in train.values())
    if options == ("feedback=none",):
        assert not any(name.startswith("igrpo/refinement") for name in train[1])
        assert "igrpo/best_draft_reward" in train[1] and "igrpo/lift" not in train[1]
    if "reference" in options[0]:
        assert train[3]["policy/kl"] > 0


def test_stage_2_is_shown_the_draft_that_was_chosen(igrpo):
    """Step 1 has the same drafts under every rule: what differs is which one is shown."""
    shown, drafts = {}, []
    for choice in ("best", "random", "worst", "none"):
        options = [f"igrpo.draft_choice={choice}", "igrpo.num_drafts=6", "igrpo.num_refinements=2"]
        one_step = ["grpo.max_num_steps=1", "grpo.num_prompts_per_step=16"]
        quick = ["grpo.val_at_start=false", "grpo.val_period=0", "grpo.val_at_end=false"]
        quick += ["checkpointing.metric_name=null"]
        igrpo("train", *QUICK, *options, *one_step, *quick, f"logger.log_dir={choice}")
        step = records(igrpo.folder / choice, "train")[1]
        drafts.append((step["igrpo/draft_reward"], step["igrpo/best_draft_reward"]))
        shown[choice] = step
    assert len(set(drafts)) == 1
    mean, best = drafts[0]
    reward = {
        choice: step["igrpo/selected_draft_reward"]
        for choice, step in shown.items()
        if choice != "none"
    }
    assert reward["worst"] < reward["random"] < reward["best"] == best
    assert reward["worst"] < mean < best
    lengths = {choice: step["igrpo/refine_prompt_tokens"] for choice, step in shown.items()}
    assert lengths["none"] == shown["none"]["igrpo/prompt_tokens"]
    assert min(lengths[choice] for choice in reward) > lengths["none"]
    assert not {"igrpo/selected_draft_reward", "igrpo/lift"} & shown["none"].keys()
