"""Stages by themselves: stamps, checkpoints of every form, conversion, a finished training."""

import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
from composed import load_config

from igrpo_nemo.chain.checkpoints import Form, find_checkpoint
from igrpo_nemo.chain.conversion import (
    check_convertible,
    conversion_command,
    convert,
    find_converter,
    is_converted,
    missing_files,
)
from igrpo_nemo.chain.experiment import is_trained, training_inputs
from igrpo_nemo.chain.script import exit_code, overrides_of
from igrpo_nemo.errors import UserError

# Stands in for NeMo-RL's converters: the same arguments, a tiny Hugging Face folder.
CONVERTER = """\
import argparse, json, pathlib, sys
parser = argparse.ArgumentParser()
for name in ("--config", "--megatron-ckpt-path", "--dcp-ckpt-path", "--hf-ckpt-path"):
    parser.add_argument(name)
flags = parser.parse_args()
assert pathlib.Path(flags.config).is_file()
out = pathlib.Path(flags.hf_ckpt_path)
assert not out.exists(), "the real one refuses a folder that exists"
out.mkdir(parents=True)
(out / "config.json").write_text("{}")
if "broken" in flags.config:
    sys.exit(3)
shards = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
(out / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
for name in shards.values():
    if not ("short" in flags.config and name == "model-2.safetensors"):
        (out / name).write_text(flags.megatron_ckpt_path or flags.dcp_ckpt_path)
(out / "tokenizer.json").write_text("the base model's")
"""


