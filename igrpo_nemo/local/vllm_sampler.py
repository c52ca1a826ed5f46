"""Sampling completions with vLLM in this process: the embedded engine's generation on a GPU.

    policy -> a folder with its config and tokenizer -> vLLM's engine, asleep
    sample: wake up -> the policy's weights, from memory -> requests -> engine steps -> Completion
    sleep:  weights and KV cache leave the GPU, which the update then has to itself

vLLM holds a second copy of the weights, in the precision that the policy is run in. It is handed
over anew in every call, so nobody needs to say that the policy has changed, and what was in it
before is never needed: asleep it takes no memory on the host either (level 2).
"""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import math
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion

from igrpo_nemo.errors import NonFiniteError, UserError
from igrpo_nemo.local.sampler import NOT_FINITE, Sampler, SamplingParams, _Row
from igrpo_nemo.run.tokenizer import special_tags
from igrpo_nemo.types import StopReason

GPU_SHARE = 0.5
"""`vllm_cfg.gpu_memory_utilization` where nobody sets it: the policy in float32, its gradients and
its optimizer's moments stay on the GPU while vLLM is awake."""
_ENDS = {"stop": StopReason.STOP_STRING, "length": StopReason.LENGTH}


def why_not_vllm() -> str | None:
    """Why this process cannot sample with vLLM; None where it can."""
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    if importlib.util.find_spec("vllm") is None:
        return "vLLM is not installed (the extra `vllm` has it)"
    return None


