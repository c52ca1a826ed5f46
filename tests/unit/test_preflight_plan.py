"""The plan as a whole: shipped experiments fit, what does not fit has a remedy, and the command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cases import cases
from composed import config_of, plan_of
from shared_data import shared_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from igrpo_nemo.cli import main
from igrpo_nemo.config.compose import builtin_config_dir
from igrpo_nemo.data import DataSpec, load_problems
from igrpo_nemo.data.catalog import SOURCES
from igrpo_nemo.preflight import preflight
from igrpo_nemo.preflight.nearest import changed, words
from igrpo_nemo.preflight.plan import PAPER_GPU_HOURS
from igrpo_nemo.preflight.tokens import questions

CASES = cases(__file__)

FILES = (builtin_config_dir() / "experiment").glob("*.yaml")
EXPERIMENTS = sorted(path.stem for path in FILES if path.stem != "laptop")  # its model is yours
S3 = "experiment=tableS3_igrpo"


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_shipped_experiment_fits_its_cluster(experiment):
    plan = plan_of(experiment)
    assert plan.problems == []
    text = plan.text()
    assert text.endswith("it fits\n")
    json.dumps(plan.to_dict())
    if plan.config.igrpo.engine == "nemo_rl":
        assert f"{PAPER_GPU_HOURS['igrpo']} / {PAPER_GPU_HOURS['grpo']} = 1.13" in text
        assert f"{plan.ratio:.2f} here" in text
        assert plan.cost is not None and plan.cost.gpu_hours > 0
        assert max(map(len, text.splitlines())) < 130


def test_the_example_of_the_docs_is_current():
    page = builtin_config_dir().parent / "docs" / "preflight.md"
    if not page.is_file():
        pytest.skip("the docs are not part of an installed package")
    text = plan_of("table1_openmath_nemotron_14b_igrpo").text()
    assert text in page.read_text(encoding="utf-8")


UTILIZATION = "policy.generation.vllm_cfg.gpu_memory_utilization"
SHORT = CASES["short"]


@pytest.mark.parametrize(("overrides", "reason"), SHORT, ids=[case[0][0] for case in SHORT])
def test_the_nearest_setting_fits_when_it_is_composed(overrides, reason):
    [problem] = preflight(config_of(S3, *overrides), environ={}).problems
    assert reason in problem and "\n" not in problem
    remedy = problem.rpartition(": set ")[2].split()
    assert 1 <= len(remedy) <= 3
    keys = {word.partition("=")[0] for word in remedy}
    kept = [word for word in overrides if word.partition("=")[0] not in keys]
    assert preflight(config_of(S3, *kept, *remedy), environ={}).problems == []


def test_where_nothing_small_helps_the_message_says_so():
    config = config_of(S3, "policy.generation.vllm_cfg.gpu_memory_utilization=0.2")
    shape = {"hidden_size": 65536, "intermediate_size": 262144, "num_hidden_layers": 96}
    assert config.igrpo.architecture is not None
    huge = config.igrpo.architecture.model_copy(update=shape)
    problems = preflight(config.replaced("igrpo", architecture=huge), environ={}).problems
    assert problems and all("use a larger cluster" in problem for problem in problems)


def test_the_embedded_engine_is_checked_and_not_estimated():
    plan = plan_of("demo")
    assert plan.fits and plan.cost is None
    assert "memory and cost of engine local are not estimated" in plan.notes


B14 = "experiment=table1_openmath_nemotron_14b_igrpo"


def disk(folder: Path, free: float, *overrides: str):
    words = [B14, f"checkpointing.checkpoint_dir={folder}/run/checkpoints", *overrides]
    config = config_of(*words, f"logger.log_dir={folder}/run")
    plan = preflight(config, environ={}, free=lambda folder: round(free))
    return plan, plan.disk


def test_checkpoints_take_14_bytes_a_parameter(tmp_path):
    """14.77e9 parameters; three best, the newest and the one being written, of 6 saves."""
    plan, found = disk(tmp_path, 2e12)
    assert found is not None and (found.each, found.count) == (14 * 14_770_033_664, 5)
    assert f"at most 5 of {found.each / 2**30:,.1f} GiB" in plan.text()
    for override, each, count in (
        ("checkpointing.save_optimizer=false", 2, 5),
        ("model=openmath_nemotron_14b_dtensor", 12, 5),
        ("checkpointing.save_period=50", 14, 2),
    ):
        found = disk(tmp_path, 2e12, override)[1]
        assert found is not None
        assert (found.each, found.count) == (each * 14_770_033_664, count)
    assert disk(tmp_path, 0, "checkpointing.enabled=false")[1] is None


def test_a_disk_that_is_too_small_is_said_and_refused_where_the_run_cannot_go_on(tmp_path):
    def said(*arguments) -> list[str]:
        notes = disk(tmp_path, *arguments)[0].notes
        return [note for note in notes if note.startswith("checkpoints take")]

    [note] = said(0.9e12)
    assert note.endswith("GiB free: set checkpointing.keep_top_k=2")
    assert said(0.9e12, "checkpointing.keep_top_k=2") == []
    [note] = said(1e9)
    assert note.endswith("set checkpointing.checkpoint_dir to a larger disk")
    checkpoints = tmp_path / "run" / "checkpoints"
    checkpoints.mkdir(parents=True)
    assert len(said(0.9e12)) == 1
    assert disk(tmp_path, 1e9)[0].problems == [note.replace(str(tmp_path), str(checkpoints))]
    with (checkpoints / "held").open("wb") as stream:
        stream.truncate(10**12)  # what is there already counts
    assert said(0.9e12) == []


def test_the_disk_of_the_checkpoints_counts_wherever_the_run_is(tmp_path):
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    run.mkdir()
    elsewhere.mkdir()
    words = [B14, f"logger.log_dir={run}"]
    config = config_of(*words, f"checkpointing.checkpoint_dir={elsewhere}/not/yet")

    def plan(free):
        return preflight(config, environ={}, free=lambda folder: free[folder])

    assert plan({elsewhere: 2 * 10**12, run: 0}).problems == []
    [problem] = plan({elsewhere: 10**9, run: 2 * 10**12}).problems
    assert f"and {elsewhere} has 0.9 GiB free" in problem


def test_dumps_of_rows_are_counted(tmp_path):
    """58 steps of 512 rows, each 9,728 places of 25 bytes and 1,638 tokens of 55."""
    plan, _ = disk(tmp_path, 2e12, "igrpo.row_dump_period=1")
    dumps = 58 * 512 * (9728 * 25 + 0.4 * 4096 * 55)
    assert plan.to_dict()["row_dumps"] == pytest.approx(dumps, abs=1)
    assert f"about {dumps / 2**30:,.1f} GiB in {tmp_path}/run" in plan.text()
    assert disk(tmp_path, 2e12, "igrpo.row_dump_period=10")[0].to_dict()["row_dumps"] < dumps / 11
    short, _ = disk(tmp_path, 1.038e12, "igrpo.row_dump_period=1")
    [note] = [note for note in short.notes if note.startswith("dumps of trained rows")]
    assert "of checkpoints" in note and note.endswith(
        "set igrpo.row_dump_period=0, or a longer period"
    )


def test_a_change_takes_what_follows_from_it_along():
    config = config_of(S3)
    change = {"policy.megatron_cfg.tensor_model_parallel_size": 4}
    assert changed(config, change) == config_of(S3, *words(change).split()[1:])
    context = {"policy.max_total_sequence_length": 4096}
    assert changed(config, context) == config_of(S3, *words(context).split()[1:])


def test_a_model_that_nobody_describes_is_checked_but_not_estimated():
    overrides = ["policy.model_name=owner/unknown", "engine=nemo_rl", "cluster=a100_2x8"]
    plan = preflight(config_of(*overrides), environ={"HF_HOME": "/nowhere"})
    assert plan.fits and plan.cost is None and plan.parameters is None
    assert any("igrpo.architecture is null" in note for note in plan.notes)


def test_questions_of_a_file_are_counted(tmp_path):
    path = tmp_path / "mine.jsonl"
    rows = [{"problem": "x" * 28 * n, "answer": "1"} for n in range(1, 501)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ["data=jsonl", f"data.train.data_path={path}", f"data.validation.data_path={path}"]
    config = config_of(S3, *data, "igrpo.drop_overlong_prompts=false")
    asked = questions(config, {})
    assert asked.count == 500 and asked.tokens[1.0] == 5000 and asked.tokens[0.5] == 2510
    [problem] = preflight(config, environ={}).problems
    assert "set igrpo.drop_overlong_prompts=true" in problem
    few = config_of(S3, *data, "igrpo.drop_overlong_prompts=true", "data.train.num_problems=64")
    [problem] = preflight(few, environ={}).problems
    assert "grpo.num_prompts_per_step=128 draws batches of 128" in problem
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[:96]))
    few = config_of(S3, *data, "grpo.num_prompts_per_step=96")
    [problem] = preflight(few, environ={}).problems
    assert problem.endswith("data.train has 90 that fit: set grpo.num_prompts_per_step=90")


def test_questions_that_stand_in_for_others_say_nothing_of_their_length():
    """MATH's, of which three are longer: what is trained on may have none such, or many."""
    other = ["data=acereason_math", "data.train.num_problems=1000"]
    for drop in ("true", "false"):
        plan = preflight(config_of(S3, *other, f"igrpo.drop_overlong_prompts={drop}"), environ={})
        assert plan.problems == [] and plan.steps == 1000 // 128
        assert plan.questions is not None and "stand in" in plan.questions.source
        assert not [note for note in plan.notes if "longer than data.max_input" in note]


