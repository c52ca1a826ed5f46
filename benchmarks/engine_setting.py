"""What both sides of `local_vs_trl.py` and `gpu.py` share: model, prompts, environment, reward.

`build_model_folder` fits a small Qwen2 for a few seconds to emit printable text that ends at
random, so that completions have the lengths asked for; `build_random_folder` fits nothing. The
reward is a cheap function of the text: what is timed is sampling, the policy update and the trainer
around them.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from igrpo_nemo.config.igrpo_keys import SmallModel
from igrpo_nemo.environment import TwoStageEnvironment
from igrpo_nemo.feedback import BestDraft, Feedback, NoFeedback
from igrpo_nemo.local.model import save_pretrained_folder
from igrpo_nemo.local.packing import completion_logprobs
from igrpo_nemo.local.warmup import build_small_model
from igrpo_nemo.prompts import PromptBuilder, PromptProfile, TokenBudget
from igrpo_nemo.rewards import ScoreRequest
from igrpo_nemo.run.tokenizer import CONTENT_TAGS, build_small_tokenizer
from igrpo_nemo.types import Completion, Problem, Score, Stage, StopReason, TrainingRow

WORDS = "first think then answer with care and give every step of the work in plain words".split()


@dataclass(frozen=True, slots=True)
class Setting:
    """The sizes of the comparison, in tokens where they are lengths."""

    hidden_size: int = 128
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 2
    intermediate_size: int = 512
    vocab_size: int = 512
    problems: int = 8
    num_drafts: int = 8
    num_refinements: int = 8
    question_tokens: int = 110
    refinement_tokens: int = 300
    mean_completion: int = 80
    max_completion: int = 64
    lr: float = 1e-5
    seed: int = 0
    context_tokens: int = 0
    """The longest sequence; 0 leaves room for four completions beside q'."""
    trl_gradient_checkpointing: int = 0
    """1 is TRL's default: less memory, more time."""

    @property
    def budget(self) -> int:
        return self.num_drafts + self.num_refinements

    @property
    def context(self) -> int:
        return self.context_tokens or self.refinement_tokens + 4 * self.max_completion + 64


class VowelReward:
    """The share of vowels in the text: cheap, and different for every completion."""

    component_names: tuple[str, ...] = ("vowels",)
    weights: dict[str, float] = {"vowels": 1.0}

    def metrics(self) -> dict[str, float]:
        return {}

    def __call__(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        shares = [vowel_share(request.text) for request in requests]
        return [Score(share, {"vowels": share}) for share in shares]

    def close(self) -> None:
        """Nothing is held."""


def vowel_share(text: str) -> float:
    return sum(character in "aeiou" for character in text) / max(len(text), 1)


def problems_of(setting: Setting, step: int) -> list[Problem]:
    """The problems of a step: other ones at each, the same on both sides."""
    rng = random.Random(f"{setting.seed}/{step}")
    questions = (" ".join(rng.choices(WORDS, k=8)) for _ in range(setting.problems))
    return [Problem(f"{step}-{i}", text, "") for i, text in enumerate(questions)]


def environment_of(setting: Setting, tokenizer: Any, *, two_stage: bool) -> TwoStageEnvironment:
    """q of about `question_tokens` and q' of about `refinement_tokens`, best draft or none."""
    filler = " ".join(WORDS * 40).split()

    def prompts(system_words: int, intro_words: int) -> PromptBuilder:
        profile = PromptProfile(
            system=" ".join(filler[:system_words]),
            draft_intro=" " + " ".join(filler[:intro_words]) + "\n",
            draft_tag="draft",
        )
        budget = TokenBudget(setting.context, setting.max_completion)
        return PromptBuilder(tokenizer, profile, budget)

    problem, draft = problems_of(setting, 0)[0], "x" * (setting.max_completion * 2 // 3)
    system_words = intro_words = 0
    while len(prompts(system_words, 0).question(problem).token_ids) < setting.question_tokens:
        system_words += 1
    while (
        len(prompts(system_words, intro_words).refinement(problem, draft).token_ids)
        < setting.refinement_tokens
    ):
        intro_words += 1
    feedback: Feedback = NoFeedback(setting.budget)
    if two_stage:
        feedback = BestDraft(setting.num_drafts, setting.num_refinements, seed=setting.seed)
    return TwoStageEnvironment(prompts(system_words, intro_words), VowelReward(), feedback)


def build_random_folder(setting: Setting, folder: Path, *, longest: int) -> None:
    """A random bf16 model that draws every token with nearly the same probability.

    So completions end with probability 1 / `vocab_size` a token. `longest` is its context.
    """
    rng = random.Random(setting.seed)
    texts = ["".join(rng.choices("aeiounrstl ", k=4_000)) for _ in range(4)]
    tokenizer = build_small_tokenizer(texts, setting.vocab_size - len(CONTENT_TAGS))
    model = build_small_model(_shape(setting), tokenizer, context=longest, seed=setting.seed)
    model.model.norm.weight.data.mul_(0.01)
    torch.nn.Module.to(model, torch.bfloat16)
    save_pretrained_folder(model, tokenizer, folder)


def _shape(setting: Setting) -> SmallModel:
    names = [name for name in SmallModel.model_fields if hasattr(setting, name)]
    return SmallModel(**{name: getattr(setting, name) for name in names})


def build_model_folder(setting: Setting, folder: Path) -> None:
    """Fits the model to random printable tokens that end with probability 1 / mean_completion."""
    tokenizer = build_small_tokenizer([" ".join(WORDS)] * 4, setting.vocab_size)
    model = build_small_model(
        _shape(setting), tokenizer, context=setting.context, seed=setting.seed
    )
    model.resize_token_embeddings(setting.vocab_size)
    printable = [i for i in range(len(tokenizer)) if _is_plain(str(tokenizer.decode([i])))]
    rng = random.Random(setting.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
    for _ in range(60):
        rows = [_random_row(setting, tokenizer, printable, rng) for _ in range(24)]
        batch = completion_logprobs(model, rows, temperature=1.0)
        (-batch.logprobs_RT.sum() / batch.lengths_R.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    save_pretrained_folder(model, tokenizer, folder)


def _is_plain(text: str) -> bool:
    return text.isascii() and text.strip() == text and text.isprintable() and len(text) == 1


def _random_row(
    setting: Setting, tokenizer: Any, printable: Sequence[int], rng: random.Random
) -> TrainingRow:
    ids = []
    while len(ids) < 3 * setting.mean_completion and rng.random() > 1 / setting.mean_completion:
        ids.append(rng.choice(printable))
    ids.append(tokenizer.eos_token_id)
    context = tuple(rng.choice(printable) for _ in range(rng.randrange(4, 40)))
    completion = Completion("", tuple(ids), (0.0,) * len(ids), StopReason.EOS)
    return TrainingRow("fit", Stage.DRAFT, context, completion, 0.0)
