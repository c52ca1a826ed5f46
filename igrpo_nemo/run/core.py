"""The core's parts that a config describes, the same for every engine: keys in, parts out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from igrpo_nemo.config import Config
from igrpo_nemo.prompts import PromptBuilder, PromptProfile, TokenBudget
from igrpo_nemo.rewards import Scorer, build_scorer
from igrpo_nemo.rewards.custom import component_name
from igrpo_nemo.rewards.judge import Judge


def prompt_profile(config: Config) -> PromptProfile:
    texts = config.igrpo.prompt
    return PromptProfile(texts.system, texts.draft_intro, texts.draft_tag)


def prompt_builder(config: Config, tokenizer: Any) -> PromptBuilder:
    """q and q' for a tokenizer, within `policy.max_total_sequence_length`."""
    return PromptBuilder(
        tokenizer,
        prompt_profile(config),
        TokenBudget(
            config.policy.max_total_sequence_length,
            config.policy.generation.max_new_tokens,
            config.data.max_input_seq_length,
        ),
        draft_truncation=config.igrpo.draft_truncation,
        draft_content=config.igrpo.draft_content,
        chat_template_kwargs=config.policy.tokenizer.chat_template_kwargs,
    )


def scorer_of(config: Config) -> Scorer:
    """`igrpo.reward` over the verifier of `env.math`, with the judge where it has a weight; its
    cache lies in the run folder unless it is told elsewhere."""
    reward, components = config.igrpo.reward, {}
    if "judge" in reward.weights:
        assert config.igrpo.judge is not None
        cache = Path(config.logger.log_dir) / "judge_cache.sqlite"
        components["judge"] = Judge(config.igrpo.judge, cache)
    return _scorer(config, reward.weights, components=components, functions=reward.functions)


def evaluation_scorer(config: Config, *, functions: bool = True) -> Scorer:
    """Accuracy and format over the verifier of `env.math`, by default with the functions of
    `igrpo.reward.custom`: an evaluation asks no judge."""
    reward = config.igrpo.reward
    paths = reward.functions if functions else ()
    own = {name: reward.weights[name] for name in map(component_name, paths)}
    return _scorer(config, {"accuracy": 1.0, "format": 1.0, **own}, functions=paths)


def _scorer(config: Config, weights: dict[str, float], **parts: Any) -> Scorer:
    env = config.env.math
    if env.num_workers:
        limits = ("item_timeout_s", "group_deadline_s", "memory_limit_mb")
        parts |= {"workers": env.num_workers, **{name: getattr(env, name) for name in limits}}
    return build_scorer(weights, **parts)