class VllmSampler(Sampler):
    """The sampler with vLLM's forward pass, cache and draws, and everything else its own: the
    table in docs/embedded_engine.md says what is the same.

    `vllm_cfg` and `vllm_kwargs` are NeMo-RL's `policy.generation.*`: of the first, this engine
    reads `gpu_memory_utilization`, `enforce_eager` and `max_model_len`; the second goes to vLLM as
    it is. `precision` is `policy.precision`. Raises `UserError` for a policy, or a share of the
    memory, that vLLM refuses. There is room for one in a process.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_model_len: int | None = None,
        precision: str = "bfloat16",
        vllm_cfg: Mapping[str, Any] | None = None,
        vllm_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        cfg = vllm_cfg or {}
        self.in_float32 = precision == "float32"
        limits = (max_model_len, cfg.get("max_model_len"))
        limit = min((limit for limit in limits if limit), default=None)
        super().__init__(model, tokenizer, max_model_len=limit)
        self._skip_special_tokens = not special_tags(tokenizer)
        self._folder = tempfile.TemporaryDirectory(prefix="igrpo-vllm-")
        save_without_weights(model, tokenizer, self._folder.name)
        options = {
            "model": self._folder.name,
            "load_format": "dummy",
            "dtype": precision,
            "max_model_len": self.max_model_len,
            "gpu_memory_utilization": cfg.get("gpu_memory_utilization") or GPU_SHARE,
            "enforce_eager": bool(cfg.get("enforce_eager")),
        }
        self._llm = _open_engine({**options, **(vllm_kwargs or {})})
        self._awake = True
        self.sleep()

    @property
    def way(self) -> str:
        return "vLLM in this process (policy.generation.backend=vllm)"

    def sleep(self) -> None:
        """Frees what vLLM holds on the GPU, but for its CUDA graphs, until the next call."""
        if self._awake:
            self._llm.sleep(level=2)
            self._awake = False

    def _decode(self, groups: Sequence[list[_Row]], params: SamplingParams) -> Iterator[int]:
        # The engine's precision is its own: autocast would lower what it keeps in float32.
        with torch.autocast(self.model.device.type, enabled=False):
            self._wake_up()
            yield from self._generate([row for rows in groups for row in rows], params)

    def _wake_up(self) -> None:
        """Maps vLLM's memory again, and hands the policy's weights over."""
        if not self._awake:
            torch.cuda.empty_cache()  # what the update no longer needs, or there may be no room
            self._llm.wake_up()
            self._awake = True
        weights = checkpoint_weights(self.model)

        def load(model: Any) -> list[str]:
            taken = model.load_weights(iter(weights.items()))
            names = [name for name, _ in model.named_parameters()]
            return [] if taken is None else [name for name in names if name not in taken]

        [missing] = self._llm.apply_model(load)
        if missing:
            raise UserError(
                f"model_type {self.model.config.model_type}: vLLM has weights that the policy does "
                f"not hand over ({missing[0]}), so it would sample from another policy"
            )
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM keeps the cache of requests under the weights before these")

    def _generate(self, rows: Sequence[_Row], params: SamplingParams) -> Iterator[int]:
        """Completes all rows; yields how many ended, whenever some did."""
        engine, end_ids = self._llm.llm_engine, self._end_ids(params)
        vocabulary = self.model.config.get_text_config().vocab_size
        truncated = params.top_p < 1 or (params.top_k or vocabulary) < vocabulary
        waiting = {str(number): row for number, row in enumerate(rows)}
        try:
            for name, row in waiting.items():
                prompt = {"type": "token", "prompt_token_ids": list(row.request.prompt_ids)}
                engine.add_request(name, prompt, self._vllm_params(row, params, end_ids))
            while engine.has_unfinished_requests():
                ended = [output for output in engine.step() if output.finished]
                for output in ended:
                    row = waiting.pop(output.request_id)
                    self._complete(row, output.outputs[0], end_ids, truncated)
                if ended:
                    yield len(ended)
        finally:
            if waiting:
                engine.abort_request(list(waiting))

    def _vllm_params(self, row: _Row, params: SamplingParams, end_ids: frozenset[int]) -> Any:
        from vllm.sampling_params import RequestOutputKind
        from vllm.sampling_params import SamplingParams as VllmParams

        return VllmParams(
            temperature=params.temperature,
            top_p=params.top_p,
            top_k=params.top_k or 0,
            seed=_seed(row.request.seed_key, row.number) if params.temperature else None,
            max_tokens=row.max_tokens,
            # The ids that end a completion are `_end_ids` alone, whatever vLLM's files say.
            ignore_eos=True,
            stop_token_ids=sorted(end_ids),
            stop=list(params.stop_strings),
            detokenize=bool(params.stop_strings),
            skip_special_tokens=self._skip_special_tokens,
            logprobs=0,  # the chosen token's
            flat_logprobs=True,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def _complete(self, row: _Row, output: Any, end_ids: frozenset[int], truncated: bool) -> None:
        row.token_ids, row.logprobs = list(output.token_ids), list(output.logprobs.logprobs)
        if not all(map(math.isfinite, row.logprobs)):
            raise NonFiniteError(NOT_FINITE)
        if truncated:
            row.logprobs = [math.nan] * len(row.token_ids)
        at_end = row.token_ids[-1] in end_ids
        reason = StopReason.EOS if at_end else _ENDS[output.finish_reason]
        row.completion = self._completion(row, reason)


def _open_engine(options: dict[str, Any]) -> Any:
    """vLLM's `LLM` in this process: as quiet as the console needs, reproducible, able to sleep."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    from vllm import LLM

    defaults = {
        "enable_sleep_mode": True,
        "logprobs_mode": "processed_logprobs",  # behind the temperature
        # Scheduling ahead of results makes batches depend on the clock, and rounding on batches.
        "async_scheduling": False,
        # Graphs of vLLM's own kernels take seconds, its compiler the better part of a minute.
        "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"},
        "use_tqdm_on_load": False,
    }
    try:  # boundary: what vLLM can run, and what fits
        return LLM(**{**defaults, **options})
    except ValueError as error:
        reason = " ".join(str(error).split())
        share = options["gpu_memory_utilization"]
        raise UserError(
            f"vLLM cannot sample this policy: {reason} (its share of the GPU's memory is "
            f"policy.generation.vllm_cfg.gpu_memory_utilization={share:g})"
        ) from error


def save_without_weights(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str
) -> None:
    """What vLLM reads of a model folder: the policy's config and tokenizer."""
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def checkpoint_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """The live weights under the names, and cut as in the files, that every host loads.

    Tied weights come once. What needs no cutting is the model's own memory.
    """
    tied = model.all_tied_weights_keys
    weights = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    return dict(revert_weight_conversion(model, weights))


def _seed(key: str, number: int) -> int:
    """63 bits that follow from a row's name alone."""
    digest = hashlib.blake2b(f"{key}\0{number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
