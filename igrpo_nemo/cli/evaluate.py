"""`igrpo evaluate`: k single-shot samples a problem; pass@1, pass@k and majority@k."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from igrpo_nemo.cli.command import Command
from igrpo_nemo.cli.threads import set_threads
