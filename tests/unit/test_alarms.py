"""A wait that lasts is named by stage and problem; a share that stays high is told once."""

from __future__ import annotations

import time

from igrpo_nemo.alarms import HEADLINES, HeadlineWatch, StallAlarm


def test_waits_that_last_are_named_and_told_again_after_as_long():
    said, now = [], [0.0]
    alarm = StallAlarm(60, said.append, clock=lambda: now[0])
    ids = [f"p{n}" for n in range(7)]
    with alarm.waiting("draft, rewards", ids), alarm.waiting("refine, sampling", ["q"]) as moved:
        now[0] = 59.0
        alarm.look()
        moved()
        assert said == []
        now[0] = 61.0
        alarm.look()
        alarm.look()
        assert said == [
            "warning: waiting for 61 s: draft, rewards of p0, p1, p2, p3, p4 and 2 more "
            "(igrpo.stall_alarm_s)"
        ]
        now[0] = 122.0
        alarm.look()
        assert len(said) == 2 and "waiting for 122 s: draft, rewards of p0" in said[1]
        assert "; refine, sampling of q (" in said[1]
    now[0] = 500.0
    alarm.look()
    assert len(said) == 2


def test_a_thread_looks_while_it_is_open():
    said = []
    with StallAlarm(0.05, said.append) as alarm, alarm.waiting("draft, rewards", ["p"]):
        limit = time.monotonic() + 20
        while not said and time.monotonic() < limit:
            time.sleep(0.01)
    assert "draft, rewards of p" in said[0]
    with StallAlarm(0, said.clear) as never, never.waiting("draft, rewards", ["p"]):
        assert said


def test_a_share_above_its_threshold_is_told_once_with_what_to_change():
    said = []
    watch = HeadlineWatch(said.append, window=3)
    for share in (0.0, 1.0, 0.0, 0.0, 1.0, 1.0, 1.0):
        watch.step({"igrpo/draft_truncated_rate": share, "loss": 1.0})
    assert len(said) == 1 and "raise policy.generation.max_new_tokens" in said[0]
    assert said[0].startswith("warning: 33% drafts that met the token limit in the last 3 steps")
    for _ in range(3):
        watch.step({each.metric: 1.0 for each in HEADLINES})
    assert len(said) == len(HEADLINES) == 3
    assert "groups without advantage" in said[2] and "\n" not in "".join(said)
