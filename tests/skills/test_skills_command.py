"""The `ns eval` command line of a setting, and the profiles' way of finding an answer."""

from __future__ import annotations

import re
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from igrpo_nemo.config import load_config
from igrpo_nemo.errors import UserError
from igrpo_nemo.evaluation.setting import Setting
from igrpo_nemo.evaluation.skills.cluster import ClusterProfile
from igrpo_nemo.evaluation.skills.command import (
    Place,
    eval_commands,
    generation_config_dir,
    prompt_text,
    tensor_parallel,
    write_profile,
)
from igrpo_nemo.evaluation.skills.evaluate import SkillsEvaluation
from igrpo_nemo.evaluation.skills.program import SkillsEnvironment

SETTING = Setting(
    model="m",
    weights="w",
    profile="answer_tags",
    system_prompt="s",
    temperature=0.6,
    top_p=0.95,
    max_tokens=65_000,
    context=131_072,
    server_type="vllm",
    nemo_skills="0.7.0",
    benchmarks={"aime24": 64, "gsm8k": 8, "gpqa": 8, "long": 8},
    problems={
        "aime24": {"tokens": 65_000},
        "gsm8k": {"tokens": 65_000},
        "gpqa": {"tokens": 65_000},
        "long": {"tokens": None},
    },
)


def answer_pattern(*, thinking_open: bool = False) -> re.Pattern[str]:
    """The pattern that finds an answer in a reply, as NeMo-Skills applies it."""
    name = "answer_tags_opened" if thinking_open else "answer_tags"
    values = yaml.safe_load((generation_config_dir() / f"{name}.yaml").read_text())
    return re.compile(values["eval_config"]["extract_regex"])


CONFIG = load_config(["policy.model_name=x"])
STARTED = SkillsEvaluation(
    CONFIG, SETTING, (), Path("/out"), SkillsEnvironment(Path("/bin"), "0.7.0"), gpus=4
)
RUNNING = replace(STARTED, address="http://127.0.0.1:1/v1")
HERE, CLUSTER = Place("/out"), Place("/out", "/m", "mine")


def call(
    evaluation: SkillsEvaluation = RUNNING, place: Place = HERE, **setting: object
) -> list[str]:
    """The one command of gsm8k; `setting` changes the evaluation's."""
    evaluation = replace(evaluation, setting=replace(evaluation.setting, **setting))
    (words,) = eval_commands(evaluation, ["gsm8k"], place)
    return words


def value(words: list[str], flag: str) -> str | None:
    return next((w.partition("=")[2] for w in words if w.startswith(f"{flag}=")), None)


def test_one_call_for_benchmarks_that_share_their_arguments() -> None:
    calls = eval_commands(RUNNING, list(SETTING.benchmarks), HERE)
    benchmarks = [value(call, "--benchmarks") for call in calls]
    assert benchmarks == ["aime24:64,gsm8k:8", "gpqa:8", "long:8"]
    shared = {"++inference.temperature=0.6", "++inference.top_p=0.95"}
    shared |= {"++prompt_config=/out/profile/prompt.yaml"}
    assert all(shared <= set(call) for call in calls)
    assert "++inference.tokens_to_generate=65000" in calls[0]
    assert "++inference.tokens_to_generate=null" in calls[2]
    assert "--config-name=answer_tags" in calls[0]
    assert "--config-name=answer_tags_multichoice" in calls[1]


def test_the_boxed_profile_is_nemo_skills_own() -> None:
    assert not [word for word in call(profile="boxed") if "config" in word]


def test_here_samples_follow_each_other_and_on_a_cluster_jobs_share_them() -> None:
    here = call()
    assert "--single_node_mode=sequential" in here and "--model=m" in here
    assert "--server_address=http://127.0.0.1:1/v1" in here
    assert value(here, "--sbatch_kwargs") is None
    place = Place("/out", "/m", "mine", Path("/cfg"), 4, sbatch={"qos": "high"}, after=(7, 8))
    there = call(STARTED, place)
    wanted = {"--cluster=mine", "--config_dir=/cfg", "--num_jobs=4", "--server_gpus=4"}
    assert wanted | {"--model=/m"} <= set(there)
    # No job waits for ever behind one that failed.
    options = {"qos": "high", "dependency": "afterok:7:8", "kill_on_invalid_dep": "yes"}
    assert yaml.safe_load(value(there, "--sbatch_kwargs") or "") == options
    alone = call(STARTED, CLUSTER)
    assert yaml.safe_load(value(alone, "--sbatch_kwargs") or "") == {"kill_on_invalid_dep": "yes"}


