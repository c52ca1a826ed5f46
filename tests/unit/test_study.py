"""Studies: their grid, their runs, and what is said of them."""

import json
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from cases import cases
from composed import load_config
from fake_slurm import squeue_line

from igrpo_nemo.cli.entry import main
from igrpo_nemo.cluster.job import job_name
from igrpo_nemo.errors import UserError
from igrpo_nemo.evaluation.statistics import over_seeds
from igrpo_nemo.report.runs import Curve, load_run
from igrpo_nemo.study import runner
from igrpo_nemo.study.grid import Claim, load_study, names
from igrpo_nemo.study.outcome import (
    arm_results,
    corrected,
    findings,
    paired_difference,
    result_table,
    verdict,
)

CASES = cases(__file__)


def fake_training(words):
    """What `igrpo train` leaves in its folder; it fails where seed and threads are the same."""
    settings = dict(word.split("=", 1) for word in words if "=" in word)
    if settings["grpo.seed"] == settings.get("igrpo.threads"):
        print("error: no room left", flush=True)
        return 1
    folder = Path(settings["logger.log_dir"])
    with (folder / "trained").open("a") as file:
        file.write("x")
    two = settings["feedback"] != "none"
    end = 0.5 + 0.01 * int(settings["grpo.seed"]) + 0.2 * (not two)
    a_run(folder, end, **{"entropy/exact": 0.3}, **({"igrpo/copy_rate": 0.7} if two else {}))
    (folder / "finished").touch()
    return 0


