"""A process of its own for `test_preflight_memory.py`: steps of the embedded engine, their peak.

    python tests/local/memory_worker.py SETTING        prints {"bytes": peak above the start}

The model is random and completions never end, so that every row has the full length.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def resident(name: str) -> int:
    """`VmRSS` or `VmHWM` of this process in bytes; not ru_maxrss, which a child inherits."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {name} in /proc/self/status")


def main() -> None:
    setting = json.loads(sys.argv[1])
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    # What libraries load and keep once is the process's, not the model's.
    run_steps(small(setting), 2)
    before = resident("VmRSS")
    run_steps(setting, 2)
    print(json.dumps({"bytes": resident("VmHWM") - before}))


def small(setting: dict) -> dict:
    """The same setting with a model of a few hundred kilobytes."""
    shape = {**setting["shape"], "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 256}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 128}
    stages = [{**stage, "rows": 2, "prompt": 8} for stage in setting["stages"]]
    return {**setting, "shape": shape, "stages": stages, "problems": 2, "new_tokens": 8}


def run_steps(setting: dict, steps: int) -> None:
    """Samples and trains as often as asked; every row has the full length."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    from igrpo_nemo.local.learner import Learner, LearnerSettings
    from igrpo_nemo.local.sampler import Sampler, SampleRequest, SamplingParams
    from igrpo_nemo.objectives.surrogate import SurrogateConfig
    from igrpo_nemo.types import Stage, TrainingRow

    kinds = {"qwen2": (Qwen2Config, Qwen2ForCausalLM), "llama": (LlamaConfig, LlamaForCausalLM)}
    config_type, model_type = kinds[setting["shape"]["model_type"]]
    fields = {k: v for k, v in setting["shape"].items() if k != "model_type"}
    config = config_type(**fields, bos_token_id=None, eos_token_id=None, pad_token_id=None)
    model = model_type(config).float().eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    learner = Learner(
        model,
        optimizer,
        scheduler,
        LearnerSettings(
            SurrogateConfig(),
            packed=setting["packed"],
            max_micro_batch_tokens=setting["micro_batch_tokens"],
            max_micro_batch_rows=setting["micro_batch_rows"],
        ),
    )
    sampler = Sampler(model, _Endless())  # type: ignore[arg-type]
    params = SamplingParams(setting["new_tokens"])
    for step in range(steps):
        rows = []
        for stage in setting["stages"]:
            prompts = [
                tuple((number + i) % 250 for i in range(stage["prompt"]))
                for number in range(setting["problems"])
            ]
            requests = [
                SampleRequest(prompt, stage["rows"], f"{step}/{number}")
                for number, prompt in enumerate(prompts)
            ]
            completions = sampler.sample(requests, params)
            if stage["trained"]:
                rows += [
                    TrainingRow(str(number), Stage.REFINE, prompts[number], completion, i % 3)
                    for number, group in enumerate(completions)
                    for i, completion in enumerate(group)
                ]
        assert all(len(row.completion.token_ids) == setting["new_tokens"] for row in rows)
        learner.update(rows)


class _Endless:
    """A tokenizer without an end token: completions stop at their length alone."""

    eos_token = eos_token_id = None

    def decode(self, ids, **options) -> str:
        return ""


if __name__ == "__main__":
    main()
