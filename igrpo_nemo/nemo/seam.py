"""Where NeMo-RL calls our rollout: three modules, two names, put back afterwards.

`grpo_train` has no hook for rollouts. While the seam is installed, the names
`run_multi_turn_rollout` and `run_async_multi_turn_rollout` in the modules that call them dispatch
on the type of `task_to_env`: a `TwoStageMap` gets the two-stage rollout, a `SingleStageMap`
NeMo-RL's own and metrics, anything else, validation included, NeMo-RL's own with the arguments as
they came.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from igrpo_nemo.nemo.names import CALLERS, ROLLOUTS
from igrpo_nemo.nemo.spec import RunMap, SingleStageMap

_lock = threading.RLock()
_originals: dict[tuple[str, str], Callable[..., Any]] = {}
_users = 0


def install() -> None:
    """Installs the seam in this process; nested calls count, `uninstall` undoes one of them."""
    global _users
    with _lock:
        _users += 1
        if _users > 1:
            return
        for module_name, names in CALLERS.items():
            module = importlib.import_module(module_name)
            for name in names:
                original = getattr(module, name)
                _originals[module_name, name] = original
                setattr(module, name, _dispatching(original, name))


def uninstall() -> None:
    """Undoes one `install`; the last one puts NeMo-RL's own functions back."""
    global _users
    with _lock:
        _users -= 1
        if _users:
            return
        for (module_name, name), original in _originals.items():
            setattr(importlib.import_module(module_name), name, original)
        _originals.clear()


@contextmanager
def installed() -> Iterator[None]:
    """The seam, for the duration of a `with` block."""
    install()
    try:
        yield
    finally:
        uninstall()


def _dispatching(original: Callable[..., Any], name: str) -> Callable[..., Any]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def dispatch(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        task_to_env = given["task_to_env"]
        if not isinstance(task_to_env, RunMap):
            return original(*args, **kwargs)
        from igrpo_nemo.nemo import rollout, single_stage

        with task_to_env.report.watching():
            if isinstance(task_to_env, SingleStageMap):
                batch, metrics = original(*args, **kwargs)
                return single_stage.described(batch, metrics, task_to_env)
            return rollout.two_stage_rollout(**given, concurrently=name == ROLLOUTS[1])

    return dispatch
