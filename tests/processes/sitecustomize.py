"""For every Python process of the tests: what it does without, and what NeMo-RL needs."""

import gc
import os
import sys

# Imports make half a million objects that stay: looking through them is a tenth of a start.
gc.set_threshold(100_000)

# Not used here, but imported by transformers where it is installed: more than a second of a start.
sys.modules["sklearn"] = None  # type: ignore[assignment]

if "IGRPO_TEST_NEMO" in os.environ and sys.version_info < (3, 12):
    # pydantic, through which NeMo-RL reads its configs, refuses the standard one before 3.12.
    import typing

    import typing_extensions

    typing.TypedDict = typing_extensions.TypedDict  # type: ignore[misc]
