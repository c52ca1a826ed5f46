"""The model card of a run: a run folder in, the README.md of a published model out.

    load_run -> headline facts, config, comparison -> card.md.j2

Values of the config are data: they stand as YAML, as Python literals, or in a table's cells.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from igrpo_nemo.files.display_text import shorten
from igrpo_nemo.report.runs import Run, load_run
from igrpo_nemo.report.tables import headline_facts, template

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
