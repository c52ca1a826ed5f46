"""The text of a completion, and recognising stop strings while tokens arrive."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from igrpo_nemo.run.tokenizer import CONTENT_TAGS


class CompletionText:
    """Decodes completions without control tokens.

    The tags of thinking and answer are text, also for a tokenizer that counts them among its
    control tokens: without them no completion would be well formed.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        added = getattr(tokenizer, "added_tokens_decoder", {})
        special = {number for number, token in added.items() if token.special}
        tags = {number for number in special if added[number].content in CONTENT_TAGS}
        self._left_out = special - tags if tags else frozenset()
        self._skip = not tags

    def __call__(self, token_ids: Sequence[int]) -> str:
        text = self._tokenizer.decode(
            [token for token in token_ids if token not in self._left_out],
            skip_special_tokens=self._skip,
            clean_up_tokenization_spaces=False,
        )
        assert isinstance(text, str)
        return text


class StopStrings:
    """Says whether the newest token of a completion has completed a stop string.

    A stop string may begin anywhere in a token and end anywhere in another one. Only the last few
    tokens are decoded: as many as the longest stop string has bytes, since a token that shows in
    the text stands for a byte or more, and one more for a character that is cut in half. And only
    where the newest token holds the last character of a stop string, since no tokenizer splits a
    visible ASCII character.
    """

    def __init__(self, strings: Sequence[str], text_of: CompletionText) -> None:
        self._strings = tuple(strings)
        self._text_of = text_of
        self._window = max((len(string.encode()) for string in strings), default=0) + 1
        self._last = {string[-1] for string in strings}
        self._selective = all(c.isascii() and c.isprintable() and c != " " for c in self._last)
        self._may_end: dict[int, bool] = {}

    def reached(self, token_ids: Sequence[int]) -> bool:
        if not self._strings or not self._is_candidate(token_ids[-1]):
            return False
        tail = self._text_of(token_ids[-self._window :])
        return any(string in tail for string in self._strings)

    def _is_candidate(self, token_id: int) -> bool:
        if not self._selective:
            return True
        if token_id not in self._may_end:
            self._may_end[token_id] = not self._last.isdisjoint(self._text_of([token_id]))
        return self._may_end[token_id]
