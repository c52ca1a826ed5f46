"""The checkpoint of a run that ended with its data.

NeMo-RL saves at `save_period`, at `max_num_steps`, and at the step that is as many as an epoch has
batches. Under dynamic sampling a step may draw several batches, so the data end before that step:
without this the steps since the last period would be lost.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch


def carry_tokenizer(checkpointer: Any, tokenizer: Any) -> None:
    """Lets every checkpoint hold the tokenizer, its chat template included.

    NeMo-RL asks its policy workers to save it, and the Megatron-Core one does not
    (megatron_policy_worker.py: save_checkpoint takes `tokenizer_path` as any other keyword): what
    is not there when a checkpoint is whole is saved here.
    """
    finalize = checkpointer.finalize_checkpoint

    def finalize_with_tokenizer(checkpoint_path: Any) -> Any:
        folder = Path(checkpoint_path) / "policy" / "tokenizer"
        if not folder.is_dir():
            tokenizer.save_pretrained(str(folder))
        return finalize(checkpoint_path)

    checkpointer.finalize_checkpoint = finalize_with_tokenizer


def newest_step(checkpointer: Any) -> int:
    """The step of the newest checkpoint; 0 without one."""
    path = checkpointer.get_latest_checkpoint_path()
    return int(Path(path).name.removeprefix("step_")) if path else 0


def save_last_step(arguments: Mapping[str, Any], loader: Any, steps: int) -> None:
    """Saves the policy after `steps` steps, as `grpo_train` does (nemo_rl/algorithms/grpo.py).

    `arguments` are the trainer's. Nothing was measured after the last step, so the checkpoint has
    no metric to be ranked by; a run that is given more epochs goes on with the next one.
    """
    policy, checkpointer, master = (
        arguments[name] for name in ("policy", "checkpointer", "master_config")
    )
    state = arguments["grpo_save_state"]
    rows = (steps - state["total_steps"]) * master.grpo["num_prompts_per_step"]
    state["consumed_samples"] += rows
    state |= {
        "total_steps": steps,
        "current_step": 0,
        "current_epoch": master.grpo["max_num_epochs"],
    }
    for name in ("val_reward", master.checkpointing["metric_name"]):
        state.pop(name, None)
    policy.prepare_for_training()
    folder = checkpointer.init_tmp_checkpoint(steps, state, master)
    weights, optimizer, tokenizer = (
        os.path.join(folder, "policy", name) for name in ("weights", "optimizer", "tokenizer")
    )
    policy.save_checkpoint(
        weights_path=weights,
        optimizer_path=optimizer if checkpointer.save_optimizer else None,
        tokenizer_path=tokenizer,
        checkpointing_cfg=master.checkpointing,
    )
    torch.save(loader.state_dict(), os.path.join(folder, "train_dataloader.pt"))
    checkpointer.finalize_checkpoint(folder)
