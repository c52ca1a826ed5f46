"""What decides an evaluation's samples, written into its folder: two settings never share one.

    config + model + data --setting_of--> Setting --claim_folder--> OUT/setting.json
        or a `UserError` with the one line that names the difference

NeMo-Skills skips what has a `.done` file, whatever it was sampled with.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from igrpo_nemo.config import Config
from igrpo_nemo.errors import UserError
from igrpo_nemo.evaluation.model import Model, plain_path
from igrpo_nemo.evaluation.results import (
    EMBEDDED_FILE,
    RESULTS_FOLDER,
    SETTING_FILE,
    finished_files,
    read_setting,
)
from igrpo_nemo.files.atomic import write_atomic, write_or_refuse
from igrpo_nemo.files.display_text import shorten
from igrpo_nemo.run.tokenizer import chat_template_text

if TYPE_CHECKING:
    from igrpo_nemo.evaluation.skills.data import BenchmarkData

TEMPLATE_TOKENS = 64
"""Room for the chat template around system prompt and problem."""

TAKES_TEMPLATE = ("vllm", "sglang")
"""Servers that take a chat template as a file, and its arguments with a request."""


@dataclass(frozen=True, slots=True)
class Setting:
    model: str
    weights: str
    """Tells two sets of weights at one path apart; of a served model, its name."""
    profile: str
    system_prompt: str | None
    temperature: float
    top_p: float
    max_tokens: int
    context: int | None
    """Tokens of the model's context, where it is known."""
    server_type: str
    nemo_skills: str
    """NeMo-Skills' version."""
    benchmarks: Mapping[str, int]
    """Samples per problem."""
    problems: Mapping[str, Mapping[str, Any]]
    """Of each benchmark: `rows`, `sha256` of its data, and the `tokens` that a request asks for."""
    thinking_open: bool = False
    """Whether `answer_tags` takes a reply as begun inside a thinking part."""
    chat_template: str | None = None
    """A hash of the config's chat template; None: the model's own."""
    chat_template_kwargs: Mapping[str, Any] | None = None
    """What the chat template is given beside the messages."""
    refine: int | None = None
    """Drafts among which `choose` took the one that q' shows; None for bare answers."""
    choose: str | None = None

    def to_json(self) -> str:
        """Without what has its default, which older ones do not have either."""
        values = {n: v for n, v in asdict(self).items() if n not in DEFAULTS or DEFAULTS[n] != v}
        return json.dumps(values, indent=2) + "\n"


DEFAULTS = {each.name: each.default for each in fields(Setting) if each.default is not MISSING}


def setting_of(
    config: Config,
    model: Model,
    data: Sequence[BenchmarkData],
    *,
    server_type: str,
    nemo_skills: str,
) -> Setting:
    """The setting of `igrpo.evaluation` for a model and its benchmarks' data."""
    keys, tokenizer = config.igrpo.evaluation, config.policy.tokenizer
    system = config.igrpo.prompt.system if keys.profile == "answer_tags" else None
    template = chat_template_text(tokenizer.chat_template)
    kwargs = tokenizer.chat_template_kwargs or None
    if kwargs and server_type not in TAKES_TEMPLATE:
        raise UserError(
            f"policy.tokenizer.chat_template_kwargs cannot be given to a server of type "
            f"{server_type}: use one of {', '.join(TAKES_TEMPLATE)}, or leave them out"
        )
    return Setting(
        model=model.name,
        weights=model.weights,
        profile=keys.profile,
        system_prompt=system,
        temperature=keys.temperature,
        top_p=keys.top_p,
        max_tokens=keys.max_tokens,
        context=model.context,
        server_type=server_type,
        nemo_skills=nemo_skills,
        benchmarks={one.name: keys.benchmarks[one.name] for one in data},
        problems={one.name: _asked(one, keys.max_tokens, model.context, system) for one in data},
        thinking_open=keys.profile == "answer_tags" and model.thinking_open,
        chat_template=hashlib.sha256(template.encode()).hexdigest()[:16] if template else None,
        chat_template_kwargs=kwargs,
    )


