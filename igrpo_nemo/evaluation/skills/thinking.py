"""Whether a model's replies begin inside a thinking part, which its chat template opened.

Such a reply has a `</think>` of its own alone: one that was cut off inside its thinking has neither
tag, and what stands in it is no answer.
"""

from __future__ import annotations

from pathlib import Path

from igrpo_nemo.errors import UserError
from igrpo_nemo.run.chat_template import chat_template_text, stored_chat_template


def opens_thinking(
    model: str | Path,
    system: str,
    chat_template: str | None = None,
    *,
    hf_home: str | None = None,
) -> bool:
    """Whether the prompt of a model ends with `<think>`, as a server renders it.

    `model` is a folder, or a name on the hub whose files are in the cache of `hf_home` or in the
    default one; nothing is downloaded, and of a model that is not here False is said.
    `chat_template`, a Jinja text or a `.jinja` file, stands in the place of the model's own.
    """
    folder = _folder(model, hf_home)
    if folder is None:
        return False
    template = chat_template_text(chat_template)
    if "think" not in (
        template or stored_chat_template(folder) or ""
    ):  # spares the import of transformers
        return False
    from jinja2 import TemplateError

    from igrpo_nemo.prompts import PromptBuilder, PromptProfile, TokenBudget
    from igrpo_nemo.run.tokenizer import load_tokenizer

    try:  # boundary: files of others; what is wrong with them, their server says
        tokenizer = load_tokenizer(folder)
        if template is not None:
            tokenizer.chat_template = template
        profile = PromptProfile(system, "", "draft")
        return PromptBuilder(tokenizer, profile, TokenBudget(2, 1)).thinking_open
    except (UserError, TemplateError):
        return False


def _folder(model: str | Path, hf_home: str | None) -> Path | None:
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    for cache in ([Path(hf_home) / "hub"] if hf_home else []) + [None]:
        try:
            found = try_to_load_from_cache(str(model), "tokenizer_config.json", cache_dir=cache)
        except HFValidationError:  # a name that no hub has
            return None
        if isinstance(found, str):
            return Path(found).parent
    return None
