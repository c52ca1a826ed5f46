"""The small built-in model (`igrpo.model`), made and warmed up (`igrpo.warmup`); kept in a cache.

    demonstrations (bare problems and draft-conditioned corrections) -> cross-entropy on the
    completions -> a model folder in Hugging Face format, in the cache folder

The cache key is a digest of everything that shapes the result, so a changed setting never reuses
another one's model.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM

from igrpo_nemo.config import Config
from igrpo_nemo.config.igrpo_keys import SmallModel
from igrpo_nemo.errors import UserError
from igrpo_nemo.feedback import Feedback, NextPrompt
from igrpo_nemo.files import cache_folder
from igrpo_nemo.files.atomic import check_folder
from igrpo_nemo.local.model import fuse_norms, save_pretrained_folder
from igrpo_nemo.local.packing import completion_logprobs
from igrpo_nemo.prompts import PromptBuilder, PromptProfile, TokenBudget
from igrpo_nemo.run.core import prompt_profile
from igrpo_nemo.run.tokenizer import build_small_tokenizer, token_id
from igrpo_nemo.tasks import TASKS
from igrpo_nemo.tasks.chain import solution_of
from igrpo_nemo.tasks.task import Task, is_validation, verdict, written
from igrpo_nemo.types import Completion, Group, Problem, Score, Stage, StopReason, TrainingRow

RECIPE = 3
"""Raised whenever this module's result changes for equal settings."""
DRAFT_SHARE = 0.5
"""Demonstrations that correct a draft, once bare problems have been shown."""

OnStep = Callable[[int, int, float], None]
"""Called with (step, steps, loss) after every optimizer step; loss in nats per token."""


@dataclass(frozen=True, slots=True)
class SmallPolicy:
    """The folder of a small model, and what its warm-up cost when it was made."""

    folder: Path
    seconds: float
    cached: bool


def small_policy(
    config: Config,
    on_step: OnStep = lambda step, steps, loss: None,
    *,
    cache_dir: Path | None = None,
) -> SmallPolicy:
    """The warmed-up small model of this config, from the cache or trained now.

    The file `complete` in the folder holds the seconds that the warm-up took. Raises `UserError`
    where the config describes no small model, or trains it on problems that are not generated, for
    which there is no demonstrator.
    """
    shape = config.igrpo.model
    if shape is None:
        raise UserError("igrpo.model is null: there is no built-in model to warm up")
    task, warmup, profile = _task(config), config.igrpo.warmup, prompt_profile(config)
    settings = {
        "model": shape.model_dump(),
        "warmup": {
            **warmup.model_dump(exclude={"shows"}),
            **vars(task),
            "draft_share": DRAFT_SHARE,
        },
        "task": config.data.train_sets[0].dataset_name,
        "prompt": asdict(profile),
        "lengths": list(_lengths(config)),
        "context": config.policy.max_total_sequence_length,
    }
    if warmup.shows == "feedback":
        settings["feedback"] = [config.igrpo.feedback, config.igrpo.feedback_options]
    if torch.cuda.is_available():
        settings["device"] = "cuda"
    key = json.dumps([RECIPE, torch.__version__, settings], sort_keys=True)
    digest = hashlib.sha256(key.encode()).hexdigest()[:16]
    folder = (cache_dir or cache_folder()) / "warmup" / digest
    check_folder(folder.parent, "IGRPO_CACHE_DIR names another folder for the warmed-up model")
    # Of several processes that want the same model one makes it, and the others wait.
    with (folder.parent / f".{digest}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        cached = (folder / "complete").exists()
        if not cached:
            _make(folder, config, settings, on_step)
    return SmallPolicy(folder, float((folder / "complete").read_text()), cached)


def _make(folder: Path, config: Config, settings: dict, on_step: OnStep) -> None:
    shape, started = config.igrpo.model, time.perf_counter()
    assert shape is not None
    texts = _tokenizer_texts(prompt_profile(config))
    tokenizer = build_small_tokenizer(texts, shape.vocab_size)
    context, seed = config.policy.max_total_sequence_length, config.igrpo.warmup.seed
    model = build_small_model(shape, tokenizer, context=context, seed=seed)
    if torch.cuda.is_available():
        torch.nn.Module.to(model, torch.device("cuda"))
        fuse_norms(model)
    _train(model, tokenizer, config, on_step)
    scratch = Path(tempfile.mkdtemp(prefix=".warmup-", dir=folder.parent))
    save_pretrained_folder(model, tokenizer, scratch)
    (scratch / "warmup.json").write_text(json.dumps(settings, indent=2))
    (scratch / "complete").write_text(f"{time.perf_counter() - started:.1f}\n")
    os.rename(scratch, folder)


def build_small_model(
    shape: SmallModel, tokenizer: PreTrainedTokenizerBase, *, context: int, seed: int
) -> Qwen2ForCausalLM:
    """A randomly initialised Qwen2 with tied embeddings, float32, on the CPU.

    The vocabulary is the tokenizer's, `context` the longest sequence in tokens. Deterministic in
    `seed`; the global random state is left as it was.
    """
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        intermediate_size=shape.intermediate_size,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        initializer_range=shape.initializer_range,
        bos_token_id=None,
        eos_token_id=token_id(tokenizer, "eos"),
        pad_token_id=token_id(tokenizer, "pad"),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(config)
    return model.float().eval()


def _lengths(config: Config) -> Sequence[int]:
    """Operation counts of the chains that are learned from."""
    return (config.data.generated and config.data.generated.lengths) or (6,)


def _tokenizer_texts(profile: PromptProfile) -> list[str]:
    """What the tokenizer learns its merges from: the prompts and the format, not the digits."""
    shown = profile.draft_open + solution_of((1, 2, 3)).text + profile.draft_close
    roles = ["system\n", "user\n", "assistant\n"]
    return [profile.system, shown, solution_of((4, 5, 6)).text, *roles] * 8


def _train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: Config,
    on_step: OnStep,
) -> None:
    """Bare problems come first, because corrections can be learnt by copying and hide the
    arithmetic. Between a short ramp and a decay the learning rate is `igrpo.warmup.lr`."""
    warmup = config.igrpo.warmup
    steps = warmup.steps if warmup.enabled else 0
    longest = 4 * max(_lengths(config))
    budget = TokenBudget(config.policy.max_total_sequence_length, max_new_tokens=longest)
    prompts = PromptBuilder(tokenizer, prompt_profile(config), budget)
    rng = random.Random(f"{warmup.seed}/warmup")
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=warmup.lr, betas=(0.9, 0.98), weight_decay=0.0
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: _rate(k, steps))
    model.train()
    for step in range(steps):
        draft_share = 0.0 if step < warmup.bare_share * steps else DRAFT_SHARE
        rows = _demonstrations(config, prompts, tokenizer, rng, draft_share)
        logprobs = completion_logprobs(model, rows, temperature=1.0)
        loss = -logprobs.logprobs_RT.sum() / logprobs.lengths_R.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        on_step(step + 1, steps, loss.item())
    model.eval()


