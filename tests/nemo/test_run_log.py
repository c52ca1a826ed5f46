"""The run's log: several draws in one step, and what a resumed run had done before."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from igrpo_nemo.metrics import mean_and_stderr
from igrpo_nemo.nemo.resume import Progress, summary_of
from igrpo_nemo.nemo.run_log import LoggersTables, RunLog
from igrpo_nemo.nemo.seam import SAMPLES, StepClock
from igrpo_nemo.tracking import Tracker


class Recorder:
    """In the place of the tracker and of NeMo-RL's logger."""

    def __init__(self):
        self.records = []

    def log(self, kind, step, metrics):
        self.records.append((kind, step, metrics))

    def log_metrics(self, *_):
        """NeMo-RL's own logger gets everything too."""

    def log_batched_dict_as_jsonl(self, _, filename):
        self.records.append(filename)


def _log(*, dynamic=False, dumps=0, samples=1, **options):
    tracker = Recorder()
    config = SimpleNamespace(
        grpo=SimpleNamespace(use_dynamic_sampling=dynamic, num_prompts_per_step=4),
        igrpo=SimpleNamespace(
            sample_table_period=0,
            budget=8,
            row_dump_period=dumps,
            validation=SimpleNamespace(samples=samples),
        ),
        cluster=SimpleNamespace(num_nodes=2, gpus_per_node=8),
    )
    log = RunLog(
        Recorder(), config, tracker, SimpleNamespace(clock=StepClock(), rollouts=[]), **options
    )
    return log, tracker.records


def _step(log, step, draws, **learned):
    """NeMo-RL's calls of a step: its metrics at the end have the last draw's once more."""
    for draw in draws:
        log.log_metrics(draw, step, prefix="train")
    log.log_metrics({"loss": 0.5, **learned, **draws[-1]}, step, prefix="train")
    log.log_metrics({"total_step_time": 9.0}, step, prefix="timing/train", step_finished=True)


def test_several_draws_are_one_rollout():
    """What they took adds up; the rest are means, over the draws that have it."""
    first = {
        "igrpo/completions": 30.0,
        "igrpo/generated_tokens": 300.0,
        "igrpo/draft_reward": 0.2,
        "igrpo/draft_clipped_rate": 0.5,
        "igrpo/drafts_dropped": 1.0,
        "timing/draft": 2.0,
        "timing/refine": 1.0,
    }
    second = {
        "igrpo/completions": 10.0,
        "igrpo/generated_tokens": 60.0,
        "igrpo/draft_reward": 0.6,
        "igrpo/drafts_dropped": 3.0,
        "timing/draft": 0.5,
        "timing/refine": 0.25,
    }
    log, records = _log(dynamic=True)
    _step(log, 1, [first, second])
    _step(log, 2, [second])
    (_, _, both), (_, _, one) = records
    expected = {
        "igrpo/completions": 40.0,
        "igrpo/generated_tokens": 360.0,
        "igrpo/draft_reward": 0.3,
        "igrpo/draft_clipped_rate": 0.5,
        "igrpo/drafts_dropped": 3.0,
        "igrpo/dynamic_sampling_draws": 2.0,
        "timing/draft": 2.5,
        "timing/refine": 1.25,
        "timing/step": 9.0,
        "perf/completions_per_s": 40 / 9,
        "perf/tokens_per_s": 40.0,
    }
    assert {name: both[name] for name in expected} == pytest.approx(expected)
    assert one["igrpo/dynamic_sampling_draws"] == 1.0
    assert {name: one[name] for name in second} == second
    assert log.progress.completions == 50


def test_a_headline_share_that_stays_high_is_told_once(capsys):
    log, _ = _log()
    for step in range(1, 13):
        _step(log, step, [{"igrpo/completions": 8.0, "igrpo/draft_clipped_rate": 0.5}])
    [line] = capsys.readouterr().out.splitlines()
    assert "50% shown drafts that were cut to fit" in line and "draft_content=answer" in line


def test_what_the_workers_have_divided_is_not_divided_again():
    """By the four updates of a step, whose extremes and rates are no sums."""
    learned = {
        "approx_entropy": 0.8,
        "probs_ratio": 1.0,
        "probs_ratio_max": 3.0,
        "token_mult_prob_error": 1.01,
        "lr": 1e-6,
        "grad_norm": 0.7,
    }
    log, records = _log()
    _step(log, 1, [{"igrpo/completions": 8.0}], **learned)
    [(_, _, metrics)] = records
    assert "igrpo/dynamic_sampling_draws" not in metrics
    named = ("entropy/sampled", "policy/ratio_mean", "policy/ratio_max", "policy/engine_mismatch")
    assert [metrics[name] for name in ("loss", *named, "lr", "grad_norm")] == [
        0.5, 0.8, 1.0, 3.0, 1.01, 1e-6, 0.7,
    ]  # fmt: skip


