"""`logger.*` keys of the embedded engine that show in the run folder and on the console."""

import pytest
import tiny_runs

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
