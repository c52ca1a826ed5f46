"""The measurements of `gpu.py`, in a process of its own for each side.

    python benchmarks/gpu_parts.py OPTIONS    (JSON: side, folder, repeats, setting)

Reads one {"part", "limit_s"} a line and answers with one JSON line a result, then {"done": true}.
A part that has not ended after its limit is left where it is.
"""

from __future__ import annotations

import copy
import gc
import importlib
import importlib.util
import json
import random
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
from engine_setting import Setting, build_random_folder, environment_of, problems_of

from igrpo_nemo.config import load_config
from igrpo_nemo.local.costs import peak_memory_gb
from igrpo_nemo.local.learner import Learner
from igrpo_nemo.local.model import LoadedPolicy, compile_layers, open_policy
from igrpo_nemo.local.packing import enable_checkpointing
from igrpo_nemo.local.parts import open_learner
from igrpo_nemo.local.rollout import TwoStageRollout
from igrpo_nemo.local.sampler import Sampler, SampleRequest, SamplingParams
from igrpo_nemo.types import Completion, Stage, StopReason, TrainingRow

_PROTOCOL = sys.stdout
"""The parent's end; everything that libraries print goes to stderr instead."""


@dataclass(frozen=True, slots=True)
class GpuSetting(Setting):
    """A Qwen2 of 0.36B parameters, 16 problems x (8 + 8), at most 256 tokens, q' of 300."""

    hidden_size: int = 896
    num_layers: int = 24
    num_heads: int = 14
    num_kv_heads: int = 2
    intermediate_size: int = 4864
    vocab_size: int = 512
    problems: int = 16
    max_completion: int = 256
    context_tokens: int = 556
    train_mb_tokens: int = 16384
    """Of a micro-batch of the embedded engine."""
    checkpointed: int = 0
    """1: the embedded engine keeps the inputs of its layers alone, as TRL does by default."""
    compiled: int = 0
    """1: the embedded engine trains through compiled layers."""
    trl_rows_at_once: int = 32
    """Of a micro-batch of TRL: about as many tokens."""
    row_tokens: int = 4096
    """Length of the rows in the part `update`."""
    copy_mb: int = 1024
    """Size of the copy whose rate is the memory's ceiling, in 2^20 bytes."""
    matrix: int = 8192
    """Width of the square matrices whose product's rate is the other ceiling."""


TOY = GpuSetting(
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    intermediate_size=64,
    vocab_size=320,
    problems=2,
    num_drafts=2,
    num_refinements=2,
    max_completion=16,
    context_tokens=316,
    train_mb_tokens=1024,
    trl_rows_at_once=2,
    row_tokens=512,
    copy_mb=16,
    matrix=256,
)
"""What runs where there is no GPU: it shows that the benchmark works, and nothing about speed."""


class OutOfTime(BaseException):
    """A part's limit is over. No `Exception`, which a library might swallow."""


class Finished(Exception):
    """Enough steps were measured."""


