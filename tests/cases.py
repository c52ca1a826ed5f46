"""Tables of cases beside the tests: the YAML file that is named like the test file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml


def cases(file: str) -> dict[str, Any]:
    return yaml.safe_load(Path(file).with_suffix(".yaml").read_text(encoding="utf-8"))
