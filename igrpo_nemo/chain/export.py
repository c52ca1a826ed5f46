"""A trained model as others use it: `igrpo export RUN --to FOLDER`, or to the hub.

checkpoint -> a Hugging Face folder (converted where need be) -> a copy with a model card
           -> the hub, with the token of the environment alone
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from igrpo_nemo.chain.checkpoints import Form, find_checkpoint
from igrpo_nemo.chain.conversion import convert
from igrpo_nemo.chain.experiment import model_folder
from igrpo_nemo.errors import UserError
from igrpo_nemo.files.scrub import scrub_text
from igrpo_nemo.report.card import model_card
from igrpo_nemo.run.folder import CONFIG

HUB = "hub:"
TOKEN = "HF_TOKEN"


def export(run: Path, to: str, *, which: str = "last", private: bool = False) -> str:
    """Writes the model of a run, with its card and config, to a new folder `to`, or to the
    repository NAME of the hub where `to` is `hub:NAME`; where it went.

    `which` is last, best or a step. Raises `UserError` for a checkpoint that is not there, a
    folder that holds something, and a hub that refuses.
    """
    if to.startswith(HUB) and not os.environ.get(TOKEN):
        raise UserError(f"{TOKEN} is not set: export it in the shell, with the right to write")
    weights = _weights(run, which)
    if not to.startswith(HUB):
        return str(_write(run, weights, Path(to)))
    name = to.removeprefix(HUB)
    with tempfile.TemporaryDirectory(prefix="igrpo-export-") as scratch:
        folder = _write(run, weights, Path(scratch) / name.rpartition("/")[2])
        return _upload(folder, name, private)


def _weights(run: Path, which: str) -> Path:
    """The Hugging Face folder of a checkpoint; NeMo-RL's are converted, or get their tokenizer."""
    found = find_checkpoint(run, which)
    if found.form is Form.HUGGING_FACE and found.weights == found.folder / "model":
        return found.weights
    convert(run, which)
    return model_folder(run, which)


def _write(run: Path, weights: Path, folder: Path) -> Path:
    """The folder appears under its name once it is whole."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is there already: give a new folder with --to")
    texts = {
        "README.md": model_card(run, folder.name),
        "igrpo_config.yaml": (run / CONFIG).read_text(encoding="utf-8"),
    }
    parent = folder.absolute().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=parent) as scratch:
            made = Path(scratch) / "model"
            shutil.copytree(weights, made)
            made.chmod(0o755)
            for name, text in texts.items():
                (made / name).write_text(scrub_text(text, os.environ), encoding="utf-8")
            os.replace(made, folder)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}") from error
    return folder


def _upload(folder: Path, name: str, private: bool) -> str:
    from huggingface_hub import HfApi

    try:  # boundary: other people's service, of whose errors the first line says what happened
        hub = HfApi(token=os.environ[TOKEN])
        repository = hub.create_repo(name, private=private, exist_ok=True)
        hub.upload_folder(
            repo_id=repository.repo_id,
            folder_path=str(folder),
            commit_message="A model trained with igrpo-nemo",
        )
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(f"the hub refused {name}: {scrub_text(reason, os.environ)}") from error
    return str(repository)
