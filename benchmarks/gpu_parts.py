"""The measurements of `gpu.py`, in a process of its own for each side.

    python benchmarks/gpu_parts.py OPTIONS    (JSON: side, folder, repeats, setting)

Reads one {"part", "limit_s"} a line and answers with one JSON line a result, then {"done": true}.
A part that has not ended after its limit is left where it is.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import random
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from importlib import metadata
from itertools import count
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from engine_setting import environment_of, problems_of
from gpu_bench import PROTOCOL, Bench, Finished, GpuSetting, StepMeter, one_line, setting_of

from igrpo_nemo.local.rollout import TwoStageRollout
from igrpo_nemo.local.sampler import SampleRequest, SamplingParams
from igrpo_nemo.local.vllm_sampler import VllmSampler
from igrpo_nemo.types import Completion, Stage, StopReason, TrainingRow


def ceilings(bench: Bench) -> None:
    """The device's two rates, and what it is."""
    name = torch.cuda.get_device_name() if bench.device == "cuda" else "CPU"
    versions = {"torch": torch.__version__, "transformers": _version("transformers")}
    bench.tell(machine=name, **versions, trl=_version("trl"), vllm=_version("vllm"))
    bench.tell(**bench.ceilings, copied_mb=bench.setting.copy_mb, matrix=bench.setting.matrix)


def step(bench: Bench) -> None:
    """Whole training steps of the embedded engine, two-stage and one-stage."""
    setting, policy, learner = bench.setting, bench.policy, bench.learner
    sampler, parameters = bench.sampler, sum(p.numel() for p in policy.model.parameters())
    way = "vLLM" if isinstance(sampler, VllmSampler) else sampler.way
    bench.tell(side="embedded", sampler=way, parameters=parameters)
    for two_stage in (True, False):
        environment = environment_of(setting, policy.tokenizer, two_stage=two_stage)
        params = SamplingParams(setting.max_completion, temperature=1.0)
        rollout = TwoStageRollout(environment, sampler, params, setting.seed)
        stages = "two" if two_stage else "one"
        meter = StepMeter(bench, 0.5 if two_stage else 1.0, side="embedded", stages=stages)
        try:
            for number in count(1):
                meter.begin()
                with policy.autocast():
                    rollouts = rollout(problems_of(setting, number), step=number)
                if isinstance(sampler, VllmSampler):
                    sampler.sleep()
                meter.rolled_out()
                rows = [row for r in rollouts for row in environment.feedback.training_rows(r)]
                learner.update(rows)
                groups = [group for r in rollouts for group in (r.drafts, *r.refinements)]
                meter.end(
                    [c.token_ids for group in groups for c in group.completions],
                    [row.context_ids for row in rows],
                )
        except Finished:
            meter.tell_median()


def update(bench: Bench) -> None:
    """The policy update at long rows against the measured rate of matrix products."""
    setting, learner, rate = bench.setting, bench.learner, bench.ceilings["flops_per_s"]
    rows = long_rows(setting)
    flops = update_flops(learner.model, rows)
    config, sizes = learner.config, [setting.row_tokens * k for k in (1, 2, 4, 8)]
    for number, size in enumerate(sizes):
        learner.config = config.replaced("policy.sequence_packing", train_mb_tokens=size)
        bench.memory()
        try:
            taken = bench.seconds(partial(learner.update, rows), 0.9 / (len(sizes) - number))
        except torch.OutOfMemoryError as error:
            bench.tell(micro_batch_tokens=size, failed=one_line(error))
            learner.optimizer.zero_grad(set_to_none=True)
            bench.free()
            continue
        bench.tell(
            micro_batch_tokens=size,
            update_s=taken,
            flops=flops,
            share_of_matrix_rate=flops / taken / rate,
            **bench.memory(),
        )
    learner.config = config


def long_rows(setting: GpuSetting) -> list[TrainingRow]:
    """One group of random rows of `row_tokens` behind a context of `refinement_tokens`."""
    rng = random.Random(setting.seed)
    context = tuple(rng.choices(range(40, 240), k=setting.refinement_tokens))
    length, rows = setting.row_tokens - setting.refinement_tokens, []
    for number in range(setting.num_refinements):
        ids = tuple(rng.choices(range(40, 240), k=length))
        completion = Completion("", ids, (0.0,) * length, StopReason.LENGTH)
        rows.append(TrainingRow("0", Stage.REFINE, context, completion, float(number % 3)))
    return rows


def update_flops(model: Any, rows: Sequence[TrainingRow]) -> float:
    """FLOPs that an update needs: 6 x parameters x tokens + 12 x layers x width x pairs.

    Tokens are those of each context once and of the completions; pairs are a token and one that it
    sees, itself included; width is heads x head size. Forward and twice as much backward: a pair
    costs 2 x width for its score and as much for its value. What is computed again (contexts of a
    group that is split, checkpointed layers) is not counted.
    """
    contexts = {row.context_ids for row in rows}
    tokens, pairs = sum(map(len, contexts)), sum(len(c) * (len(c) + 1) / 2 for c in contexts)
    for row in rows:
        length = len(row.completion.token_ids)
        tokens += length
        pairs += length * len(row.context_ids) + length * (length + 1) / 2
    config = model.config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width = config.num_attention_heads * head
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return 6 * parameters * tokens + 12 * config.num_hidden_layers * width * pairs