def test_a_resumed_run_counts_on(tmp_path):
    """From the log of the steps before; an old summary has the wall clock besides."""
    records = [("val", 0, {"val/accuracy": 0.25})]
    records += [("train", n, {"timing/step": 10.0, "igrpo/completions": 8.0}) for n in (1, 2)]
    records += [("val", 2, {"val/accuracy": 0.5})]
    lines = [json.dumps({"kind": k, "step": s, "time": 0.0, "metrics": m}) for k, s, m in records]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert summary_of(tmp_path) == {}
    assert Progress.before(tmp_path, 0) == Progress()
    assert Progress.before(tmp_path, 2) == Progress(2, 20.0, 20.0, 16, 0.25, 0.5)
    (tmp_path / "summary.json").write_text('{"seconds": 33.5}')
    progress = Progress.before(tmp_path, 2)
    assert progress.seconds == 33.5
    log, logged = _log(progress=progress)
    _step(log, 3, [{"igrpo/completions": 8.0}])
    [(_, _, metrics)] = logged
    assert metrics["perf/gpu_hours"] == pytest.approx(29.0 * 16 / 3600)
    assert (progress.completions, progress.training_seconds) == (24, 29.0)
    log.log_metrics({"accuracy": 0.75}, 3, prefix="validation")
    assert (progress.first_accuracy, progress.last_accuracy) == (0.25, 0.75)


def _validated(log, answers, question="q"):
    conversations = [
        [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        for answer in answers
    ]
    dump = {"rewards": [1.0] * len(answers), "content": conversations}
    log.log_batched_dict_as_jsonl(dump, "val_data_step1.jsonl")
    log.log_metrics({"accuracy": 1.0}, 1, prefix="validation")


def test_a_template_may_have_opened_the_thinking_part():
    """As R1's: its answers begin inside, and are as well formatted as in training."""
    log, records = _log()
    answers = ["2+2=4.</think><answer>4</answer>", "4"]
    _validated(log, answers, "<|User|>q<|Assistant|><think>\n")
    _validated(log, answers)
    assert [metrics["val/format"] for _, _, metrics in records] == [0.5, 0.0]


def test_several_answers_a_problem_are_measured_by_problem():
    log, records = _log(samples=2)
    conversation = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "4"}]
    dump = {"rewards": [1.0, 1.0, 1.0, 0.0, 0.0, 0.0], "content": [conversation] * 6}
    log.log_batched_dict_as_jsonl(dump, "val_data_step1.jsonl")
    log.log_metrics({"accuracy": 0.5}, 1, prefix="validation")
    [(_, _, metrics)] = records
    assert metrics["val/avg_at_2"] == metrics["val/accuracy"] == 0.5
    assert metrics["val/pass_at_2"] == pytest.approx(2 / 3)
    assert metrics["val/accuracy_stderr"] == pytest.approx(mean_and_stderr([1.0, 0.5, 0.0])[1])


def test_what_the_run_is_asked_for_is_logged_where_it_is_known():
    """The gap between q and q', and the peak memory of the training workers."""
    beside = {"val/draft_conditioned_accuracy": 0.25, "val/reward": 1.5}
    log, records = _log(measured=lambda: beside, peak_memory=lambda: 5e10)
    _validated(log, ["4"])
    _step(log, 1, [{"igrpo/completions": 8.0}])
    (_, _, validated), (_, _, trained) = records
    assert validated.items() >= {**beside, "val/transfer_gap": -0.75}.items()
    assert trained["perf/peak_memory_gb"] == 50.0
    log, records = _log()
    _step(log, 1, [{"igrpo/completions": 8.0}])
    assert "perf/peak_memory_gb" not in records[0][2]


def test_the_fullest_worker_counts_and_silence_is_no_figure(monkeypatch):
    from igrpo_nemo.nemo import setup

    class Workers:
        def run_all_workers_single_data(self, method):
            assert method == "get_gpu_info"
            return [{"peak_memory_allocated_mb": 1024.0}, {"peak_memory_allocated_mb": 2048.0}]

    monkeypatch.setattr(setup.ray, "get", lambda found: found)
    assert setup.peak_training_memory(SimpleNamespace(worker_group=Workers())) == 2**31
    assert setup.peak_training_memory(SimpleNamespace()) is None


@pytest.mark.parametrize(("period", "kept"), [(0, []), (2, [2, 4]), (1, [1, 2, 3, 4])])
def test_rows_are_dumped_as_often_as_asked(period, kept):
    log, _ = _log(dumps=period)
    for step in (1, 2, 3, 4):
        log.log_batched_dict_as_jsonl({}, f"train_data_step{step}.jsonl")
    names = [f"nemo_rl/train_data_step{step}.jsonl" for step in kept]
    assert log._logger.records == names


def test_sample_tables_reach_the_services_of_nemo_rls_own_logger(tmp_path, monkeypatch):
    """Before the call that makes a step complete: W&B drops what comes later."""
    from nemo_rl.utils.logger import Logger
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    enabled = {"wandb_enabled": True, "tensorboard_enabled": True}
    off = dict.fromkeys(("swanlab_enabled", "mlflow_enabled", "monitor_gpus"), False)
    own = Logger(
        {"log_dir": str(tmp_path), "wandb": {"project": "p"}, "tensorboard": {}} | enabled | off
    )
    log, _ = _log()
    log._logger, log._tracker = own, Tracker([LoggersTables(own)])
    log._config.igrpo.sample_table_period = 2
    for step in (1, 2):
        rows = [{"question": f"q{step}", "draft": "d"}]
        _step(log, step, [{"igrpo/completions": 8.0, SAMPLES: rows}])
    own.wandb_logger.run.finish()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Tensors("samples/text_summary")] == [2]
    (table,) = [json.loads(p.read_text()) for p in tmp_path.rglob("samples*.table.json")]
    assert (table["columns"], table["data"]) == (["step", "question", "draft"], [[2, "q2", "d"]])