def server_args(
    evaluation: SkillsEvaluation = STARTED, arguments: str = "", **setting: object
) -> str | None:
    evaluation = replace(evaluation, server_args=arguments)
    return value(call(evaluation, CLUSTER, **setting), "--server_args")


def test_a_jobs_server_samples_as_the_request_says() -> None:
    ours = "--generation-config vllm"
    assert server_args() == ours
    # The last one of an option counts: what the user says does.
    assert server_args(arguments="--seed 1") == f"{ours} --seed 1"
    assert server_args(server_type="sglang") is None
    assert server_args(RUNNING, "--seed 1") is None


def test_a_server_that_is_started_gets_the_configs_chat_template(tmp_path: Path) -> None:
    template, flag = "0123456789abcdef", "--chat-template /out/profile/chat_template.jinja"
    found = server_args(arguments="-x", chat_template=template)
    assert found == f"--generation-config vllm {flag} -x"
    assert server_args(server_type="sglang", chat_template=template) == flag
    assert server_args(RUNNING, chat_template=template) is None
    with pytest.raises(UserError, match="chat_template cannot be given to a server of type trt"):
        server_args(server_type="trtllm", chat_template=template)
    model = ["model=nemotron_h_8b", "engine=nemo_rl", "cluster=a100_2x8"]
    write_profile(config := load_config(model), tmp_path)
    written = (tmp_path / "profile" / "chat_template.jinja").read_text()
    assert written == config.policy.tokenizer.chat_template


def test_arguments_of_the_chat_template_go_with_the_requests(tmp_path: Path) -> None:
    """In the generation config: a shell reads the command line."""
    given = {"enable_thinking": False, "mark": "a 'b' $c"}
    tokenizer = CONFIG.policy.tokenizer.model_copy(update={"chat_template_kwargs": given})
    folder = write_profile(CONFIG.replaced("policy", tokenizer=tokenizer), tmp_path)
    for profile, benchmark in (
        ("answer_tags", "gsm8k"),
        ("answer_tags", "gpqa"),
        ("boxed", "gpqa"),
    ):
        setting = replace(SETTING, chat_template_kwargs=given, profile=profile)
        (call,) = eval_commands(replace(RUNNING, setting=setting), [benchmark], HERE)
        assert "--config-path=/out/profile" in call
        (name,) = [word.partition("=")[2] for word in call if word.startswith("--config-name=")]
        values = yaml.safe_load((folder / f"{name}.yaml").read_text())
        assert values["chat_template_kwargs"] == given
        assert not [word for word in call if "enable_thinking" in word]


@pytest.mark.parametrize(("heads", "size"), [(28, 4), (32, 8), (40, 8), (6, 2), (7, 1), (None, 8)])
def test_a_model_is_split_over_gpus_that_divide_its_heads(heads: int | None, size: int) -> None:
    assert tensor_parallel(8, heads) == size


def test_paths_as_the_containers_see_them() -> None:
    mounts = ("/lustre/me:/space", "/data:/data:ro")
    profile = ClusterProfile("mine", Path("/cfg"), {"account": "acme"}, mounts)
    assert profile.seen("/lustre/me/out/a") == "/space/out/a"
    assert profile.seen("/data") == "/data" and profile.seen("org/model") == "org/model"
    with pytest.raises(UserError, match="/lustre/meadow is in none of"):
        profile.seen("/lustre/meadow")