def decode(bench: Bench) -> None:
    """A decoding step against the time in which what it reads could be copied.

    The step's time is that of completions of `max_completion` tokens minus that of a single token
    (the prefill), by the number of steps. No row ends before.
    """
    setting, policy, steps = bench.setting, bench.policy, bench.setting.max_completion - 1
    rng = random.Random(setting.seed)
    requests = [
        SampleRequest(
            tuple(rng.choices(range(40, 240), k=setting.refinement_tokens)), setting.budget, str(i)
        )
        for i in range(setting.problems)
    ]
    rate, sampler = bench.ceilings["bytes_per_s"], bench.sampler
    with mock.patch.object(sampler, "_end_ids", lambda params: frozenset()), policy.autocast():
        bench.memory()
        prefill_s = bench.seconds(lambda: sampler.sample(requests, SamplingParams(1)), 0.2)
        params = SamplingParams(setting.max_completion)
        whole_s = bench.seconds(lambda: sampler.sample(requests, params), 0.9)
    step_s = (whole_s - prefill_s) / steps
    of_rows, of_groups = decoding_bytes(bench)
    bench.tell(
        rows=setting.problems * setting.budget,
        steps=steps,
        step_s=step_s,
        prefill_s=prefill_s,
        bytes_per_step=of_rows,
        share_of_bandwidth=of_rows / step_s / rate,
        bytes_per_step_prompts_once=of_groups,
        share_of_bandwidth_prompts_once=of_groups / step_s / rate,
        **bench.memory(),
    )


def decoding_bytes(bench: Bench) -> tuple[float, float]:
    """What a decoding step must read on average: the weights and each row's keys and values.

    Second, the same with the keys and values of a prompt read once for all rows of its group.
    """
    setting, model = bench.setting, bench.policy.model
    size = bench.dtype.itemsize
    weights = size * sum(parameter.numel() for parameter in model.parameters())
    head = setting.hidden_size // setting.num_heads
    per_token = size * 2 * setting.num_layers * setting.num_kv_heads * head
    own = setting.problems * setting.budget * setting.max_completion / 2
    prompts = setting.problems * setting.refinement_tokens
    return (
        weights + per_token * (own + prompts * setting.budget),
        weights + per_token * (own + prompts),
    )


def trl(bench: Bench, *, two_stage: bool) -> None:
    """TRL on the same work: with vLLM where it can, without gradient checkpointing if it fits."""
    from trl_side import stepping_trainer

    setting, folder = bench.setting, bench.model_folder()
    vllm = bench.device == "cuda" and importlib.util.find_spec("vllm") is not None
    while True:
        checkpointing = bool(setting.trl_gradient_checkpointing)
        names = {"generation": "vllm" if vllm else "own", "gradient_checkpointing": checkpointing}
        stages = "two" if two_stage else "one"
        meter = StepMeter(bench, 0.9, side="trl", stages=stages, **names)
        try:
            stepping_trainer(
                setting,
                folder,
                meter,
                two_stage=two_stage,
                steps=bench.repeats + 2,
                device=bench.device,
                rows_at_once=setting.trl_rows_at_once,
                vllm=vllm,
            ).train()
        except Finished:
            return meter.tell_median()
        except torch.OutOfMemoryError as error:
            failed = one_line(error)
            if checkpointing:
                raise
            setting = replace(setting, trl_gradient_checkpointing=1)
        except Exception as error:  # boundary: a vLLM that TRL cannot drive
            failed = one_line(error)
            if not vllm:
                raise
            vllm = False
        bench.tell(side="trl", stages=stages, **names, failed=failed)
        bench.free()


PARTS: dict[str, Callable[[Bench], None]] = {
    "ceilings": ceilings,
    "step": step,
    "update": update,
    "decode": decode,
    "trl_two": partial(trl, two_stage=True),
    "trl_one": partial(trl, two_stage=False),
}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def main(arguments: Sequence[str]) -> None:
    sys.stdout = sys.stderr
    options = json.loads(arguments[0])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    setting = setting_of(device, options["setting"])
    torch.manual_seed(setting.seed)
    bench = Bench(Path(options["folder"]), device, options["repeats"], setting)
    if options["side"] == "trl":
        with suppress(Exception):  # What fails here fails again in the part, which says so.
            _ = importlib.import_module("trl").GRPOTrainer
    print(json.dumps({"done": True}), file=PROTOCOL, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        with bench.within(request["part"], request["limit_s"]):
            PARTS[request["part"]](bench)
        print(json.dumps({"done": True}), file=PROTOCOL, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
