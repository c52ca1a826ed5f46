"""What can break while the real `ns eval` runs: it is said, and the same command completes it.

Replies are counted at the server: nothing is evaluated twice, nothing of two settings is mixed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
import urllib.request
from pathlib import Path

import pytest
from answer_stub import Reply, Stub
from skills_runs import Ended, evaluate, write_problems

from igrpo_nemo.evaluation.results import read_results
from igrpo_nemo.evaluation.skills import program
from igrpo_nemo.evaluation.skills.program import SkillsEnvironment

pytestmark = pytest.mark.timeout(600)

PROBLEMS = 3
SAMPLES = 2
RIGHT = Reply("<answer>4</answer>")


class Setup:
    """A benchmark of three problems, and the command that evaluates it."""

    def __init__(self, tmp_path: Path, skills: SkillsEnvironment) -> None:
        self.data, self.out = tmp_path / "data", tmp_path / "out"
        self.where = self.out / "eval-results" / "toy"
        self.texts = write_problems(self.data, "toy", ["4"] * PROBLEMS)
        self.env = skills.bin.parent

    def command(self, server: Stub, *words: str) -> Ended:
        return evaluate(
            *("--address", server.address, "--data-dir", str(self.data), "--out", str(self.out)),
            *("--benchmarks", f"toy:{SAMPLES}", *words),
            env=self.env,
        )

    def await_rows(self, seed: int, rows: int) -> None:
        """Until that many replies of a sample are on disk."""
        path = self.where / f"output-rs{seed}.jsonl-async"
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if path.is_file() and path.read_bytes().count(b"\n") >= rows:
                return
            time.sleep(0.05)
        raise AssertionError(f"{path} did not get {rows} rows within 60 s")


def test_a_failure_in_the_stub_fails_the_test() -> None:
    def fault(number: int) -> None:
        raise ValueError("not what was expected")

    body = b'{"messages": [{"content": "1+1"}], "seed": 0}'
    with pytest.raises(AssertionError, match="the stub failed: not what was expected"):
        with Stub(lambda problem, seed: RIGHT, fault) as server:
            with pytest.raises(ConnectionError):
                urllib.request.urlopen(f"{server.address}/chat/completions", body, timeout=10)


def kill_process_of_sample(out: Path, seed: int) -> None:
    """kill -9 of the process that samples it."""
    listing = subprocess.run(
        ["ps", "-A", "-ww", "-o", "pid=,args="], capture_output=True, text=True
    )
    mark = f"++output_file={out}/eval-results/toy/output-rs{seed}.jsonl"
    found = []
    for line in listing.stdout.splitlines():
        pid, *args = line.split()
        if args and args[0].endswith("python") and mark in args:
            found.append(int(pid))
    assert len(found) == 1, found
    os.kill(found[0], signal.SIGKILL)


def test_what_breaks_is_said_and_the_same_command_completes_it(
    tmp_path: Path, skills: SkillsEnvironment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sample's process is killed; files are cut off; the server dies; all is there in the end."""
    monkeypatch.setattr(program, "SILENT_S", 5.0)
    setup, stub, hold = Setup(tmp_path, skills), Stub(lambda *_: RIGHT), threading.Event()

    def killed(number: int) -> None:
        """At the last request of sample 1, once the two others are on disk."""
        if number == 2 * PROBLEMS:
            setup.await_rows(seed=1, rows=PROBLEMS - 1)
            kill_process_of_sample(setup.out, 1)
            hold.wait(10)
            raise ConnectionResetError

    stub.fault = killed
    with stub:
        ended = setup.command(stub)
        hold.set()
        assert ended.code == 1 and "toy: 1 of 2 samples are missing (rs1)" in ended.err
        assert not (setup.where / "output-rs1.jsonl.done").exists()
        with (setup.where / "output-rs1.jsonl-async").open("a") as file:
            file.write('{"problem": "toy problem 2?", "generation": "<ans')
        # A finished file loses its end: the row that was cut off is sampled again, no other.
        path = setup.where / "output-rs0.jsonl"
        path.write_bytes(path.read_bytes()[:-40])
        ended = evaluate("--check", str(setup.out), env=setup.env)
        assert ended.code == 1 and "a row is broken in rs0" in ended.err
        stub.die()
        ended = setup.command(stub)
        assert ended.code == 2 and f"no server answers at {stub.address}" in ended.err

        def dies(number: int) -> None:
            if setup.texts[-1] in (key[0] for key in list(stub.answered - before)):
                stub.die()
                raise ConnectionResetError

        before = stub.answered.copy()
        stub.fault = dies
        stub.start()
        ended = setup.command(stub)
        assert ended.code == 1 and f"the server at {stub.address} stopped answering" in ended.err
        assert "toy: 1 of 2 samples are missing (rs1)" in ended.err

        stub.fault = lambda number: None
        stub.start()
        ended = setup.command(stub)
        assert ended.code == 0 and "100.00%" in ended.out, ended.err
        assert len(stub.answered) == PROBLEMS * SAMPLES
        again = {key: count for key, count in stub.answered.items() if count > 1}
        assert again == {(setup.texts[-1], 0): 2}

        answered = stub.answered.total()
        assert setup.command(stub).code == 0
        ended = setup.command(stub, "igrpo.evaluation.temperature=0.7")
        assert ended.code == 2 and "temperature was 0.6, is 0.7" in ended.err
        assert stub.answered.total() == answered
    assert {body["temperature"] for body in stub.bodies} == {0.6}
    assert read_results(setup.out).benchmarks["toy"].correct_P_K.all()
