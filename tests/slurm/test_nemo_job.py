"""NeMo-RL's own loop in a job: it returns 0 when it stops, and is to be resumed all the same."""

from __future__ import annotations

import pytest
from slurm_jobs import FAKE_SECRETS

pytestmark = pytest.mark.timeout(900)


def test_a_run_that_stops_at_its_time_limit_goes_back_to_the_queue(stopped_nemo):
    run = stopped_nemo
    assert "JobState=PENDING" in run.seen and "Restarts=1" in run.seen, run.log()
    first = run.run_dir / "slurm" / f"{run.job}-0"
    assert (first / "driver.exit").read_text() == "0\n"
    assert not (run.run_dir / "finished").exists()
    # It stops at the end of a step: of the one after the gate.
    assert run.steps() == [1, 2, 3] and run.newest_checkpoint() == 3
    assert "saved up to step 3: back to the queue" in run.output()
    assert "checkpointing.checkpoint_must_save_by=" in (first / "driver.sh").read_text()


def test_no_secret_is_in_its_files(stopped_nemo):
    for path in stopped_nemo.folder.rglob("*"):
        if path.is_file():
            assert not any(v.encode() in path.read_bytes() for v in FAKE_SECRETS.values()), path
