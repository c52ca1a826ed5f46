"""Tokenizers and their chat templates: one trained for a small model, or a model folder's own.

The small tokenizer is a byte-level BPE, so any text round-trips; each digit is a token, so that
arithmetic is learnable; control tokens and chat template are Qwen's ChatML. It is an instance of
Qwen2's own class, because loaders that see `model_type: qwen2` rebuild that one around the saved
merges, whatever stands in the folder: so the ids stay the same after saving and loading.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from igrpo_nemo.errors import UserError
from igrpo_nemo.files.atomic import write_atomic

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, TURN_START, TURN_END)
CONTENT_TAGS = ("<think>", "</think>", "<answer>", "</answer>")
"""One token each, as the thinking tags of reasoning models are, but ordinary text to a decoder."""

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)

_BYTES = 256
_SMALLEST_VOCABULARY = _BYTES + len(SPECIAL_TOKENS)
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


def build_small_tokenizer(texts: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on `texts` (templates and task text, so that prompts stay short).

    Decoding the ids of a text gives back that text in Unicode's composed form (NFC), as Qwen2
    does; nothing else is normalised. The vocabulary has at most `vocab_size` entries (fewer when
    `texts` hold fewer merges). Deterministic in its arguments. Raises `UserError` where
    `vocab_size` cannot hold the 256 bytes and the control tokens.
    """
    if vocab_size < _SMALLEST_VOCABULARY:
        raise UserError(
            f"vocab_size {vocab_size} is too small for a byte-level tokenizer: "
            f"use {_SMALLEST_VOCABULARY} or more"
        )
    from tokenizers import AddedToken, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    core = Qwen2Tokenizer().backend_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(_without_control_tokens(texts), trainer)
    learned = json.loads(core.to_str())["model"]
    merges: Any = [tuple(merge) for merge in learned["merges"]]
    no_token: Any = None
    tokenizer = Qwen2Tokenizer(
        vocab=learned["vocab"],
        merges=merges,
        unk_token=no_token,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        extra_special_tokens=[TURN_START],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
    tags: Any = [AddedToken(tag, normalized=False) for tag in CONTENT_TAGS]
    tokenizer.add_tokens(tags)
    return tokenizer


def _without_control_tokens(texts: Sequence[str]) -> Iterator[str]:
    """The pieces between added tokens: merges of `<|im_start|>`'s letters would be wasted."""
    pattern = re.compile("|".join(map(re.escape, SPECIAL_TOKENS + CONTENT_TAGS)))
    for text in texts:
        yield from (piece for piece in pattern.split(text) if piece)


def token_id(tokenizer: PreTrainedTokenizerBase, name: str) -> int | None:
    """The id of the special token `name` ("eos", "pad"), None where there is none."""
    value = getattr(tokenizer, f"{name}_token_id")
    return None if value is None else int(value)


def load_tokenizer(
    name_or_path: str | Path, chat_template: str | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder or of a Hugging Face model name, with
    `policy.tokenizer.chat_template` in the place of its own.

    Raises `UserError` where there is none, it cannot be read, or it has no end-of-sequence token.
    """
    from transformers import AutoTokenizer

    folder = Path(name_or_path)
    if folder.is_dir() and not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise UserError(
            f"model folder {folder} has no tokenizer: save one there with "
            "tokenizer.save_pretrained (tokenizer.json and tokenizer_config.json)"
        )
    try:  # boundary: files written by others, perhaps a download
        tokenizer = AutoTokenizer.from_pretrained(str(name_or_path))
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"cannot load the tokenizer of {name_or_path}: {reason}") from error
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer of {name_or_path} has no end-of-sequence token: "
            "set eos_token in its tokenizer_config.json"
        )
    if template := chat_template_text(chat_template):
        tokenizer.chat_template = template
    return tokenizer


def special_tags(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """The tags of thinking and answer, by id, that a tokenizer counts among its control tokens."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {i: t.content for i, t in added.items() if t.special and t.content in CONTENT_TAGS}


def check_tags_are_text(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises `UserError` where a host that decodes without control tokens would lose the tags: in
    what is scored there would be no thinking and no answer."""
    if tags := special_tags(tokenizer):
        raise UserError(
            f"the tokenizer of {tokenizer.name_or_path} counts {', '.join(tags.values())} among "
            "its control tokens, which NeMo-RL leaves out of the text that is scored: set "
            '"special": false for them in its tokenizer.json and tokenizer_config.json'
        )


def chat_template_text(chat_template: str | None) -> str | None:
    """The Jinja text that `policy.tokenizer.chat_template` means; None: the tokenizer's own.

    A name that ends in `.jinja` is a file, "default" the tokenizer's own, anything else the text
    itself, as in NeMo-RL (nemo_rl/algorithms/utils.py: get_tokenizer). Raises `UserError` for a
    file that cannot be read.
    """
    if chat_template is None or chat_template.lower() == "default":
        return None
    if not chat_template.endswith(".jinja"):
        return chat_template
    try:
        return Path(chat_template).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"policy.tokenizer.chat_template: cannot read {chat_template} ({error.strerror})"
        ) from error


def stored_chat_template(folder: Path) -> str | None:
    """The chat template that a folder's tokenizer has, None without one."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    try:
        values = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        found = values.get("chat_template")
        if isinstance(found, list):  # several with a name each
            found = {each["name"]: each["template"] for each in found}.get("default")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return found


def write_chat_template(folder: Path, text: str) -> None:
    """Gives the tokenizer in a folder a chat template, in the place of any that it has.

    transformers and vLLM read `chat_template.jinja`; their older versions tokenizer_config.json.
    """
    write_atomic(folder / "chat_template.jinja", text.encode())
    file = folder / "tokenizer_config.json"
    values = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    content = json.dumps({**values, "chat_template": text}, indent=2, ensure_ascii=False)
    write_atomic(file, f"{content}\n".encode())
