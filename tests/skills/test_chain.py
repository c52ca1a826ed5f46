"""Chains on Slurm with the real NeMo-Skills: what is planned, and what a Slurm is really given.

Slurm itself is a stand-in: an `sbatch` that numbers and keeps what it gets, and an empty queue.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from fake_slurm import FakeSlurm
from sample_files import row, write_metrics, write_sample
from skills_runs import pipeline, write_problems

from igrpo_nemo.chain import on_slurm
from igrpo_nemo.chain.conversion import convert
from igrpo_nemo.chain.experiment import Experiment
from igrpo_nemo.chain.stages import chain_evaluation
from igrpo_nemo.config import load_config
from igrpo_nemo.evaluation.skills.evaluate import prepare
from igrpo_nemo.evaluation.skills.program import SkillsEnvironment
from igrpo_nemo.run.tokenizer import build_small_tokenizer

# NeMo-Skills composes its jobs for seconds of CPU, several times a test.
pytestmark = pytest.mark.timeout(600)

EXPERIMENT = "table1_openmath_nemotron_14b_igrpo"
SAMPLES = {"aime24": 3, "amc23": 2}
ROWS = {"aime24": 30, "amc23": 40}
TOKEN = "hf_" + "s" * 30


@dataclass(frozen=True)
class Cluster:
    """A user's account on a cluster: run folder, profile, data, and the stand-in for Slurm."""

    folder: Path
    slurm: FakeSlurm

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def benchmarks(self) -> str:
        return ",".join(f"{name}:{samples}" for name, samples in SAMPLES.items())

    def words(self, *more: str) -> list[str]:
        return [
            f"experiment={EXPERIMENT}",
            f"logger.log_dir={self.run}",
            "igrpo.site.account=acme",
            "igrpo.site.partition=gpu",
            "igrpo.site.qos=high",
            "igrpo.site.time=08:00:00",
            f"igrpo.site.container={self.folder}/nemo-rl.sqsh",
            f"igrpo.site.mounts=['{self.folder}/models:/models:ro']",
            f"igrpo.site.hf_home={self.folder}/hf",
            *more,
        ]

    def chain(self, *flags: str, code: int = 0, more: tuple[str, ...] = ()) -> str:
        paths = ["--config-dir", str(self.folder), "--benchmarks", self.benchmarks]
        paths += ["--data-dir", str(self.folder / "data")]
        words = ["--cluster", "slurm", *paths, *flags, *self.words(*more)]
        ended = pipeline("train_and_evaluate.py", *words)
        assert ended.code == code, f"{ended.out[-3000:]}\n{ended.err[-3000:]}"
        return ended.out if code == 0 else ended.err

    def sent(self) -> dict[int, str]:
        """Job id -> the words of sbatch and the file it was given."""
        calls = self.slurm.calls("sbatch")
        return {i: f"{' '.join(call.words)}\n{call.script}" for i, call in enumerate(calls, 101)}


