"""`igrpo launch` against fake sbatch and squeue: what it submits, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
from cases import cases
from fake_slurm import squeue_line

from igrpo_nemo.cli import main
from igrpo_nemo.cluster import launch as launching
from igrpo_nemo.cluster.job import job_name
from igrpo_nemo.cluster.site import VARIABLES

CASES = cases(__file__)

TRAIN = "experiment=demo"


class Plan:
    def __init__(self, *problems: str) -> None:
        self.problems = list(problems)

    def text(self) -> str:
        return "memory 40 of 80 GB"


def set_preflight(monkeypatch: pytest.MonkeyPatch, *problems: str) -> list:
    """A preflight with this outcome; the configs that it sees."""
    seen = []
    monkeypatch.setattr(
        launching, "preflight", lambda config, environ: seen.append(config) or Plan(*problems)
    )
    return seen


@pytest.fixture(autouse=True)
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout that is the working folder, and a preflight that says yes."""
    folder = tmp_path / "checkout"
    (folder / "slurm").mkdir(parents=True)
    for name in ("train", "train_igrpo_7b", "evaluate"):
        (folder / "slurm" / f"{name}.sh").write_text(f"#!/bin/bash\n#SBATCH --nodes=1\n# {name}\n")
    monkeypatch.chdir(folder)
    for name in (*VARIABLES.values(), "WANDB_MODE"):
        monkeypatch.setenv(name, "")  # put back afterwards, whatever happens
        monkeypatch.delenv(name)
    set_preflight(monkeypatch)
    return folder


def launch(*words: str) -> int:
    return main(["launch", *words])


def test_it_submits_and_says_what_next(checkout, slurm, capsys, monkeypatch):
    seen = set_preflight(monkeypatch)
    (checkout / "cluster.local.yaml").write_text("account: mine\ntime: 12:00:00\n")
    monkeypatch.setenv("SBATCH_PARTITION", "long")
    assert launch(TRAIN, "grpo.seed=7") == 0
    run = checkout / "runs" / "demo"
    (call,) = slurm.calls("sbatch")
    assert call.folder == checkout and call.words[-3:] == ["slurm/train.sh", TRAIN, "grpo.seed=7"]
    options = {"--account=mine", "--partition=long", "--time=12:00:00", "--signal=B:USR1@900"}
    assert options <= set(call.words) and f"--job-name={job_name(run)}" in call.words
    assert f"--output={run}/slurm/%j.out" in call.words and (run / "slurm").is_dir()
    assert "SBATCH_PARTITION" not in call.environ
    assert seen[0].igrpo.site.account == "mine"
    assert capsys.readouterr().out.splitlines() == [
        f"submitted job 101 ({job_name(run)})",
        f"run folder: {run}",
        f"  igrpo status {run}",
        f"  tail -F {run}/slurm/101.out",
        "  scancel 101",
    ]


def test_a_named_script_is_found_from_anywhere_and_brings_its_experiment(checkout, slurm, capsys):
    (checkout / "elsewhere").mkdir()
    for name in ("slurm/train_igrpo_7b.sh", "train_igrpo_7b.sh", f"{checkout}/slurm/train.sh"):
        assert launch("--script", name, TRAIN) == 0
    scripts = [call.words[call.words.index(TRAIN) - 1] for call in slurm.calls("sbatch")]
    assert scripts == ["slurm/train_igrpo_7b.sh", "slurm/train_igrpo_7b.sh", "slurm/train.sh"]
    (checkout / "slurm" / "train_igrpo_7b.sh").write_text("#!/bin/bash\nEXPERIMENT=demo_grpo\n")
    capsys.readouterr()
    assert launch("--script", "slurm/train_igrpo_7b.sh", "grpo.seed=7") == 0
    assert launch("--script", "slurm/train_igrpo_7b.sh", "experiment=demo") == 0
    runs = [line for line in capsys.readouterr().out.splitlines() if line.startswith("run folder")]
    assert [Path(line).name for line in runs] == ["demo_grpo", "demo"]
    assert slurm.calls("sbatch")[3].words[-2:] == ["experiment=demo_grpo", "grpo.seed=7"]


@pytest.fixture
def elsewhere(tmp_path, monkeypatch) -> Path:
    """A working folder that is no checkout; the package lies in the folder that is returned."""
    package = tmp_path / "own" / "igrpo_nemo" / "cluster" / "job.py"
    monkeypatch.setattr("igrpo_nemo.cluster.job.__file__", str(package))
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path / "home")
    return tmp_path / "own"


