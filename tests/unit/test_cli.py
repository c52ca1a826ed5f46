"""The command line: subcommands, exit codes, one-line errors, and what it does not import."""

from __future__ import annotations

import os
import subprocess
import sys
import types
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml
from cases import cases

from igrpo_nemo import __version__
from igrpo_nemo.cli import main
from igrpo_nemo.cli.entry import COMMANDS
from igrpo_nemo.config import Config, RolloutBudget, load_config
from igrpo_nemo.errors import UserError
from igrpo_nemo.evaluation.refine import Refinement

CASES = cases(__file__)

Stub = Callable[..., Any]


@pytest.fixture(autouse=True)
def _restored_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """`igrpo train` sets thread variables for the process it runs in."""
    for name in ("OMP_WAIT_POLICY", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
        monkeypatch.delenv(name)


def replace_module(monkeypatch: pytest.MonkeyPatch, name: str, **functions: Stub) -> None:
    """Puts an engine's place holder where a command imports the engine from."""
    module = types.ModuleType(name)
    for function, body in functions.items():
        setattr(module, function, body)
    monkeypatch.setitem(sys.modules, name, module)


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("error: ")
    return line


def test_help_and_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"igrpo-nemo {__version__}\n"
    for arguments in ([], ["--help"]):
        assert main(arguments) == 0
        text = capsys.readouterr().out
        assert all(f"{each.name} " in text and each.help in text for each in COMMANDS)
        assert "igrpo train experiment=demo" in text
    for command in COMMANDS:
        assert main([command.name, "--help"]) == 0
        text = capsys.readouterr().out
        assert f"  igrpo {command.name}" in text and f"usage: igrpo {command.name}" in text


@pytest.mark.parametrize(("command", "said"), CASES["help"])
def test_help_shows_what_works(command, said, capsys):
    assert main([command, "--help"]) == 0
    assert said in " ".join(capsys.readouterr().out.split())


def test_dry_run_prints_config_and_budget(capsys):
    overrides = ["experiment=demo", "grpo.max_num_steps=5"]
    assert main(["train", overrides[0], "--dry-run", overrides[1]]) == 0
    text = capsys.readouterr().out
    config = load_config(overrides)
    assert yaml.safe_load(text) == config.to_dict()
    for line in RolloutBudget(config).lines():
        assert f"#   {line}\n" in text
    assert "steps: 5, optimizer updates: 5" in text
    assert "not read by engine local" not in text
    key = "policy.megatron_cfg.tensor_model_parallel_size=4"
    assert main(["train", "experiment=demo", key, "--dry-run"]) == 0
    assert "# not read by engine local: policy.megatron_cfg\n" in capsys.readouterr().out


def test_dry_run_takes_a_config_folder(tmp_path, capsys):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - demo\n  - _self_\ngrpo:\n  max_num_steps: 7\n"
    )
    flags = ["--config-dir", str(tmp_path), "--dry-run"]
    assert main(["train", *flags, "experiment=mine"]) == 0
    assert "steps: 7," in capsys.readouterr().out


HEAVY = "torch ray transformers datasets nemo_rl wandb mlflow"


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("code = 0", f"{HEAVY} hydra pydantic numpy"),
        ("import igrpo_nemo; igrpo_nemo.train; code = 0", f"{HEAVY} hydra pydantic numpy"),
        ("import igrpo_nemo.metrics, igrpo_nemo.tracking; code = 0", HEAVY),
        ("code = main(['train', 'experiment=demo', '--dry-run'])", HEAVY),
        ("code = main(['preflight', 'experiment=tableS3_igrpo'])", HEAVY),
    ],
)
def test_what_is_quick_imports_nothing_heavy(code, absent):
    """The package alone imports nothing: verifiers' processes do it, and every command."""
    code = (
        "import sys; had = set(sys.modules); import igrpo_nemo;"
        "more = set(sys.modules) - had; assert more == {'igrpo_nemo'}, more;"
        f"from igrpo_nemo.cli import main; {code};"
        f"heavy = set({absent.split()}) & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("code", [0, 75])
def test_train_returns_the_trainers_code(code, monkeypatch, capsys):
    seen: list[Config] = []

    def train(config: Config) -> int:
        seen.append(config)
        warnings.warn("step_3 is torn:\nusing step_2", UserWarning, stacklevel=1)
        return code

    replace_module(monkeypatch, "igrpo_nemo.local.trainer", train=train)
    assert main(["train", "experiment=demo", "grpo.seed=7", "igrpo.threads=1"]) == code
    assert seen == [load_config(["experiment=demo", "grpo.seed=7", "igrpo.threads=1"])]
    assert (os.environ["OMP_WAIT_POLICY"], os.environ["OMP_NUM_THREADS"]) == ("PASSIVE", "1")
    assert capsys.readouterr().err == "warning: step_3 is torn: using step_2\n"


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("the data\nhas gone"), 2, "error: the data has gone"),
        (RuntimeError("a\n b"), 1, "error: RuntimeError: a b (--traceback shows where)"),
        (KeyboardInterrupt(), 130, "error: interrupted"),
    ],
)
def test_errors_of_the_trainer_become_one_line(error, code, line, monkeypatch, capsys):
    def train(config: Config) -> int:
        raise error

    replace_module(monkeypatch, "igrpo_nemo.local.trainer", train=train)
    assert main(["train", "experiment=demo"]) == code
    assert error_line(capsys) == line


