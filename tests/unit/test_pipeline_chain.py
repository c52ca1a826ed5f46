"""A whole chain on this machine with the embedded engine, and the batch scripts of its stages."""

import csv
import runpy
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from igrpo_nemo.chain import here
from igrpo_nemo.chain.conversion import convert
from igrpo_nemo.chain.experiment import Experiment
from igrpo_nemo.chain.script import exit_code
from igrpo_nemo.cli import main
from igrpo_nemo.cluster.job import HOST_PATHS, StageJob, Surroundings, script_text
from igrpo_nemo.config import load_config
from igrpo_nemo.config.igrpo_keys import Site
from igrpo_nemo.errors import UserError
from igrpo_nemo.evaluation.skills.cluster import profile_for

pytestmark = pytest.mark.slow

CHECKOUT = Path(__file__).resolve().parents[2]
SMALL = (
    "experiment=demo",
    "igrpo.warmup.steps=10",
    "igrpo.warmup.batch_size=8",
    "igrpo.threads=1",
    "env.math.num_workers=0",
    "data.train.num_problems=16",
    "data.validation.num_problems=8",
    "grpo.num_prompts_per_step=2",
    "grpo.max_val_samples=8",
    "grpo.max_num_steps=2",
    "grpo.val_at_start=false",
    "grpo.val_period=0",
    "checkpointing.save_period=2",
)


SCRIPT = str(CHECKOUT / "pipelines" / "train_and_evaluate.py")
COMMAND = (*SMALL, "--evaluator", "igrpo", "--samples", "2")


