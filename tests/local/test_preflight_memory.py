"""The preflight's memory of the embedded engine against measured peaks, each in its own process.

What is measured is the growth of the resident set over two steps, sampling and update, above a
process that has run the same code with a tiny model. A busy machine does not change it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from igrpo_nemo.config import load_config
from igrpo_nemo.preflight.lengths import context
from igrpo_nemo.preflight.local_memory import (
    LocalWork,
    Sampling,
    Update,
    local_memory,
    local_work,
)
from igrpo_nemo.preflight.questions import questions
from igrpo_nemo.preflight.shape import Shape

WORKER = Path(__file__).with_name("memory_worker.py")
TOLERANCE = 0.15


def model(hidden: int, layers: int, heads: int, kv: int, inner: int, vocab: int, **other: Any):
    return {
        "model_type": "qwen2",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "intermediate_size": inner,
        "vocab_size": vocab,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
        **other,
    }


TWO_STAGES = [
    {"prompt": 64, "rows": 4, "trained": False},
    {"prompt": 180, "rows": 4, "trained": True},
]
BASE = {
    "stages": TWO_STAGES,
    "problems": 4,
    "new_tokens": 96,
    "packed": True,
    "micro_batch_tokens": 4096,
    "micro_batch_rows": 1,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "two stages": {"shape": model(512, 4, 8, 2, 1536, 8192)},
    "large vocabulary": {"shape": model(256, 4, 4, 2, 768, 32_768)},
    "llama, untied": {
        "shape": model(384, 6, 6, 2, 1024, 16_384, model_type="llama", tie_word_embeddings=False)
    },
    "one stage, eight rows": {
        "shape": model(256, 4, 8, 8, 1024, 4096),
        "stages": [{"prompt": 100, "rows": 8, "trained": True}],
        "new_tokens": 60,
    },
    "long prompts": {
        "shape": model(128, 4, 4, 2, 512, 1024),
        "stages": [{"prompt": 300, "rows": 8, "trained": True}],
        "problems": 8,
        "new_tokens": 100,
        "micro_batch_tokens": 100_000,
    },
    "many micro-batches": {"shape": model(512, 4, 8, 4, 1408, 4096), "micro_batch_tokens": 600},
    "padded rows": {
        "shape": model(256, 4, 4, 2, 768, 8192),
        "packed": False,
        "micro_batch_rows": 8,
    },
}


def measured(setting: dict[str, Any]) -> int:
    """Bytes of the peak, in a fresh process."""
    if not Path("/proc/self/status").exists():
        pytest.skip("the peak of a process is read from /proc")
    done = subprocess.run(
        [sys.executable, str(WORKER), json.dumps(setting)],
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["bytes"]


def shape_of_fields(fields: dict[str, Any]) -> Shape:
    hidden, heads = fields["hidden_size"], fields["num_attention_heads"]
    return Shape(
        family=fields["model_type"],
        hidden=hidden,
        depth=fields["num_hidden_layers"],
        attention_layers=fields["num_hidden_layers"],
        mlp_layers=fields["num_hidden_layers"],
        mamba_layers=0,
        heads=heads,
        kv_heads=fields["num_key_value_heads"],
        head_dim=hidden // heads,
        intermediate=fields["intermediate_size"],
        gated_mlp=True,
        vocab=fields["vocab_size"],
        context=fields["max_position_embeddings"],
        tied=fields["tie_word_embeddings"],
        qkv_bias=fields["model_type"] == "qwen2",
    )


def work_of(setting: dict[str, Any]) -> LocalWork:
    stages, problems = setting["stages"], setting["problems"]
    return LocalWork(
        samplings=tuple(Sampling(problems, s["rows"], s["prompt"]) for s in stages),
        updates=tuple(Update(problems, s["rows"], s["prompt"]) for s in stages if s["trained"]),
        new_tokens=setting["new_tokens"],
        packed=setting["packed"],
        micro_batch_tokens=setting["micro_batch_tokens"],
        micro_batch_rows=setting["micro_batch_rows"],
    )


@pytest.mark.parametrize("name", SETTINGS)
def test_the_estimate_is_within_15_percent_of_the_measured_peak(name):
    setting = {**BASE, **SETTINGS[name]}
    estimate = local_memory(shape_of_fields(setting["shape"]), work_of(setting)).growth
    assert estimate == pytest.approx(measured(setting), rel=TOLERANCE)


def test_a_configs_work_is_what_the_engine_does():
    """Batches, rows and lengths of the demo, at their limits."""
    config = load_config(["experiment=demo"])
    work = local_work(config, context(config, questions(config, {})))
    q = 35
    assert work.samplings == (
        Sampling(64, 4, q),
        Sampling(64, 4, q + 12 + 24),
        Sampling(1024, 1, q),
    )
    assert work.updates == (Update(64, 4, q + 12 + 24),)
    one = load_config(["experiment=demo_grpo"])
    assert local_work(one, context(one, questions(one, {}))).updates == (Update(64, 8, q),)
