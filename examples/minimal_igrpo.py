"""iGRPO in one file: Algorithm 1 of the paper over Transformers, to be read from top to bottom.

    python examples/minimal_igrpo.py    two and a half minutes on two CPU cores, warm-up included

The pieces that make the method are the package's own: prompts (q and q'), feedback (which draft is
kept), rewards, advantages (Eq. 4) and the clipped surrogate (Eq. 5). What `igrpo train` adds is
left out: a fast sampler, packed training, several updates a rollout, validation sets, checkpoints,
resume, logs.

Shapes: P problems of a step, N drafts, G refinements, R = P * G trained rows, T tokens.
"""

import argparse
import random

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from igrpo_nemo.config import load_config
from igrpo_nemo.environment import Attempt, StepReturn, TwoStageEnvironment
from igrpo_nemo.feedback import BestDraft, NextPrompt
from igrpo_nemo.local.warmup import small_policy
from igrpo_nemo.objectives.advantage import group_advantages
from igrpo_nemo.objectives.surrogate import (
    Normalizer,
    SurrogateConfig,
    SurrogateInputs,
    clipped_surrogate,
)
from igrpo_nemo.rewards import build_scorer
from igrpo_nemo.run.core import prompt_builder
from igrpo_nemo.tasks.chain import ChainTask
from igrpo_nemo.types import Completion, Group, Problem, Rollout, Stage, StopReason, TrainingRow

MAX_NEW_TOKENS = 24


def sample(model, tokenizer, prompts: list[NextPrompt]) -> list[tuple[Completion, ...]]:
    """`num_samples` completions of every prompt at temperature 1, prompts padded on the left."""
    ids = [list(p.prompt.token_ids) for p in prompts for _ in range(p.num_samples)]
    padded = tokenizer.pad({"input_ids": ids}, padding_side="left", return_tensors="pt")
    output_RT = model.generate(
        **padded, do_sample=True, top_k=0, top_p=1.0, max_new_tokens=MAX_NEW_TOKENS
    )
    rows = iter(output_RT[:, padded["input_ids"].shape[1] :].tolist())
    return [tuple(completion(tokenizer, next(rows)) for _ in range(p.num_samples)) for p in prompts]


def completion(tokenizer, ids: list[int]) -> Completion:
    """A sampled row up to its first end-of-sequence token, which stays part of it."""
    ended = tokenizer.eos_token_id in ids
    ids = ids[: ids.index(tokenizer.eos_token_id) + 1] if ended else ids
    text = tokenizer.decode(ids, skip_special_tokens=True)
    return Completion(text, tuple(ids), (), StopReason.EOS if ended else StopReason.LENGTH)


def run_stage(model, tokenizer, environment, stage, problems, prompts, step) -> list[StepReturn]:
    """Samples a stage's completions and lets the environment score them."""
    sampled = sample(model, tokenizer, prompts)
    rows = zip(problems, prompts, sampled, strict=True)
    attempts = [Attempt(problem, asked.prompt, completions) for problem, asked, completions in rows]
    return environment.step(stage, attempts, step=step)


def roll_out(model, tokenizer, environment, problems: list[Problem], step: int) -> list[Rollout]:
    """Lines 4 to 14 of Algorithm 1: drafts, the best of them, refinements of q'."""
    # Stage 1: N drafts of the bare prompt q; the environment scores them and builds q' (Eqs. 2, 3).
    questions = [environment.reset(problem) for problem in problems]
    drafted = run_stage(model, tokenizer, environment, Stage.DRAFT, problems, questions, step)
    # Stage 2: G refinements of q' = Concat(q, best draft), in a fresh conversation.
    following = [result.observations[0] for result in drafted]
    refined = run_stage(model, tokenizer, environment, Stage.REFINE, problems, following, step)
    return [
        Rollout(problem, first.group, first.selection, (second.group,))
        for problem, first, second in zip(problems, drafted, refined, strict=True)
    ]


def completion_logprobs(model, rows: list[TrainingRow]) -> torch.Tensor:
    """log pi(token | context, tokens before) in nats, as logprobs_RT; zeros behind the ends."""
    lengths = [len(row.completion.token_ids) for row in rows]
    logprobs_RT = torch.zeros(len(rows), max(lengths))
    for i, row in enumerate(rows):
        ids = torch.tensor([row.context_ids + row.completion.token_ids])
        logits_TV = model(ids).logits[0, -lengths[i] - 1 : -1].float()
        chosen_T1 = ids[0, -lengths[i] :, None]
        logprobs_RT[i, : lengths[i]] = logits_TV.log_softmax(-1).gather(-1, chosen_T1)[:, 0]
    return logprobs_RT


def update(model, optimizer, rows: list[TrainingRow], surrogate: SurrogateConfig) -> float:
    """One policy update on the trained rows (Eqs. 4 and 5); returns the loss."""
    advantages_R = group_advantages(
        torch.tensor([row.reward for row in rows]), [row.group for row in rows]
    )
    logprobs_RT = completion_logprobs(model, rows)
    lengths = [len(row.completion.token_ids) for row in rows]
    inputs = SurrogateInputs(
        logprobs_RT=logprobs_RT,
        old_logprobs_RT=logprobs_RT.detach(),  # one update: pi_old is the policy as it is now
        reference_logprobs_RT=None,
        advantages_R=advantages_R,
        lengths_R=torch.tensor(lengths),
    )
    loss, _ = clipped_surrogate(inputs, surrogate, Normalizer.from_lengths(lengths))
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()


def share_correct(groups: list[Group]) -> float:
    correct = [score.correct for group in groups for score in group.scores]
    return sum(correct) / len(correct)


def main() -> None:
    parser = argparse.ArgumentParser(description="iGRPO on chained arithmetic, in one file.")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--problems", type=int, default=32, help="problems a step (P)")
    parser.add_argument("--warmup-steps", type=int, default=1200, help="of the small model")
    options = parser.parse_args()
    torch.manual_seed(0)
    rng = random.Random(0)

    # The demo's prompts, and its small model, which is warmed up once and cached.
    config = load_config(["experiment=demo", f"igrpo.warmup.steps={options.warmup_steps}"])
    folder = small_policy(config).folder
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    feedback = BestDraft(num_drafts=4, num_refinements=4)
    environment = TwoStageEnvironment(prompt_builder(config, tokenizer), build_scorer(), feedback)
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4, betas=(0.9, 0.99), weight_decay=0.0)

    for step in range(1, options.steps + 1):
        chains = [ChainTask().sample(rng, size=6) for _ in range(options.problems)]
        problems = [Problem(str(i), chain.question, chain.answer) for i, chain in enumerate(chains)]
        rollouts = roll_out(model, tokenizer, environment, problems, step)
        rows = [row for rollout in rollouts for row in feedback.training_rows(rollout)]
        update(model, optimizer, rows, SurrogateConfig())
        drafts = share_correct([rollout.drafts for rollout in rollouts])
        refined = share_correct([rollout.refinements[0] for rollout in rollouts])
        print(f"step {step:3}: drafts {drafts:6.1%}, refinements {refined:6.1%}")


if __name__ == "__main__":
    main()
