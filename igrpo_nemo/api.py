"""The Python API: `igrpo_nemo.load_config`, `train`, `evaluate` and `score`.

Each is what the command of its name calls. All raise `igrpo_nemo.errors.UserError`, one line, for
input that cannot be used. Nothing heavy is imported before a function needs it.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

from igrpo_nemo.errors import UserError
from igrpo_nemo.rewards.accuracy import Reason, Verdict
from igrpo_nemo.rewards.extract import AnswerFormat
from igrpo_nemo.run import config_of_model, set_threads
from igrpo_nemo.types import Problem, ScoreRequest

if TYPE_CHECKING:
    from igrpo_nemo.config import Config
    from igrpo_nemo.evaluation.embedded import EvaluationResult

__all__ = ["Scores", "evaluate", "load_config", "score", "train"]

LONGEST_ITEM_S = 86_400
"""Above a day the clocks of the verifier overflow."""

# Items per call of the pool: bounds what is in memory, and how often progress could be lost.
_CHUNK = 2_048


def load_config(overrides: Sequence[str], config_dir: Path | str | None = None) -> Config:
    """The resolved, derived and checked config of Hydra overrides, `["experiment=demo", ...]`.

    They are the words behind `igrpo train`; `config_dir` is a further folder of config groups.
    A config is typed and frozen: `config.grpo.max_num_steps`; `config.to_yaml()` shows all of it.
    """
    from igrpo_nemo.config import load_config

    if isinstance(overrides, str):
        raise UserError(f"load_config takes a list of overrides: load_config([{overrides!r}])")
    return load_config(overrides, None if config_dir is None else Path(config_dir))


def train(config: Config) -> int:
    """Trains as configured on the engine `igrpo.engine`; goes on where an earlier run stopped.

    The run is in the folder `config.logger.log_dir`. Returns 0 when the last step is done and 75
    when a signal, the stop file or the time limit stopped the run with its state saved (engine
    `nemo_rl`: 0 for these too, 1 and 70 for a trainer that ended early). Raises `NonFiniteError`
    where the policy diverges.

    `igrpo.threads` takes effect only where torch has not been imported before.
    """
    set_threads(config.igrpo.threads)
    if config.igrpo.engine == "local":
        from igrpo_nemo.local.trainer import train
    else:
        from igrpo_nemo.nemo.launch import train

    return train(config)


def evaluate(
    model: Path | str,
    overrides: Sequence[str] = (),
    *,
    data: Path | str | None = None,
    samples: int = 1,
    temperature: float = 0.6,
    top_p: float = 0.95,
    max_tokens: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    out: Path | str | None = None,
    refine: int | None = None,
    choose: Literal["reward", "majority"] = "reward",
) -> EvaluationResult:
    """Samples single answers to bare problems with the embedded engine and measures them.

    `model` is a Hugging Face folder or a checkpoint of a run, whose own config is then used, with
    the Hydra `overrides` on top: the prompt must be the one that the model was trained with.
    `data` is a file of problems or the name of a data set, by default the config's
    `data.validation`; `limit` takes its first problems alone. `samples` is k, of each problem.
    `max_tokens` is by default as trained. Sample files that `out` has already are kept and counted.
    `refine` (N) also samples refined answers: to q', which shows the best of the first N bare ones,
    by the reward or by a `majority` vote that looks at no gold. They are `result.refined`.
    """
    config = config_of_model(Path(model), overrides)
    set_threads(config.igrpo.threads)
    from igrpo_nemo.evaluation.embedded import EvaluationSettings, evaluate
    from igrpo_nemo.evaluation.refine import Refinement

    return evaluate(
        config,
        model,
        EvaluationSettings(samples, temperature, top_p, seed),
        max_tokens=max_tokens,
        data=None if data is None else str(data),
        out=out,
        limit=limit,
        refinement=Refinement.of(refine, choose),
    )


@dataclass(frozen=True, slots=True)
class Scores:
    """Verdicts on completions; `places` has for each its row and its number within the row, from 0.

    A verdict has `correct`, `reason` (docs/rewards.md lists them) and the `answer` that was found.
    `rewards` are the components of the functions, for each completion; empty without functions.
    """

    places: tuple[tuple[int, int], ...]
    verdicts: tuple[Verdict, ...]
    rewards: tuple[dict[str, float], ...] = ()

    @property
    def summary(self) -> dict[str, Any]:
        """`accuracy` (0 where there is nothing to score), `n`, `reasons`, and with functions the
        means of their `rewards` over all completions.

        A row without a reference counts under `reasons`, and in neither `accuracy` nor `n`.
        """
        reasons = Counter(str(verdict.reason) for verdict in self.verdicts)
        n = len(self.verdicts) - reasons[Reason.NO_REFERENCE]
        accuracy = sum(verdict.correct for verdict in self.verdicts) / n if n else 0.0
        found = {"accuracy": accuracy, "n": n, "reasons": dict(sorted((+reasons).items()))}
        names = dict.fromkeys(name for each in self.rewards for name in each)
        means = {name: fmean(each[name] for each in self.rewards if name in each) for name in names}
        return {**found, "rewards": means} if means else found


def score(
    references: Sequence[Any],
    completions: Sequence[str | Sequence[str]],
    *,
    answer_format: AnswerFormat | str = AnswerFormat.ANY,
    workers: int | None = None,
    item_timeout_s: float = 5.0,
    thinking_open: bool = False,
    functions: Sequence[str] = (),
    columns: Sequence[Mapping[str, Any]] = (),
) -> Scores:
    """Compares completions with reference answers, in worker processes that cannot hang.

    Row i is `references[i]` and `completions[i]`, one text or several. A reference is read as data
    sets have it: a number, a solution's last box, what follows `####`. `answer_format` (`tags`,
    `boxed`, `any`) says where a completion's answer stands; with `thinking_open` its prompt ended
    with `<think>`. A comparison has `item_timeout_s` seconds, a day at most. `workers` are by
    default the cores, at most 8.

    `functions` are paths of reward functions (`module:name`), called on every completion with the
    row's `columns`, one mapping a row, whose `problem` or the like is the problem's question.
    """
    from igrpo_nemo.data.columns import QUESTION_KEYS
    from igrpo_nemo.rewards.custom import CustomReward, function_at
    from igrpo_nemo.rewards.pool import VerifierPool

    if len(references) != len(completions):
        raise UserError(
            f"{len(references)} references for {len(completions)} rows of completions: "
            "give one for each"
        )
    if not 0 < item_timeout_s <= LONGEST_ITEM_S:
        raise UserError(
            f"item_timeout_s is {item_timeout_s}: use above 0, at most {LONGEST_ITEM_S:,} seconds"
        )
    for path in functions:
        try:
            function_at(path)
        except UserError as error:
            raise UserError(f"the reward function {path} {error}") from error
    places: list[tuple[int, int]] = []
    requests: list[ScoreRequest] = []
    for number, (reference, row) in enumerate(zip(references, completions, strict=True)):
        others = columns[number] if columns else {}
        question = next((str(others[key]) for key in QUESTION_KEYS if key in others), "")
        kept = json.dumps(dict(others), default=str)
        problem = Problem(str(number), question, _reference(reference), kept)
        for sample, text in enumerate(texts_of_row(row, f"row {number}")):
            places.append((number, sample))
            requests.append(ScoreRequest(problem, text, thinking_open=thinking_open))
    verdicts: list[Verdict] = []
    rewards: list[dict[str, float]] = []
    with VerifierPool(
        workers=workers or min(8, os.cpu_count() or 1),
        item_timeout_s=item_timeout_s,
        # Nobody waits for the next step here: only the limit of each item counts.
        group_deadline_s=float("inf"),
        answer_format=_format(answer_format),
        functions=functions,
    ) as pool:
        own = [CustomReward(path, pool) for path in functions]
        for start in range(0, len(requests), _CHUNK):
            chunk = requests[start : start + _CHUNK]
            verdicts += pool.verdicts(chunk)
            for parts in zip(*(reward(chunk, ()) for reward in own), strict=True):
                rewards.append({name: each[name] for each in parts for name in each})
    return Scores(tuple(places), tuple(verdicts), tuple(rewards))


def texts_of_row(value: Any, where: str) -> list[str]:
    """The completions of a row: a text, or several. Raises `UserError` for what is no text."""
    texts = [value] if isinstance(value, str) or not isinstance(value, Sequence) else list(value)
    for text in texts:
        if not isinstance(text, str):
            raise UserError(f"{where}: a completion must be text, not {type(text).__name__}")
    return texts


def _reference(value: Any) -> str:
    """Empty, which the verifier calls `no_reference`, where the value is none."""
    from igrpo_nemo.data.columns import Unusable, reference_answer

    try:
        return reference_answer(value)
    except Unusable:
        return ""


def _format(name: str) -> AnswerFormat:
    try:
        return AnswerFormat(name)
    except ValueError:
        raise UserError(f"answer_format is {name!r}: use {', '.join(AnswerFormat)}") from None
