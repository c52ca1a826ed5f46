"""The chat template of a run: from the config to the tokenizers that are saved and served."""

from __future__ import annotations

import json
from pathlib import Path

from igrpo_nemo.errors import UserError
from igrpo_nemo.files.atomic import write_atomic


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
