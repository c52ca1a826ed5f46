"""The Hugging Face model in Megatron-Core's form, which NeMo-RL's workers make as they start.

    BASE/REVISION/MODEL/iter_0000000     what NeMo-RL looks for, and makes where it is missing
    BASE/REVISION/MODEL.conversion/      the lock of whoever makes it, `unfinished` until it is made

BASE is NRL_MEGATRON_CHECKPOINT_DIR, else HF_HOME/nemo_rl. NeMo-RL takes whatever is there: what a
process left that was killed in the middle, what another run is writing, what a model was before its
weights changed. Here one run converts while the others wait, and what is no whole conversion of
these weights is removed first.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from igrpo_nemo.errors import UserError
from igrpo_nemo.files import model_folder
from igrpo_nemo.nemo.processes import variable
from igrpo_nemo.run.lock import RunLock, writer_of

VARIABLE = "NRL_MEGATRON_CHECKPOINT_DIR"
FIRST = "iter_0000000"
"""Where Megatron-Bridge saves what it has converted, with run_config.yaml as its last file."""
WAIT_S = 3600.0

_PAUSE_S = 5.0


@contextmanager
def converted_once(policy: Mapping[str, Any]) -> Iterator[None]:
    """Around NeMo-RL's `setup()`: its workers find a whole conversion of the model or make one
    alone. `policy` is NeMo-RL's section. Nothing is done where no Megatron-Core model is converted.

    Raises `UserError` where another run converts for longer than `WAIT_S`, or where the folder
    cannot be written.
    """
    megatron = policy.get("megatron_cfg") or {}
    if not megatron.get("enabled") or policy.get("pretrained_checkpoint") is not None:
        yield
        return
    converted = converted_folder(policy)
    # NeMo-RL hands this process's variables to its workers.
    with variable(VARIABLE, str(_base(policy))):
        if is_whole(converted) and not megatron.get("force_reconvert_from_hf"):
            yield
            return
        mark = _mark(converted)
        try:
            mark.parent.mkdir(parents=True, exist_ok=True)
            lock = _lock(converted, mark.parent)
        except OSError as error:
            raise _unwritable(converted, error) from error
        try:
            # Another run may just have made it.
            if begun := not is_whole(converted) or bool(megatron.get("force_reconvert_from_hf")):
                _begin(converted)
            else:
                lock.release()
            yield
            if begun:
                with suppress(OSError):
                    mark.unlink(missing_ok=True)
        finally:
            lock.release()


def converted_folder(policy: Mapping[str, Any]) -> Path:
    """Where a model is in Megatron-Core's form, or will be: above `iter_0000000`. Its name is what
    NeMo-RL's `validate_model_paths` makes (models/megatron/setup.py)."""
    name = policy["model_name"]
    if os.path.exists(name):
        name = f"model_{name.replace('/', '_')}"
    if overrides := policy.get("hf_config_overrides"):
        text = json.dumps(overrides, sort_keys=True, separators=(",", ":"))
        name = f"{name}__hfovr_{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    return _base(policy) / name


def _base(policy: Mapping[str, Any]) -> Path:
    """BASE/REVISION."""
    base = os.environ.get(VARIABLE)
    base = base or Path(os.environ.get("HF_HOME") or "~/.cache/huggingface", "nemo_rl")
    return Path(base).expanduser() / model_revision(policy["model_name"])


def is_whole(converted: Path) -> bool:
    """Whether a conversion is there that nobody was interrupted in."""
    return (converted / FIRST / "run_config.yaml").is_file() and not _mark(converted).exists()


def model_revision(name: str) -> str:
    """What changes with the weights of a model: its commit in the hub's cache, or of a folder the
    names, sizes and times of its files."""
    folder = Path(name)
    if folder.is_dir():
        files = sorted(path for path in folder.iterdir() if path.is_file())
        facts = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]
    found = model_folder(name)
    return found.name[:12] if found is not None else "main"


def _mark(converted: Path) -> Path:
    return converted.with_name(f"{converted.name}.conversion") / "unfinished"


def _begin(converted: Path) -> None:
    try:
        _mark(converted).touch()
        if converted.exists():
            shutil.rmtree(converted)
    except OSError as error:
        raise _unwritable(converted, error) from error


def _unwritable(converted: Path, error: OSError) -> UserError:
    return UserError(f"cannot write {converted}: {error.strerror or error}")


def _lock(converted: Path, folder: Path) -> RunLock:
    """The lock, as soon as whoever converts is done."""
    start, said = time.monotonic(), False
    while True:
        try:
            return RunLock(folder)
        except UserError as error:
            holder = writer_of(folder) or "another run"
            if time.monotonic() - start > WAIT_S:
                raise UserError(
                    f"{converted} is being converted by {holder} for more than {WAIT_S:.0f} s: if "
                    f"that run is gone, remove {folder}"
                ) from error
            if not said:
                print(f"waiting for {holder} to convert {converted}", flush=True)
                said = True
            time.sleep(_PAUSE_S)