REPLIES = {
    False: [
        ("<answer>4</answer>", "4"),
        ("a <answer>3</answer> b <answer> 4\n</answer> c", "4"),
        ("<think>\n<answer>3</answer></think><answer>4</answer>", "4"),
        ("template opened it: <answer>3</answer></think>so <answer>4</answer>", "4"),
        (r"\boxed{3} <answer>\frac{1}{2}</answer>", r"\frac{1}{2}"),
        ("<answer>4</answer> <answer>cut of", "4"),
        ("<answer><answer>4</answer>", "4"),
        ("<answer>4</answer> <think>again <answer>5</answer>", "4"),
        (r"\boxed{4}", None),
        ("<answer></answer>", None),
        ("<answer>  \n </answer>", None),
        ("<answer>4", None),
        ("<think>so <answer>4</answer>", None),
        ("so <answer>4</answer></think> done", None),
        ("<think>so <answer>4</answer></think> done", None),
        ("", None),
    ],
    True: [
        ("so <answer>3</answer></think>so <answer>4</answer>", "4"),
        ("a</think><answer>3</answer> b <answer> 4\n</answer> c", "4"),
        ("<think>again</think>so <answer>4</answer>", "4"),
        # Cut off inside the thinking: the answer in it was not given.
        ("perhaps <answer>4</answer>", None),
        ("<answer>4</answer> or <answer>5</answer> or", None),
        ("so <answer>4</answer></think> done", None),
        ("<think>so <answer>4</answer>", None),
        # What the client leaves of "<think>again</think>\n<answer>4</answer>".
        ("\n<answer>4</answer>\n", "4"),
        ("<answer> </answer>", None),
        ("", None),
    ],
}


@pytest.mark.parametrize(
    ("thinking_open", "reply", "answer"),
    [(opened, *each) for opened, replies in REPLIES.items() for each in replies],
)
def test_the_answer_in_tags(thinking_open: bool, reply: str, answer: str | None) -> None:
    found = answer_pattern(thinking_open=thinking_open).findall(reply)
    assert (found[-1] if found else None) == answer


@pytest.mark.parametrize("thinking_open", [False, True])
@pytest.mark.parametrize(
    "text",
    [
        "<answer>" * 20_000,
        "<answer>4</answer>" * 10_000 + "</think>",
        "<think>" * 20_000,
        "<answer>" + " " * 200_000,
        "<answer>" + " a" * 100_000,
        "x" * 200_000,
    ],
)
def test_hostile_replies_cost_no_time(text: str, thinking_open: bool) -> None:
    pattern = answer_pattern(thinking_open=thinking_open)
    before = time.process_time()
    pattern.findall(text)
    assert time.process_time() - before < 2


def test_shipped_prompt_is_the_trainings(tmp_path: Path) -> None:
    shipped = yaml.safe_load((generation_config_dir() / "paper_prompt.yaml").read_text())
    assert shipped == yaml.safe_load(prompt_text(CONFIG.igrpo.prompt.system))
    folder = write_profile(CONFIG, tmp_path)
    assert yaml.safe_load((folder / "prompt.yaml").read_text()) == shipped
    assert shipped["user"] == "{problem}"


def test_the_profile_of_a_model_whose_template_opens_the_thinking(tmp_path: Path) -> None:
    shipped = generation_config_dir()
    plain = write_profile(CONFIG, tmp_path / "plain")
    opened = write_profile(CONFIG, tmp_path / "opened", thinking_open=True)
    assert sorted(path.name for path in opened.iterdir()) == [
        "answer_tags.yaml",
        "answer_tags_multichoice.yaml",
        "prompt.yaml",
    ]
    for name in ("answer_tags.yaml", "answer_tags_multichoice.yaml"):
        assert (plain / name).read_bytes() == (shipped / name).read_bytes()
    values = yaml.safe_load((opened / "answer_tags.yaml").read_text())
    assert values["eval_config"]["extract_regex"] == answer_pattern(thinking_open=True).pattern
    before = yaml.safe_load((shipped / "answer_tags.yaml").read_text())
    del values["eval_config"]["extract_regex"], before["eval_config"]["extract_regex"]
    assert values == before


def test_braces_of_a_system_prompt_stay_braces() -> None:
    prompt = yaml.safe_load(prompt_text(r"put it in \boxed{}"))
    assert prompt["system"] == r"put it in \boxed{}"  # NeMo-Skills sends it as it is
    assert "system" not in yaml.safe_load(prompt_text(""))
