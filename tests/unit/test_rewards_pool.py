"""The pool: limits, order, deadlines, callers of every kind, and no process left behind."""

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hostile_text import hostile_completions

from igrpo_nemo.errors import UserError
from igrpo_nemo.rewards import ScoreRequest, build_scorer
from igrpo_nemo.rewards.accuracy import Reason
from igrpo_nemo.rewards.pool import VerifierPool
from igrpo_nemo.types import Problem

HANGS = "9^{9^{9^{9}}}"


def _request(gold: str, answer: str) -> ScoreRequest:
    return ScoreRequest(Problem("p", "", gold), f"<answer>{answer}</answer>")


def _formulas(count: int) -> list[ScoreRequest]:
    """Pairs that need math-verify; every third is wrong."""
    return [_request(f"x + {i}", f"{i + (i % 3 == 0)} + x") for i in range(count)]


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def _gone(pids, seconds: float = 5.0) -> bool:
    limit = time.monotonic() + seconds
    while any(map(_alive, pids)):
        if time.monotonic() > limit:
            return False
        time.sleep(0.02)
    return True


@pytest.fixture(scope="module")
def pool():
    with VerifierPool(workers=2, item_timeout_s=2.0, group_deadline_s=60.0) as pool:
        pool.warm_up()
        yield pool


def test_verdicts_come_in_the_order_of_the_requests(pool):
    verdicts = pool.verdicts(_formulas(60))
    assert [v.correct for v in verdicts] == [i % 3 != 0 for i in range(60)]
    assert verdicts[1].answer == "1 + x"


def test_equal_pairs_are_compared_once_and_remembered(pool):
    requests = [_request("y^2 + 1", "1 + y^2")] * 20
    before = pool.stats.compared
    assert all(v.correct for v in pool.verdicts(requests))
    assert all(v.correct for v in pool.verdicts(requests))
    assert pool.stats.compared == before + 1


def test_a_hanging_item_times_out_and_the_others_do_not():
    with VerifierPool(workers=1, item_timeout_s=0.5) as pool:
        pool.warm_up()
        first = pool.process_ids()[1:]
        start = time.monotonic()
        requests = [*_formulas(5), _request("5", HANGS), *_formulas(9)[5:], _request("5", "5")]
        verdicts = pool.verdicts(requests)
        assert time.monotonic() - start < 2.5
        assert verdicts[5].reason is Reason.TIMEOUT
        assert [v.correct for v in verdicts[:5] + verdicts[6:]] == [
            *(i % 3 != 0 for i in range(9)),
            True,
        ]
        assert pool.stats.timeouts == 1
        assert _gone(first)


def test_a_worker_that_dies_is_replaced(pool):
    for pid in pool.process_ids()[1:]:
        os.kill(pid, signal.SIGKILL)
    verdicts = pool.verdicts(_formulas(90)[60:])
    # The item under which a worker died has another try.
    assert [v.correct for v in verdicts] == [i % 3 != 0 for i in range(60, 90)]
    assert pool.stats.crashes == 2


def test_a_supervisor_that_dies_is_replaced():
    with VerifierPool(workers=1) as pool:
        pool.warm_up()
        old = pool.process_ids()
        os.kill(old[0], signal.SIGKILL)
        assert _gone(old)
        assert pool.verdicts([_request("z + 2", "2 + z")])[0].correct
        assert pool.verdicts([_request("z + 3", "3 + z")])[0].correct
        assert pool.process_ids()[0] != old[0]


def test_the_deadline_of_a_group_gives_the_fallback_to_what_is_missing():
    with VerifierPool(workers=1, item_timeout_s=30.0, group_deadline_s=1.0) as pool:
        pool.warm_up()
        start = time.monotonic()
        verdicts = pool.verdicts(
            [_request("x + 1", "1 + x"), _request("5", HANGS), _request("x + 2", "2 + x")]
        )
        assert time.monotonic() - start < 2.0
        assert [v.reason for v in verdicts] == [Reason.MATCH, Reason.TIMEOUT, Reason.TIMEOUT]
        assert pool.stats.missed_deadline == 2
        closing = time.monotonic()
    assert time.monotonic() - closing < 5.0


def test_a_worker_may_not_take_more_memory_than_allowed():
    with VerifierPool(workers=1, item_timeout_s=1.0, memory_limit_mb=600) as pool:
        pool.warm_up()
        pids = pool.process_ids()[1:]
        limits = Path(f"/proc/{pids[0]}/limits").read_text()
        assert str(600 * 1024 * 1024) in next(
            line for line in limits.splitlines() if line.startswith("Max address space")
        )
        assert not pool.verdicts([_request("5", "10^{10^{9}} - 1")])[0].correct
        assert pool.verdicts([_request("x + 1", "1 + x")])[0].correct


