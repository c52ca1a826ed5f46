"""The config's chat template through NeMo-RL's own saving and its own converter."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from pydantic import BaseModel
from test_data import PLAIN

from igrpo_nemo.chain.conversion import convert
from igrpo_nemo.config.igrpo_keys import SmallModel
from igrpo_nemo.local.model import save_pretrained_folder
from igrpo_nemo.local.warmup import build_small_model
from igrpo_nemo.nemo.resume import carry_tokenizer
from igrpo_nemo.nemo.versions import finalized
from igrpo_nemo.run.tokenizer import build_small_tokenizer

SHAPE = SmallModel(
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    intermediate_size=48,
    vocab_size=300,
    initializer_range=0.15,
)


class Saved(BaseModel):
    """What a checkpoint's config.yaml has of a run's config."""

    policy: dict


@pytest.mark.either_tree
@pytest.mark.parametrize("finish", ["finalize_checkpoint", "begin_finalization"])
@pytest.mark.parametrize("worker_saves_it", [True, False])
def test_a_base_models_template_reaches_the_converted_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, worker_saves_it: bool, finish: str
) -> None:
    """DTensor's worker saves the tokenizer that it was given; Megatron-Core's saves none."""
    from nemo_rl.algorithms.utils import get_tokenizer
    from nemo_rl.utils.checkpoint import CheckpointManager
    from nemo_rl.utils.native_checkpoint import save_checkpoint
    from transformers import AutoTokenizer

    if not hasattr(CheckpointManager, finish):
        pytest.skip(f"this NeMo-RL has no {finish}")
    base, run = tmp_path / "base", tmp_path / "run"
    plain = build_small_tokenizer(["user: 1+2=3"], 300)
    plain.chat_template = None
    model = build_small_model(SHAPE, plain, context=128, seed=0)
    save_pretrained_folder(model, plain, base)
    section = {"name": str(base), "chat_template": PLAIN}
    tokenizer = get_tokenizer(section)
    settings = {"checkpoint_dir": run / "checkpoints", "metric_name": None, "enabled": True}
    settings |= {"higher_is_better": True, "keep_top_k": None, "save_optimizer": False}
    settings["save_period"] = 1
    checkpointer = CheckpointManager(settings)
    carry_tokenizer(checkpointer, tokenizer)
    config = Saved(policy={"model_name": str(base), "tokenizer": section})
    folder = Path(checkpointer.init_tmp_checkpoint(3, {}, config))
    kept = {"tokenizer": tokenizer, "tokenizer_path": str(folder / "policy" / "tokenizer")}
    save_checkpoint(model, str(folder / "policy" / "weights"), **(kept if worker_saves_it else {}))
    with finalized(checkpointer):
        getattr(checkpointer, finish)(folder)
    (run / "config.yaml").write_text("{}")
    (run / "finished").touch()

    monkeypatch.setenv("NEMO_RL_SRC", str(Path(sys.modules["nemo_rl"].__file__ or "").parents[1]))
    convert(run, "last", python=sys.executable)
    converted = AutoTokenizer.from_pretrained(run / "hf" / "last")
    asked = [{"role": "user", "content": "1+2="}]
    text = converted.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    assert text == "1+2=\n\nAnswer:"
    assert json.loads((run / "stages" / "convert-last.json").read_text())["outputs"]["step"] == 3