def test_outside_of_a_checkout_it_works_in_its_own(elsewhere, capsys):
    assert launch(TRAIN) == 2
    assert "run igrpo launch in a checkout" in capsys.readouterr().err
    (elsewhere / "slurm").mkdir(parents=True)
    (elsewhere / "slurm" / "train.sh").write_text("#!/bin/bash\n")
    assert launch(TRAIN, "--dry-run") == 0
    text = capsys.readouterr().out
    assert f"cd {elsewhere}\n" in text and f"# run folder: {elsewhere}/runs/demo\n" in text


def test_the_preflight_refuses(slurm, monkeypatch, capsys):
    set_preflight(monkeypatch, "needs 90 GB\nof 80", "no validation")
    for flag in ([], ["--dry-run"]):
        assert launch(TRAIN, *flag) == 1
        assert capsys.readouterr().err.splitlines() == [
            "preflight: needs 90 GB of 80",
            "preflight: no validation",
            "error: the preflight says no, nothing was submitted",
        ]
    assert slurm.calls("sbatch") == []


def test_dry_run_prints_the_command_and_the_script(checkout, no_slurm, capsys):
    assert launch(TRAIN, "--dry-run", "data.train.data_path='a b'") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "# memory 40 of 80 GB" and f"cd {checkout}" in lines
    (command,) = [line for line in lines if line.startswith("sbatch ")]
    assert command.endswith(
        """ slurm/train.sh experiment=demo 'data.train.data_path='"'"'a b'"'"''"""
    )
    assert lines[-4:] == ["# slurm/train.sh", "#!/bin/bash", "#SBATCH --nodes=1", "# train"]
    assert not (checkout / "runs").exists()