def test_threads_share_a_pool(pool):
    with ThreadPoolExecutor(4) as threads:
        groups = [_formulas(100 + 10 * i)[90 + 10 * i :] for i in range(8)]
        results = list(threads.map(pool.verdicts, groups))
    for i, verdicts in enumerate(results):
        numbers = range(90 + 10 * i, 100 + 10 * i)
        assert [v.correct for v in verdicts] == [n % 3 != 0 for n in numbers]


def test_the_caller_keeps_its_signal_handlers_and_may_be_any_thread():
    numbers = (signal.SIGALRM, signal.SIGCHLD, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    results = []

    def work():
        with VerifierPool(workers=1, item_timeout_s=0.4) as pool:
            pool.warm_up()
            results.extend(pool.verdicts([_request("5", HANGS), _request("v + 1", "1 + v")]))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(30)
    assert [v.reason for v in results] == [Reason.TIMEOUT, Reason.MATCH]
    assert [signal.getsignal(number) for number in numbers] == before


def test_closing_ends_every_process():
    pool = VerifierPool(workers=2)
    pool.warm_up()
    pids = pool.process_ids()
    assert len(pids) == 3
    pool.close()
    pool.close()
    assert _gone(pids)
    with pytest.raises(RuntimeError, match="closed"):
        pool.verdicts([_request("5", "5")])


def test_a_forgotten_pool_ends_its_processes():
    pool = VerifierPool(workers=1)
    pool.warm_up()
    pids = pool.process_ids()
    del pool
    gc.collect()
    assert _gone(pids)


PARENT = """
import sys, threading, time
from igrpo_nemo.rewards import ScoreRequest
from igrpo_nemo.rewards.pool import VerifierPool
from igrpo_nemo.types import Problem

pool = VerifierPool(workers=2, item_timeout_s=60.0)
pool.warm_up()
hang = [ScoreRequest(Problem("p", "", "5"), "<answer>9^{9^{9^{%d}}}</answer>" % i) for i in (8, 9)]
threading.Thread(target=pool.verdicts, args=(hang,), daemon=True).start()
time.sleep(0.3)
print(*pool.process_ids(), "torch" in sys.modules, flush=True)
time.sleep(60)
"""


def test_nothing_outlives_a_killed_parent_and_no_worker_has_torch():
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    *pids, has_torch = parent.stdout.readline().split()
    pids = [int(pid) for pid in pids]
    assert has_torch == "False"
    assert len(pids) == 3 and all(map(_alive, pids))
    for pid in pids:
        assert "torch" not in Path(f"/proc/{pid}/maps").read_text()
    parent.kill()
    parent.wait()
    assert _gone(pids)


def test_workers_do_not_see_secrets(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "a-secret")
    with VerifierPool(workers=1) as pool:
        pool.warm_up()
        for pid in pool.process_ids():
            assert b"a-secret" not in Path(f"/proc/{pid}/environ").read_bytes()


def test_a_scorer_over_the_pool_gives_the_same_as_one_in_process():
    requests = [*_formulas(12), _request("5", "5"), ScoreRequest(Problem("p", "", "5"), "none")]
    pooled = build_scorer(workers=1, item_timeout_s=5.0, group_deadline_s=60.0)
    try:
        assert pooled(requests) == build_scorer(workers=0)(requests)
    finally:
        pooled.close()


@pytest.mark.parametrize(
    ("option", "named"),
    [
        ({"workers": 0}, "num_workers"),
        ({"item_timeout_s": 0.0}, "item_timeout_s"),
        ({"group_deadline_s": -1.0}, "group_deadline_s"),
        ({"memory_limit_mb": 8}, "memory_limit_mb"),
    ],
)
def test_limits_that_cannot_work_are_refused(option, named):
    with pytest.raises(UserError, match=named):
        VerifierPool(**option)


def test_a_thousand_hostile_completions():
    limit = 0.3
    hostile = [ScoreRequest(Problem("h", "", "5"), text) for text in hostile_completions()]
    good = _formulas(40)
    requests = [request for i, bad in enumerate(hostile) for request in (bad, *good[i : i + 1])]
    assert len(hostile) >= 1_000
    with VerifierPool(workers=2, item_timeout_s=limit, group_deadline_s=240.0) as pool:
        pool.warm_up()
        verdicts = pool.verdicts(requests)
        pids = pool.process_ids()
        stats = pool.stats
    verdict_of = dict(zip(map(id, requests), verdicts, strict=True))
    assert not any(verdict_of[id(request)].correct for request in hostile)
    assert [verdict_of[id(r)].correct for r in good] == [i % 3 != 0 for i in range(40)]
    assert stats.missed_deadline == 0
    assert stats.timeouts > 10 and stats.slowest_s < limit + 1.0
    assert len(pids) <= 3 and _gone(pids)
