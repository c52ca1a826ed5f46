"""What a config names by its path, `module:name`."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from igrpo_nemo.errors import UserError


def imported(path: str) -> Any:
    """The object at `module:name`. Raises `UserError`, whose message goes on from the path."""
    module, _, name = path.partition(":")
    try:  # boundary: whatever the module does when it is imported
        return getattr(importlib.import_module(module), name)
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"cannot be imported ({reason}): is it on PYTHONPATH?") from error


def function_at(path: str) -> Callable[..., Any]:
    """The function at `module:name`, likewise."""
    found = imported(path)
    if not callable(found):
        raise UserError(f"is no function but a {type(found).__name__}")
    return found
