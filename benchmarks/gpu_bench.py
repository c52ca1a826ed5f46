"""What the parts of `gpu.py` share: sizes, time limits, model, rates of the device, step times."""

from __future__ import annotations

import gc
import json
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from engine_setting import Setting, build_random_folder

from igrpo_nemo.config import load_config
from igrpo_nemo.local.costs import peak_memory_gb
from igrpo_nemo.local.learner import Learner
from igrpo_nemo.local.model import LoadedPolicy, open_policy
from igrpo_nemo.local.packing import enable_checkpointing
from igrpo_nemo.local.parts import open_learner
from igrpo_nemo.local.sampler import Sampler
from igrpo_nemo.local.vllm_sampler import VllmSampler

PROTOCOL = sys.stdout
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
    vllm: int = 0
    """1: the embedded engine samples with vLLM."""
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
        print(json.dumps({"part": self.part, **values}), file=PROTOCOL, flush=True)

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

    @cached_property
    def sampler(self) -> Sampler:
        policy, longest = self.policy, self.setting.context
        kind = VllmSampler if self.setting.vllm else Sampler
        return kind(policy.model, policy.tokenizer, max_model_len=longest)

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


def setting_of(device: str, values: dict[str, str]) -> GpuSetting:
    """The device's setting with fields replaced; raises `ValueError` for an unknown name."""
    setting = GpuSetting() if device == "cuda" else TOY
    kinds = {f.name: type(f.default) for f in fields(setting)}
    if unknown := values.keys() - kinds.keys():
        raise ValueError(f"no such size: {', '.join(unknown)}; there are {', '.join(kinds)}")
    return replace(setting, **{name: kinds[name](text) for name, text in values.items()})


def one_line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"[:300]
