"""The two stages as plain functions: pipelining, errors, short circuit, routes. No NeMo-RL."""

from __future__ import annotations

import asyncio

import pytest

from igrpo_nemo.environment import StepReturn
from igrpo_nemo.feedback import BestDraft, NextPrompt
from igrpo_nemo.nemo.errors import RolloutError
from igrpo_nemo.nemo.short_circuit import ShortCircuit
from igrpo_nemo.nemo.stages import Ahead, Backends, Item, roll_out
from igrpo_nemo.types import Completion, Group, Problem, Prompt, Score, Stage, StopReason


class Engine:
    """Answers `texts[position]` in order, after the seconds given with each text; then at once."""

    def __init__(self, answers):
        self.answers = {position: list(rows) for position, rows in answers.items()}
        self.asked: list[str] = []
        self.cancelled: list[str] = []
        self.busy = 0

    def load(self) -> int:
        return self.busy

    async def sample(self, prompt: Prompt, route: str) -> Completion:
        self.asked.append(route)
        position = int(route.split("/")[0])
        rest = self.answers[position]
        seconds, text = rest.pop(0) if rest else (0.0, "0 more")
        if isinstance(text, Exception):
            raise text
        try:
            await asyncio.sleep(seconds)
        except asyncio.CancelledError:
            self.cancelled.append(text)
            raise
        reason = StopReason.LENGTH if text.endswith("cut") else StopReason.EOS
        return Completion(text, (1,), (), reason)


class Environment:
    """A completion's reward is the number that it begins with."""

    def __init__(self, feedback):
        self.feedback = feedback
        self.steps: list[tuple[Stage | None, str]] = []

    async def step(self, stage, attempt, *, scores=None):
        self.steps.append((stage, attempt.problem.id))
        scores = scores or tuple(Score(float(c.text.split()[0])) for c in attempt.completions)
        group = Group(
            attempt.problem, stage or Stage.DRAFT, attempt.prompt, attempt.completions, scores
        )
        if stage is not Stage.DRAFT:
            return StepReturn(group, None, (), True)
        selection = self.feedback.select(group, 0)
        shown = attempt.completions[selection.index].text
        following = NextPrompt(Prompt(f"after {shown}", (2,)), self.feedback.num_refinements)
        return StepReturn(group, selection, (following,), False)


def items(count: int) -> list[Item]:
    return [Item(Problem(f"p{n}", "q", "a"), Prompt("q", (1,)), n) for n in range(count)]


def rolled_out(count, answers, *, drafts=2, refinements=2, rule=None, ahead=None, taken=None):
    feedback = BestDraft(drafts, refinements)
    on = Backends(Engine(answers), Environment(feedback), feedback, rule or ShortCircuit())
    return asyncio.run(roll_out(items(count), on, taken, ahead)), on


def test_a_problem_goes_on_while_another_still_drafts():
    answers = {
        0: [(0.2, "0 slow"), (0.0, "1 a"), (0.0, "0 r"), (0.0, "0 r")],
        1: [(0.0, "0 b"), (0.0, "1 c"), (0.0, "1 s"), (0.0, "0 t")],
    }
    rollouts, on = rolled_out(2, answers)
    order = [step for step in on.environment.steps if step[0] is Stage.REFINE]
    assert order == [(Stage.REFINE, "p1"), (Stage.REFINE, "p0")]
    assert on.environment.steps.index((Stage.REFINE, "p1")) < on.environment.steps.index(
        (Stage.DRAFT, "p0")
    )
    assert [r.problem.id for r in rollouts] == ["p0", "p1"]
    assert rollouts[0].refinements[0].prompt.text == "after 1 a"
    assert [c.text for c in rollouts[1].refinements[0].completions] == ["1 s", "0 t"]


def test_an_error_names_its_problem_and_stops_the_others():
    answers = {
        0: [(5.0, "0 a"), (5.0, "0 b")],
        1: [(0.0, ValueError("engine on fire")), (5.0, "0 c")],
    }
    feedback = BestDraft(2, 2)
    on = Backends(Engine(answers), Environment(feedback), feedback)
    with pytest.raises(RolloutError, match="problem p1, stage draft: engine on fire"):
        asyncio.run(roll_out(items(2), on))
    assert sorted(on.engine.cancelled) == ["0 a", "0 b", "0 c"]


def test_routes_keep_a_group_together_and_apart_from_others():
    answers = {n: [(0.0, "1 a"), (0.0, "0 b"), (0.0, "0 r"), (0.0, "0 r")] for n in range(2)}
    _, on = rolled_out(2, answers)
    assert set(on.engine.asked) == {"0/draft", "0/refine/0", "1/draft", "1/refine/0"}
    assert all(on.engine.asked.count(route) == 2 for route in on.engine.asked)


INDEX_ORDER = ShortCircuit("index_order", best_reward=1.0)
CASES = [
    ([(0.0, "1 a"), (9.0, "1 b"), (9.0, "0 c")], "1 a", ["1 b", "0 c"]),
    ([(0.1, "0 a"), (0.0, "1 b"), (9.0, "1 c")], "1 b", ["1 c"]),
    ([(0.1, "1 a"), (0.0, "1 b"), (9.0, "0 c")], "1 a", ["0 c"]),
    ([(0.0, "0 a"), (0.1, "0.5 b"), (0.0, "0.5 c")], "0.5 b", []),
    ([(0.0, "1 cut"), (0.1, "1 b"), (9.0, "1 c")], "1 b", ["1 c"]),
]


