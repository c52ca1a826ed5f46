"""Supervised warm-up of the small built-in model, cached between runs.

    demonstrations (bare problems and draft-conditioned corrections) -> cross-entropy on the
    completions -> a model folder in Hugging Face format, in the cache folder

The cache key is a digest of everything that shapes the result, so a changed setting never reuses
another one's model.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from igrpo_nemo.data.arithmetic import Chain, is_validation, sample_chain
from igrpo_nemo.data.demonstrations import Demonstrator, solution_text
from igrpo_nemo.files import cache_folder
from igrpo_nemo.local.model import SmallModelSpec, build_small_model, save_pretrained_folder
from igrpo_nemo.local.packing import completion_logprobs
from igrpo_nemo.prompts import PromptBuilder, PromptProfile, TokenBudget
from igrpo_nemo.run.tokenizer import build_small_tokenizer, token_id
from igrpo_nemo.types import Completion, Problem, Stage, StopReason, TrainingRow

RECIPE = 1
"""Raised whenever this module's result changes for equal settings."""


@dataclass(frozen=True, slots=True)
class WarmupSpec:
    """What the warm-up learns from and how.

    `lengths` are the chains' operation counts. Bare problems come first, because corrections can be
    learnt by copying and hide the arithmetic; after `bare_share` of the steps, `draft_share` of the
    demonstrations correct a draft. Between a short ramp and a decay the learning rate is `lr`.
    """

    model: SmallModelSpec
    profile: PromptProfile
    demonstrator: Demonstrator
    vocab_size: int = 320
    lengths: tuple[int, ...] = (6,)
    steps: int = 400
    batch_size: int = 128
    lr: float = 4e-3
    bare_share: float = 0.5
    draft_share: float = 0.5
    seed: int = 0


def warmed_up_folder(
    spec: WarmupSpec,
    *,
    cache_dir: Path | None = None,
    on_step: Callable[[int, float], None] | None = None,
) -> Path:
    """The folder of the warmed-up model, trained now if the cache does not hold it.

    `on_step(step, loss)` is called after every optimizer step; loss in nats per token. Two
    processes that ask at once both train, and the first to finish is kept. The file `complete` in
    the folder holds the seconds that the warm-up took.
    """
    folder = (cache_dir or cache_folder()) / "warmup" / _digest(spec)
    if (folder / "complete").exists():
        return folder
    started = time.perf_counter()
    tokenizer = build_small_tokenizer(_tokenizer_texts(spec), spec.vocab_size)
    model = build_small_model(spec.model, tokenizer, spec.seed)
    _train(model, tokenizer, spec, on_step)
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".warmup-", dir=folder.parent))
    save_pretrained_folder(model, tokenizer, scratch)
    (scratch / "warmup.json").write_text(json.dumps(asdict(spec), indent=2))
    (scratch / "complete").write_text(f"{time.perf_counter() - started:.1f}\n")
    try:
        os.rename(scratch, folder)
    except OSError:
        # Another process finished first: equal settings give an equal model.
        shutil.rmtree(scratch)
    return folder


def _digest(spec: WarmupSpec) -> str:
    settings = json.dumps([RECIPE, torch.__version__, asdict(spec)], sort_keys=True)
    return hashlib.sha256(settings.encode()).hexdigest()[:16]


def _tokenizer_texts(spec: WarmupSpec) -> list[str]:
    """What the tokenizer learns its merges from: the prompts and the format, not the digits."""
    profile = spec.profile
    shown = profile.draft_open + solution_text((1, 2, 3)) + profile.draft_close
    return [
        profile.system,
        shown,
        solution_text((4, 5, 6)),
        "system\n",
        "user\n",
        "assistant\n",
    ] * 8


def _train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    spec: WarmupSpec,
    on_step: Callable[[int, float], None] | None,
) -> None:
    budget = TokenBudget(spec.model.max_position_embeddings, max_new_tokens=4 * max(spec.lengths))
    prompts = PromptBuilder(tokenizer, spec.profile, budget)
    rng = random.Random(f"{spec.seed}/warmup")
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=spec.lr, betas=(0.9, 0.98), weight_decay=0.0
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: _rate(k, spec.steps))
    model.train()
    for step in range(spec.steps):
        draft_share = 0.0 if step < spec.bare_share * spec.steps else spec.draft_share
        rows = _demonstrations(spec, prompts, tokenizer, rng, draft_share)
        logprobs = completion_logprobs(model, rows, temperature=1.0)
        loss = -logprobs.logprobs_RT.sum() / logprobs.lengths_R.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if on_step:
            on_step(step + 1, loss.item())
    model.eval()


def _rate(step: int, steps: int) -> float:
    """Ramp over a twentieth of the steps, flat, linear to a tenth over the last quarter."""
    ramp = min(1.0, (step + 1) / max(1, steps // 20))
    return ramp * min(1.0, 0.1 + 0.9 * 4 * (1 - step / steps))


def _demonstrations(
    spec: WarmupSpec,
    prompts: PromptBuilder,
    tokenizer: PreTrainedTokenizerBase,
    rng: random.Random,
    draft_share: float,
) -> list[TrainingRow]:
    """One batch of demonstrations, about `draft_share` of them under a draft."""
    end = token_id(tokenizer, "eos")
    assert end is not None
    rows = []
    for index in range(spec.batch_size):
        chain = _training_chain(spec.lengths, rng)
        problem = Problem(str(index), chain.question, chain.answer)
        if rng.random() < draft_share:
            draft, stated = spec.demonstrator.draft(chain, rng)
            prompt = prompts.refinement(problem, draft)
            text = spec.demonstrator.correct(chain, stated, rng)
        else:
            prompt = prompts.question(problem)
            text = spec.demonstrator.solve(chain, rng)
        ids = (*tokenizer(text, add_special_tokens=False).input_ids, end)
        completion = Completion(text, ids, (0.0,) * len(ids), StopReason.EOS)
        rows.append(TrainingRow(str(index), Stage.DRAFT, prompt.token_ids, completion, 0.0))
    return rows


def _training_chain(lengths: Sequence[int], rng: random.Random) -> Chain:
    """A chain outside the validation split, which the warm-up must not have seen."""
    while True:
        chain = sample_chain(rng, rng.choice(list(lengths)))
        if not is_validation(chain.question):
            return chain