@pytest.mark.parametrize("arguments", [["train", "--traceback"], ["--traceback", "train"]])
def test_traceback_is_shown_when_asked_for(arguments, capsys):
    assert main([*arguments, "experiment=nope"]) == 2
    text = capsys.readouterr().err
    assert "Traceback (most recent call last)" in text
    assert text.splitlines()[-1].startswith("error: experiment=nope does not exist: use laptop, ")


@pytest.mark.parametrize(("arguments", "expected"), CASES["bad_command_lines"])
def test_bad_command_lines(arguments, expected, capsys):
    assert main(arguments) == 2
    assert expected in error_line(capsys)


def test_a_closed_pipe_is_quiet():
    code = "import sys; from igrpo_nemo.cli import main; sys.exit(main())"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "train", "experiment=demo", "--dry-run"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(60) == 141


def test_evaluate_passes_its_flags(monkeypatch, capsys, tmp_path):
    calls: list[tuple[Config, Path, dict[str, Any]]] = []

    def evaluate(config: Config, model: Path, sampling: Any, **settings: Any) -> str:
        calls.append((config, model, asdict(sampling) | settings))
        return "a table"

    monkeypatch.setattr("igrpo_nemo.evaluation.embedded.evaluate", evaluate)
    flags = "--samples 3 --temperature 0 --top-p 1 --max-tokens 9 --limit 5 --seed 4 --data aime24"
    flags += " --refine 2 --choose majority"
    arguments = [*flags.split(), "--out", "results", "prompt=short"]
    assert main(["evaluate", "--model", str(tmp_path), *arguments]) == 0
    ((config, model, settings),) = calls
    assert capsys.readouterr().out == "a table\n"
    assert model == tmp_path and config.policy.model_name == str(tmp_path)
    assert config.igrpo.prompt.system == "<think>...</think><answer>...</answer>"
    sampling = {"num_samples": 3, "temperature": 0.0, "top_p": 1.0, "max_tokens": 9, "seed": 4}
    others = {"batch_size": 256, "data": "aime24", "out": Path("results"), "limit": 5}
    assert settings == {**sampling, **others, "refinement": Refinement(2, "majority")}


def test_evaluate_uses_the_config_of_the_run(monkeypatch, tmp_path):
    seen: list[Config] = []
    monkeypatch.setattr(
        "igrpo_nemo.evaluation.embedded.evaluate", lambda config, *_, **__: seen.append(config)
    )
    (tmp_path / "config.yaml").write_text(load_config(["experiment=demo", "grpo.seed=7"]).to_yaml())
    model = tmp_path / "checkpoints" / "step_10" / "model"
    model.mkdir(parents=True)
    assert main(["evaluate", "--model", str(model), "igrpo.validation.top_p=1.0"]) == 0
    assert seen[0].grpo.seed == 7 and seen[0].igrpo.validation.top_p == 1.0
    assert seen[0].data.train.dataset_name == "arithmetic"


def test_report_passes_folders_and_output(monkeypatch, capsys):
    calls: list[tuple[list[Path], Path | None, bool]] = []

    def build_report(run_dirs: list[Path], out: Path | None, *, anyway: bool) -> Path:
        calls.append((run_dirs, out, anyway))
        return Path("page.html")

    replace_module(monkeypatch, "igrpo_nemo.report.page", build_report=build_report)
    assert main(["report", "runs/a", "--out", "page.html", "runs/b"]) == 0
    assert calls == [([Path("runs/a"), Path("runs/b")], Path("page.html"), False)]
    assert capsys.readouterr().out == "page.html\n"


@pytest.mark.parametrize(("key", "end"), CASES["keys"])
def test_keys_say_what_they_take_and_their_default(key, end, capsys):
    assert main(["keys", key]) == 0
    assert capsys.readouterr().out.rstrip().endswith(end)