def hugging_face(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_text("weights")
    return folder


def finished_run(run: Path, *, metric: str = "val:accuracy") -> Path:
    run.mkdir(parents=True, exist_ok=True)
    config = f"checkpointing: {{metric_name: '{metric}', higher_is_better: true}}\n"
    (run / "config.yaml").write_text(config)
    (run / "finished").touch()
    return run


def megatron_step(run: Path, step: int, *, accuracy: float | None = None) -> Path:
    folder = run / "checkpoints" / f"step_{step}"
    (folder / "policy" / "weights" / "iter_0000000").mkdir(parents=True)
    (folder / "policy" / "tokenizer").mkdir()
    (folder / "policy" / "tokenizer" / "tokenizer.json").write_text("as it was trained with")
    (folder / "config.yaml").write_text("policy: {}\n")
    info = {} if accuracy is None else {"val:accuracy": accuracy}
    (folder / "training_info.json").write_text(json.dumps(info))
    return folder


@pytest.fixture
def nemo_rl(tmp_path, monkeypatch):
    """A stand-in for NeMo-RL's source tree."""
    scripts = tmp_path / "nemo-rl" / "examples" / "converters"
    scripts.mkdir(parents=True)
    for name in ("convert_megatron_to_hf.py", "convert_dcp_to_hf.py"):
        (scripts / name).write_text(CONVERTER)
    monkeypatch.setenv("NEMO_RL_SRC", str(tmp_path / "nemo-rl"))
    return tmp_path / "nemo-rl"


def test_a_stamp_keeps_its_result_and_names_what_changed(tmp_path):
    run = finished_run(tmp_path / "run")
    config = "grpo: {seed: 1}\nigrpo: {train_stages: [refine]}\n"
    (run / "config.yaml").write_text(config)
    hugging_face(run / "checkpoints" / "step_7" / "model")
    assert not is_converted(run, "last")  # nothing was made yet
    made = convert(run, "last")
    assert is_converted(run, "last")
    (run / "config.yaml").write_text(config.replace("1", "2"))  # trained anew, in the same folder
    with pytest.raises(UserError, match="was made with grpo.seed=1, now it is 2: remove"):
        convert(run, "last")
    (run / "config.yaml").write_text(f"{config}a: 3\nb: 2\n")
    with pytest.raises(UserError, match="a=None, now it is 3"):
        is_converted(run, "last")
    (run / "hf" / "last").unlink()
    assert not is_converted(run, "last")  # its result was removed
    assert convert(run, "last") == made
    for broken in ("{", "[]"):
        (run / "stages" / "convert-last.json").write_text(broken)
        with pytest.raises(UserError, match="is no stamp of a stage"):
            convert(run, "last")


def test_checkpoints_of_both_engines_are_found(tmp_path):
    embedded = finished_run(tmp_path / "embedded")
    hugging_face(embedded / "checkpoints" / "step_00000005" / "model")
    found = find_checkpoint(embedded, "last")
    assert (found.step, found.form) == (5, Form.HUGGING_FACE)
    assert found.weights == embedded / "checkpoints" / "step_00000005" / "model"

    run = finished_run(tmp_path / "nemo")
    for step, accuracy in ((10, 0.5), (20, 0.7), (30, 0.6)):
        megatron_step(run, step, accuracy=accuracy)
    (run / "checkpoints" / "tmp_step_40").mkdir()
    assert find_checkpoint(run, "last").step == 30
    assert find_checkpoint(run, "best").step == 20
    found = find_checkpoint(run, "10")
    assert (found.form, found.weights.name) == (Form.MEGATRON, "iter_0000000")
    with pytest.raises(UserError, match="no checkpoint 40: give last, best or one of 10, 20, 30"):
        find_checkpoint(run, "40")


def test_forms_of_dtensor_checkpoints(tmp_path):
    run = finished_run(tmp_path / "run")
    weights = run / "checkpoints" / "step_1" / "policy" / "weights"
    (weights / "model").mkdir(parents=True)
    with pytest.raises(UserError, match="no weights in a known form"):
        find_checkpoint(run, "last")
    (weights / "model" / "shard-1.safetensors").touch()
    with pytest.raises(UserError, match="checkpointing.save_consolidated=true"):
        find_checkpoint(run, "last")
    (weights / "model" / ".metadata").touch()
    assert find_checkpoint(run, "last").form is Form.DCP
    hugging_face(weights / "model" / "consolidated")
    found = find_checkpoint(run, "last")
    assert (found.form, found.weights.name) == (Form.HUGGING_FACE, "consolidated")


def test_a_run_without_checkpoints_or_metrics_says_so(tmp_path):
    with pytest.raises(UserError, match="is no run folder"):
        find_checkpoint(tmp_path, "last")
    run = finished_run(tmp_path / "run")
    with pytest.raises(UserError, match="has no checkpoint: train first"):
        find_checkpoint(run, "last")
    megatron_step(run, 1)
    with pytest.raises(UserError, match="no checkpoint of .* has val:accuracy"):
        find_checkpoint(run, "best")


def test_a_hugging_face_checkpoint_is_linked(tmp_path):
    run = finished_run(tmp_path / "run")
    hugging_face(run / "checkpoints" / "step_00000002" / "model")
    made = convert(run, "last")
    assert made == {"step": 2, "form": "Hugging Face"}
    assert (run / "hf" / "last").is_symlink()
    assert (run / "hf" / "last" / "model.safetensors").read_text() == "weights"
    moved = run.rename(tmp_path / "elsewhere")
    assert (moved / "hf" / "last" / "config.json").is_file()  # the link is relative
    assert convert(moved, "last") == made


def test_nemo_rl_converts_once_with_the_trained_tokenizer(tmp_path, nemo_rl, capfd):
    run = finished_run(tmp_path / "run")
    megatron_step(run, 4)
    made = convert(run, "last", python=sys.executable)
    assert made == {"step": 4, "form": "Megatron-Core"}
    model = run / "hf" / "last"
    assert (model / "tokenizer.json").read_text() == "as it was trained with"
    assert (model / "model-1.safetensors").read_text().endswith("policy/weights/iter_0000000")
    assert is_converted(run, "last")
    (nemo_rl / "examples" / "converters" / "convert_megatron_to_hf.py").write_text("exit(9)")
    assert convert(run, "last", python=sys.executable) == made
    megatron_step(run, 8)
    with pytest.raises(UserError, match="checkpoint.step=4, now it is 8: remove"):
        convert(run, "last", python=sys.executable)
    assert "convert_megatron_to_hf.py --config" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("name", "words"),
    [("broken", "converter ended with exit code 3"), ("short", "without model-2.safetensors")],
)
def test_a_failed_conversion_leaves_no_model_and_is_repeated(tmp_path, nemo_rl, name, words):
    run = finished_run(tmp_path / name)
    folder = megatron_step(run, 4)
    for _ in range(2):
        with pytest.raises(UserError, match=words):
            convert(run, "last", python=sys.executable)
        assert not (run / "hf" / "last").exists()
    folder.parent.parent.rename(tmp_path / "run")
    assert convert(tmp_path / "run", "last", python=sys.executable)["step"] == 4


