"""Asks NeMo-RL's trainer to save and stop: by its own time limit, or by the stop file.

    trainer, at the end of a step ─ TimeoutChecker.check_save() ─> its own answer, or the stop file

All of NeMo-RL's trainers save a checkpoint and return when `check_save` says so. While a
`StopRequest` is installed the method also looks at the file; afterwards it is NeMo-RL's own again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from igrpo_nemo.run.stop import StopFile


class StopRequest:
    """Context manager; `given` says whether a trainer was told to stop inside."""

    def __init__(self, file: StopFile) -> None:
        self.given = False
        self._file = file
        self._original: Callable[[Any], bool] | None = None

    def __enter__(self) -> StopRequest:
        from nemo_rl.utils.timer import TimeoutChecker

        self._original = original = TimeoutChecker.check_save

        def check_save(checker: Any) -> bool:
            if original(checker):
                self.given = True
            elif not self.given and self._file:
                print(f"{self._file.path}: saving after this step", flush=True)
                # What the checker notes when its own time is over.
                self.given = checker.last_saved = True
            else:
                return False
            return True

        TimeoutChecker.check_save = check_save
        return self

    def __exit__(self, *_: object) -> None:
        from nemo_rl.utils.timer import TimeoutChecker

        assert self._original is not None
        TimeoutChecker.check_save = self._original
