"""A chat template that stands in the config alone goes wherever the trained model goes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml
from transformers import AutoTokenizer

from igrpo_nemo.chain.conversion import convert
from igrpo_nemo.errors import UserError
from igrpo_nemo.run.tokenizer import (
    build_small_tokenizer,
    chat_template_text,
    stored_chat_template,
    write_chat_template,
)

TEMPLATE = "{% for message in messages %}{{ message['content'] + '\\n\\n' }}{% endfor %}Answer:"
OTHER = "{{ messages[0]['content'] }}"
ASKED = [{"role": "user", "content": "1+2="}]

# Stands in for NeMo-RL's Megatron-Core converters: they write the base model's tokenizer.
CONVERTER = """\
import pathlib, shutil, sys
out = pathlib.Path(sys.argv[sys.argv.index("--hf-ckpt-path") + 1])
shutil.copytree(pathlib.Path(__file__).parents[2] / "base", out)
(out / "model.safetensors").touch()
"""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A base model's folder, whose tokenizer has no chat template; NeMo-RL's tree is around it."""
    folder = tmp_path / "nemo-rl" / "base"
    save_tokenizer(folder, None)
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def run(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished run on NeMo-RL that has no checkpoint yet."""
    scripts = base.parent / "examples" / "converters"
    scripts.mkdir(parents=True)
    (scripts / "convert_megatron_to_hf.py").write_text(CONVERTER)
    monkeypatch.setenv("NEMO_RL_SRC", str(base.parent))
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text("{}")
    (folder / "finished").touch()
    return folder


def save_tokenizer(folder: Path, template: str | None) -> None:
    tokenizer = build_small_tokenizer(["user: 1+2=3"], 300)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)


def checkpoint(run: Path, template: str | None, weights: str = "iter_0000000") -> Path:
    folder = run / "checkpoints" / "step_4"
    (folder / "policy" / "weights" / weights).mkdir(parents=True)
    values = {"policy": {"tokenizer": {"name": "base", "chat_template": template}}}
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    return folder


def rendered(folder: Path) -> str:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return tokenizer.apply_chat_template(ASKED, tokenize=False, add_generation_prompt=True)


def test_what_the_key_means(tmp_path: Path) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text(TEMPLATE)
    assert chat_template_text(None) is None and chat_template_text("Default") is None
    assert chat_template_text(str(file)) == chat_template_text(TEMPLATE) == TEMPLATE
    with pytest.raises(UserError, match="chat_template: cannot read /no/such.jinja"):
        chat_template_text("/no/such.jinja")


def test_a_template_takes_the_place_of_any_other(tmp_path: Path) -> None:
    assert stored_chat_template(tmp_path) is None
    save_tokenizer(tmp_path, OTHER)
    assert stored_chat_template(tmp_path) == OTHER
    write_chat_template(tmp_path, TEMPLATE)
    assert rendered(tmp_path) == "1+2=\n\nAnswer:"
    (tmp_path / "chat_template.jinja").unlink()  # what older versions read
    assert stored_chat_template(tmp_path) == TEMPLATE and rendered(tmp_path) == "1+2=\n\nAnswer:"
    named = [{"name": "tools", "template": OTHER}, {"name": "default", "template": TEMPLATE}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert stored_chat_template(tmp_path) == TEMPLATE


@pytest.mark.parametrize("saved", [True, False])
@pytest.mark.parametrize("as_file", [True, False])
def test_a_megatron_checkpoint_is_converted_with_it(
    run: Path, tmp_path: Path, saved: bool, as_file: bool
) -> None:
    """NeMo-RL's Megatron-Core worker saves no tokenizer: checkpoints made so have the config's."""
    (tmp_path / "mine.jinja").write_text(TEMPLATE)
    folder = checkpoint(run, str(tmp_path / "mine.jinja") if as_file else TEMPLATE)
    if saved:
        save_tokenizer(folder / "policy" / "tokenizer", TEMPLATE)
        (tmp_path / "mine.jinja").unlink()  # a checkpoint that has it needs nothing else
    convert(run, "last", python=sys.executable)
    assert rendered(run / "hf" / "last") == "1+2=\n\nAnswer:"


def test_a_template_of_the_tokenizers_own_stays(run: Path, base: Path) -> None:
    save_tokenizer(base, OTHER)
    checkpoint(run, "default")
    convert(run, "last", python=sys.executable)
    assert rendered(run / "hf" / "last") == "1+2="


def test_weights_without_a_tokenizer_get_the_one_that_was_saved(run: Path) -> None:
    """DTensor's consolidated folder has none: linking it alone would serve nothing."""
    folder = checkpoint(run, TEMPLATE, "model/consolidated")
    weights = folder / "policy" / "weights" / "model" / "consolidated"
    for name in ("config.json", "model.safetensors", "tokenizer_config.json"):
        (weights / name).write_text("{}")
    save_tokenizer(folder / "policy" / "tokenizer", TEMPLATE)
    convert(run, "last")
    moved = run.rename(run.parent / "elsewhere")
    model = moved / "hf" / "last"
    assert rendered(model) == "1+2=\n\nAnswer:"
    assert (model / "model.safetensors").is_symlink() and (model / "config.json").is_file()
    consolidated = moved / "checkpoints/step_4/policy/weights/model/consolidated"
    assert (consolidated / "tokenizer_config.json").read_text() == "{}"
