"""Sending an evaluation's samples: what runs is left alone, and what was sent is remembered.

`ns` and `squeue` are stand-ins that say what the real ones do.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import yaml
from fake_slurm import FakeSlurm, squeue_line
from sample_files import row, write_metrics, write_sample, write_unordered
from skills_runs import write_problems

from igrpo_nemo.config import load_config
from igrpo_nemo.errors import UserError
from igrpo_nemo.evaluation.model import Model
from igrpo_nemo.evaluation.refine import Refinement
from igrpo_nemo.evaluation.setting import setting_of
from igrpo_nemo.evaluation.skills.cluster import evaluation_text, submit, write_note
from igrpo_nemo.evaluation.skills.command import Place
from igrpo_nemo.evaluation.skills.data import read_benchmark, with_benchmarks
from igrpo_nemo.evaluation.skills.evaluate import (
    SkillsEvaluation,
    check_not_running,
    evaluate_here,
    next_round,
    prepare,
    skills_evaluation,
)
from igrpo_nemo.evaluation.skills.program import SkillsEnvironment
from igrpo_nemo.evaluation.skills.refine import BOXED_TOKENS, draft_prompts
from igrpo_nemo.run.tokenizer import build_small_tokenizer

NS = """\
#!/bin/sh
echo "$*" >> {folder}/calls
env > {folder}/environment
number=$(wc -l < {folder}/calls)
if [ -e {folder}/refuse ] && [ $number -gt 1 ]; then
  printf '%s\n' '╭─ Error ─────────────╮' '│ no such partition   │' '╰─────────────────────╯'
  exit 1