def _rate(step: int, steps: int) -> float:
    """Ramp over a twentieth of the steps, flat, linear to a tenth over the last quarter."""
    ramp = min(1.0, (step + 1) / max(1, steps // 20))
    return ramp * min(1.0, 0.1 + 0.9 * 4 * (1 - step / steps))


def _task(config: Config) -> Task:
    """The task with the demonstrator that the warm-up's seed gives."""
    if (generated := config.data.generated) is None:
        names = ", ".join(each.dataset_name for each in config.data.train_sets)
        raise UserError(
            f"the built-in model knows {', '.join(TASKS)}, not {names}: "
            "choose model=hf policy.model_name=FOLDER, or data=arithmetic"
        )
    return TASKS[generated.dataset_name](seed=config.igrpo.warmup.seed)


def _demonstrations(
    config: Config,
    prompts: PromptBuilder,
    tokenizer: PreTrainedTokenizerBase,
    rng: random.Random,
    draft_share: float,
) -> list[TrainingRow]:
    """One batch of demonstrations, about `draft_share` of them under a draft."""
    warmup, task = config.igrpo.warmup, _task(config)
    end, lengths = token_id(tokenizer, "eos"), list(_lengths(config))
    assert end is not None
    rows = []
    for index in range(warmup.batch_size):
        exercise = task.sample(rng, rng.choice(lengths))
        while is_validation(exercise.question):  # the warm-up must not have seen that split
            exercise = task.sample(rng, rng.choice(lengths))
        problem = Problem(str(index), exercise.question, exercise.answer)
        if rng.random() < draft_share:
            draft = task.draft(exercise, rng)
            following = NextPrompt(prompts.refinement(problem, draft.text), 1)
            if warmup.shows == "feedback":
                right = draft.answer == exercise.answer
                asked = _followed(config.feedback, prompts, problem, draft.text, right)
                following = asked or following
            prompt = following.prompt
            if following.target is None:
                corrected = task.correct(exercise, draft, rng)
                text = written(corrected, rng, warmup.broken_format)
            else:
                text = verdict(task, exercise, draft, following.target.among, rng).text
        else:
            prompt = prompts.question(problem)
            text = written(task.attempt(exercise, rng), rng, warmup.broken_format)
        ids = (*tokenizer(text, add_special_tokens=False).input_ids, end)
        completion = Completion(text, ids, (0.0,) * len(ids), StopReason.EOS)
        rows.append(TrainingRow(str(index), Stage.DRAFT, prompt.token_ids, completion, 0.0))
    return rows


def _followed(
    feedback: Feedback, prompts: PromptBuilder, problem: Problem, draft: str, right: bool
) -> NextPrompt | None:
    """What a feedback makes of a single draft; None where it asks nothing more."""
    score = Score(float(right), {"accuracy": float(right)})
    shown = (Completion(draft, (), (), StopReason.EOS),)
    group = Group(problem, Stage.DRAFT, prompts.question(problem), shown, (score,))
    following = feedback.next_prompts(group, feedback.select(group, 0), prompts)
    return following[0] if following else None
