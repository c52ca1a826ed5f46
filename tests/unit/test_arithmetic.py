import random
from statistics import mean

import pytest

from igrpo_nemo.data.arithmetic import Chain, answer_of, arithmetic_problems, sample_chain
from igrpo_nemo.data.demonstrations import Demonstrator, solution_text
from igrpo_nemo.rewards import build_scorer
from igrpo_nemo.rewards.weighted import ScoreRequest
from igrpo_nemo.types import Problem


def test_a_chain_keeps_last_digits_and_answers_with_the_last_two():
    chain = Chain(7, (("+", 5), ("*", 3), ("-", 9)))
    assert chain.question == "7+5*3-9="
    assert chain.results == (2, 6, 7)
    assert chain.answer == "67"


def test_every_operation_is_a_bijection_of_the_digits():
    rng = random.Random(0)
    for _ in range(50):
        operations = sample_chain(rng, 5).operations
        ends = {Chain(start, operations).results[-1] for start in range(10)}
        assert len(ends) == 10


def test_splits_are_disjoint_and_deterministic():
    train = arithmetic_problems(300, lengths=[3, 4], seed=0, split="train")
    held_out = arithmetic_problems(100, lengths=[3, 4], seed=0, split="validation")
    assert not {p.question for p in train} & {p.question for p in held_out}
    assert train == arithmetic_problems(300, lengths=[3, 4], seed=0, split="train")
    assert train != arithmetic_problems(300, lengths=[3, 4], seed=1, split="train")
    assert len({p.id for p in train + held_out}) == 400


def test_too_many_problems_for_their_length_is_an_error():
    with pytest.raises(ValueError, match="fewer than 400"):
        arithmetic_problems(400, lengths=[1], seed=0, split="train")


def score(chain, text):
    problem = Problem("1", chain.question, chain.answer)
    return build_scorer()([ScoreRequest(problem, text)])[0]


def test_right_solutions_earn_everything():
    rng = random.Random(1)
    for _ in range(50):
        chain = sample_chain(rng, 6)
        assert score(chain, solution_text(chain.results)).reward == 2.0


def test_the_demonstrator_errs_as_often_as_its_rates_say():
    demonstrator, rng = Demonstrator(seed=5, broken_format=0.0), random.Random(2)
    chains = [sample_chain(rng, 6) for _ in range(800)]
    accuracy = mean(score(c, demonstrator.solve(c, rng)).correct for c in chains)
    # Each of six steps is right with about .7 * .97 + .3 * .3 = .77.
    assert 0.1 < accuracy < 0.4
    flawless = Demonstrator(fixed_error_share=0.0, slip=0.0, broken_format=0.0)
    assert all(flawless.solve(c, rng) == solution_text(c.results) for c in chains[:50])


def test_corrections_improve_wrong_drafts_and_mostly_keep_right_ones():
    demonstrator, rng = Demonstrator(broken_format=0.0), random.Random(3)
    right, mended = [], []
    for _ in range(600):
        chain = sample_chain(rng, 6)
        kept = demonstrator.correct(chain, chain.results, rng)
        right.append(score(chain, kept).correct)
        wrong = tuple((digit + 1) % 10 for digit in chain.results)
        mended.append(score(chain, demonstrator.correct(chain, wrong, rng)).correct)
    assert mean(right) == pytest.approx(0.95**2, abs=0.06)
    assert mean(mended) == pytest.approx(0.8**2, abs=0.08)


def test_a_verdict_follows_from_an_own_solution():
    flawless = Demonstrator(fixed_error_share=0.0, slip=0.0)
    chain, rng = sample_chain(random.Random(6), 6), random.Random(7)
    wrong = tuple((digit + 1) % 10 for digit in chain.results)
    for stated, word in ((chain.results, "yes"), (wrong, "no")):
        text = flawless.judge(chain, stated, ("yes", "no"), rng)
        assert text == f"<think>{''.join(map(str, chain.results))}</think><answer>{word}</answer>"


def test_broken_formats_lose_a_tag():
    demonstrator = Demonstrator(broken_format=1.0)
    rng = random.Random(4)
    texts = {demonstrator.solve(Chain(1, (("+", 1),)), rng) for _ in range(40)}
    assert texts and all(solution_text([2]).count("<") > text.count("<") for text in texts)


def test_answers_are_the_last_two_results():
    assert answer_of([1, 2, 3]) == "23" and answer_of([4]) == "4"
