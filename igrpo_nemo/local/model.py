"""Policies: a causal language model from a Hugging Face folder, or a small one built from scratch.

folder or name -> load_model -> PreTrainedModel     (fp32 master weights when trained)
SmallModelSpec + tokenizer -> build_small_model -> Qwen2ForCausalLM
model + tokenizer -> save_pretrained_folder -> a folder that any Hugging Face host serves
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.utils import logging as hf_logging

from igrpo_nemo.errors import UserError
from igrpo_nemo.run.tokenizer import load_tokenizer, token_id

# The console shows what is going on; bars of single files would tear its lines.
hf_logging.disable_progress_bar()

PRECISIONS = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
}

_WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


@dataclass(frozen=True, slots=True)
class SmallModelSpec:
    """The shape of a small Qwen2 policy; the vocabulary is its tokenizer's."""

    hidden_size: int = 128
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 2
    intermediate_size: int = 512
    max_position_embeddings: int = 1024
    rope_theta: float = 10_000.0
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if getattr(self, name) <= 0:
                raise UserError(
                    f"{name} of the small model is {getattr(self, name)}: use more than 0"
                )
        if self.hidden_size % self.num_heads or (self.hidden_size // self.num_heads) % 2:
            raise UserError(
                f"hidden_size {self.hidden_size} does not give {self.num_heads} heads of an even "
                "size: use a multiple of 2 * num_heads"
            )
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"num_heads {self.num_heads} is no multiple of num_kv_heads {self.num_kv_heads}"
            )


def load_model(
    name_or_path: str | Path,
    *,
    device: str | torch.device,
    precision: str,
    trainable: bool = True,
) -> PreTrainedModel:
    """Load a causal language model for training or, frozen, as a reference.

    A trainable model keeps float32 master weights whatever `precision` says (bf16 training runs
    under autocast, which is the caller's); a frozen one is held in `precision` on a GPU and in
    float32 on a CPU. The model comes back in evaluation mode: a policy is never sampled or
    trained with dropout, or its log-probs would not be those it was sampled with.

    Raises:
        UserError: no such folder or model, a folder without config, weights or tokenizer, files
            that cannot be read, or an unknown precision.
    """
    device = torch.device(device)
    if precision not in PRECISIONS:
        raise UserError(f"unknown precision {precision!r}: use float32 or bfloat16")
    _check_folder(name_or_path)
    dtype = torch.float32 if trainable or device.type == "cpu" else PRECISIONS[precision]
    try:  # boundary: files written by others, perhaps a download
        model = AutoModelForCausalLM.from_pretrained(str(name_or_path), dtype=dtype)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"cannot load the model {name_or_path}: {reason}") from error
    model.requires_grad_(trainable).eval()
    torch.nn.Module.to(model, device)
    return model


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
    if not any((folder / name).is_file() for name in _WEIGHT_FILES):
        raise UserError(
            f"model folder {folder} has no weights: expected model.safetensors "
            "(or its index.json beside the shards)"
        )
    load_tokenizer(folder)


def build_small_model(
    spec: SmallModelSpec, tokenizer: PreTrainedTokenizerBase, seed: int
) -> Qwen2ForCausalLM:
    """A randomly initialised Qwen2 with tied embeddings, float32, on the CPU.

    Deterministic in `seed`; the global random state is left as it was.
    """
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=spec.hidden_size,
        num_hidden_layers=spec.num_layers,
        num_attention_heads=spec.num_heads,
        num_key_value_heads=spec.num_kv_heads,
        intermediate_size=spec.intermediate_size,
        max_position_embeddings=spec.max_position_embeddings,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": spec.rope_theta},
        initializer_range=spec.initializer_range,
        bos_token_id=None,
        eos_token_id=token_id(tokenizer, "eos"),
        pad_token_id=token_id(tokenizer, "pad"),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(config)
    return model.float().eval()


def save_pretrained_folder(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: str | Path
) -> None:
    """Write config, weights (safetensors), generation config and tokenizer to `path`.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    folder = Path(path)
    try:  # boundary: the file system
        folder.mkdir(parents=True, exist_ok=True)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    except OSError as error:
        raise UserError(f"cannot save the model in {folder}: {error.strerror or error}") from error
