"""Recognising stop strings while tokens arrive."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase


class StopStrings:
    """Says whether the newest token of a completion has completed a stop string.

    A stop string may begin anywhere in a token and end anywhere in another one. Only the last few
    tokens are decoded: as many as the longest stop string has bytes, since a token that shows in
    the text stands for a byte or more, and one more for a character that is cut in half.
    """

    def __init__(self, strings: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> None:
        self._strings = tuple(strings)
        self._tokenizer = tokenizer
        self._window = max((len(string.encode()) for string in strings), default=0) + 1

    def reached(self, token_ids: Sequence[int]) -> bool:
        if not self._strings:
            return False
        tail = self._tokenizer.decode(
            list(token_ids[-self._window :]),
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,
        )
        return any(string in tail for string in self._strings)
