"""Which texts in an answer column are no reference answer at all."""

from __future__ import annotations

import re
from functools import lru_cache

_EMPTY = frozenset(
    ("nan", "n/a", "#n/a", "<na>", "n.a.", "nat", "tbd", "tba", "missing", "unknown", "?", "??")
    + ("-", "--", "—", "...", "…", "[]", "{}", "no answer", "not available", "not applicable")
    + ("not provided", "not given", "no answer provided", "no reference", "answer not provided")
)
# As programs write them; in other spellings (`none`, `\text{None}`) they are answers.
_NULLS = frozenset(("None", "NONE", "null", "NULL", "Null"))
_POINTER = re.compile(
    r"\W*(?:please\s+)?(?:see|refer\s+to|cf\.?|as\s+(?:shown|described|explained)|shown|given)\b.*"
    r"\b(?:figure|fig|above|below|diagram|graph|image|picture|attached|attachment|table|solution|"
    r"explanation|proof|text|appendix|plot|sketch|answer|work|page|book)s?\b.*",
    re.IGNORECASE | re.DOTALL,
)
_WRAPPING = re.compile(r"\\(?:text|mathrm|textbf)\{([^{}]*)\}")


@lru_cache(maxsize=16_384)
def is_missing_reference(text: str) -> bool:
    """Whether a reference says that there is none: empty, NaN, None, N/A, `see figure above`.

    Nothing is ever equal to such a reference: rows with one are dropped and counted.
    """
    bare = text.strip().strip("$").strip()
    if not bare or bare in _NULLS:
        return True
    if len(bare) > 200:
        return False
    bare = _WRAPPING.sub(r"\1", bare).strip(" .\"'`*")
    return not bare or bare.casefold() in _EMPTY or _POINTER.fullmatch(bare) is not None
