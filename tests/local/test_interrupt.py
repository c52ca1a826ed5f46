"""Signals set a flag, a second SIGINT stops at once, handlers come back, workers stay killable."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from igrpo_nemo.run.stop import EXIT_INTERRUPTED, SIGNALS, InterruptFlag


def send(number: signal.Signals) -> None:
    signal.raise_signal(number)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_sets_the_flag_and_says_so_once(number):
    lines = []
    with InterruptFlag(announce=lines.append) as flag:
        assert not flag.requested
        send(number)
        assert flag.requested
        send(signal.SIGTERM)
    assert lines == [
        f"{number.name}: finishing the micro-batch, then saving; press again to stop at once"
    ]


def test_the_second_sigint_stops_at_once_and_other_signals_never_do():
    lines = []
    with InterruptFlag(announce=lines.append):
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            send(number)
        assert len(lines) == 1 and lines[0].startswith("SIGUSR1: ")
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)


def test_handlers_are_restored_even_after_an_error():
    def mine(number, frame):
        pass

    before = signal.signal(signal.SIGUSR1, mine)
    try:
        others = [signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)]
        with pytest.raises(RuntimeError), InterruptFlag():
            assert signal.getsignal(signal.SIGUSR1) is not mine
            raise RuntimeError
        assert signal.getsignal(signal.SIGUSR1) is mine
        assert others == [signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)]
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_outside_the_main_thread_it_is_inert():
    before = [signal.getsignal(number) for number in SIGNALS]
    inside = []

    def body():
        with InterruptFlag() as flag:
            inside.extend(signal.getsignal(number) for number in SIGNALS)
            assert not flag.requested
            inside.append("left")

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert inside == [*before, "left"]


def test_a_forked_worker_is_still_killed_by_sigterm():
    with InterruptFlag(announce=lambda line: None) as flag:
        child = os.fork()
        if child == 0:
            time.sleep(30)
            os._exit(0)
        time.sleep(0.05)
        os.kill(child, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
        assert not flag.requested


def test_a_process_ends_with_its_own_exit_code_and_one_line():
    program = (
        "import sys, time\n"
        "from igrpo_nemo.run.stop import EXIT_INTERRUPTED, InterruptFlag\n"
        "with InterruptFlag() as flag:\n"
        "    print('ready', flush=True)\n"
        "    while not flag.requested: time.sleep(0.01)\n"
        "sys.exit(EXIT_INTERRUPTED)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == EXIT_INTERRUPTED == 75
    assert errors.strip() == (
        "SIGTERM: finishing the micro-batch, then saving; press again to stop at once"
    )