fi
echo "Launched app: slurm_tunnel://nemo_run/$((100 + number))"
"""


@dataclass(frozen=True)
class Cluster:
    """An evaluation that takes two calls of `ns`, and the queue that its jobs would stand in."""

    folder: Path
    evaluation: SkillsEvaluation
    place: Place

    @property
    def out(self) -> Path:
        return self.evaluation.out

    @property
    def note(self) -> dict:
        return json.loads((self.out / "submitted.json").read_text())

    def send(self, **flags: bool) -> list[int] | None:
        return submit(self.evaluation, self.place, os.environ, **flags)

    def calls(self) -> list[str]:
        path = self.folder / "calls"
        return path.read_text().splitlines() if path.exists() else []

    def queue(self, state: str = "RUNNING", reason: str = "None") -> None:
        """One job of the evaluation, as squeue prints it."""
        name = f"acc-igrpo-{self.place.expname}-toy"
        FakeSlurm(self.folder).answers("squeue", squeue_line(7, state, name, reason=reason))


def program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    programs = tmp_path / "bin"
    programs.mkdir()
    program(programs / "ns", NS.format(folder=programs))
    FakeSlurm(programs)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    # Two lengths of prompts in a context that just does not hold the longest reply beside them.
    for name in ("toy", "toy-long"):
        write_problems(tmp_path / "data", name, ["4", "5"])
    data = tuple(read_benchmark(tmp_path / "data", name) for name in ("toy", "toy-long"))
    config = with_benchmarks(load_config(["policy.model_name=x"]), "toy:2,toy-long:2")
    model = Model("m", "w", 65_010)
    setting = setting_of(config, model, data, server_type="vllm", nemo_skills="0.7.0")
    environment = SkillsEnvironment(programs, "0.7.0")
    evaluation = SkillsEvaluation(config, setting, data, tmp_path / "out", environment, gpus=8)
    return Cluster(programs, evaluation, Place("/out", "m", "mine", expname="eval-1234"))


def files(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path): path.read_bytes() for path in found if path.suffix != ".log"}


def half_written(cluster: Cluster) -> None:
    """What a job has on the disk that samples, and what one that was killed left behind."""
    prepare(cluster.evaluation)
    where = cluster.out / "eval-results" / "toy"
    write_unordered(where, 0, {1: row("toy problem 1?")})
    write_sample(where, 1, [row("toy problem 0?")], done=True)
    (where / "metrics.json").write_text("{}")


def test_jobs_are_noted_and_do_not_inherit_the_shells_allocation(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SLURM_CPUS_PER_TASK", "SLURM_JOB_ID", "SBATCH_SIGNAL", "SBATCH_TIMELIMIT"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    assert cluster.send() == [101, 102]
    assert cluster.note["jobs"] == [101, 102] and cluster.note["expname"] == "eval-1234"
    assert cluster.note["benchmarks"] == ["toy", "toy-long"]
    lines = (cluster.folder / "environment").read_text().splitlines()
    names = [line.partition("=")[0] for line in lines]
    assert [name for name in names if name.startswith(("SLURM_", "SBATCH_"))] == ["SLURM_CONF"]


def test_a_dry_run_mends_nothing_and_sends_nothing(cluster: Cluster) -> None:
    half_written(cluster)
    before = files(cluster.out)
    assert cluster.send(dry_run=True) == []
    assert files(cluster.out) == before
    assert all("--dry_run" in call for call in cluster.calls()) and len(cluster.calls()) == 2


def test_nothing_touches_a_folder_that_jobs_write_into(cluster: Cluster) -> None:
    half_written(cluster)
    write_note(cluster.out, "eval-1234", ["toy"], [7])
    cluster.queue()
    before = files(cluster.out)
    hotter = replace(cluster.evaluation.setting, benchmarks={"toy": 3, "toy-long": 3})
    other = replace(cluster.evaluation, setting=hotter)
    here = replace(other, address="http://127.0.0.1:1/v1")
    for call in (
        lambda: submit(other, cluster.place, os.environ),
        lambda: submit(other, cluster.place, os.environ, dry_run=True),
        lambda: evaluation_text(other, cluster.place, os.environ, cluster.folder),
        lambda: evaluate_here(here, os.environ),
    ):
        with pytest.raises(UserError, match="1 jobs eval-1234 are queued or running"):
            call()
    assert files(cluster.out) == before and not cluster.calls()
    assert cluster.send(again=True) == [101, 102]


def test_jobs_that_were_sent_before_a_failure_are_remembered(cluster: Cluster) -> None:
    (cluster.folder / "refuse").touch()
    with pytest.raises(
        UserError, match=r"\(exit 1\): no such partition;.*submitted before that: 101 \(scancel 101"
    ):
        cluster.send()
    assert cluster.note["jobs"] == [101]
    cluster.queue("PENDING")
    with pytest.raises(UserError, match="queued or running"):
        cluster.send()
    assert len(cluster.calls()) == 2


def test_a_call_that_is_killed_leaves_its_note(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object, **__: object) -> int:
        assert cluster.note["jobs"] == []  # what a kill -9 leaves
        raise KeyboardInterrupt

    monkeypatch.setattr("igrpo_nemo.evaluation.skills.cluster.run_logged", killed)
    with pytest.raises(KeyboardInterrupt):
        cluster.send()
    assert cluster.note["expname"] == "eval-1234"


def test_jobs_that_may_still_run_hold_a_folder(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = cluster.out.parent
    check_not_running(folder)
    write_note(folder, "eval-1234", ["toy"], [7])
    for state, reason in (("RUNNING", "None"), ("PENDING", "None"), ("PENDING", "Dependency")):
        cluster.queue(state, reason)
        with pytest.raises(UserError, match="1 jobs eval-1234 are queued or running"):
            check_not_running(folder)
    for state, reason in (("COMPLETED", "None"), ("PENDING", "DependencyNeverSatisfied")):
        cluster.queue(state, reason)
        check_not_running(folder)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match="give --again"):
        check_not_running(folder)


def finish(cluster: Cluster) -> SkillsEvaluation:
    """The evaluation as its jobs leave it behind: nothing is missing."""
    evaluation = prepare(cluster.evaluation)
    for name in ("toy", "toy-long"):
        where = cluster.out / "eval-results" / name
        for seed in range(2):
            answers = ("4", "5") if seed else ("5", "5")
            rows = [row(f"{name} problem {i}?", bool(seed), answers[i]) for i in range(2)]
            write_sample(where, seed, rows)
        write_metrics(where)
    return evaluation


def test_an_evaluation_that_lacks_nothing_sends_nothing(cluster: Cluster) -> None:
    evaluation = finish(cluster)
    assert submit(evaluation, cluster.place, os.environ) == []
    assert not (evaluation.out / "submitted.json").exists() and not cluster.calls()


@pytest.mark.parametrize("profile", ["answer_tags", "boxed"])
def test_refined_answers_are_sent_once_the_bare_ones_are_there(
    cluster: Cluster, tmp_path: Path, profile: str
) -> None:
    build_small_tokenizer(["user assistant"], 300).save_pretrained(tmp_path / "model")
    setting = replace(cluster.evaluation.setting, profile=profile)
    refining = {"refinement": Refinement(2), "tokenizer": str(tmp_path / "model")}
    cluster = replace(cluster, evaluation=replace(cluster.evaluation, setting=setting, **refining))
    assert next_round(cluster.evaluation) is cluster.evaluation
    finish(cluster)
    refined = next_round(cluster.evaluation)
    assert submit(refined, cluster.place, os.environ) == [101]
    (call,) = cluster.calls()
    assert "toy:2,toy-long:2" in call and "tokens_to_generate=32505" in call
    assert refined.out == cluster.out / "refined"
    rows = read_benchmark(refined.out / "data", "toy").rows
    shown, draft = rows[0].get("draft", rows[0]["problem"]), "<draft>\n<answer>4</answer>\n</draft>"
    assert shown.endswith(draft)  # the right one
    assert ("draft" in rows[0]) == (profile == "answer_tags")
    assert rows[0]["problem"].startswith("toy problem 0?") and rows[0]["id"] == "toy-0"
    asked = json.loads((refined.out / "setting.json").read_text())
    assert (asked["refine"], asked["choose"]) == (2, "reward")
    prompt = yaml.safe_load((refined.out / "profile" / "prompt.yaml").read_text())
    assert prompt["user"] == "{problem}{draft}"


def test_a_draft_behind_a_problem_stays_text_in_their_own_prompts(
    skills: SkillsEnvironment,
) -> None:
    problem = "a {b}?\n<draft>\n{x} {{y}} \\boxed{4}\n</draft>"
    code = "import sys; from nemo_skills.prompt.utils import get_prompt as p\n" + (
        "for n in ('generic/math', 'eval/aai/mcq-10choices'):"
        " print([p(n, None).fill({'problem': sys.argv[1]})[-1]['content']])"
    )
    command = [skills.python, "-c", code, problem]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    for line in done.stdout.splitlines():
        (text,) = ast.literal_eval(line)
        words = text.removesuffix(problem)
        assert text.endswith(problem) and len(words.encode()) < BOXED_TOKENS


def test_what_cannot_be_refined_is_said_before_anything_is_sampled(cluster: Cluster) -> None:
    bare, model = cluster.evaluation, Model("org/none", "w", 65_010)
    with pytest.raises(UserError, match="--refine 3 chooses among the first 3 .*, toy has 2"):
        skills_evaluation(
            bare.config, model, Path(), bare.environment, base=Path(), refinement=Refinement(3)
        )
    with pytest.raises(UserError, match="the tokenizer of org/none, which is not on this machine"):
        draft_prompts(replace(bare, refinement=Refinement(2), tokenizer="org/none"))
