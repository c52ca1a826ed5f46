"""The built-in small model of a config (`igrpo.model`, `igrpo.warmup`) as a model folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from igrpo_nemo.config import Config
from igrpo_nemo.data.demonstrations import Demonstrator
from igrpo_nemo.errors import UserError
from igrpo_nemo.local.model import SmallModelSpec
from igrpo_nemo.local.warmup import WarmupSpec, warmed_up_folder
from igrpo_nemo.run.core import prompt_profile


def warmup_spec(config: Config) -> WarmupSpec:
    """What the warm-up of this config's small model is made of.

    Raises `UserError` where the config describes no small model, or trains it on other problems
    than chained arithmetic, for which there is no demonstrator.
    """
    model, warmup = config.igrpo.model, config.igrpo.warmup
    if model is None:
        raise UserError("igrpo.model is null: there is no built-in model to warm up")
    if config.data.train.dataset_name != "arithmetic":
        raise UserError(
            f"the built-in model knows arithmetic alone, not {config.data.train.dataset_name}: "
            "choose model=hf policy.model_name=FOLDER, or data=arithmetic"
        )
    return WarmupSpec(
        model=SmallModelSpec(
            hidden_size=model.hidden_size,
            num_layers=model.num_layers,
            num_heads=model.num_heads,
            num_kv_heads=model.num_kv_heads,
            intermediate_size=model.intermediate_size,
            max_position_embeddings=config.policy.max_total_sequence_length,
            rope_theta=model.rope_theta,
            initializer_range=model.initializer_range,
        ),
        profile=prompt_profile(config),
        demonstrator=Demonstrator(
            seed=warmup.seed,
            fixed_error_share=warmup.fixed_error_share,
            fixed_error_rate=warmup.fixed_error_rate,
            slip=warmup.slip,
            trust=warmup.trust,
            mend=warmup.mend,
            right_draft_share=warmup.right_draft_share,
            broken_format=warmup.broken_format,
        ),
        vocab_size=model.vocab_size,
        lengths=tuple(config.data.train.lengths or (6,)),
        steps=warmup.steps if warmup.enabled else 0,
        batch_size=warmup.batch_size,
        lr=warmup.lr,
        bare_share=warmup.bare_share,
        draft_share=warmup.draft_share,
        seed=warmup.seed,
    )


@dataclass(frozen=True, slots=True)
class SmallPolicy:
    """The folder of a small model, and what its warm-up cost when it was made."""

    folder: Path
    seconds: float
    cached: bool


def small_policy_folder(config: Config, on_step: Callable[[int, int, float], None]) -> SmallPolicy:
    """The warmed-up small model of this config, from the cache or trained now.

    `on_step(step, steps, loss)` reports the warm-up; loss in nats per token.
    """
    spec = warmup_spec(config)
    trained = []

    def report(step: int, loss: float) -> None:
        trained.append(step)
        on_step(step, spec.steps, loss)

    folder = warmed_up_folder(spec, on_step=report)
    return SmallPolicy(folder, float((folder / "complete").read_text()), cached=not trained)
