"""Pairs of answers, labelled by mathematics: `answer_pairs.txt`, by kind, equal (1) or not (0)."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from igrpo_nemo.rewards.accuracy import (
    Reason,
    Verdict,
    find_answer,
    full_verdict,
    quick_verdict,
)


def pairs() -> Iterator[tuple[str, str, str, bool]]:
    """Kind, reference, completion, label. An answer that begins with `@` is plain text in tags."""
    kind = ""
    for line in (Path(__file__).parent / "answer_pairs.txt").read_text("utf-8").splitlines():
        if line.startswith("# "):
            kind = line[2:]
        elif line:
            label, _, rest = line.partition(" | ")
            gold, _, answer = rest.partition(" <- ")
            text = f"<answer>{answer[1:]}</answer>" if answer[0] == "@" else f"\\boxed{{{answer}}}"
            yield kind, gold, text, label == "1"


@pytest.mark.parametrize("kind", dict.fromkeys(pair[0] for pair in pairs()))
def test_no_verdict_is_wrong_and_the_fast_path_agrees(kind: str) -> None:
    for _, gold, text, equal in (pair for pair in pairs() if pair[0] == kind):
        answer = find_answer(gold, text)
        if isinstance(answer, Verdict):
            assert not equal, (gold, text)
            continue
        full = full_verdict(gold, answer)
        assert (full is Reason.MATCH) == equal, (gold, text)
        assert quick_verdict(gold, answer) in (None, full), (gold, text)
