import random
from statistics import mean

import pytest

from igrpo_nemo.rewards import build_scorer
from igrpo_nemo.rewards.weighted import ScoreRequest
from igrpo_nemo.tasks import TASKS, generated_problems
from igrpo_nemo.tasks.chain import Chain, ChainTask, LongChainTask, solution_of
from igrpo_nemo.tasks.sudoku import SudokuTask, fits, grids
from igrpo_nemo.tasks.task import WorkedAnswer, verdict, written
from igrpo_nemo.types import Problem

SIZES = {"arithmetic": [6], "long_chain": [6, 12], "sudoku": [8]}
"""The lengths of configs/data."""


def test_a_chain_keeps_last_digits_and_answers_with_the_last_two():
    chain = Chain(7, (("+", 5), ("*", 3), ("-", 9)))
    assert chain.question == "7+5*3-9="
    assert chain.results == (2, 6, 7)
    assert chain.answer == "67"


def test_every_operation_is_a_bijection_of_the_digits():
    rng = random.Random(0)
    for _ in range(50):
        operations = ChainTask().sample(rng, 5).operations
        ends = {Chain(start, operations).results[-1] for start in range(10)}
        assert len(ends) == 10


def test_a_sudoku_has_one_solution_among_all_grids():
    assert len(set(grids())) == 288 and all(map(fits, grids()))
    rng = random.Random(1)
    for _ in range(30):
        sudoku = SudokuTask().sample(rng, 8)
        assert sudoku.question.count(".") == 8
        shown = sudoku.question.rstrip("=")
        texts = ("".join(map(str, grid)) for grid in grids())
        fitting = [t for t in texts if all(a in (b, ".") for a, b in zip(shown, t, strict=True))]
        assert fitting == [sudoku.answer]


@pytest.mark.parametrize("name", TASKS)
def test_splits_are_disjoint_and_deterministic(name):
    sizes = [*SIZES[name], SIZES[name][-1] - 1]
    train = generated_problems(name, 300, lengths=sizes, seed=0, split="train")
    held_out = generated_problems(name, 100, lengths=sizes, seed=0, split="validation")
    assert not {p.question for p in train} & {p.question for p in held_out}
    assert train == generated_problems(name, 300, lengths=sizes, seed=0, split="train")
    assert train != generated_problems(name, 300, lengths=sizes, seed=1, split="train")
    assert len({p.id for p in train + held_out}) == 400


def test_too_many_problems_for_their_length_is_an_error():
    with pytest.raises(ValueError, match="fewer than 400"):
        generated_problems("arithmetic", 400, lengths=[1], seed=0, split="train")


def score(exercise, text):
    problem = Problem("1", exercise.question, exercise.answer)
    return build_scorer()([ScoreRequest(problem, text)])[0]


@pytest.mark.parametrize("name", TASKS)
def test_right_solutions_earn_everything_and_attempts_a_middling_share(name):
    task, rng = TASKS[name](seed=5), random.Random(1)
    exercises = [task.sample(rng, rng.choice(SIZES[name])) for _ in range(400)]
    assert all(score(e, task.right(e).text).reward == 2.0 for e in exercises[:50])
    attempts = [task.attempt(exercise, rng) for exercise in exercises]
    if isinstance(task, LongChainTask):  # a completion ends in the middle of longer ones
        attempts = [a if len(a.steps) <= 6 else WorkedAnswer(a.steps[:12], None) for a in attempts]
    scores = [score(e, a.text).correct for e, a in zip(exercises, attempts, strict=True)]
    assert 0.1 < mean(scores) < 0.4


@pytest.mark.parametrize("name", TASKS)
def test_corrections_mostly_keep_right_drafts_and_improve_wrong_ones(name):
    task, rng = TASKS[name](), random.Random(3)
    right, mended = [], []
    for _ in range(600):
        exercise = task.sample(rng, rng.choice(SIZES[name]))
        draft = task.draft(exercise, rng)
        corrected = task.correct(exercise, draft, rng).answer == exercise.answer
        (right if draft.answer == exercise.answer else mended).append(corrected)
    assert mean(right) > 0.7 > mean(mended) > 0.35


def test_a_draft_that_was_cut_off_is_continued():
    task, rng = LongChainTask(fixed_error_share=0.0, slip=0.0), random.Random(9)
    for size in (12, 14):
        chain = task.sample(rng, size)
        cut = task.draft(chain, rng)
        shown = tuple(map(str, chain.results))
        assert cut == WorkedAnswer(shown[:12], None) and cut.text == "<think>" + "".join(cut.steps)
        assert task.correct(chain, cut, rng) == WorkedAnswer(shown[12:], chain.answer)
    short = task.sample(rng, 6)
    assert task.draft(short, rng) == task.right(short)


def test_the_demonstrator_errs_as_often_as_its_rates_say():
    rng = random.Random(2)
    flawless = ChainTask(fixed_error_share=0.0, slip=0.0)
    chains = [flawless.sample(rng, 6) for _ in range(600)]
    assert all(flawless.attempt(c, rng) == flawless.right(c) for c in chains[:50])
    right, mended = [], []
    for chain in chains:
        right.append(flawless.correct(chain, flawless.right(chain), rng).answer == chain.answer)
        wrong = solution_of([(digit + 1) % 10 for digit in chain.results])
        mended.append(flawless.correct(chain, wrong, rng).answer == chain.answer)
    assert mean(right) == pytest.approx(0.95**2, abs=0.06)
    assert mean(mended) == pytest.approx(0.8**2, abs=0.08)


def test_a_verdict_follows_from_an_own_solution():
    flawless, rng = ChainTask(fixed_error_share=0.0, slip=0.0), random.Random(7)
    chain = flawless.sample(random.Random(6), 6)
    wrong = solution_of([(digit + 1) % 10 for digit in chain.results])
    for draft, word in ((flawless.right(chain), "yes"), (wrong, "no")):
        text = verdict(flawless, chain, draft, ("yes", "no"), rng).text
        assert text == f"<think>{''.join(map(str, chain.results))}</think><answer>{word}</answer>"


def test_broken_formats_lose_a_tag():
    rng, solution = random.Random(4), solution_of([2])
    texts = {written(solution, rng, broken_format=1.0) for _ in range(40)}
    assert texts and all(solution.text.count("<") > text.count("<") for text in texts)
