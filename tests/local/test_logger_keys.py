"""`logger.*` keys of the embedded engine that show in the run folder and on the console."""

import json
import re
import time

import pytest
import tiny_runs

from igrpo_nemo.local import trainer

VALIDATING = ["grpo.val_at_end=true", "grpo.max_num_steps=1", "igrpo.val_temperature=1.0"]


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


def test_the_seconds_are_the_runs_own(policy, tmp_path, monkeypatch, capsys):
    """Not those of the process, which may have done other things before."""
    monkeypatch.setattr(trainer, "cached_warmup", lambda state: 9000.0)
    began = time.monotonic()
    tiny_runs.run(tiny_runs.tiny_config(policy, tmp_path, "grpo.max_num_steps=1"))
    limit = time.monotonic() - began
    done = capsys.readouterr().out.splitlines()[-1]
    seconds = int(re.match(r"done: 1 steps, (\d+) s \(and 9000 s of warm-up, cached\), ", done)[1])
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert 0 < summary["seconds"] < limit and abs(seconds - summary["seconds"]) < 1
