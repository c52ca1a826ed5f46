"""Policies: a causal language model and its tokenizer, from a Hugging Face folder and back.

folder or name -> load_model -> PreTrainedModel with fp32 master weights
               -> open_policy -> LoadedPolicy: model, tokenizer, and the precision they are run in
model + tokenizer -> save_pretrained_folder -> a folder that any Hugging Face host serves
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as hf_logging

from igrpo_nemo.errors import UserError
from igrpo_nemo.local.fused.decoder import can_pack
from igrpo_nemo.run.tokenizer import load_tokenizer

# The console shows what is going on; bars of single files would tear its lines.
hf_logging.disable_progress_bar()

_WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
"""Beside each may stand its index, where it is cut into shards."""


@dataclass(frozen=True, slots=True)
class LoadedPolicy:
    """A model, its tokenizer, and the precision it is run in."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    autocast: Callable[[], AbstractContextManager[Any]]
    precision: str
    """`bfloat16` or `float32`: what its products are computed in."""


def open_policy(
    folder: Path | str,
    *,
    precision: str,
    tokenizer_name: str | None = None,
    chat_template: str | None = None,
) -> LoadedPolicy:
    """Loads a policy with fp32 master weights onto the GPU where there is one, else the CPU.

    `precision` is `policy.precision`: on a GPU `bfloat16` means autocast, on a CPU everything runs
    in float32, because bf16 brings nothing there. `tokenizer_name` is another folder's tokenizer
    (default: the model's own). `chat_template` is a Jinja text or the path of a `.jinja` file that
    replaces the tokenizer's own. Raises `UserError` for a folder that is not there or lacks weights
    or a tokenizer, and for a tokenizer with ids that the model does not know.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_model(folder, device=device)
    if device.type == "cuda" and can_pack(model):
        fuse_norms(model)
    tokenizer = load_tokenizer(tokenizer_name or folder, chat_template)
    _check_vocabulary(model, tokenizer)
    if device.type == "cpu" or precision != "bfloat16":
        return LoadedPolicy(model, tokenizer, nullcontext, "float32")
    autocast = partial(torch.autocast, "cuda", dtype=torch.bfloat16)
    return LoadedPolicy(model, tokenizer, autocast, precision)


def _check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = model.get_input_embeddings().get_parameter("weight").shape[0]
    highest = max(tokenizer.get_vocab().values())
    if highest >= rows:
        raise UserError(
            f"the tokenizer {tokenizer.name_or_path} has ids up to {highest}, but the model's "
            f"embedding has only {rows} rows: choose the model's own tokenizer, or enlarge the "
            "model with resize_token_embeddings"
        )


def context_of(model: PreTrainedModel) -> int | None:
    """The longest sequence that a model is made for, in tokens; None where its config names none.

    YaRN multiplies a shorter context; the other scalings of rotary positions have theirs in the
    config, as vLLM reads it too.
    """
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    limit = getattr(config, "max_position_embeddings", None)
    original = rope.get("original_max_position_embeddings")
    if rope.get("rope_type") == "yarn" and original:
        return max(limit or 0, int(original * rope["factor"]))
    return limit


def reference_of(policy: LoadedPolicy) -> PreTrainedModel:
    """A frozen copy of the policy as it is now: the reference policy of the KL penalty."""
    return copy.deepcopy(policy.model).requires_grad_(False).eval()


def load_weights(model: PreTrainedModel, folder: Path | str) -> None:
    """Replaces a model's weights by those of a model folder of the same architecture."""
    model.load_state_dict(load_model(folder, device="cpu").state_dict())


def load_model(name_or_path: str | Path, *, device: str | torch.device) -> PreTrainedModel:
    """A causal language model with float32 master weights, which autocast runs in less.

    It comes back in evaluation mode: a policy is never sampled or trained with dropout, or its
    log-probs would not be those it was sampled with. Raises `UserError` where there is no such
    folder or model, or it lacks something, or cannot be read.
    """
    _check_folder(name_or_path)
    try:  # boundary: files written by others, perhaps a download
        model = AutoModelForCausalLM.from_pretrained(str(name_or_path), dtype=torch.float32)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"cannot load the model {name_or_path}: {reason}") from error
    torch.nn.Module.to(model.eval(), torch.device(device))
    return model


def fuse_norms(model: PreTrainedModel) -> None:
    """Each RMSNorm in one kernel, and under autocast in its precision, which is what follows wants.

    For families whose norms are weight * x / rms(x), as `can_pack` knows them.
    """
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
            module.forward = partial(_rms_norm, module)


def _rms_norm(norm: Any, x: torch.Tensor) -> torch.Tensor:
    device, weight = x.device.type, norm.weight
    with torch.autocast(device, enabled=False):
        out = F.rms_norm(x, weight.shape, weight.to(x.dtype), norm.variance_epsilon)
    return out.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else out


def _check_folder(name_or_path: str | Path) -> None:
    folder = Path(name_or_path)
    if not folder.exists():
        # `org/model` may be a name on the Hugging Face hub; anything else was meant as a path.
        text = str(name_or_path)
        if folder.is_absolute() or text.startswith((".", "~")) or text.count("/") != 1:
            raise UserError(f"model folder {folder} does not exist")
        return
    if not folder.is_dir():
        raise UserError(f"{folder} is a file: name the model's folder")
    if not (folder / "config.json").is_file():
        raise UserError(f"model folder {folder} has no config.json: it is no Hugging Face model")
    names = [name + end for name in _WEIGHT_FILES for end in ("", ".index.json")]
    if not any((folder / name).is_file() for name in names):
        raise UserError(
            f"model folder {folder} has no weights: expected model.safetensors "
            "(or its index.json beside the shards)"
        )
    load_tokenizer(folder)


def save_pretrained_folder(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: str | Path
) -> None:
    """Write config, weights (safetensors), generation config and tokenizer to `path`.

    Raises `UserError` where the disk is full or the folder cannot be written.
    """
    folder = Path(path)
    try:  # boundary: the file system
        folder.mkdir(parents=True, exist_ok=True)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    except OSError as error:
        raise UserError(f"cannot save the model in {folder}: {error.strerror or error}") from error