def test_a_tokenizer_at_hand_counts_exactly(tmp_path):
    characters = Tokenizer(models.WordLevel({"1": 0}, unk_token="1"))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    characters.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps({"problem": "1" * n, "answer": "1"}) + "\n" for n in (3, 7)))
    data = ["data=jsonl", f"data.train.data_path={path}", f"data.validation.data_path={path}"]
    asked = questions(config_of(f"policy.model_name={tmp_path}", *data), {})
    assert asked.tokens[1.0] == 7 and asked.source.endswith("with its tokenizer")


def test_the_known_number_of_problems_is_the_loaders():
    shared_file("math_train_7500.jsonl")
    assert SOURCES["math"].usable["train"] == len(load_problems(DataSpec("math")))


def test_json_on_the_command_line(capsys):
    assert main(["preflight", S3, "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["fits"] is True and values["steps"] == 58
    assert values["parameters"] == 7_615_616_512
    assert values["training_memory"]["total"] < values["training_memory"]["capacity"]
    assert values["published_gpu_hours_igrpo_over_grpo"] == pytest.approx(94.1 / 83.3)


def test_the_clusters_own_profile_is_read(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("cluster.local.yaml").write_text("gpu: a100_40gb\n")
    assert main(["preflight", S3]) == 0
    assert "A100-40GB" in capsys.readouterr().out
