"""The second round of `ns eval`: the same benchmarks, each problem with the draft that was chosen.

    OUT/eval-results/ (complete) --Refinement.chosen--> drafts, fitted to the model's context
        --> OUT/refined/drafts/, the benchmarks with a column `draft`

The prompt is {problem}{draft}, which NeMo-Skills fills in one pass: braces in a row stay text.
"""

from __future__ import annotations

from dataclasses import replace

from igrpo_nemo.errors import UserError
from igrpo_nemo.evaluation.model import cached_folder, model_folder
from igrpo_nemo.evaluation.refine import REFINED, Refinement
from igrpo_nemo.evaluation.results import RESULTS_FOLDER, read_results
from igrpo_nemo.evaluation.skills.data import BenchmarkData, read_benchmark, write_benchmark
from igrpo_nemo.evaluation.skills.evaluate import SkillsEvaluation
from igrpo_nemo.prompts import PromptBuilder
from igrpo_nemo.run.core import prompt_builder
from igrpo_nemo.run.tokenizer import chat_template_text, load_tokenizer
from igrpo_nemo.types import Problem


def check_refinable(evaluation: SkillsEvaluation, refinement: Refinement, model: str) -> None:
    """Raises `UserError` for what cannot be refined, before anything is sampled."""
    for name in evaluation.names:
        refinement.check(evaluation.setting.benchmarks[name], name)
    if evaluation.setting.profile != "answer_tags":
        raise UserError("--refine shows a draft as training does: use profile answer_tags")
    _prompts(evaluation, model)


def refined_evaluation(
    evaluation: SkillsEvaluation, refinement: Refinement, model: str
) -> SkillsEvaluation:
    """The evaluation of the refined answers, to drafts that are `evaluation`'s own samples.

    `model` is a folder or a name on the hub, whose tokenizer fits the drafts. A reply keeps at
    least half of the context; drafts are cut to the rest of it. Raises `UserError` while the bare
    answers are incomplete.
    """
    read_results(evaluation.out, evaluation.names)
    out, prompts = evaluation.out / REFINED, _prompts(evaluation, model)
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
    return replace(evaluation, setting=setting, data=data, out=out)


def _with_drafts(
    evaluation: SkillsEvaluation, one: BenchmarkData, refinement: Refinement, prompts: PromptBuilder
) -> BenchmarkData:
    drafts = refinement.chosen(evaluation.out / RESULTS_FOLDER / one.name)
    rows = [
        {**row, "draft": prompts.draft_text(Problem(one.name, row["problem"], ""), draft)}
        for row, draft in zip(one.rows, drafts, strict=True)
    ]
    folder = evaluation.out / REFINED / "drafts" / f"{refinement.choose}-{refinement.drafts}"
    write_benchmark(folder, one.name, rows)
    return read_benchmark(folder, one.name)


def _prompts(evaluation: SkillsEvaluation, model: str) -> PromptBuilder:
    """Raises `UserError` where the model's tokenizer, which fits the drafts, is not here."""
    config, setting = evaluation.config, evaluation.setting
    folder = cached_folder(model, config.igrpo.site.hf_home)
    if folder is None:
        raise UserError(
            f"--refine fits drafts with the tokenizer of {model}, which is not on this machine: "
            "give the model's folder with --model"
        )
    context = setting.context or config.policy.max_total_sequence_length
    config = config.replaced("policy", max_total_sequence_length=context)
    tokens = min(setting.max_tokens, context // 2)
    config = config.replaced("policy.generation", max_new_tokens=tokens)
    tokenizer = load_tokenizer(model_folder(folder))
    if template := chat_template_text(config.policy.tokenizer.chat_template):
        tokenizer.chat_template = template
    return prompt_builder(config, tokenizer)