@pytest.mark.parametrize(("drafts", "shown", "cancelled"), CASES)
def test_index_order_is_the_arg_max_with_first_index_ties(drafts, shown, cancelled):
    refinements = [(0.0, "0 r"), (0.0, "0 r")]
    rollouts, on = rolled_out(1, {0: drafts + refinements}, drafts=3, rule=INDEX_ORDER)
    assert rollouts[0].refinements[0].prompt.text == f"after {shown}"
    assert on.engine.cancelled == cancelled
    if not cancelled:
        assert len(rollouts[0].drafts.completions) == 3


def test_index_order_equals_the_full_arg_max_on_random_drafts():
    import random

    rng = random.Random(0)
    for _ in range(60):
        drafts = [(rng.random() / 200, f"{rng.choice(['0', '0.5', '1'])} {n}") for n in range(4)]
        rest = [(0.0, "0 r"), (0.0, "0 r")]
        short, _ = rolled_out(1, {0: drafts + rest}, drafts=4, rule=INDEX_ORDER)
        full, _ = rolled_out(1, {0: drafts + rest}, drafts=4)
        assert short[0].refinements[0].prompt == full[0].refinements[0].prompt


def _early(drafts, refinements=(), busy=0):
    """Two drafts, and what became of the second stage that began before both were done."""
    feedback = BestDraft(2, 2)
    engine = Engine({0: [*drafts, *refinements]})
    engine.busy = busy
    on = Backends(engine, Environment(feedback), feedback, INDEX_ORDER)
    [rollout] = asyncio.run(roll_out(items(1), on))
    return rollout, on


def test_stage_two_begins_while_a_single_draft_is_left():
    """The refinements of the second draft are there before the first draft is."""
    rollout, on = _early([(0.2, "0 a"), (0.0, "1 b")], [(0.1, "1 r"), (0.1, "0 s")])
    assert (on.early_starts.kept, on.early_starts.dropped) == (1, 0)
    assert rollout.refinements[0].prompt.text == "after 1 b"
    assert [c.text for c in rollout.refinements[0].completions] == ["1 r", "0 s"]
    assert [c.text for c in rollout.drafts.completions] == ["0 a", "1 b"]
    assert rollout.selection.index == 1
    scored = [step for step in on.environment.steps if step[0] is not None]
    assert scored == [(Stage.DRAFT, "p0"), (Stage.REFINE, "p0"), (Stage.DRAFT, "p0")]


def test_an_early_stage_two_of_a_beaten_draft_is_dropped():
    rollout, on = _early([(0.1, "1 a"), (0.0, "1 b")], [(9.0, "1 r"), (9.0, "0 s")])
    assert (on.early_starts.kept, on.early_starts.dropped) == (0, 1)
    assert rollout.refinements[0].prompt.text == "after 1 a"
    assert sorted(on.engine.cancelled) == ["0 s", "1 r"]
    assert [c.text for c in rollout.refinements[0].completions] == ["0 more"] * 2


def test_a_busy_engine_begins_nothing_early():
    rollout, on = _early([(0.1, "1 a"), (0.0, "1 b")], busy=128)
    assert (on.early_starts.kept, on.early_starts.dropped) == (0, 0)
    assert rollout.refinements[0].prompt.text == "after 1 a"
    assert on.engine.asked.count("0/refine/0") == 2


def test_an_early_stage_two_that_fails_matters_only_if_it_is_kept():
    broken = [(0.0, ValueError("engine on fire")), (0.0, "0 s")]
    rollout, on = _early([(0.1, "1 a"), (0.0, "1 b")], broken)
    assert rollout.refinements[0].prompt.text == "after 1 a"
    with pytest.raises(RolloutError, match="problem p0, stage refine: engine on fire"):
        _early([(0.1, "0 a"), (0.0, "1 b")], broken)


def test_first_ends_stage_one_at_once():
    drafts = [(9.0, "1 a"), (0.0, "1 b"), (9.0, "0 c")]
    rollouts, on = rolled_out(
        1, {0: [*drafts, (0.0, "0 r"), (0.0, "0 r")]}, drafts=3, rule=ShortCircuit("first", 1.0)
    )
    assert rollouts[0].refinements[0].prompt.text == "after 1 b"
    assert sorted(on.engine.cancelled) == ["0 c", "1 a"]


def test_a_draft_that_fails_fails_the_step_under_a_short_circuit_too():
    with pytest.raises(RolloutError, match="problem p0, stage draft: no"):
        rolled_out(1, {0: [(0.0, ValueError("no")), (1.0, "1 a")]}, rule=INDEX_ORDER)


def test_drafts_for_the_next_step_are_sampled_beside_the_refinements():
    answers = {
        0: [(0.0, "1 a"), (0.0, "0 b"), (0.1, "0 r"), (0.1, "0 r"), (0.0, "1 n"), (0.0, "0 n")]
    }
    ahead = Ahead(items(1))
    rollouts, on = rolled_out(1, answers, ahead=ahead)
    assert [c.text for c in ahead.drafts[0]] == ["1 n", "0 n"]
    assert [c.text for c in rollouts[0].refinements[0].completions] == ["0 r", "0 r"]
    taken = dict(ahead.drafts)
    rollouts, on = rolled_out(1, {0: [(0.0, "0 x"), (0.0, "0 y")]}, taken=taken)
    assert rollouts[0].refinements[0].prompt.text == "after 1 n"
    assert on.engine.asked == ["0/refine/0"] * 2
