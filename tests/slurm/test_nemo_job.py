"""NeMo-RL's own loop in a job: it returns 0 when it stops, and is resumed all the same."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

DEFAULT_SOURCE = Path.home() / ".cache" / "igrpo-nemo" / "nemo-rl-0.7.0"
SOURCE = Path(os.environ.get("NEMO_RL_SRC", DEFAULT_SOURCE))

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        not (SOURCE / "nemo_rl").is_dir(),
        reason=f"NEMO-RL IS NOT HERE: set NEMO_RL_SRC to its source tree, or put it in {SOURCE}",
    ),
]

STEPS = 4

SITE = """\
import sys
if sys.version_info < (3, 12):
    import typing
    import typing_extensions
    typing.TypedDict = typing_extensions.TypedDict
"""
"""pydantic, through which NeMo-RL reads its configs, refuses the standard one before 3.12."""


def test_a_run_that_stops_at_its_time_limit_goes_on_and_ends_with_the_marker(run, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(SITE)
    run.close_gate(2)
    words = ("engine=nemo_rl_local", f"grpo.max_num_steps={STEPS}")
    run.train(*words, flags=("--time=8:00:00",), PYTHONPATH=f"{tmp_path}:{SOURCE}")
    run.wait_at_gate(2)
    run.signal("USR1")
    assert run.wait_for_state("COMPLETED", "FAILED")["ExitCode"] == "0:0", run.log()
    assert run.shown()["Restarts"] == "1" and (run.run_dir / "finished").exists()
    first = run.run_dir / "slurm" / f"{run.job}-0"
    assert (first / "driver.exit").read_text() == "0\n"
    assert "checkpointing.checkpoint_must_save_by=" in (first / "driver.sh").read_text()
    # NeMo-RL stops at the end of a step: the one after the gate.
    assert run.steps() == list(range(1, STEPS + 1))
    said = run.driver_log(0)
    assert "stopped after step 3" in said, said
