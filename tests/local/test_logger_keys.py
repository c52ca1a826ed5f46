"""`logger.*` keys of the embedded engine that show in the run folder and on the console."""

import json
import re
import time

import pytest
import tiny_runs

from igrpo_nemo.local import trainer

VALIDATING = ["grpo.val_at_end=true", "grpo.max_num_steps=1", "igrpo.validation.temperature=1.0"]


@pytest.mark.parametrize("enabled", [True, False])
def test_tensorboard_events_are_written_where_they_are_wanted(policy, tmp_path, enabled):
    key = f"logger.tensorboard_enabled={str(enabled).lower()}"
    config = tiny_runs.tiny_config(policy, tmp_path / "run", "grpo.max_num_steps=1", key)
    tiny_runs.run(config)
    events = list((tmp_path / "run").glob("tensorboard/*"))
    assert bool(events) is enabled


@pytest.mark.parametrize("count", [0, 4])
def test_so_many_validation_samples_are_shown(policy, tmp_path, capsys, count):
    config = tiny_runs.tiny_config(
        policy, tmp_path / "run", *VALIDATING, f"logger.num_val_samples_to_print={count}"
    )
    tiny_runs.run(config)
    printed = capsys.readouterr().out
    assert printed.count("sample of step 1: ") == printed.count("  response (reward ") == count


def test_validation_has_settings_of_its_own(policy, tmp_path, capsys):
    """k answers a problem: their first is the one that k = 1 gives, the draws being named."""
    logged = {}
    for k in (1, 4):
        keys = [f"igrpo.validation.samples={k}", "igrpo.validation.top_p=0.9"]
        run = tmp_path / str(k)
        tiny_runs.run(tiny_runs.tiny_config(policy, run, *VALIDATING, *keys))
        lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        [logged[k]] = [line["metrics"] for line in lines if line["kind"] == "val"]
    assert not any("_at_" in name for name in logged[1])
    assert logged[4]["val/avg_at_4"] == logged[4]["val/accuracy"] < logged[4]["val/pass_at_4"]
    assert logged[4]["val/accuracy"] * 16 % 1 == 0 and logged[1]["val/accuracy"] * 4 % 1 == 0
    assert "(bare prompt, mean of 4; " in capsys.readouterr().out


def test_what_a_rollout_waits_for_is_named(policy, tmp_path, monkeypatch, capsys):
    def slow(scorer, requests):
        time.sleep(0.5)
        return scores(scorer, requests)

    scores = tiny_runs.TextScorer.__call__
    monkeypatch.setattr(tiny_runs.TextScorer, "__call__", slow)
    keys = ("grpo.max_num_steps=1", "igrpo.stall_alarm_s=0.1")
    tiny_runs.run(tiny_runs.tiny_config(policy, tmp_path, *keys))
    told = [line for line in capsys.readouterr().out.splitlines() if "waiting for" in line]
    assert any("draft, rewards of " in line for line in told)
    assert any("refine, rewards of " in line for line in told)


def test_the_seconds_are_the_runs_own(policy, tmp_path, monkeypatch, capsys):
    """Not those of the process, which may have done other things before."""
    finish = trainer.Trainer.finish

    def with_a_cached_warmup(self):
        self._remember(warmup_seconds=9000.0, warmup_cached=True)
        finish(self)

    monkeypatch.setattr(trainer.Trainer, "finish", with_a_cached_warmup)
    began = time.monotonic()
    tiny_runs.run(tiny_runs.tiny_config(policy, tmp_path, "grpo.max_num_steps=1"))
    limit = time.monotonic() - began
    done = capsys.readouterr().out.splitlines()[-1]
    seconds = int(re.match(r"done: 1 steps, (\d+) s \(and 9000 s of warm-up, cached\), ", done)[1])
    summary = json.loads((tmp_path / "summary.json").read_text())
    own = summary["seconds"] - 9000.0
    assert 0 < own < limit and abs(seconds - own) < 1
