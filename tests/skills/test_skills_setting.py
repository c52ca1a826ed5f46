"""A folder holds one setting: another one is refused with the one thing that differs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from sample_files import whole_benchmark
from skills_runs import write_problems

from igrpo_nemo.chain import on_slurm as slurm_chain
from igrpo_nemo.chain import stages as pipeline
from igrpo_nemo.chain.experiment import Experiment
from igrpo_nemo.config import load_config
from igrpo_nemo.errors import UserError
from igrpo_nemo.evaluation.model import (
    Model,
    default_base,
    evaluated_config,
    local_model,
    named_model,
    opens_thinking,
)
from igrpo_nemo.evaluation.setting import (
    Setting,
    claim_folder,
    default_folder,
    reply_tokens,
    setting_of,
)
from igrpo_nemo.evaluation.skills.data import read_benchmark, with_benchmarks
from igrpo_nemo.evaluation.skills.evaluate import SkillsEvaluation, evaluate_here
from igrpo_nemo.evaluation.skills.program import SkillsEnvironment
from igrpo_nemo.run.tokenizer import build_small_tokenizer


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    write_problems(tmp_path / "data", "toy", ["4", "5", "6"])
    return made(tmp_path)


def made(folder: Path, *words: str, server_type: str = "vllm") -> Setting:
    config = with_benchmarks(load_config(["policy.model_name=x", *words]), "toy:2")
    data, model = [read_benchmark(folder / "data", "toy")], Model("m", "w", 131_072)
    return setting_of(config, model, data, server_type=server_type, nemo_skills="0.7.0")


def test_the_papers_setting(setting: Setting) -> None:
    assert (setting.temperature, setting.top_p, setting.max_tokens) == (0.6, 0.95, 65_000)
    assert setting.profile == "answer_tags" and "<answer>" in (setting.system_prompt or "")
    assert setting.benchmarks == {"toy": 2}
    assert setting.problems["toy"]["rows"] == 3 and setting.problems["toy"]["tokens"] == 65_000


@pytest.mark.parametrize(
    ("context", "prompt", "expected"),
    [
        (131_072, 500, 65_000),
        (65_500, 500, 65_000),
        (65_499, 500, 64_999),
        (65_000, 500, None),
        (8_192, 500, None),
        (None, 500, 65_000),
    ],
)
def test_tokens_of_a_reply(context: int | None, prompt: int, expected: int | None) -> None:
    assert reply_tokens(65_000, context, prompt) == expected


def test_another_setting_is_refused(tmp_path: Path, setting: Setting) -> None:
    out = tmp_path / "out"
    claim_folder(out, setting)
    # Nothing was sampled yet: any setting may take the folder.
    claim_folder(out, replace(setting, temperature=0.7))
    claim_folder(out, setting)
    whole_benchmark(out)
    claim_folder(out, setting)
    for changed, message in (
        (replace(setting, temperature=0.7), r"\(temperature was 0.6, is 0.7\)"),
        (replace(setting, weights="v"), r'\(weights was "w", is "v"\)'),
        (replace(setting, profile="boxed"), "profile was"),
        (replace(setting, benchmarks={"toy": 1}), r"\(samples of toy was 2, is 1\)"),
        (replace(setting, problems={"toy": {"rows": 4}}), "data of toy was"),
        (replace(setting, thinking_open=True), "thinking_open was false, is true"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            claim_folder(out, changed)
        assert "\n" not in str(caught.value)
    assert json.loads((out / "setting.json").read_text())["temperature"] == 0.6
    # What has its default is not written: a setting without such a template is as it always was.
    (out / "setting.json").write_text(replace(setting, thinking_open=True).to_json())
    with pytest.raises(UserError, match="thinking_open was true, is false"):
        claim_folder(out, setting)


@pytest.mark.parametrize("is_evaluated", ["here", "slurm"])
def test_a_chain_does_not_take_samples_of_other_data_for_its_own(
    tmp_path: Path, setting: Setting, monkeypatch: pytest.MonkeyPatch, is_evaluated: str
) -> None:
    """As many rows, other problems: only setting.json tells them apart."""
    out = tmp_path / "out"
    claim_folder(out, setting)
    whole_benchmark(out)
    (data,) = [read_benchmark(tmp_path / "data", "toy")]
    config = load_config(["policy.model_name=x"])
    environment = SkillsEnvironment(tmp_path / "bin", "0.7.0")
    evaluation = SkillsEvaluation(config, setting, (data,), out, environment)
    chain = Experiment((), config, tmp_path / "run")
    monkeypatch.setattr(slurm_chain, "_is_converted", lambda chain: True)

    def ask() -> object:
        if is_evaluated == "here":
            return evaluate_here(evaluation, {})
        return slurm_chain._is_evaluated(chain, evaluation)

    assert ask() is True
    before = (out / "setting.json").read_text()
    changed = {"toy": {**setting.problems["toy"], "sha256": "another"}}
    evaluation = replace(evaluation, setting=replace(setting, problems=changed))
    with pytest.raises(UserError, match="data of toy was .*move that folder away"):
        ask()
    assert (out / "setting.json").read_text() == before


def test_a_folder_may_grow(tmp_path: Path, setting: Setting) -> None:
    out = tmp_path / "out"
    claim_folder(out, setting)
    whole_benchmark(out)
    more = replace(setting, benchmarks={"toy": 8})
    assert claim_folder(out, more).benchmarks == {"toy": 8}
    other = replace(setting, benchmarks={"new": 1}, problems={"new": {"rows": 1}})
    joined = claim_folder(out, other)
    assert joined.benchmarks == {"toy": 8, "new": 1} and set(joined.problems) == {"toy", "new"}


def test_samples_of_unknown_origin_are_not_joined(tmp_path: Path, setting: Setting) -> None:
    whole_benchmark(tmp_path / "out")
    with pytest.raises(UserError, match="samples without a setting.json"):
        claim_folder(tmp_path / "out", setting)


def test_paths_that_a_shell_would_break_are_refused(tmp_path: Path, setting: Setting) -> None:
    with pytest.raises(UserError, match="does not quote paths"):
        claim_folder(tmp_path / "my results", setting)


def test_each_setting_has_a_folder_of_its_own(setting: Setting) -> None:
    folder = default_folder(Path("base"), setting)
    assert folder.name.startswith("answer_tags-t0.6-p0.95-")
    assert default_folder(Path("base"), replace(setting, benchmarks={"toy": 9})) == folder
    for changed in ({"max_tokens": 100}, {"thinking_open": True}):
        assert default_folder(Path("base"), replace(setting, **changed)) != folder
    assert not {"thinking_open", "chat_template_kwargs"} & set(json.loads(setting.to_json()))
    step = "runs/demo/checkpoints/step_00000100"
    assert default_base(f"{step}/model") == Path("runs/demo/evaluation/step_00000100").absolute()
    assert default_base("org/name") == Path("evaluation/name")


def test_a_model_is_known_by_its_weights(tmp_path: Path) -> None:
    config = load_config(["policy.model_name=x"])
    folder = tmp_path / "checkpoint" / "model"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"max_position_embeddings": 4096}')
    (folder / "model.safetensors").write_bytes(b"0" * 100)
    model = local_model(tmp_path / "checkpoint", config)
    assert model.name == str(folder) and model.context == 4096
    (folder / "model.safetensors").write_bytes(b"1" * 100)
    assert local_model(tmp_path / "checkpoint", config).weights != model.weights
    with pytest.raises(UserError, match="no config.json"):
        local_model(tmp_path, config)


OPENED = "{{ messages[-1]['content'] }}{% if add_generation_prompt %}<think>\n{% endif %}"


@pytest.fixture
def opened(tmp_path: Path) -> Path:
    """A model folder whose chat template opens the thinking; its weights do not matter here."""
    tokenizer = build_small_tokenizer(["user assistant"], 300)
    tokenizer.chat_template = OPENED
    tokenizer.save_pretrained(tmp_path / "opened")
    (tmp_path / "opened" / "config.json").write_text("{}")
    (tmp_path / "opened" / "model.safetensors").touch()
    return tmp_path / "opened"


def opens(
    model: Path | str, system: str = "", template: str | None = None, **kwargs: object
) -> bool:
    """`opens_thinking` under a config with this system prompt and chat template."""
    config = load_config(["policy.model_name=x"])
    keys = {"chat_template": template, "chat_template_kwargs": kwargs or None}
    config = config.replaced("policy", tokenizer=config.policy.tokenizer.model_copy(update=keys))
    prompt = config.igrpo.prompt.model_copy(update={"system": system})
    return opens_thinking(model, config.replaced("igrpo", prompt=prompt))


def test_a_template_that_opens_the_thinking_is_seen(tmp_path: Path, opened: Path) -> None:
    config = load_config(["policy.model_name=x"])
    assert local_model(opened, config).thinking_open
    assert named_model(str(opened), config).thinking_open  # as a server calls it
    assert not named_model("org/served", config).thinking_open
    assert not opens(opened, "", "{{ messages[-1]['content'] }}")
    for template in (
        "{{ messages[-1]['content'] }}<think>\n\n</think>\n",
        "{{ raise_exception('thinking without a system prompt alone') }}",
        "no message, though it speaks of <think>",
    ):
        assert not opens(opened, "system", template)
    (tmp_path / "own.jinja").write_text(OPENED)
    build_small_tokenizer(["user"], 300).save_pretrained(tmp_path / "plain")
    assert not opens(tmp_path / "plain")
    assert opens(tmp_path / "plain", "", str(tmp_path / "own.jinja"))


def test_arguments_of_the_chat_template_are_part_of_the_setting(
    tmp_path: Path, setting: Setting, opened: Path
) -> None:
    given = {"think": False}
    word = "policy.tokenizer.chat_template_kwargs={think: false}"
    assert made(tmp_path, word, server_type="sglang").chat_template_kwargs == given
    refusal = "chat_template_kwargs cannot be given to a server of type o"
    with pytest.raises(UserError, match=refusal):
        made(tmp_path, word, server_type="openai")
    template = OPENED.replace("add_generation_prompt", "think is not defined or think")
    assert opens(opened, "", template)
    assert not opens(opened, "", template, **given)


def test_a_template_of_the_hub_is_looked_for_in_the_cache(tmp_path: Path, opened: Path) -> None:
    model = tmp_path / "hf" / "hub" / "models--org--opened"
    (model / "snapshots").mkdir(parents=True)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("abc")
    opened.rename(model / "snapshots" / "abc")
    plain = load_config(["policy.model_name=x"])
    assert opens_thinking("org/opened", plain, hf_home=str(tmp_path / "hf"))
    assert not opens_thinking("org/opened", plain)
    config = load_config(["policy.model_name=x", f"igrpo.site.hf_home={tmp_path / 'hf'}"])
    assert named_model("org/opened", config).thinking_open
    assert not named_model("no name: of the hub/", config).thinking_open


def test_a_chain_knows_the_template_before_its_model(opened: Path, tmp_path: Path) -> None:
    words = ["model=hf", f"policy.model_name={opened}", f"logger.log_dir={tmp_path / 'run'}"]
    write_problems(tmp_path / "data", "toy", ["4"])
    environment = SkillsEnvironment(tmp_path / "bin", "0.7.0")

    def setting_with(*more: str) -> Setting:
        config = load_config([*words, *more])
        data = tmp_path / "data"
        chain = Experiment((), config, tmp_path / "run", benchmarks="toy:1", data_dir=data)
        return pipeline.chain_evaluation(chain, environment).setting

    assert setting_with().thinking_open
    assert not setting_with("igrpo.evaluation.profile=boxed").thinking_open
    plain = "policy.tokenizer.chat_template=\"{{ messages[-1]['content'] }}\""
    assert not setting_with(plain).thinking_open


def test_a_chains_evaluation_is_the_same_before_and_after_the_training(tmp_path: Path) -> None:
    """For a model of the hub too: else every sample would be asked for again."""
    write_problems(tmp_path / "data", "toy", ["4"])
    home, run = tmp_path / "hf", tmp_path / "run"
    words = ["model=hf", "policy.model_name=org/base", f"logger.log_dir={run}"]
    config = load_config([*words, f"igrpo.site.hf_home={home}"])
    chain = Experiment((), config, run, benchmarks="toy:1", data_dir=tmp_path / "data")
    environment = SkillsEnvironment(tmp_path / "bin", "0.7.0")
    with pytest.raises(UserError, match="the context of org/base is not known on this machine"):
        pipeline.chain_evaluation(chain, environment)
    repository = home / "hub" / "models--org--base"
    for folder in (repository / "snapshots" / "abc", repository / "refs", chain.model):
        folder.mkdir(parents=True)
    shape = json.dumps({"max_position_embeddings": 4096, "num_attention_heads": 28})
    (repository / "refs" / "main").write_text("abc")
    (repository / "snapshots" / "abc" / "config.json").write_text(shape)
    before = pipeline.chain_evaluation(chain, environment)
    (chain.model / "config.json").write_text(shape)
    after = pipeline.chain_evaluation(chain, environment)
    assert before.setting.context == 4096 and before.out == after.out
    assert before.gpus == after.gpus == 4  # of eight, as many as its heads divide by


def test_benchmarks_of_the_command_line() -> None:
    config = load_config(["policy.model_name=x"])
    chosen = with_benchmarks(config, "aime24,gsm8k:3,mine").igrpo.evaluation.benchmarks
    assert chosen == {"aime24": 64, "gsm8k": 3, "mine": 8}
    for wrong in ("aime24:0", "aime24:x", "../up:1"):
        with pytest.raises(UserError, match="--benchmarks"):
            with_benchmarks(config, wrong)


def test_a_runs_config_takes_another_evaluation(tmp_path: Path) -> None:
    config = load_config(["experiment=demo"])
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    model = tmp_path / "checkpoints" / "step_5"
    model.mkdir(parents=True)
    found = evaluated_config(str(model), ["eval=all_64", "igrpo.evaluation.profile=boxed"])
    assert found.igrpo.prompt.system == config.igrpo.prompt.system
    assert found.igrpo.evaluation.benchmarks["math-500"] == 64
    assert found.igrpo.evaluation.profile == "boxed"