@dataclass
class Bench:
    """What the parts of one process share: device, sizes, limits, model and ceilings."""

    folder: Path
    device: str
    repeats: int
    setting: GpuSetting
    part: str = ""
    _deadline: float = field(default=0.0, init=False)

    def tell(self, **values: Any) -> None:
        print(json.dumps({"part": self.part, **values}), file=_PROTOCOL, flush=True)

    @contextmanager
    def within(self, part: str, limit_s: float) -> Iterator[None]:
        """Runs a part; says why where it ends early, and goes on."""

        def stop(*_: Any) -> None:
            raise OutOfTime

        self.part, self._deadline = part, time.perf_counter() + limit_s
        before = signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, limit_s)
        try:
            yield
        except OutOfTime:
            self.tell(failed=f"cut off after {limit_s:g} s")
        except Exception as error:  # boundary: the other parts are still to be measured
            self.tell(failed=one_line(error))
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        self.free()

    def left_s(self) -> float:
        return self._deadline - time.perf_counter()

    def sync(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def free(self) -> None:
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def memory(self) -> dict[str, float]:
        """GB (10^9 bytes): the allocator's peak since the last call (a process's on a CPU), and
        what is taken on the GPU now, caches and other processes included."""
        found = {"peak_gb": peak_memory_gb(torch.device(self.device))}
        if self.device == "cuda":
            free, total = torch.cuda.mem_get_info()
            found["device_gb"] = (total - free) / 1e9
            torch.cuda.reset_peak_memory_stats()
        return found

    def seconds(self, work: Callable[[], Any], share: float = 1.0, calls: int = 1) -> float:
        """Median seconds of a call, after one that is not counted.

        Of `repeats` rounds of `calls` calls, or fewer where they would take more than `share` of
        the time that is left.
        """
        until = time.perf_counter() + share * self.left_s()
        work()
        times = []
        while len(times) < self.repeats:
            self.sync()
            start = time.perf_counter()
            for _ in range(calls):
                work()
            self.sync()
            end = time.perf_counter()
            times.append((end - start) / calls)
            if 2 * end - start > until:
                break
        return statistics.median(times)

    def model_folder(self) -> Path:
        """The model of both sides, made by whoever needs it first."""
        folder = self.folder / "model"
        if not folder.exists():
            scratch, setting = self.folder / "scratch", self.setting
            with torch.device(self.device):
                build_random_folder(setting, scratch, longest=setting.row_tokens + setting.context)
            scratch.rename(folder)
        return folder

    @cached_property
    def policy(self) -> LoadedPolicy:
        policy = open_policy(self.model_folder(), precision="bfloat16")
        if self.setting.checkpointed:
            enable_checkpointing(policy.model)
        if self.setting.compiled:
            compile_layers(policy.model)
        return policy

    @cached_property
    def learner(self) -> Learner:
        setting = self.setting
        config = load_config(
            [
                "experiment=demo",
                f"policy.optimizer.kwargs.lr={setting.lr}",
                f"policy.sequence_packing.train_mb_tokens={setting.train_mb_tokens}",
                f"policy.max_total_sequence_length={setting.context}",
                f"policy.generation.max_new_tokens={setting.max_completion}",
            ]
        )
        return open_learner(config, self.policy)

    def sampler(self) -> Sampler:
        policy = self.policy
        return Sampler(policy.model, policy.tokenizer, max_model_len=self.setting.context)

    @cached_property
    def ceilings(self) -> dict[str, float]:
        """Bytes read plus written per second by a large copy, FLOP/s of a large matrix product."""
        on: dict[str, Any] = {"device": self.device}
        source = torch.zeros(self.setting.copy_mb * 2**20, dtype=torch.uint8, **on)
        target, size = torch.empty_like(source), self.setting.matrix
        copy_s = self.seconds(lambda: target.copy_(source), 0.3, calls=10)
        a, b = torch.randn(2, size, size, dtype=self.dtype, **on)
        product_s = self.seconds(lambda: a @ b, 0.5, calls=10)
        return {
            "bytes_per_s": 2 * source.numel() / copy_s,
            "flops_per_s": 2 * size**3 / product_s,
        }

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device == "cuda" else torch.float32


class StepMeter:
    """Times training steps and tells each; raises `Finished` when there are enough.

    The first step pays for caches, compilation and lazy imports, and is not counted.
    """

    def __init__(self, bench: Bench, share: float = 1.0, **names: Any) -> None:
        self._bench, self._names = bench, names
        self._until = time.perf_counter() + share * bench.left_s()
        self._steps: list[dict[str, float]] = []

    def begin(self) -> None:
        self._bench.sync()
        self._bench.memory()
        self._start = time.perf_counter()

    def rolled_out(self) -> None:
        self._bench.sync()
        self._rolled_out = time.perf_counter()

    def end(self, completions: Sequence[Sequence[int]], prompts: Sequence[Sequence[int]]) -> None:
        self._bench.sync()
        now = time.perf_counter()
        tokens, step_s = sum(map(len, completions)), now - self._start
        step = {
            "step_s": step_s,
            "rollout_s": self._rolled_out - self._start,
            "update_s": now - self._rolled_out,
            "tokens_per_s": tokens / step_s,
            "completion_tokens": tokens / len(completions),
            "trained_prompt_tokens": sum(map(len, prompts)) / len(prompts),
            **self._bench.memory(),
        }
        self._bench.tell(**self._names, step=len(self._steps), **step)
        self._steps.append(step)
        if len(self._steps) > self._bench.repeats or now + step_s > self._until:
            raise Finished

    def tell_median(self) -> None:
        counted = self._steps[1:] or self._steps
        median = {name: statistics.median(s[name] for s in counted) for name in counted[0]}
        self._bench.tell(**self._names, steps=len(self._steps[1:]), **median)


def ceilings(bench: Bench) -> None:
    """The device's two rates, and what it is."""
    name = torch.cuda.get_device_name() if bench.device == "cuda" else "CPU"
    versions = {"torch": torch.__version__, "transformers": _version("transformers")}
    bench.tell(machine=name, **versions, trl=_version("trl"), vllm=_version("vllm"))
    bench.tell(**bench.ceilings, copied_mb=bench.setting.copy_mb, matrix=bench.setting.matrix)


def step(bench: Bench) -> None:
    """Whole training steps of the embedded engine, two-stage and one-stage."""
    setting, policy, learner = bench.setting, bench.policy, bench.learner
    sampler, parameters = bench.sampler(), sum(p.numel() for p in policy.model.parameters())
    bench.tell(side="embedded", sampler=sampler.way, parameters=parameters)
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
    setting, learner = bench.setting, bench.learner
    rows = long_rows(setting)
    flops = update_flops(learner.model, rows)
    config, sizes = learner.config, [setting.row_tokens * k for k in (1, 2, 4, 8)]
    for number, size in enumerate(sizes):
        learner.config = config.replaced("policy.sequence_packing", train_mb_tokens=size)
        bench.memory()
        try:
            taken = bench.seconds(partial(learner.update, rows), 1 / (len(sizes) - number))
        except torch.OutOfMemoryError as error:
            bench.tell(micro_batch_tokens=size, failed=one_line(error))
            learner.optimizer.zero_grad(set_to_none=True)
            bench.free()
            continue
        bench.tell(
            micro_batch_tokens=size,
            update_s=taken,
            flops=flops,
            share_of_matrix_rate=flops / taken / bench.ceilings["flops_per_s"],
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
    with endless(policy, setting.context) as sampler, policy.autocast():
        bench.memory()
        prefill_s = bench.seconds(lambda: sampler.sample(requests, SamplingParams(1)), 0.2)
        params = SamplingParams(setting.max_completion)
        whole_s = bench.seconds(lambda: sampler.sample(requests, params))
    step_s, rate = (whole_s - prefill_s) / steps, bench.ceilings["bytes_per_s"]
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


@contextmanager
def endless(policy: LoadedPolicy, longest: int) -> Iterator[Sampler]:
    """A sampler whose rows end at their length alone."""
    tokenizer = copy.deepcopy(policy.tokenizer)
    tokenizer.eos_token = None
    generation = policy.model.generation_config
    assert generation is not None
    before, generation.eos_token_id = generation.eos_token_id, None
    try:
        yield Sampler(policy.model, tokenizer, max_model_len=longest)
    finally:
        generation.eos_token_id = before


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


def one_line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"[:300]


def _version(name: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def setting_of(device: str, values: dict[str, str]) -> GpuSetting:
    """The device's setting with fields replaced; raises `ValueError` for an unknown name."""
    setting = GpuSetting() if device == "cuda" else TOY
    kinds = {f.name: type(f.default) for f in fields(setting)}
    if unknown := values.keys() - kinds.keys():
        raise ValueError(f"no such size: {', '.join(unknown)}; there are {', '.join(kinds)}")
    return replace(setting, **{name: kinds[name](text) for name, text in values.items()})


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
    print(json.dumps({"done": True}), file=_PROTOCOL, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        with bench.within(request["part"], request["limit_s"]):
            PARTS[request["part"]](bench)
        print(json.dumps({"done": True}), file=_PROTOCOL, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
