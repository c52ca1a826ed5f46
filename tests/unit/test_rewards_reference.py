"""Which references are none, and that nothing equals them."""

import pytest

from igrpo_nemo.rewards.accuracy import (
    Reason,
    gold_verdict,
    is_missing_reference,
    verify_completion,
)

MISSING = [
    *("", " ", "nan", "NaN", "None", "null", "N/A", "n/a", "$\\text{N/A}$", "<NA>", "-", "?"),
    *(
        "see figure above",
        "See the solution below.",
        "(see attached image)",
        "Refer to the diagram",
    ),
    *("as shown in the figure", "\\text{see explanation}", "Not available"),
]
PRESENT = ["0", "none", "\\text{None}", "n", "na", "-1", "\\emptyset", "see", "figure 3", "NAN"[1:]]


@pytest.mark.parametrize("gold", MISSING)
def test_a_missing_value_is_no_reference_and_nothing_equals_it(gold):
    assert is_missing_reference(gold)
    assert gold_verdict(gold) in (Reason.NO_ANSWER, Reason.NO_REFERENCE)
    verdict = verify_completion(gold, f"<answer>{gold}</answer>")
    assert (verdict.reason, verdict.correct) == (Reason.NO_REFERENCE, False)


@pytest.mark.parametrize("gold", PRESENT)
def test_what_only_looks_like_one_is_a_reference(gold):
    assert not is_missing_reference(gold)