def a_run(folder, end, **metrics):
    """A run's files; `metrics` of its training step."""
    row = {"kind": "train", "step": 1, "time": 0, "metrics": {"loss": 0.0, **metrics}}
    (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    summary = {"val_accuracy_start": 0.25, "val_accuracy_end": end, "steps": 1}
    (folder / "summary.json").write_text(json.dumps(summary))


def runs_of(folder, ends, **metrics):
    """Finished runs by arm and seed; `metrics` of every training step."""
    runs = {}
    for arm, values in ends.items():
        for seed, end in enumerate(values):
            path = folder / arm / str(seed)
            path.mkdir(parents=True)
            a_run(path, end, **metrics)
            runs.setdefault(arm, {})[seed] = load_run(path)
    return runs


def test_corrected_intervals_hold_together():
    """Of ten comparisons without a difference hardly ever one shows some."""
    rng = random.Random(2)
    false_alarms = 0
    for _ in range(300):
        intervals = (
            over_seeds([rng.gauss(0.0, 1.0) for _ in range(5)], confidence=corrected(0.95, 10))
            for _ in range(10)
        )
        false_alarms += any(each.excludes_zero for each in intervals)
    assert 0.01 < false_alarms / 300 < 0.09


def test_differences_are_paired_by_seed():
    ours, reference = {0: 0.5, 1: 0.9, 2: 0.4}, {0: 0.4, 1: 0.8, 7: 0.0}
    difference = paired_difference(ours, reference)
    assert (difference.problems, difference.mean) == (2, pytest.approx(0.1))
    assert paired_difference({0: 1.0}, {1: 1.0}) is None
    assert over_seeds([0.2]).low is None


def test_findings_say_who_is_ahead_whoever_it_is(tmp_path):
    ends = {"grpo": (0.90, 0.91, 0.92), "igrpo": (0.50, 0.52, 0.53), "even": (0.89, 0.93, 0.91)}
    labels = {"grpo": "GRPO", "igrpo": "iGRPO", "even": "even"}
    results = arm_results(runs_of(tmp_path, ends), "grpo")
    behind, even = findings(results, labels, "grpo")
    assert behind.startswith("iGRPO: GRPO ahead by 39.3 points")
    assert even.startswith("even: no difference to GRPO that 3 seeds can show")
    table = result_table("by arm", results, labels, "grpo")
    assert all(len(row) == len(table.header) for row in table.rows)
    assert table.rows[0][3:5] == ("91.0 ± 1.0", "reference")


@pytest.mark.parametrize(("ours", "expects", "said"), CASES["claims"])
def test_a_claim_is_seen_only_where_its_interval_says_so(tmp_path, ours, expects, said):
    runs = runs_of(tmp_path, {"a": ours, "b": (0.50, 0.51, 0.52)})
    claim = Claim(says="a beats b", source="here", arm="a", against="b", expects=expects)
    assert verdict(claim, runs, 0.95)[0] == said


@pytest.mark.parametrize("name", names())
def test_every_run_of_a_study_has_a_config_and_one_budget(name, tmp_path):
    study, budgets = load_study(name), {}
    for cell in study.restricted(None, None, 1).cells(tmp_path):
        # Every arm on the first task, every task with the reference.
        if cell.arm == study.reference or cell.task == next(iter(study.tasks)):
            config = load_config([*cell.overrides, f"logger.log_dir={cell.folder}"])
            if not cell.arm.startswith("budget"):
                budgets.setdefault(config.igrpo.budget, []).append(cell.arm)
    assert len(budgets) == 1


@pytest.fixture
def study(tmp_path, monkeypatch):
    """`igrpo study compare` with a training that takes no time."""
    monkeypatch.setattr(runner, "IGRPO", "test_study:fake_training")
    out = ("--out", str(tmp_path / "out"), "--seeds", "2", "--processes", "2")
    return lambda *words: main(["study", "compare", *out, *words])


def test_a_study_tells_what_it_finds_and_keeps_finished_runs(study, tmp_path, capsys):
    assert study("--arms", "igrpo", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    grpo, igrpo = found["arms"]["arithmetic"]
    assert (grpo["arm"], igrpo["arm"]) == ("grpo", "igrpo")
    assert grpo["end"] == [0.7, 0.71]
    assert igrpo["difference"]["mean"] == pytest.approx(-0.2)
    assert found["findings"][0].startswith("iGRPO: GRPO ahead by 20.0 points")
    assert found["cpu_hours"] >= 0
    page = (tmp_path / "out" / "arithmetic.html").read_text()
    assert "GRPO (mean of 2)" in page and "Bonferroni" in page
    assert study("--arms", "igrpo") == 0
    told = capsys.readouterr()
    assert re.search(r"iGRPO +\| +2 \| 25\.0 ± 0\.0 \| 50\.5 ± 0\.7", told.out)
    assert "4 of 4 runs are finished already" in told.err
    assert (tmp_path / "out/arithmetic/grpo/seed_1/trained").read_text() == "x"


def test_a_run_that_was_stopped_is_not_finished(study, tmp_path, capsys):
    assert study("--arms", "grpo", "--seeds", "1") == 0
    run = tmp_path / "out" / "arithmetic" / "grpo" / "seed_0"
    (run / "finished").unlink()
    assert study("--arms", "grpo", "--seeds", "1") == 0
    assert (run / "trained").read_text() == "xx"


def test_a_study_sends_what_has_no_job_that_runs_or_waits(tmp_path, slurm, capsys):
    cells = [tmp_path / "arithmetic" / arm / "seed_0" for arm in ("grpo", "igrpo")]
    slurm.answers("squeue", squeue_line(7, "PENDING", job_name(cells[0])))
    words = ("--submit", "--arms", "igrpo", "--seeds", "1", "--out", str(tmp_path))
    assert main(["study", "compare", *words]) == 0
    (call,) = slurm.calls("sbatch")
    assert f"--job-name={job_name(cells[1])}" in call.words
    assert "no run has finished yet" in capsys.readouterr().out


def test_what_a_draft_is_worth_is_told_at_the_start_at_the_end_and_of_the_first_gains(tmp_path):
    (run,) = runs_of(tmp_path, {"a": (0.3,)})["a"].values()
    curves = {"accuracy": (0.1, 0.2, 0.3), "draft_conditioned_accuracy": (0.1, 0.5, 0.7)}
    val = {f"val/{name}": Curve((0, 5, 9), values) for name, values in curves.items()}
    (result,) = arm_results({"a": {0: replace(run, val=val)}}, "a")
    (row,) = result_table("by arm", [result], {"a": "A"}, "a").rows
    assert row[5:7] == ("10.0 -> 70.0", "+10.0 / +40.0")


def test_a_study_names_a_run_of_other_settings_and_a_failed_one(study, tmp_path, capsys):
    assert study("--arms", "grpo", "--seeds", "1") == 0
    assert study("--arms", "grpo", "grpo.max_num_steps=7") == 2
    assert "seed_0 holds a run with other settings" in capsys.readouterr().err
    assert study("--out", str(tmp_path / "failed"), "igrpo.threads=1") == 2
    assert re.search("ended with exit code 1 .*: error: no room left", capsys.readouterr().err)


def test_a_study_of_ones_own_and_its_faults(tmp_path):
    content = yaml.safe_load(Path("configs/study/compare.yaml").read_text())
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(content))
    assert load_study(str(path)).restricted("worst", None, 1).arms.keys() == {"grpo", "worst"}
    for broken, told in (
        ({"reference": "dpo"}, "there is no arm dpo"),
        ({"seeds": 0}, "seeds: "),
        ({"colour": 1}, "colour: "),
    ):
        path.write_text(yaml.safe_dump({**content, **broken}))
        with pytest.raises(UserError, match=told):
            load_study(str(path))
    with pytest.raises(UserError, match="there is no study nothing: use claims, compare"):
        load_study("nothing")
    with pytest.raises(UserError, match="unknown arm beste: use grpo, igrpo"):
        load_study("compare").restricted("beste", None, None)