SCRIPTS = sorted((Path(__file__).parents[2] / "slurm").glob("train_*.sh"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_the_shipped_scripts_pass_their_own_preflight(script, monkeypatch, capsys):
    """With the real preflight: their experiment exists, fits, and has the script's own shape."""
    monkeypatch.undo()
    monkeypatch.chdir(script.parents[1])
    for name in VARIABLES.values():
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("igrpo_nemo.cluster.site.LOCAL_PROFILE", "no such file")
    run = "logger.log_dir=runs/never"
    assert launch("--script", f"slurm/{script.name}", run, "--dry-run") == 0
    text = capsys.readouterr().out
    (command,) = [line for line in text.splitlines() if line.startswith("sbatch ")]
    lines = script.read_text().splitlines()
    for option in ("--nodes=", "--gpus-per-node="):
        (asked,) = [line for line in lines if line.startswith(f"#SBATCH {option}")]
        assert f" {asked.removeprefix('#SBATCH ')} " in command
    assert not (script.parents[1] / "runs" / "never").exists()


def test_a_chain_awaits_each_job(slurm, capsys):
    assert launch(TRAIN, "--dry-run", "--chain", "2") == 0
    one, two = [line for line in capsys.readouterr().out.splitlines() if line.startswith("JOB")]
    assert one.startswith("JOB1=$(sbatch --parsable ") and "--dependency=singleton" in one
    assert two.startswith("JOB2=$(") and " --dependency=afterok:$JOB1,singleton " in two
    assert launch(TRAIN, "--chain", "3") == 0
    assert [
        word.partition("=")[2]
        for call in slurm.calls("sbatch")
        for word in call.words
        if word.startswith("--dependency=")
    ] == ["singleton", "afterok:101,singleton", "afterok:102,singleton"]
    assert "submitted jobs 101 102 103 " in capsys.readouterr().out


def test_a_chain_that_breaks_off_names_what_is_queued(slurm, capsys):
    slurm.refuses("sbatch", "Batch job submission failed: limit", after=("101;cluster\n", "102\n"))
    assert launch(TRAIN, "--chain", "3") == 2
    assert capsys.readouterr().err == (
        "error: sbatch says: Batch job submission failed: limit; submitted before that: 101 102 "
        "(scancel 101 102 takes them back)\n"
    )


def test_one_job_of_a_run_at_a_time(checkout, slurm, capsys):
    name = job_name(checkout / "runs" / "demo")
    slurm.answers("squeue", squeue_line(7, "RUNNING", "other") + squeue_line(9, "PENDING", name))
    assert launch(TRAIN) == 2
    assert "runs/demo has a job already: 9 (PENDING); scancel it first" in capsys.readouterr().err
    assert slurm.calls("sbatch") == []
    assert launch(TRAIN, "--chain", "1") == 0
    assert "--dependency=afterok:9,singleton" in slurm.calls("sbatch")[0].words
    (checkout / "runs" / "demo" / "slurm" / "7-0").mkdir(parents=True)
    # A job submitted by hand counts by its logs.
    slurm.answers("squeue", squeue_line(7, "RUNNING", "igrpo-7b"))
    assert launch(TRAIN) == 2
    slurm.answers("squeue", squeue_line(7, "COMPLETED", "igrpo-7b"))
    assert launch(TRAIN) == 0


@pytest.mark.parametrize("flags", [[], ["--job-settings"]])
def test_a_finished_run_is_not_submitted_again_and_goes_on_for_more_steps(
    flags, checkout, slurm, capsys
):
    run = checkout / "runs" / "demo"
    run.mkdir(parents=True)
    (run / "finished").write_text("100\n")
    assert launch(*flags, TRAIN, "grpo.max_num_steps=200") == 0
    assert (run / "finished").exists(), "without a config there is nothing to compare with"
    (run / "config.yaml").write_text("grpo: {max_num_steps: 100, max_num_epochs: 1}\n")
    words = [TRAIN, "grpo.max_num_steps=100", "igrpo.site.account=a"]
    assert launch(*flags, *words) == 0 and (run / "finished").exists()
    assert flags or "is finished: nothing to submit" in capsys.readouterr().out
    assert slurm.calls("sbatch") == []
    assert launch(*flags, TRAIN, "grpo.max_num_steps=200") == 0
    assert not (run / "finished").exists()
    assert len(slurm.calls("sbatch")) == (0 if flags else 1)


def test_another_runs_folder_is_refused_before_the_queue(checkout, slurm, capsys):
    run = checkout / "runs" / "mine"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("grpo: {seed: 1}\n")
    assert launch("engine=nemo_rl", "cluster=a100_2x8", "policy.model_name=/m",
                  "logger.log_dir=runs/mine") == 2  # fmt: skip
    assert "runs/mine holds a run with" in capsys.readouterr().err
    assert slurm.calls("sbatch") == []


def test_an_evaluation_keeps_its_words_and_its_shape(checkout, slurm, capsys, monkeypatch):
    set_preflight(monkeypatch, "is not asked")
    words = ["--model", "runs/demo", "eval=all_64", "igrpo.site.account=mine"]
    assert launch("--script", "slurm/evaluate.sh", *words) == 0
    (call,) = slurm.calls("sbatch")
    assert call.words[-5:] == ["slurm/evaluate.sh", *words]
    assert "--account=mine" in call.words
    assert f"--output={checkout}/runs/evaluate/slurm/%j.out" in call.words
    options = ("--nodes", "--gpus-per-node", "--job-name", "--dependency")
    assert not [word for word in call.words if word.startswith(options)]
    assert capsys.readouterr().out.splitlines()[0] == "submitted job 101 (evaluate)"
    assert slurm.calls("squeue") == []


def test_without_slurm_one_line(no_slurm, capsys):
    assert launch(TRAIN) == 2
    assert "there is no squeue here: submit from a login node" in capsys.readouterr().err


def test_job_settings_read_the_profile(checkout, capsys, monkeypatch):
    (checkout / "cluster.local.yaml").write_text("env: {NCCL_DEBUG: WARN}\nhf_home: /from/file\n")
    monkeypatch.setenv("HF_HOME", "/from/shell")
    monkeypatch.setenv("HF_TOKEN", "hunter2-hunter2")
    assert launch("--job-settings", TRAIN) == 0
    text = capsys.readouterr().out
    assert "HF_HOME=/from/shell\n" in text and "NCCL_DEBUG=WARN\n" in text
    assert f"IGRPO_RUN_DIR={checkout}/runs/demo\n" in text and "hunter2" not in text
    # Of an evaluation's words the profile's alone: its engine would use one GPU at most.
    words = ["--model", "/m", "eval=all_64", "cluster=a100_1x8", "igrpo.site.offline=false"]
    assert launch("--script", "slurm/evaluate.sh", "--job-settings", *words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {"IGRPO_GPUS_PER_NODE=8", "HF_HUB_OFFLINE=0"} <= set(lines)
    assert f"IGRPO_RUN_DIR={checkout}/runs/evaluate" in lines


def test_env_prints_a_profile(checkout, capsys, monkeypatch):
    (checkout / "cluster.local.yaml").write_text("account: mine\npartition: short\n")
    monkeypatch.setenv("SBATCH_PARTITION", "long")
    assert launch("--env", "h100_2x8", "igrpo.site.time=04:00:00") == 0
    assert capsys.readouterr().out.splitlines() == [
        "export SBATCH_ACCOUNT=mine",
        "export SBATCH_PARTITION=long",
        "export SBATCH_TIMELIMIT=04:00:00",
        "export HF_HUB_OFFLINE=1",
        "export SBATCH_SIGNAL=B:USR1@900",
    ]


@pytest.mark.parametrize(("words", "expected"), CASES["bad_words"])
def test_bad_words(words, expected, slurm, capsys):
    assert launch(*words) == 2
    captured = capsys.readouterr()
    assert expected in captured.err and captured.out == ""
