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

from igrpo_nemo import __version__
from igrpo_nemo.cli import main
from igrpo_nemo.cli.entry import COMMANDS
from igrpo_nemo.config import Config, RolloutBudget, load_config
from igrpo_nemo.errors import UserError
from igrpo_nemo.evaluation.refine import Refinement

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


def run_process(*arguments: str) -> subprocess.CompletedProcess[str]:
    code = "import sys; from igrpo_nemo.cli import main; sys.exit(main())"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60
    )


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("error: ")
    return line


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"igrpo-nemo {__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_help_lists_the_commands(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 0
    text = capsys.readouterr().out
    for command in COMMANDS:
        assert f"{command.name} " in text and command.help in text
    assert "igrpo train experiment=demo" in text


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_help_of_each_command_has_examples(
    command: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command.name, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"  igrpo {command.name}" in text and f"usage: igrpo {command.name}" in text


def test_dry_run_prints_config_and_budget(capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["experiment=demo", "grpo.max_num_steps=5"]
    assert main(["train", overrides[0], "--dry-run", overrides[1]]) == 0
    text = capsys.readouterr().out
    config = load_config(overrides)
    assert yaml.safe_load(text) == config.to_dict()
    for line in RolloutBudget.of(config).lines():
        assert f"#   {line}\n" in text
    assert "steps: 5, optimizer updates: 5" in text
    assert "not read by engine local" not in text


def test_dry_run_names_keys_that_the_engine_does_not_read(
    capsys: pytest.CaptureFixture[str],
) -> None:
    key = "policy.megatron_cfg.tensor_model_parallel_size=4"
    assert main(["train", "experiment=demo", key, "--dry-run"]) == 0
    assert "# not read by engine local: policy.megatron_cfg\n" in capsys.readouterr().out


def test_dry_run_takes_a_config_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - demo\n  - _self_\ngrpo:\n  max_num_steps: 7\n"
    )
    flags = ["--config-dir", str(tmp_path), "--dry-run"]
    assert main(["train", *flags, "experiment=mine"]) == 0
    assert "steps: 7," in capsys.readouterr().out


def test_the_package_alone_imports_nothing() -> None:
    """A verifier's process imports it, and so does every command."""
    code = "import sys; had = set(sys.modules); import igrpo_nemo; print(*set(sys.modules) - had)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["igrpo_nemo"]


HEAVY = "torch ray transformers datasets nemo_rl"


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("code = 0", f"{HEAVY} hydra pydantic numpy"),
        ("import igrpo_nemo; igrpo_nemo.train; code = 0", f"{HEAVY} hydra pydantic numpy"),
        ("code = main(['train', 'experiment=demo', '--dry-run'])", HEAVY),
        ("code = main(['preflight', 'experiment=tableS3_igrpo'])", HEAVY),
    ],
)
def test_what_is_quick_imports_nothing_heavy(code: str, absent: str) -> None:
    code = (
        f"import sys; from igrpo_nemo.cli import main; {code};"
        f"heavy = set({absent.split()}) & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("code", [0, 75])
def test_train_returns_the_trainers_code(code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Config] = []

    def train(config: Config) -> int:
        seen.append(config)
        return code

    replace_module(monkeypatch, "igrpo_nemo.local.trainer", train=train)
    assert main(["train", "experiment=demo", "grpo.seed=7", "igrpo.threads=1"]) == code
    assert seen == [load_config(["experiment=demo", "grpo.seed=7", "igrpo.threads=1"])]
    assert (os.environ["OMP_WAIT_POLICY"], os.environ["OMP_NUM_THREADS"]) == ("PASSIVE", "1")


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("the data\nhas gone"), 2, "error: the data has gone"),
        (RuntimeError("a\n b"), 1, "error: RuntimeError: a b (--traceback shows where)"),
        (KeyboardInterrupt(), 130, "error: interrupted"),
    ],
)
def test_errors_of_the_trainer_become_one_line(
    error: BaseException,
    code: int,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def train(config: Config) -> int:
        raise error

    replace_module(monkeypatch, "igrpo_nemo.local.trainer", train=train)
    assert main(["train", "experiment=demo"]) == code
    assert error_line(capsys) == line


@pytest.mark.parametrize("arguments", [["train", "--traceback"], ["--traceback", "train"]])
def test_traceback_is_shown_when_asked_for(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "experiment=nope"]) == 2
    text = capsys.readouterr().err
    assert "Traceback (most recent call last)" in text
    assert text.splitlines()[-1].startswith("error: experiment=nope does not exist: use laptop, ")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["train"], "policy.model_name is not set"),
        (["train", "experiment=demo", "grpo.sed=1"], "did you mean grpo.seed?"),
        (["train", "experiment=demo", "igrpo.num_drafts=5"], "igrpo.budget=8"),
        (["train", "experiment=demo", "seed"], "cannot read the override 'seed'"),
        (["train", "--dryrun"], "unknown flag --dryrun: did you mean --dry-run?"),
        (["train", "--zzz=1"], "unknown flag --zzz: `igrpo train --help` lists the flags"),
        (["trian"], "invalid choice: 'trian'"),
        (["evaluate"], "are required: --model; `igrpo evaluate --help` shows what works"),
        (["evaluate", "--model", "x", "--samples", "0"], "argument --samples: 0 is less than 1"),
        (["report"], "igrpo report needs a run or evaluation folder"),
        (["report", "no/such/folder"], "no/such/folder"),
        (["keys", "igrpo.schedul"], "did you mean igrpo.schedule?"),
    ],
)
def test_bad_command_lines(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert expected in error_line(capsys)


def test_bad_input_shows_no_traceback_in_a_process() -> None:
    done = run_process("train", "experiment=demo", "grpo.max_num_stps=3")
    expected = "error: unknown key grpo.max_num_stps: did you mean grpo.max_num_steps?\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", expected)


