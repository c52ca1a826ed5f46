"""Ctrl-C and SIGTERM on a pipeline: the trainer saves, nothing that was started stays behind."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from igrpo_nemo.chain.script import run_to_its_end
from igrpo_nemo.run.stop import handling

# Stands in for `igrpo train`: takes longer to save than subprocess.run waits after Ctrl-C.
TRAINER = """\
import pathlib, signal, sys, time
asked = []
for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
    signal.signal(getattr(signal, name), lambda *_: asked.append(1))
print("training", flush=True)
end = time.monotonic() + 60
while not asked and time.monotonic() < end:
    time.sleep(0.01)
time.sleep(0.7)
pathlib.Path(sys.argv[1]).write_text(str(len(asked)))
sys.exit(75)
"""

PIPELINE = """\
import sys
from igrpo_nemo.config import load_config
from igrpo_nemo.chain import here
from igrpo_nemo.chain.script import exit_code
here.IGRPO = (sys.executable, "-c", sys.argv[1], sys.argv[2] + "/saved")
config = load_config(["experiment=demo", f"logger.log_dir={sys.argv[2]}/run"])
sys.exit(exit_code(lambda words: here.train_here(config, []), []))
"""

# A stage that works in this process, and ends what it started in a `finally`.
STAGE = """\
import pathlib, sys, time
from igrpo_nemo.chain.script import exit_code
def main(words):
    try:
        print("working", flush=True)
        time.sleep(60)
    finally:
        pathlib.Path(sys.argv[1]).touch()
sys.exit(exit_code(main, []))
"""


def started(program: str, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", program, *words],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_trainer_that_is_told_to_stop_saves_first(tmp_path: Path, number: signal.Signals) -> None:
    process = started(PIPELINE, TRAINER, str(tmp_path))
    try:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(2)]
        assert lines == ["train: igrpo train\n", "training\n"]
        if number == signal.SIGINT:
            os.killpg(process.pid, number)  # as a terminal does
        else:
            process.send_signal(number)
        rest, _ = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 75
    assert (tmp_path / "saved").read_text() == "1"
    assert "stopped with its state saved" in rest


def test_a_signal_before_the_child_is_there_reaches_it(monkeypatch: pytest.MonkeyPatch) -> None:
    real = subprocess.Popen

    def slow(*words, **named):
        signal.raise_signal(signal.SIGINT)
        return real(*words, **named)

    monkeypatch.setattr(subprocess, "Popen", slow)
    assert run_to_its_end(["sleep", "60"]) == 128 + signal.SIGTERM


def test_exit_codes_and_handlers_are_those_of_before() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    assert run_to_its_end(["sh", "-c", "exit 3"]) == 3
    assert run_to_its_end(["sh", "-c", "kill -KILL $$"]) == 137
    with pytest.raises(KeyError), handling({signal.SIGTERM: lambda *_: None}):
        raise KeyError
    assert before == {number: signal.getsignal(number) for number in before}


def test_sigterm_unwinds_every_script(tmp_path: Path) -> None:
    process = started(STAGE, str(tmp_path / "ended"))
    try:
        assert process.stdout is not None and process.stdout.readline() == "working\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 143
    finally:
        process.kill()
    assert (tmp_path / "ended").exists()