def test_two_conversions_at_once_do_not_write_one_folder(tmp_path, nemo_rl):
    run = finished_run(tmp_path / "run")
    megatron_step(run, 4)
    script = nemo_rl / "examples" / "converters" / "convert_megatron_to_hf.py"
    at_work = (
        "import pathlib, time\n"
        f"pathlib.Path({str(tmp_path / 'started')!r}).touch()\n"
        "end = time.monotonic() + 60\n"
        f"go = pathlib.Path({str(tmp_path / 'go')!r})\n"
        "while not go.exists() and time.monotonic() < end: time.sleep(0.01)\n"
    )
    script.write_text(at_work + CONVERTER)
    call = (
        "import pathlib, sys; from igrpo_nemo.chain.conversion import convert; "
        "convert(pathlib.Path(sys.argv[1]), 'last', python=sys.executable)"
    )
    first = subprocess.Popen([sys.executable, "-c", call, str(run)])
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "started").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        script.write_text(CONVERTER)
        busy = rf"hf is being written by pid {first.pid} on .*: wait until that conversion ends$"
        with pytest.raises(UserError, match=busy):
            convert(run, "last", python=sys.executable)
        (tmp_path / "go").touch()
        assert first.wait(timeout=60) == 0
    finally:
        first.kill()
    assert missing_files(run / "hf" / "last") == []
    assert convert(run, "last")["step"] == 4


def test_an_unfinished_run_is_converted_by_the_number_of_a_step_alone(tmp_path):
    run = finished_run(tmp_path / "run")
    hugging_face(run / "checkpoints" / "step_2" / "model")
    (run / "finished").unlink()
    with pytest.raises(UserError, match="is not finished"):
        convert(run, "last")
    assert convert(run, "2")["step"] == 2
    assert (run / "hf" / "2").is_symlink()


def test_commands_of_nemo_rls_converters(tmp_path):
    run = finished_run(tmp_path / "run")
    folder = megatron_step(run, 4).resolve()
    checkpoint = find_checkpoint(run, "last")
    command = conversion_command(checkpoint, tmp_path / "out", Path("/opt/nemo-rl"))
    assert shlex.join(command) == (
        "/opt/nemo-rl/examples/converters/convert_megatron_to_hf.py "
        f"--config {folder}/config.yaml --megatron-ckpt-path {folder}/policy/weights/iter_0000000 "
        f"--hf-ckpt-path {tmp_path}/out"
    )
    sharded = conversion_command(checkpoint, tmp_path / "out", Path("/opt/nemo-rl"), gpus=8)
    assert "--nproc_per_node=8" in sharded and sharded[-2:] == ["--tp", "8"]
    assert sharded[4].endswith("convert_megatron_to_hf_gpu.py")


def test_the_arguments_are_those_of_the_real_converters():
    """Every flag of the commands above is one that NeMo-RL's scripts define."""
    scripts = Path.home() / ".cache/igrpo-nemo/nemo-rl-0.7.0/examples/converters"
    if not scripts.is_dir():
        pytest.skip(f"NeMo-RL's source is not at {scripts}")
    flags = {
        "convert_megatron_to_hf.py": {"--config", "--megatron-ckpt-path", "--hf-ckpt-path"},
        "convert_megatron_to_hf_gpu.py": {"--megatron-ckpt-path", "--tp", "--hf-ckpt-path"},
        "convert_dcp_to_hf.py": {"--config", "--dcp-ckpt-path", "--hf-ckpt-path"},
    }
    for name, wanted in flags.items():
        text = (scripts / name).read_text()
        assert all(f'"{flag}"' in text for flag in wanted), name


def test_without_nemo_rl_the_conversion_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("NEMO_RL_SRC", str(tmp_path))
    monkeypatch.setattr("igrpo_nemo.chain.conversion.IMAGE_ROOT", tmp_path / "none")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="set NEMO_RL_SRC"):
        find_converter(Form.MEGATRON)