def here_in_process(command: Sequence[str]) -> int:
    """`igrpo` without a process of its own; `test_pipeline_child` has what a process adds."""
    assert tuple(command[: len(here.IGRPO)]) == here.IGRPO
    return main(command[len(here.IGRPO) :])


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A working folder with a finished chain in runs/demo."""
    folder = tmp_path_factory.mktemp("chain")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        patch.setattr(here, "run_to_its_end", here_in_process)
        assert exit_code(runpy.run_path(SCRIPT)["main"], [*COMMAND]) == 0
    return folder


@pytest.fixture
def again(work, monkeypatch, capfd):
    """Another call in the same folder."""
    monkeypatch.chdir(work)
    monkeypatch.setenv("XDG_CACHE_HOME", str(work / "cache"))
    monkeypatch.setattr(here, "run_to_its_end", here_in_process)

    def call(*words: str, flags: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
        capfd.readouterr()
        code = exit_code(runpy.run_path(SCRIPT)["main"], [*COMMAND, *flags, *words])
        return subprocess.CompletedProcess(words, code, *capfd.readouterr())

    return call


def states(folder: Path) -> dict[str, int]:
    """When each file of the run was last written, but those of the comparison."""
    files = (path for path in (folder / "runs" / "demo").rglob("*") if path.is_file())
    return {str(path): path.stat().st_mtime_ns for path in files if "comparison" not in path.parts}


def test_chain_trains_evaluates_and_compares(work):
    run = work / "runs" / "demo"
    assert (run / "finished").is_file() and (run / "hf" / "last").is_symlink()
    (where,) = (run / "evaluation" / "last").glob("igrpo-*/eval-results/arithmetic")
    assert len((where / "output-rs1.jsonl").read_text().splitlines()) == 8
    assert "| demo " in (run / "comparison" / "comparison.md").read_text()
    rows = list(csv.DictReader((run / "comparison" / "comparison.csv").open()))
    quantities = {(row["quantity"], row["k"]) for row in rows}
    assert {("accuracy", ""), ("pass", "2"), ("majority", "2"), ("no_answer", "")} <= quantities
    assert "<svg" in (run / "comparison" / "report.html").read_text()


def test_a_second_call_repeats_nothing(work, again):
    before = states(work)
    done = again()
    assert done.returncode == 0, done.stderr
    assert "train: runs/demo is finished" in done.stdout
    assert "-n8 is complete" in done.stdout
    assert states(work) == before


def test_a_changed_setting_is_named_and_nothing_is_made(work, again):
    before = states(work)
    done = again("igrpo.num_drafts=3", "igrpo.num_refinements=5")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "a run with grpo.num_generations_per_prompt=4, this one has 5" in done.stderr
    shorter = again("grpo.max_num_steps=1")
    assert "a run with grpo.max_num_steps=2, this one has 1" in shorter.stderr
    assert states(work) == before


def test_another_temperature_gets_a_folder_of_its_own_and_is_not_compared_silently(work, again):
    hot = ("igrpo.evaluation.temperature=1.0",)
    (first,) = (work / "runs/demo/evaluation/last").glob("igrpo-*-t0.6-*")
    done = again(*hot, flags=("--against", f"cold={first}"))
    assert done.returncode == 2
    assert "differ in temperature (cold: 0.6, demo: 1.0)" in done.stderr
    done = again(*hot, flags=("--against", f"cold={first}", "--anyway"))
    assert done.returncode == 0, done.stderr
    assert "minus cold" in done.stdout and "temperature" in done.stdout


def test_refined_answers_join_the_comparison(work, again):
    done = again(flags=("--refine", "3"))
    assert done.returncode == 2 and "a run's own problems has 2 a problem" in done.stderr
    done = again(flags=("--refine", "2", "--choose", "majority"))
    assert done.returncode == 0, done.stderr
    assert "arithmetic, refined" in done.stdout and "minus demo" in done.stdout
    assert "refined from the best of 2 by majority" in done.stdout
    again()  # the comparison of the bare answers


def test_an_exported_model_is_the_chains(work, again):
    """Either may come first; `RUN/hf/last` is made once."""
    before = states(work)
    assert main(["export", "runs/demo", "--to", "exported"]) == 0
    convert(work / "runs" / "demo", "last")  # as of a checkpoint of NeMo-RL's
    assert again().returncode == 0 and states(work) == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--evaluator", "nemo_skills"], "NeMo-Skills is not found"),
        (["--samples", "0"], "argument --samples: 0 is less than 1"),
        (["--jobs", "-1"], "argument --jobs: -1 is less than 1"),
        (["--jobs", "x"], "argument --jobs: invalid number value: 'x'"),
    ],
)
def test_what_cannot_be_evaluated_is_said_before_the_training(
    flags, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    for name, value in {"IGRPO_CACHE_DIR": str(tmp_path), "PATH": "/nowhere"}.items():
        monkeypatch.setenv(name, value)
    for name in ("NEMO_SKILLS_ENV", "VENV"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(here, "run_to_its_end", lambda command: pytest.fail("it trains"))
    assert exit_code(runpy.run_path(SCRIPT)["main"], [*COMMAND, *flags]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "flag", "why"),
    [
        ("train", "--chain", "not between 1 and 100"),
        ("train_and_evaluate", "--chain", "not between 1 and 100"),
        ("evaluate", "--jobs", "less than 1"),
        ("convert", "--gpus", "less than 1"),
    ],
)
def test_numbers_of_the_scripts_are_checked(name, flag, why, capsys):
    path = str(CHECKOUT / "pipelines" / f"{name}.py")
    assert exit_code(runpy.run_path(path)["main"], [flag, "0"]) == 2
    assert f"argument {flag}: 0 is {why}" in capsys.readouterr().err


def test_dry_run_prints_the_stages_and_starts_nothing(again, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = again(flags=("--dry-run",))
    assert done.returncode == 0, done.stderr
    stages = [line.partition(":")[0] for line in done.stdout.splitlines()]
    assert stages == ["train", "convert", "evaluate", "compare"]
    assert not (tmp_path / "runs").exists()


def test_weights_are_told_apart_before_they_exist(tmp_path):
    def weights(*words, which="last"):
        words = ("experiment=demo", *words)
        return Experiment(words, load_config(words), tmp_path, which).weights()

    same = weights("logger.log_dir=elsewhere", "igrpo.evaluation.temperature=1.0")
    assert weights() == same
    others = {weights("grpo.max_num_steps=3"), weights("grpo.seed=3"), weights(which="best")}
    assert len(others | {same}) == 4


SITE = Site(
    gpu="a100_80gb",
    account="acme",
    partition="gpu",
    qos="high",
    container="nvcr.io#nvidia/nemo-rl:v0.7.0",
    mounts=["/lustre/data:/data:ro"],
    hf_home="/lustre/hf",
    sbatch=["--comment=ours"],
)
JOB = StageJob("convert", ("python", "pipelines/convert.py", "a=b c"), 1, "01:00:00", (7, 8))


def surroundings(site: Site) -> Surroundings:
    settings = {
        "IGRPO_CHECKPOINT_DIR": "/lustre/runs/demo/checkpoints",
        "HF_HOME": "/lustre/hf",
        "HF_HUB_OFFLINE": "1",
        "CONTAINER_IMAGE": "x",
        "VENV": "",
    }
    return Surroundings(site, Path("/home/me/igrpo"), Path("/lustre/runs/demo"), settings)


def test_stage_script_in_a_container():
    lines = script_text(JOB, surroundings(SITE)).splitlines()
    options = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH")]
    assert options[0].startswith("--job-name=igrpo-demo-") and options[0].endswith("-convert")
    assert options[1:] == [
        "--nodes=1",
        "--ntasks-per-node=1",
        "--gpus-per-node=1",
        "--exclusive",
        "--mem=0",
        "--time=01:00:00",
        "--requeue",
        "--account=acme",
        "--partition=gpu",
        "--qos=high",
        "--output=/lustre/runs/demo/slurm/convert-%j.out",
        "--dependency=afterok:7:8",
        "--kill-on-invalid-dep=yes",
        "--comment=ours",
    ]
    assert "export HF_HOME=/lustre/hf" in lines
    assert lines[-1] == (
        "srun --ntasks=1 --cpu-bind=none '--container-image=nvcr.io#nvidia/nemo-rl:v0.7.0' "
        "--container-mounts=/lustre/data:/data:ro,/home/me/igrpo:/home/me/igrpo,"
        "/lustre/runs/demo:/lustre/runs/demo,/lustre/hf:/lustre/hf "
        "--container-workdir=/home/me/igrpo --no-container-mount-home "
        "--container-env=HF_HOME,HF_HUB_OFFLINE,IGRPO_CHECKPOINT_DIR "
        """bash -c 'PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" exec "$@"' bash """
        "python pipelines/convert.py 'a=b c'"
    )
    assert lines.index(f"unset {HOST_PATHS}") < lines.index("export HF_HOME=/lustre/hf")
    assert not [line for line in lines if "CONTAINER_IMAGE" in line]


def test_stage_script_on_bare_metal():
    text = script_text(JOB, surroundings(Site(gpu="cpu")))
    assert "--gpus-per-node" not in text and "container" not in text.replace("CONTAINER", "")
    assert 'export PATH=/home/me/igrpo/.venv/bin:"$PATH"' in text
    assert text.endswith("srun --ntasks=1 --cpu-bind=none python pipelines/convert.py 'a=b c'\n")
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0


def test_a_stage_sees_what_it_reads_where_it_reads_it():
    site = SITE.model_copy(update={"mounts": ["/lustre/hf:/hf", "/lustre:/lustre"]})
    where = surroundings(site)
    where.settings["IGRPO_CHECKPOINT_DIR"] = "/fast/checkpoints"
    mounts = next(word for word in script_text(JOB, where).split() if "container-mounts" in word)
    # /lustre/hf is only the source of a mount: nothing is at that place in the container.
    assert mounts.partition("=")[2].split(",") == [
        *site.mounts,
        *(
            f"{path}:{path}"
            for path in ("/home/me/igrpo", "/lustre/runs/demo", "/fast/checkpoints")
        ),
        "/lustre/hf:/lustre/hf",
    ]


def test_stage_script_takes_the_constraints_that_slurm_takes():
    site = SITE.model_copy(update={"constraint": "[rack1*2|rack2*4]&(a100)"})
    assert "#SBATCH --constraint=[rack1*2|rack2*4]&(a100)\n" in script_text(JOB, surroundings(site))


def test_stage_script_refuses_what_slurm_would_cut():
    where = surroundings(SITE)
    odd = Surroundings(where.site, where.checkout, Path("/lustre/my runs/#1"), where.settings)
    with pytest.raises(UserError, match="cannot stand in a job script"):
        script_text(JOB, odd)


def test_the_chains_skills_profile_takes_the_sites_account_and_mounts_the_run(tmp_path):
    shipped = CHECKOUT / "configs" / "cluster_configs"
    run = tmp_path / "runs" / "demo"
    profile = profile_for(SITE, "slurm_a100", shipped, [run], run / "stages")
    values = yaml.safe_load((run / "stages" / "slurm_a100.yaml").read_text())
    before = yaml.safe_load((shipped / "slurm_a100.yaml").read_text())
    assert (values["account"], values["partition"]) == ("acme", "gpu")
    assert values["dependency_type"] == "afterok"
    assert values["containers"] == before["containers"]
    assert values["mounts"] == [*before["mounts"], f"{run}:{run}"]
    assert profile.seen(str(run / "hf" / "last")) == str(run / "hf" / "last")
    again = profile_for(Site(), "slurm_a100", shipped, [Path("/workspace/runs/x")], tmp_path)
    assert again.mounts == tuple(before["mounts"])
    with pytest.raises(UserError, match="no cluster profile .*slurm_none.yaml: there are local"):
        profile_for(SITE, "slurm_none", shipped, [], tmp_path)
