"""Evaluation as at inference: k single answers to the bare prompt q; on demand, refined ones too.

    problems -> q -> sampler -> scorer -> output-rs{i}.jsonl (+ .done) -> metrics.json, table
    a chosen answer in q' -> the same, in OUT/refined

Files have NeMo-Skills' layout: its `summarize_results` reads the folder. A sample file is written
when it is whole, so that an interrupted evaluation goes on with the next one.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from igrpo_nemo.config import Config
from igrpo_nemo.errors import UserError
from igrpo_nemo.evaluation.metrics import bench_metrics, format_table
from igrpo_nemo.evaluation.model import default_base, model_folder
from igrpo_nemo.evaluation.refine import Refinement, RefiningPrompts
from igrpo_nemo.evaluation.results import (
    REFINED,
    RESULTS_FOLDER,
    done_path,
    finished_files,
    read_samples,
    write_metrics,
    write_rows,
)
from igrpo_nemo.evaluation.setting import claim_embedded
from igrpo_nemo.files.atomic import is_disk_full
from igrpo_nemo.local.answers import Answerer, Progress
from igrpo_nemo.local.sampler import Sampler
from igrpo_nemo.rewards.accuracy import Verdict, find_answer
from igrpo_nemo.run.identity import weights_fingerprint
from igrpo_nemo.tracking import Console
from igrpo_nemo.types import Group, Problem


@dataclass(frozen=True, slots=True)
class EvaluationSettings:
    """How to sample: `num_samples` is k; temperature 0.6 and top-p 0.95 are the paper's (4.1).

    `batch_size` completions are sampled together; it changes nothing but speed and memory.
    """

    num_samples: int = 1
    temperature: float = 0.6
    top_p: float = 0.95
    seed: int = 0
    batch_size: int = 256

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise UserError(f"num_samples is {self.num_samples}: use 1 or more")


@dataclass(frozen=True, slots=True)
class EvaluationResult:
    """What an evaluation came to. As text: the table that NeMo-Skills prints, and where the files
    are.

    `metrics` are NeMo-Skills' too, by mode: `metrics["pass@1"]["symbolic_correct"]` is the accuracy
    in percent; with k > 1 samples there are `pass@1[avg-of-k]`, `pass@k` and `majority@k`. `file`
    is the `metrics.json` that holds them, beside the samples.
    """

    benchmark: str
    metrics: dict[str, dict[str, Any]]
    file: Path
    refined: EvaluationResult | None = None
    """The same of the refined answers, where they were asked for."""

    def __str__(self) -> str:
        text = f"{format_table(self.benchmark, self.metrics)}\n{self.file}"
        if self.refined is None:
            return text
        table = format_table(f"{self.benchmark}, refined", self.refined.metrics)
        return f"{text}\n\n{table}\n{self.refined.file}"


def evaluate(
    config: Config,
    model: Path | str,
    settings: EvaluationSettings,
    *,
    max_tokens: int | None = None,
    data: str | None = None,
    out: Path | str | None = None,
    limit: int | None = None,
    refinement: Refinement | None = None,
) -> EvaluationResult:
    """Evaluates a model folder, or the model of a checkpoint; see `igrpo_nemo.evaluate`.

    `config` gives the prompt texts, the token limits, stop strings and the reward. Raises
    `UserError` for a model, problem or output folder that cannot be used.
    """
    from igrpo_nemo.local.model import open_policy
    from igrpo_nemo.local.sampling import sampling_params
    from igrpo_nemo.run.core import evaluation_scorer, prompt_builder
    from igrpo_nemo.run.problems import fitting_problems

    folder = model_folder(Path(model))
    benchmark, problems = _problems(config, data, limit)
    if refinement is not None:
        refinement.check(settings.num_samples, benchmark)
    if max_tokens is not None:
        config = config.replaced("policy.generation", max_new_tokens=max_tokens)
    keys, drop = config.policy, config.igrpo.drop_overlong_prompts
    template, context = keys.tokenizer.chat_template, keys.max_total_sequence_length
    policy = open_policy(folder, precision=keys.precision, chat_template=template)
    prompts = prompt_builder(config, policy.tokenizer)
    problems = fitting_problems(problems, prompts, drop_overlong=drop)
    sampler = Sampler(policy.model, policy.tokenizer, max_model_len=context)
    out = Path(out) if out is not None else default_base(str(folder.resolve()))
    console = Console(settings.num_samples * len(problems))
    with closing(evaluation_scorer(config)) as scorer, policy.autocast():
        return evaluate_with(
            Answerer(sampler, prompts, scorer, sampling_params(config)),
            problems,
            out / RESULTS_FOLDER / benchmark,
            settings,
            identity={"model": weights_fingerprint(folder)},
            on_progress=lambda done, total: console.stage("evaluate", done, total),
            refinement=refinement,
        )


def evaluate_with(
    answerer: Answerer,
    problems: Sequence[Problem],
    folder: Path,
    settings: EvaluationSettings,
    *,
    identity: Mapping[str, object] | None = None,
    on_progress: Progress = lambda done, total: None,
    refinement: Refinement | None = None,
) -> EvaluationResult:
    """The evaluation itself, with its parts opened; temperature and top-p are the settings'.

    `folder` is `OUT/eval-results/<benchmark>`; refined answers lie in `OUT/refined` alike. Sample
    files that are finished are kept and counted; results of other settings, problems or weights
    (`identity`) in it are a `UserError`.
    """
    identity = identity or {}
    bare = _sampled(answerer, problems, folder, settings, identity, on_progress)
    if refinement is None:
        return bare
    drafts = zip(problems, refinement.chosen(folder), strict=True)
    shown = RefiningPrompts(answerer.prompts, {problem.id: text for problem, text in drafts})
    answerer = replace(answerer, prompts=shown)
    identity = {**identity, "refine": refinement.drafts, "choose": refinement.choose}
    where = folder.parents[1] / REFINED / RESULTS_FOLDER / folder.name
    refined = _sampled(answerer, problems, where, settings, identity, on_progress)
    return replace(bare, refined=refined)


def _sampled(
    answerer: Answerer,
    problems: Sequence[Problem],
    folder: Path,
    settings: EvaluationSettings,
    identity: Mapping[str, object],
    on_progress: Progress,
) -> EvaluationResult:
    """Samples what is missing in `folder`, and measures all of it."""
    if not problems:
        raise UserError(f"{folder.name} has no problems: give at least one")
    params = replace(answerer.params, temperature=settings.temperature, top_p=settings.top_p)
    answerer = replace(answerer, params=params)
    asked = {**_asked(answerer, problems), "benchmark": folder.name, "seed": settings.seed}
    P, total = len(problems), settings.num_samples * len(problems)
    try:  # boundary: the file system
        folder.mkdir(parents=True, exist_ok=True)
        claim_embedded(folder, {**asked, **identity})
        missing = [i for i in range(settings.num_samples) if not done_path(folder, i).exists()]
        # Sampled together, but each draw is its own seed's.
        stage = "refined" if "refine" in identity else "evaluation"
        keyed = [(p, f"{settings.seed}/{stage}/rs{i}/{p.id}") for i in missing for p in problems]
        rows: list[dict[str, Any]] = []
        for start in range(0, len(keyed), settings.batch_size):
            before, began = total - len(keyed) + start, time.time()
            groups = answerer(
                keyed[start : start + settings.batch_size],
                on_progress=lambda done, _, before=before: on_progress(before + done, total),
            )
            ended = time.time()
            rows += [_row(group, began, ended) for group in groups]
            while len(rows) >= P:
                write_rows(folder, missing.pop(0), rows[:P])
                del rows[:P]
        metrics = bench_metrics(read_samples(finished_files(folder)))
        write_metrics(folder, metrics)
    except OSError as error:
        reason = "the disk is full" if is_disk_full(error) else error.strerror or error
        raise UserError(f"cannot write the evaluation to {folder}: {reason}") from error
    return EvaluationResult(folder.name, metrics, folder / "metrics.json")


def _problems(config: Config, data: str | None, limit: int | None) -> tuple[str, list[Problem]]:
    """The benchmark's name and its problems, the first `limit` of them."""
    from igrpo_nemo.config.nemo_keys import Dataset
    from igrpo_nemo.run.problems import validation_problems

    dataset = config.data.validation
    if data is not None and (Path(data).suffix or Path(data).exists()):
        dataset = Dataset(dataset_name="jsonl", data_path=data)
    elif data is not None:
        dataset = Dataset(dataset_name=data)
    if dataset is None:
        raise UserError("the config has no data.validation: name a data set or a file of problems")
    config = config.replaced("data", validation=dataset)
    # An evaluation takes all problems; `max_val_samples` is about validation while training.
    config = config.replaced("grpo", max_val_samples=limit or sys.maxsize)
    name = Path(dataset.data_path or dataset.dataset_name)
    return name.stem if dataset.data_path else name.name, validation_problems(config)