@pytest.fixture
def cluster(tmp_path, skills, monkeypatch) -> Cluster:
    for name in ("bin", "models", "hf", "workspace"):
        (tmp_path / name).mkdir()
    slurm = FakeSlurm(tmp_path / "bin")
    profile = {
        "executor": "slurm",
        "containers": {"nemo-skills": "/images/skills.sqsh", "vllm": "/images/vllm.sqsh"},
        "account": "ACCOUNT",
        "partition": "PARTITION",
        "job_dir": f"{tmp_path}/workspace",
        "job_name_prefix": "igrpo-",
        "mounts": [f"{tmp_path}/hf:{tmp_path}/hf"],
        "env_vars": [f"HF_HOME={tmp_path}/hf"],
        "dependency_type": "afterany",
    }
    (tmp_path / "slurm_a100.yaml").write_text(yaml.safe_dump(profile))
    for name, rows in ROWS.items():
        write_problems(tmp_path / "data", name, [str(i) for i in range(rows)])
    # A disk for the checkpoints of 14B parameters, which the machine of the tests need not have.
    full = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full(path)._replace(free=10**13))
    for name in ("SBATCH_ACCOUNT", "SBATCH_PARTITION", "CONTAINER_IMAGE", "HF_HOME", "VENV"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("NEMO_SKILLS_ENV", str(skills.bin.parent))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return Cluster(tmp_path, slurm)


def sections(plan: str) -> dict[str, str]:
    """The plan's parts by their titles."""
    found = re.split(r"^##### (.*)$", plan, flags=re.MULTILINE)[1:]
    return dict(zip(found[::2], found[1::2], strict=True))


def options(text: str) -> dict[str, str]:
    """The #SBATCH options of a batch file."""
    found = re.findall(r"^#SBATCH --([a-z-]+)=(\S+)$", text, flags=re.MULTILINE)
    return dict(found)


def test_the_plan_holds_everything_that_the_profile_says(cluster):
    plan = cluster.chain("--dry-run", "--chain", "2")
    parts = sections(plan)
    jobs = {name: text for name, text in parts.items() if name.startswith("sbatch ")}
    scripts = {name: text for name, text in parts.items() if name.endswith(".sh")}

    first, second = re.findall(r"^JOB\d=.*$", parts["train"], flags=re.MULTILINE)
    for line in (first, second):
        for word in (
            "--nodes=5", "--gpus-per-node=8", "--account=acme", "--partition=gpu", "--qos=high",
            "--time=08:00:00", "--requeue", f"experiment={EXPERIMENT}",
        ):  # fmt: skip
            assert word in line
    assert "--dependency=singleton" in first
    assert "--dependency=afterok:$JOB1,singleton --kill-on-invalid-dep=yes" in second

    convert = parts["convert"]
    wanted = {
        "nodes": "1", "gpus-per-node": "1", "account": "acme", "partition": "gpu", "qos": "high",
        "dependency": "afterok:TRAIN", "kill-on-invalid-dep": "yes",
    }  # fmt: skip
    assert wanted.items() <= options(convert).items()
    assert f"--container-image={cluster.folder}/nemo-rl.sqsh" in convert
    assert f"{cluster.folder}/models:/models:ro" in convert
    assert f"{cluster.run}:{cluster.run}" in convert
    assert f"python pipelines/convert.py --checkpoint last experiment={EXPERIMENT}" in convert

    servers = [text for text in jobs.values() if "/images/vllm.sqsh" in text]
    summaries = [text for name, text in jobs.items() if "summarize-results" in name]
    assert servers, parts["evaluate"]
    assert len(summaries) == 2 and len(servers) + len(summaries) == len(jobs)
    for text in jobs.values():
        wanted = {"account": "acme", "partition": "gpu", "qos": "high", "nodes": "1"}
        wanted |= {"dependency": "afterok:CONVERT", "kill-on-invalid-dep": "yes"}
        assert wanted.items() <= options(text).items()
        assert options(text)["time"] == "0-08:00:00"
        assert f"--container-mounts {cluster.folder}/hf:{cluster.folder}/hf" in text
        assert f"{cluster.run}:{cluster.run}" in text
        assert "--container-image /images/skills.sqsh" in text
        assert f"export HF_HOME={cluster.folder}/hf" in text
    assert all(options(text)["gpus-per-node"] == "8" for text in servers)
    assert all(f"{cluster.folder}/workspace/" in text for text in jobs.values())

    generation = "\n".join(scripts.values())
    model = f"{cluster.run}/hf/last"
    assert generation.count("serve_vllm") == len(servers)
    assert generation.count("--generation-config vllm") == len(servers)
    assert f"--model {model}     --num_gpus 8" in generation
    calls = re.findall(
        r"nemo_skills\.inference\.generate .*?output_file=(\S+)(.*?)&& touch", generation
    )
    assert sorted(Path(file).name for file, _ in calls if "/aime24/" in file) == [
        f"output-rs{seed}.jsonl" for seed in range(3)
    ]
    assert len([file for file, _ in calls if "/amc23/" in file]) == 2
    for _, arguments in calls:
        last = dict(re.findall(r"\+\+inference\.(\w+)=(\S+)", arguments))
        assert (last["temperature"], last["top_p"]) == ("0.6", "0.95")
        assert last["tokens_to_generate"] == "65000"
        assert f"++server.model={model}" in arguments
        assert "/profile/prompt.yaml" in arguments

    compare = parts["compare"]
    assert options(compare)["dependency"] == "afterok:EVALUATE"
    assert f"--experiment {EXPERIMENT}={EXPERIMENT}" in compare
    assert "gpus-per-node" not in options(compare)
    assert TOKEN not in plan
    assert cluster.sent() == {} and not (cluster.run / "stages").exists()


def test_slurm_gets_a_chain_of_successes(cluster):
    text = cluster.chain("--against", f"base={cluster.folder}/base")
    sent = cluster.sent()
    train, convert, *evaluate, compare = sorted(sent)
    assert f"submitted job {train} (" in text and f"compare: job {compare}" in text
    assert "slurm/train.sh" in sent[train] and "--dependency=singleton" in sent[train]
    assert options(sent[convert])["dependency"] == f"afterok:{train}"
    files = {job: sent[job] for job in evaluate}
    servers = [job for job, file in files.items() if "serve_vllm" in file or "vllm.sqsh" in file]
    for job in servers:
        assert options(files[job])["dependency"] == f"afterok:{convert}"
        assert options(files[job])["kill-on-invalid-dep"] == "yes"
    for job in set(evaluate) - set(servers):
        (after,) = re.findall(r"--dependency=(\S+) ", files[job].splitlines()[0] + " ")
        kind, *numbers = after.split(":")
        assert kind == "afterok" and set(map(int, numbers)) <= set(servers) and numbers
    waits = options(sent[compare])["dependency"].removeprefix("afterok:")
    assert sorted(map(int, waits.split(":"))) == evaluate
    assert f"base={cluster.folder}/base" in sent[compare]
    assert not [job for job, file in sent.items() if TOKEN in file]


def test_only_what_is_missing_is_submitted_and_at_the_end_compared(cluster, skills, monkeypatch):
    submit = on_slurm.submit  # the chain above has had its arguments checked by NeMo-Skills first
    monkeypatch.setattr(on_slurm, "submit", lambda *a, dry_run=False: [] if dry_run else submit(*a))
    cluster.run.mkdir()
    finish_training(cluster)
    finish_evaluation(cluster, skills, without=("amc23", 1))
    cluster.chain()
    sent = cluster.sent()
    *evaluate, compare = sorted(sent)
    assert not [file for file in sent.values() if "train.sh" in file or "convert.py" in file]
    first = sent[evaluate[0]]
    assert "amc23" in first and "aime24" not in options(first)["job-name"]
    assert "dependency" not in options(first)
    assert all(options(sent[job])["kill-on-invalid-dep"] == "yes" for job in evaluate)
    assert "pipelines/compare.py" in sent[compare]

    finish_evaluation(cluster, skills)
    text = cluster.chain()
    assert cluster.sent() == sent
    assert "measured - published" in text and (cluster.run / "comparison/report.html").is_file()
    assert "is complete" in sections(cluster.chain("--dry-run"))["evaluate"]

    # Refined answers need the bare ones, which are there: now they are sent, and then compared.
    build_small_tokenizer(["user assistant"], 300).save_pretrained(cluster.run / "hf" / "last")
    assert "chooses among the first 3" in cluster.chain("--refine", "3", code=2)
    assert "compare: job" in cluster.chain("--refine", "2")
    *evaluate, compare = (file for job, file in cluster.sent().items() if job not in sent)
    assert evaluate and all("/refined" in file for file in evaluate)
    assert f"'{EXPERIMENT} refined=" in compare and f" {EXPERIMENT}=" in compare


def test_what_cannot_work_is_refused_before_anything_is_sent(cluster, monkeypatch):
    cluster.run.mkdir()
    finish_training(cluster)
    error = cluster.chain(code=2, more=("policy.max_grad_norm=3.0",))
    assert "holds a run with policy.max_grad_norm=1.0, this one has 3.0" in error
    error = cluster.chain(code=2, more=("igrpo.site.account=null",))
    assert "slurm_a100 names no account" in error
    error = cluster.chain(code=2, more=("igrpo.site.sbatch=['--comment=my job']",))
    assert "'--comment=my job' cannot stand in a job script" in error
    error = cluster.chain("--evaluator", "igrpo", code=2)
    assert "leave out --cluster" in error
    text = (cluster.folder / "slurm_a100.yaml").read_text().replace("/workspace", "/moved/nemo_run")
    (cluster.folder / "slurm_a100.yaml").write_text(text)
    error = cluster.chain(code=2)
    assert f"there is no {cluster.folder}/moved: make one of your own" in error
    assert "# not to be submitted as it is: " in sections(cluster.chain("--dry-run"))["evaluate"]
    error = cluster.chain("--data-dir", str(cluster.folder / "none"), code=2)
    assert "prepare_data.py" in error
    assert cluster.sent() == {}
    # Without NeMo-Skills the plan still shows the other stages.
    monkeypatch.setenv("NEMO_SKILLS_ENV", str(cluster.folder))
    parts = sections(cluster.chain("--dry-run"))
    assert list(parts) == ["train", "convert", "evaluate", "compare"]
    assert "# not composed: NEMO_SKILLS_ENV" in parts["evaluate"]
    assert "# temperature: 0.6" in parts["evaluate"]


def finish_training(cluster: Cluster) -> None:
    """What the training and the conversion leave behind."""
    run = cluster.run
    config = load_config(cluster.words())
    (run / "config.yaml").write_text(config.to_yaml())
    (run / "finished").write_text("58\n")
    weights = run / "checkpoints" / "step_58" / "policy" / "weights"
    weights.mkdir(parents=True)
    (weights / "config.json").write_text('{"max_position_embeddings": 131072}')
    (weights / "model.safetensors").write_text("weights")
    convert(run, "last")


def finish_evaluation(
    cluster: Cluster, skills: SkillsEnvironment, without: tuple[str, int] | None = None
) -> None:
    """What NeMo-Skills' jobs leave behind, but one sample."""
    words = cluster.words()
    chain = Experiment(
        tuple(words),
        load_config(words),
        cluster.run,
        benchmarks=cluster.benchmarks,
        data_dir=cluster.folder / "data",
    )
    out = prepare(chain_evaluation(chain, skills)).out
    for name, samples in SAMPLES.items():
        where = out / "eval-results" / name
        data = out / "data" / name / "test.jsonl"
        problems = [json.loads(line) for line in data.read_text().splitlines()]
        for seed in range(samples):
            if (name, seed) != without:
                rows = [one | row(one["problem"], i % 3 != seed) for i, one in enumerate(problems)]
                write_sample(where, seed, rows)
        write_metrics(where)
