"""Which reference answers can serve: checked once per data set, in the pool, and cached on disk.

A reference that the verifier cannot read, or that does not equal itself, would be a silent constant
reward. The check costs seconds per thousand formulas, so its outcome is kept under the digest of
the references.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

from igrpo_nemo.errors import UserError
from igrpo_nemo.files import cache_folder
from igrpo_nemo.files.atomic import write_or_refuse
from igrpo_nemo.rewards.accuracy import Reason, gold_verdict
from igrpo_nemo.rewards.literal import read_literal

# Counts up when the reading of references changes, so that old outcomes are not used.
_CHECK_VERSION = 4
_ITEM_LIMIT_S = 10.0


def check_golds(golds: Sequence[str]) -> list[Reason]:
    """`gold_verdict` of each reference, in order. Plain numbers never leave this process."""
    verdicts: dict[str, Reason] = {}
    formulas: list[str] = []
    for gold in dict.fromkeys(golds):
        if not gold.strip() or read_literal(gold.strip()) is not None:
            verdicts[gold] = gold_verdict(gold)
        else:
            formulas.append(gold)
    verdicts.update(_check_formulas(formulas))
    return [verdicts[gold] for gold in golds]


def _check_formulas(formulas: list[str]) -> dict[str, Reason]:
    if not formulas:
        return {}
    from igrpo_nemo.rewards.pool import VerifierPool

    digest = hashlib.sha256(json.dumps([_CHECK_VERSION, *formulas]).encode()).hexdigest()
    path = cache_folder() / "references" / f"{digest[:32]}.json"
    cached = _read(path, len(formulas))
    if cached is None:
        with VerifierPool(
            workers=min(8, os.cpu_count() or 1), item_timeout_s=_ITEM_LIMIT_S
        ) as pool:
            cached = pool.check_golds(formulas)
        if Reason.TIMEOUT not in cached:  # Which may be the machine's fault, and not for ever.
            try:
                write_or_refuse(path, json.dumps([str(reason) for reason in cached]))
            except UserError as error:
                warnings.warn(
                    f"{error}: references are checked again each time (IGRPO_CACHE_DIR names "
                    "another folder)",
                    stacklevel=2,
                )
    return dict(zip(formulas, cached, strict=True))


def _read(path: Path, count: int) -> list[Reason] | None:
    try:
        reasons = [Reason(reason) for reason in json.loads(path.read_text())]
    except (OSError, ValueError, TypeError):
        return None  # No cache, or not ours: check again.
    return reasons if len(reasons) == count else None