def reply_tokens(max_tokens: int, context: int | None, longest_prompt: int) -> int | None:
    """The tokens that a request asks for, so that a reply has min(max_tokens, context - prompt).

    None leaves it to the server, whose default is context - prompt. A server refuses a request for
    more than fits, and NeMo-Skills' enable_soft_fail would count every other failure as an empty
    reply too; so where only the longest prompts do not fit, all get what the longest one leaves.
    """
    if context is None or context >= max_tokens + longest_prompt:
        return max_tokens
    if context <= max_tokens:
        return None
    return context - longest_prompt


def _asked(
    data: BenchmarkData, max_tokens: int, context: int | None, system: str | None
) -> dict[str, Any]:
    # No prompt has more tokens than bytes.
    longest = max(len(row["problem"].encode()) for row in data.rows)
    longest += len((system or "").encode()) + TEMPLATE_TOKENS
    tokens = reply_tokens(max_tokens, context, longest)
    return {"rows": len(data.rows), "sha256": data.sha256, "tokens": tokens}


def default_folder(base: Path, setting: Setting) -> Path:
    """A folder of the setting's own below `base`; benchmarks and samples may be added to it."""
    values = {**json.loads(setting.to_json()), "benchmarks": None, "problems": None}
    digest = hashlib.sha256(json.dumps(values).encode()).hexdigest()[:8]
    name = f"{setting.profile}-t{setting.temperature:g}-p{setting.top_p:g}-{digest}"
    return base / name


def claim_folder(out: Path, setting: Setting) -> Setting:
    """Writes setting.json, or raises `UserError` with what differs from the one that is there.

    A folder may grow: more benchmarks and more samples join what it has, and the setting that is
    returned holds them all. Without samples, any setting may take the folder.
    """
    plain_path(out.absolute())
    setting = check_same(out, setting)
    write_or_refuse(out / SETTING_FILE, setting.to_json())
    return setting


def check_same(out: Path, setting: Setting) -> Setting:
    """What `claim_folder` would write, or its `UserError`; writes nothing.

    `inspect` counts samples and rows alone: before samples that are there are taken for this
    setting's own, this has to be asked.
    """
    if not any((out / RESULTS_FOLDER).glob("*/output*")):
        return setting
    stored = read_setting(out)
    if not stored:
        raise UserError(
            f"{out} holds samples without a {SETTING_FILE}: evaluate into another folder (--out)"
        )
    wanted = json.loads(json.dumps(asdict(setting)))
    found = {**DEFAULTS, "benchmarks": {}, "problems": {}, **stored}
    apart = ("benchmarks", "problems")
    _check_equal(out, found, {n: v for n, v in wanted.items() if n not in apart})
    for name, samples in wanted["benchmarks"].items():
        before = found["benchmarks"].get(name, 0)
        if samples < before:
            _check_equal(out, {f"samples of {name}": before}, {f"samples of {name}": samples})
        if before:
            data = f"data of {name}"
            old, new = found["problems"].get(name), wanted["problems"][name]
            _check_equal(out, {data: old}, {data: new})
    return replace(setting, **{part: {**found[part], **wanted[part]} for part in apart})


def claim_embedded(where: Path, setting: Mapping[str, Any]) -> None:
    """Writes a benchmark's evaluation.json, or raises `UserError` as `claim_folder` does.

    `setting` is all that two calls of `igrpo evaluate` must share for their samples to be joined.
    """
    wanted = json.loads(json.dumps(dict(setting)))
    if found := read_setting(where, EMBEDDED_FILE):
        _check_equal(where, found, wanted)
    elif finished_files(where):
        raise UserError(
            f"{where} holds samples that another program made: evaluate into another folder (--out)"
        )
    write_atomic(where / EMBEDDED_FILE, json.dumps(wanted, indent=2).encode())


def _check_equal(out: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    for name, value in wanted.items():
        if found.get(name) != value:
            was, now = (shorten(json.dumps(one), 60) for one in (found.get(name), value))
            raise UserError(
                f"{out} holds another evaluation ({name} was {was}, is {now}): "
                "move that folder away, or evaluate into another one (--out)"
            )