def test_a_closed_pipe_is_quiet() -> None:
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


def test_warnings_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def train(config: Config) -> int:
        warnings.warn("step_3 is torn:\nusing step_2", UserWarning, stacklevel=1)
        return 0

    replace_module(monkeypatch, "igrpo_nemo.local.trainer", train=train)
    assert main(["train", "experiment=demo"]) == 0
    assert capsys.readouterr().err == "warning: step_3 is torn: using step_2\n"


def test_evaluate_passes_its_flags(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
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
    assert settings == {
        "num_samples": 3,
        "batch_size": 256,
        "temperature": 0.0,
        "top_p": 1.0,
        "max_tokens": 9,
        "data": "aime24",
        "out": Path("results"),
        "limit": 5,
        "seed": 4,
        "refinement": Refinement(2, "majority"),
    }


def test_evaluate_uses_the_config_of_the_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
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


def test_report_passes_folders_and_output(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[tuple[list[Path], Path | None, bool]] = []

    def build_report(run_dirs: list[Path], out: Path | None, *, anyway: bool) -> Path:
        calls.append((run_dirs, out, anyway))
        return Path("page.html")

    replace_module(monkeypatch, "igrpo_nemo.report.page", build_report=build_report)
    assert main(["report", "runs/a", "--out", "page.html", "runs/b"]) == 0
    assert calls == [([Path("runs/a"), Path("runs/b")], Path("page.html"), False)]
    assert capsys.readouterr().out == "page.html\n"


def test_keys_lists_descriptions(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys", "igrpo.schedule", "grpo.seed"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert lines[-1].split(maxsplit=1) == ["grpo.seed", "Seed of everything random. (default 42)"]


@pytest.mark.parametrize(
    ("key", "end"),
    [
        ("igrpo.draft_truncation", "too long. (tail, head_tail; default tail)"),
        ("igrpo.train_stages", 'paper\'s. (draft, refine; default ["refine"])'),
        ("igrpo.draft_prefetch", "one update behind. (off, fused; default off)"),
        ("igrpo.updates_per_rollout", "(default null)"),
        ("igrpo.architecture.model_type", "Family. (qwen2, llama, nemotron_h)"),
        ("igrpo.prompt.system", "empty is none."),
        ("policy.model_name", "describes a built-in one."),
        ("policy.tokenizer.name", "name of the tokenizer."),
        ("grpo.async_grpo", "..."),
    ],
)
def test_keys_say_what_they_take_and_their_default(
    key: str, end: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["keys", key]) == 0
    assert capsys.readouterr().out.rstrip().endswith(end)


def test_all_keys_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys"]) == 0
    assert len(capsys.readouterr().out.splitlines()) > 150


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("launch", 'profile=$(igrpo launch --env a100_5x8) && eval "$profile" && sbatch slurm/'),
        ("evaluate", "runs/demo/checkpoints/step_00000100"),
        ("report", "runs/demo/evaluation/step_00000100"),
        ("score", "FILE without .jsonl, plus .verdicts.jsonl"),
    ],
)
def test_help_shows_what_works(command: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    assert said in " ".join(capsys.readouterr().out.split())
