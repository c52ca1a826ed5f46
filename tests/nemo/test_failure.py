"""The watchdog of a rollout that fails in another process, without a trainer."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from igrpo_nemo.nemo.failure import LostProcessError, RolloutError, Watchdog


@pytest.fixture(params=[signal.default_int_handler, signal.SIG_IGN], ids=["terminal", "background"])
def handler(request):
    """A process that a script starts with `&` ignores SIGINT."""
    before = signal.signal(signal.SIGINT, request.param)
    yield request.param
    signal.signal(signal.SIGINT, before)


def test_a_failure_ends_a_wait_for_a_lock(ray_cluster, handler):
    watchdog = Watchdog()

    def fail():
        with pytest.raises(RolloutError), watchdog.reporter.watching():
            raise RolloutError("problem p1, stage draft: no tokens")

    threading.Timer(0.2, fail).start()
    started = time.monotonic()
    with pytest.raises(RolloutError, match=r"^problem p1, stage draft: no tokens$"), watchdog():
        threading.Event().wait(60)
    assert time.monotonic() - started < 30
    assert signal.getsignal(signal.SIGINT) is handler


def test_an_interrupt_without_a_failure_does_what_it_did(ray_cluster, handler):
    def interrupted():
        with Watchdog()():
            os.kill(os.getpid(), signal.SIGINT)

    if handler is signal.SIG_IGN:
        interrupted()
    else:
        with pytest.raises(KeyboardInterrupt):
            interrupted()


def test_an_error_that_the_trainer_sees_by_itself_is_the_one_that_was_reported(ray_cluster):
    """As NeMo-RL's main does: it asks its collector, whose error is Ray's with a page of text."""
    from ray.exceptions import ActorDiedError, RayTaskError

    seen = RayTaskError("check_health", "trace", RuntimeError("aborting")).as_instanceof_cause()
    watchdog = Watchdog()
    with pytest.raises(RolloutError, match=r"^problem p1, stage draft: no tokens$"), watchdog():
        with pytest.raises(RolloutError), watchdog.reporter.watching():
            raise RolloutError("problem p1, stage draft: no tokens")
        raise seen
    with pytest.raises(LostProcessError, match="^the process that rolls out is gone"), Watchdog()():
        raise ActorDiedError