def test_the_interpreter_with_megatron_is_that_of_nemo_rls_workers(tmp_path, nemo_rl, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("shutil.which", lambda name: "/bin/uv")
    uv = ("uv", "run", "--extra", "mcore", "python")
    assert find_converter(Form.MEGATRON) == (nemo_rl, uv)
    assert find_converter(Form.DCP) == (nemo_rl, ("uv", "run", "python"))
    name = "nemo_rl.models.policy.workers.megatron_policy_worker.MegatronPolicyWorker"
    worker = tmp_path / "venvs" / name / "bin" / "python"
    worker.parent.mkdir(parents=True)
    worker.touch()
    monkeypatch.setenv("NEMO_RL_VENV_DIR", str(tmp_path / "venvs"))
    assert find_converter(Form.MEGATRON) == (nemo_rl, (str(worker),))


def test_dtensor_checkpoints_that_nothing_converts_are_refused_before_training():
    words = ["engine=nemo_rl", "policy.model_name=none", "policy.megatron_cfg.enabled=false"]
    dtensor = "policy.dtensor_cfg={enabled: true, _v2: true}"
    shards = load_config([*words, dtensor, "checkpointing.save_consolidated=false"])
    with pytest.raises(UserError, match="checkpointing.save_consolidated=true"):
        check_convertible(shards)
    check_convertible(load_config([*words, dtensor, "checkpointing.save_consolidated=true"]))
    check_convertible(load_config(["engine=nemo_rl", "policy.model_name=none"]))


def test_missing_files_names_shards(tmp_path):
    folder = hugging_face(tmp_path / "m")
    assert missing_files(folder) == []
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "x.safetensors"}}')
    assert missing_files(folder) == ["x.safetensors"]
    assert missing_files(tmp_path) == ["config.json or weights"]


DEMO = ("experiment=demo", "grpo.max_num_steps=4")


def trained(run: Path, *words: str):
    """A config whose run folder looks finished."""
    config = load_config([*DEMO, f"logger.log_dir={run}", *words])
    run.mkdir()
    (run / "config.yaml").write_text(config.to_yaml())
    (run / "finished").write_text("4\n")
    return config


def demo(run: Path, *words: str):
    return load_config([*DEMO, f"logger.log_dir={run}", *words])


@pytest.mark.parametrize("model", ["demo", "hf"])
def test_a_finished_training_is_known_by_its_settings(tmp_path, model):
    run = tmp_path / "run"
    words = [] if model == "demo" else ["model=hf", "policy.model_name=/models/a"]
    assert is_trained(demo(run, *words)) is False
    config = trained(run, *words)
    assert is_trained(demo(run, *words)) is True
    if model == "demo":  # as NeMo-RL's engines store it
        config = config.replaced("policy", model_name="/cache/model")
        (run / "config.yaml").write_text(config.to_yaml())
    free = ["logger.tensorboard_enabled=false", "igrpo.evaluation.temperature=1.0"]
    assert is_trained(demo(run, *words, *free)) is True
    assert is_trained(demo(run, *words, "grpo.max_num_steps=6")) is False  # it goes on
    with pytest.raises(UserError, match="a run with grpo.max_num_steps=4, this one has 3"):
        is_trained(demo(run, *words, "grpo.max_num_steps=3"))
    with pytest.raises(UserError, match="a run with policy.max_grad_norm=1.0, this one has 2.0"):
        is_trained(demo(run, *words, "policy.max_grad_norm=2.0"))
    if model == "hf":
        other = "policy.model_name='/models/a', this one has '/models/b'"
        with pytest.raises(UserError, match=other):
            is_trained(demo(run, "model=hf", "policy.model_name=/models/b"))
    (run / "finished").unlink()
    assert is_trained(demo(run, *words)) is False


def test_training_inputs_are_what_shapes_the_weights():
    first = training_inputs(load_config(["experiment=demo"]).to_dict())
    assert {"grpo.max_num_steps", "grpo.seed", "igrpo.feedback", "policy.max_grad_norm"} <= set(
        first
    )
    assert not [key for key in first if key.startswith(("logger.", "igrpo.site", "cluster."))]
    again = load_config(["experiment=demo", "eval=all_64", "igrpo.site.account=me"])
    assert training_inputs(again.to_dict()) == first


def test_words_and_errors_of_the_scripts(capsys):
    assert overrides_of(["a=1", "~b", "+c=2"]) == ["a=1", "~b", "+c=2"]
    with pytest.raises(UserError, match="unknown flag --temperature"):
        overrides_of(["--temperature=1"])
    with pytest.raises(UserError, match="cannot read the override 'demo'"):
        overrides_of(["demo"])

    def fails(words):
        raise UserError("one\nline")

    def stopped(words):
        raise KeyboardInterrupt

    assert exit_code(fails, []) == 2
    assert capsys.readouterr().err == "error: one line\n"
    assert exit_code(stopped, []) == 130
