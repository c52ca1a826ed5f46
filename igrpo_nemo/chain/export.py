"""A trained model as others use it: `igrpo export RUN --to FOLDER`, or to the hub.

checkpoint -> a Hugging Face folder (converted where need be) -> a copy with a model card
           -> the hub, with the token of the environment alone

Values of the config are data: in the card they stand as YAML, as Python literals, or in a table's
cells.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from igrpo_nemo.chain.checkpoints import Form, find_checkpoint
from igrpo_nemo.chain.conversion import convert
from igrpo_nemo.chain.experiment import model_folder
from igrpo_nemo.errors import UserError
from igrpo_nemo.files.display_text import shorten
from igrpo_nemo.files.scrub import scrub_text
from igrpo_nemo.report.runs import Run, load_run
from igrpo_nemo.report.tables import headline_facts, template
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


_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_METHODS = {"best_draft": "iGRPO, two-stage GRPO", "none": "GRPO"}
_KEYS = (
    ("feedback", "igrpo.feedback"),
    ("drafts and refinements a problem", "igrpo.num_drafts", "igrpo.num_refinements"),
    ("problems a step", "grpo.num_prompts_per_step"),
    ("learning rate", "policy.optimizer.kwargs.lr"),
    ("KL penalty", "loss_fn.reference_policy_kl_penalty"),
    ("tokens of an answer at most", "policy.generation.max_new_tokens"),
    ("rewards", "igrpo.reward"),
    ("training problems", "data.train.dataset_name"),
    ("held-out problems", "data.validation.dataset_name"),
    ("engine", "igrpo.engine"),
    ("seed", "grpo.seed"),
)
"""What a reader wants to know first: a label and the keys whose values stand beside it."""


def model_card(folder: Path, name: str) -> str:
    """The card of the run in `folder`, for a model that is to be called `name`."""
    run = load_run(folder)
    base, feedback = _base(run), str(run.setting("igrpo.feedback"))
    comparison = folder / "comparison" / "comparison.md"
    return template("card.md.j2", autoescape=False).render(
        front_matter=yaml.safe_dump(_front_matter(run, name), sort_keys=False, allow_unicode=True),
        name=_cell(name),
        base=f"`{_cell(base)}`" if base else "A small model",
        method=_METHODS.get(feedback, f"GRPO and the feedback {_cell(feedback)}"),
        messages=repr(_messages(run)),
        max_new_tokens=json.dumps(run.setting("policy.generation.max_new_tokens")),
        training=list(_training(run)),
        facts=headline_facts(run),
        comparison=comparison.read_text(encoding="utf-8") if comparison.is_file() else "",
    )


def _front_matter(run: Run, name: str) -> dict[str, Any]:
    """What the hub reads; models and data sets that are files of the user's are not named."""
    base, data = _base(run), run.setting("data.train.dataset_name")
    found: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    found["tags"] = ["igrpo", "grpo", "reinforcement-learning", "math", "igrpo-nemo"]
    if base and _HUB_NAME.fullmatch(base):
        found["base_model"] = base
    if isinstance(data, str) and _HUB_NAME.fullmatch(data):
        found["datasets"] = [data]
    if (accuracy := run.accuracy("end")) is not None:
        metric = {"type": "accuracy", "value": round(accuracy, 4), "name": "held-out accuracy"}
        task = {"type": "text-generation"}
        dataset = {"name": str(run.setting("data.validation.dataset_name")), "type": "held-out"}
        result = {"task": task, "dataset": dataset, "metrics": [metric]}
        found["model-index"] = [{"name": name, "results": [result]}]
    return found


def _base(run: Run) -> str:
    """The base model's name, of a folder its last part; empty for a built-in one."""
    name = str(run.setting("policy.model_name") or "")
    if run.setting("igrpo.model"):
        return ""
    return name if _HUB_NAME.fullmatch(name) and not Path(name).exists() else Path(name).name


def _messages(run: Run) -> list[dict[str, str]]:
    system = run.setting("igrpo.prompt.system")
    asked = [{"role": "user", "content": "What is 6 * 7?"}]
    return [{"role": "system", "content": system}, *asked] if system else asked


def _training(run: Run) -> Iterator[tuple[str, str]]:
    for label, *keys in _KEYS:
        values = [value for key in keys if (value := run.setting(key)) is not None]
        if values:
            told = (v if isinstance(v, str) else json.dumps(v) for v in values)
            yield label, _cell(" + ".join(told))


def _cell(text: str) -> str:
    return shorten(text, 200).replace("|", "\\|").replace("`", "'")
