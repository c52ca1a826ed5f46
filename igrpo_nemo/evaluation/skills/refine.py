"""The second round of `ns eval`: the same benchmarks, each problem with the draft that was chosen.

    OUT/eval-results/ (complete) --Refinement.chosen--> drafts, fitted to the model's context
        --> OUT/refined/drafts/, the benchmarks with their drafts

NeMo-Skills fills a prompt in one pass: braces in a row stay text.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from igrpo_nemo.errors import UserError
from igrpo_nemo.evaluation.model import cached_folder, model_folder
from igrpo_nemo.evaluation.refine import Refinement
from igrpo_nemo.evaluation.results import REFINED, RESULTS_FOLDER, problem_key, read_results
from igrpo_nemo.evaluation.skills.data import BenchmarkData, read_benchmark, write_benchmark
from igrpo_nemo.prompts import PromptBuilder
from igrpo_nemo.run.core import prompt_builder
from igrpo_nemo.run.tokenizer import load_tokenizer
from igrpo_nemo.types import Problem

if TYPE_CHECKING:
    from igrpo_nemo.evaluation.skills.evaluate import SkillsEvaluation

BOXED_TOKENS = 256
"""Room for the words that NeMo-Skills' own prompts (profile `boxed`) put around a problem."""


def refined_evaluation(evaluation: SkillsEvaluation) -> SkillsEvaluation:
    """The second round of `ns eval`: refined answers, to drafts that are `evaluation`'s samples.

    A reply keeps at least half of the context; drafts are cut to the rest of it. Raises `UserError`
    while the bare answers are incomplete.
    """
    refinement, out = evaluation.refinement, evaluation.out / REFINED
    assert refinement is not None
    read_results(evaluation.out, evaluation.names)
    prompts = draft_prompts(evaluation)
    data = tuple(_with_drafts(evaluation, one, refinement, prompts) for one in evaluation.data)
    tokens = prompts.budget.max_new_tokens
    setting = replace(
        evaluation.setting,
        problems={
            one.name: {"rows": len(one.rows), "sha256": one.sha256, "tokens": tokens}
            for one in data
        },
        refine=refinement.drafts,
        choose=refinement.choose,
    )
    return replace(evaluation, setting=setting, data=data, out=out, refinement=None)


def _with_drafts(
    evaluation: SkillsEvaluation, one: BenchmarkData, refinement: Refinement, prompts: PromptBuilder
) -> BenchmarkData:
    """The benchmark with the drafts: in a column of their own that our prompt shows, and behind
    the problem's text where the prompt is NeMo-Skills'."""
    rows = []
    drafts = refinement.chosen(evaluation.out / RESULTS_FOLDER / one.name)
    for row, draft in zip(one.rows, drafts, strict=True):
        text = prompts.draft_text(Problem(one.name, row["problem"], ""), draft)
        if evaluation.setting.profile == "boxed":
            # With the bare answer's key, by which the two are compared.
            rows.append({**row, "id": problem_key(row), "problem": row["problem"] + text})
        else:
            rows.append({**row, "draft": text})
    folder = evaluation.out / REFINED / "drafts" / f"{refinement.choose}-{refinement.drafts}"
    write_benchmark(folder, one.name, rows)
    return read_benchmark(folder, one.name)


def draft_prompts(evaluation: SkillsEvaluation) -> PromptBuilder:
    """What cuts the drafts to size. Raises `UserError` where the tokenizer for it is not here."""
    config, setting = evaluation.config, evaluation.setting
    folder = cached_folder(evaluation.tokenizer, config.igrpo.site.hf_home)
    if folder is None:
        raise UserError(
            f"--refine fits drafts with the tokenizer of {evaluation.tokenizer}, which is not on "
            "this machine: give the model's folder with --model"
        )
    context = setting.context or config.policy.max_total_sequence_length
    tokens = min(setting.max_tokens, context // 2)
    if setting.profile == "boxed":
        texts = config.igrpo.prompt.model_copy(update={"system": ""})
        config, context = config.replaced("igrpo", prompt=texts), context - BOXED_TOKENS
    config = config.replaced("policy", max_total_sequence_length=context)
    config = config.replaced("policy.generation", max_new_tokens=tokens)
    tokenizer = load_tokenizer(model_folder(folder), config.policy.tokenizer.chat_template)
    return prompt_builder(config, tokenizer)
