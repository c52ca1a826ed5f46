"""The policy to train, with its tokenizer: a Hugging Face folder, or the small built-in model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from igrpo_nemo.errors import UserError
from igrpo_nemo.local.model import load_model
from igrpo_nemo.run.tokenizer import load_tokenizer


@dataclass(frozen=True, slots=True)
class Policy:
    """A model, its tokenizer, and the precision it is run in."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    autocast: Callable[[], AbstractContextManager[Any]]


def open_policy(
    folder: Path | str,
    *,
    precision: str,
    tokenizer_name: str | None = None,
    chat_template: str | None = None,
) -> Policy:
    """Loads a policy with fp32 master weights onto the GPU where there is one, else the CPU.

    `precision` is `policy.precision`: on a GPU `bfloat16` means autocast, on a CPU everything runs
    in float32, because bf16 brings nothing there. `tokenizer_name` is another folder's tokenizer
    (default: the model's own). `chat_template` is a Jinja text or the path of a
    `.jinja` file that replaces the tokenizer's own. Raises `UserError` for a folder that is not
    there or lacks weights or a tokenizer.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_model(folder, device=device, precision="float32")
    tokenizer = load_tokenizer(tokenizer_name or folder)
    if chat_template:
        tokenizer.chat_template = _template_text(chat_template)
    return Policy(model, tokenizer, _autocast(device, precision))


def reference_of(policy: Policy) -> PreTrainedModel:
    """A frozen copy of the policy as it is now: the reference policy of the KL penalty."""
    return copy.deepcopy(policy.model).requires_grad_(False).eval()


def load_weights(model: PreTrainedModel, folder: Path | str) -> None:
    """Replaces a model's weights by those of a model folder of the same architecture."""
    stored = load_model(folder, device="cpu", precision="float32", trainable=False)
    model.load_state_dict(stored.state_dict())


def _autocast(device: torch.device, precision: str) -> Callable[[], AbstractContextManager[Any]]:
    if device.type == "cuda" and precision in ("bfloat16", "float16"):
        dtype = getattr(torch, precision)
        return lambda: torch.autocast("cuda", dtype=dtype)
    return nullcontext


def _template_text(chat_template: str) -> str:
    if not chat_template.endswith(".jinja"):
        return chat_template
    path = Path(chat_template)
    if not path.is_file():
        raise UserError(f"policy.tokenizer.chat_template: there is no file {path}")
    return path.read_text()
