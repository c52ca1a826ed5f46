"""Problems as NeMo-RL's data: the raw problem is kept, templates are the models' own."""

from __future__ import annotations

import nemo_runs
import pytest

from igrpo_nemo.nemo import data
from igrpo_nemo.types import Problem

QWEN = (
    "{%- if messages[0]['role'] == 'system' %}{{- '<|im_start|>system\\n' + messages[0]['content'] "
    "+ '<|im_end|>\\n' }}{%- else %}{{- '<|im_start|>system\\nYou are Qwen, created by Alibaba "
    "Cloud. You are a helpful assistant.<|im_end|>\\n' }}{%- endif %}{%- for message in messages %}"
    "{%- if message.role == 'user' %}{{- '<|im_start|>' + message.role + '\\n' + message.content + "
    "'<|im_end|>' + '\\n' }}{%- endif %}{%- endfor %}{%- if add_generation_prompt %}"
    "{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
R1 = (
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}{% endif %}"
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '<｜User｜>' + message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}"
)
OPEN_REASONING = (
    "{%- if messages[0]['role'] == 'system' %}{{- '<|im_start|>system\\n' + messages[0]['content'] "
    "+ '<|im_end|>\\n' }}{%- endif %}{%- for message in messages %}{%- if message.role == 'user' %}"
    "{{- '<|im_start|>user\\n' + message.content + '<|im_end|>\\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
PLAIN = (
    "{% for message in messages %}{{ message['content'] + '\\n\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Answer:' }}{% endif %}"
)
"""The shapes of the templates of Qwen2.5, DeepSeek-R1-Distill, OpenMath and OpenReasoning-Nemotron,
and one for a base model without any."""


def _datum(config, tokenizer, question="1+2=", limit=64, **row):
    data.configure(config)
    raw = {"id": "p1", "question": question, "answer": "3", "task_name": data.TASK, **row}
    return data.problem_processor(raw, None, tokenizer, limit, 5)


def _tokenizer(policy_folder, template=None):
    from nemo_rl.algorithms.utils import get_tokenizer

    section = {"name": policy_folder}
    return get_tokenizer(section if template is None else {**section, "chat_template": template})


@pytest.mark.parametrize(
    ("template", "thinking"),
    [(QWEN, False), (R1, True), (OPEN_REASONING, False), (PLAIN, False)],
    ids=["qwen2.5", "r1-distill", "nemotron", "plain"],
)
def test_templates(policy_folder, tmp_path, template, thinking):
    """q is the template's own rendering; Stage 2 begins a fresh conversation of the same shape."""
    config = nemo_runs.tiny_config(policy_folder, tmp_path, "policy.max_total_sequence_length=512")
    tokenizer = _tokenizer(policy_folder, template)
    datum = _datum(config, tokenizer, limit=400)
    [message] = datum["message_log"]
    rendered = tokenizer.apply_chat_template(
        [
            {"role": "system", "content": config.igrpo.prompt.system},
            {"role": "user", "content": "1+2="},
        ],
        tokenize=False,
        add_generation_prompt=True,
    )
    assert message["content"] == rendered
    assert tokenizer.decode(message["token_ids"]) == rendered
    assert datum["extra_env_info"]["thinking_open"] is thinking
    problem = {"id": "p1", "question": "1+2=", "answer": "3", "columns": ""}
    assert datum["extra_env_info"]["problem"] == problem
    assert (datum["length"], datum["loss_multiplier"]) == (len(message["token_ids"]), 1.0)
    assert datum["idx"] == 5
    from igrpo_nemo.run.core import prompt_builder

    builder = prompt_builder(config, tokenizer)
    refined = builder.refinement(Problem("p1", "1+2=", "3"), "<think>it is 3</think>")
    assert refined.thinking_open is thinking
    assert refined.text.count("1+2=") == 1
    assert "it is 3" in refined.text


def test_a_prompt_that_is_too_long_is_cut_and_gets_no_weight(policy_folder, tmp_path):
    config = nemo_runs.tiny_config(policy_folder, tmp_path)
    datum = _datum(config, _tokenizer(policy_folder), question="1+" * 200)
    assert datum["loss_multiplier"] == 0.0
    assert datum["length"] == len(datum["message_log"][0]["token_ids"]) == data.CUT_TOKENS


def test_the_data_set_class_is_loaded_by_its_path(tmp_path):
    from nemo_rl.data.datasets import load_response_dataset

    path = tmp_path / "train.jsonl"
    odd = 'with "quotes" é\u2028and lines\x85'
    columns = '{"record": {"a": [1, null]}}'
    data.write_problems([Problem("a", "1+1=", "2"), Problem("b", odd, "3", columns)], path)
    section = {"dataset_name": data.DATASET_PATH, "data_path": str(path), "split": "validation"}
    from nemo_rl.data.processors import PROCESSOR_REGISTRY

    PROCESSOR_REGISTRY.setdefault(data.PROCESSOR, data.problem_processor)
    loaded = load_response_dataset({**section, "processor": data.PROCESSOR, "env_name": "igrpo"})
    assert loaded.task_name == data.TASK
    assert loaded.val_dataset is None
    assert [row["question"] for row in loaded.dataset] == ["1+1=", odd]
    assert [row["columns"] for row in loaded.dataset] == ["", columns]
    assert all(row["validation"] for row in loaded.dataset)
