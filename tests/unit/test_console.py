"""What a run prints: a line a step, and samples that cannot command a terminal."""

import io
import os

import pytest
from hostile_text import NASTY, ROW

from igrpo_nemo.files.display_text import printable, shorten
from igrpo_nemo.tracking import Console


def test_model_text_cannot_command_a_terminal():
    shown = printable(NASTY)
    assert shown == "[bold red]x[/] red a b\ufffd \ufffdevil \ufffd end"
    assert printable("a\nb\t\u2028c") == "a b c"
    assert printable("\x1bP payload \x1b\\x\x1bc\x1b(B\x1b") == "x"


def test_shortening_keeps_the_end_and_is_bounded(monkeypatch):
    seen = []
    monkeypatch.setattr(
        "igrpo_nemo.files.display_text.printable", lambda text: seen.append(text) or text
    )
    shown = shorten("start " + "x" * 5_000_000 + " the answer is 42", 60)
    assert len(seen[0]) < 1_000, "looks at far more than it shows"
    assert len(shown) <= 60 and shown.startswith("start") and shown.endswith("answer is 42")
    assert shorten("short", 60) == "short"


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


METRICS = {
    "igrpo/draft_reward": 0.5,
    "igrpo/refinement_reward": 1.25,
    "entropy/exact": 0.75,
    "perf/tokens_per_s": 1234.5,
}


def test_console_prints_one_line_per_step():
    clock, stream = Clock(), io.StringIO()
    console = Console(100, stream, clock)
    clock.now = 2.0
    console.stage("draft", 1, 8)
    console.step(1, METRICS)
    console.step(1, {"val/accuracy": 0.5, "val/reward": 1.0})
    console.step(2, {"igrpo/draft_reward": 0.5})
    lines = stream.getvalue().splitlines()
    assert lines[0] == (
        "step   1/100  draft reward 0.50  refinement reward 1.25  entropy 0.75  "
        "tokens/s 1,234  ETA 0:03:18"
    )
    assert lines[1] == "step   1/100  val accuracy 50.0%"
    assert lines[2].startswith("step   2/100  draft reward 0.50  ETA")
    clock.now = 40.0
    console.stage("refine", 3, 8)
    console.stage("refine", 4, 8)
    assert stream.getvalue().splitlines()[3:] == ["  refine 3/8"]


def test_console_shows_samples_as_inert_single_lines():
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", newline="\n")
    console = Console(3, stream)
    console.samples(2, [ROW] * 9)
    console.note(f"saved {NASTY}")
    printed = stream.buffer.getvalue()
    assert printed.count(b"\n") == 3 * 3 + 1
    assert not any(byte < 32 and byte != 10 or byte > 126 for byte in printed)
    assert b"draft (reward 0.00, wrong): " in printed
    assert b"refinement (reward 2.00, correct): " in printed and b" two\n" in printed


def test_a_console_without_reader_does_not_end_the_run():
    reader, writer = os.pipe()
    os.close(reader)
    stream = open(writer, "w")
    console = Console(3, stream)
    for step in range(3):
        console.step(step, METRICS)
    with pytest.raises(BrokenPipeError):
        stream.close()