def _row(group: Group, started: float, ended: float) -> dict[str, Any]:
    """A line of `output-rs{i}.jsonl`: NeMo-Skills' fields, and the reward with its reason."""
    (completion,), (score,) = group.completions, group.scores
    found = find_answer(
        group.problem.answer,
        completion.text,
        thinking_open=group.prompt.thinking_open,
        truncated=completion.truncated,
    )
    own = {n: v for n, v in score.components.items() if n not in ("accuracy", "format")}
    return {
        "id": group.problem.id,
        "problem": group.problem.question,
        "expected_answer": group.problem.answer,
        "generation": completion.text,
        "predicted_answer": found.answer if isinstance(found, Verdict) else found,
        "symbolic_correct": score.correct,
        "num_generated_tokens": len(completion.token_ids),
        "finish_reason": "length" if completion.truncated else "stop",
        "reward": score.reward,
        **({"rewards": own} if own else {}),
        "reason": score.reason,
        # A row is sampled with its batch: these are the batch's times.
        "generation_start_time": started,
        "generation_end_time": ended,
        "generation_time": ended - started,
    }


def _asked(answerer: Answerer, problems: Sequence[Problem]) -> dict[str, Any]:
    """What two evaluations must share for their sample files to belong together."""
    asked = hashlib.sha256()
    for problem in problems:
        ids = answerer.prompts.question(problem).token_ids
        asked.update(json.dumps([problem.id, problem.answer, ids]).encode())
    return {**asdict(answerer.params), "problems": asked.hexdigest()[:16]}
