"""Comparisons of evaluations: the numbers, what may be compared, and what is written."""

import csv
import io
import json
import re

import numpy as np
import pytest
from cases import cases
from evaluation_folders import draw, write_evaluation

from igrpo_nemo.cli import main
from igrpo_nemo.errors import UserError
from igrpo_nemo.evaluation.metrics import majority_score
from igrpo_nemo.evaluation.results import finished_files, read_samples
from igrpo_nemo.evaluation.systems import (
    AVERAGE,
    Published,
    compared,
    evaluation_folder,
    load_systems,
    published_results,
)
from igrpo_nemo.evaluation.tables import (
    CSV_HEADER,
    accuracy_table,
    as_csv,
    as_markdown,
    findings,
    tables,
)
from igrpo_nemo.report import build_report
from igrpo_nemo.report.figures import pass_figure

CASES = cases(__file__)


RATES = np.random.default_rng(0).beta(0.8, 1.2, size=30)


@pytest.fixture
def grpo(tmp_path):
    verdicts = {"aime24": draw(RATES, 16, 1), "amc23": draw(RATES, 4, 2)}
    return write_evaluation(tmp_path / "grpo" / "evaluation" / "last", verdicts)


@pytest.fixture
def igrpo(tmp_path):
    better = RATES + 0.5 * (1 - RATES)
    verdicts = {"aime24": draw(better, 16, 3), "amc23": draw(better, 4, 4)}
    return write_evaluation(tmp_path / "igrpo" / "evaluation" / "last", verdicts, tokens=300)


def test_systems_hold_the_numbers_of_their_files(grpo):
    (system,) = load_systems([f"GRPO={grpo}"])
    found = system.benchmarks["aime24"]
    verdicts = draw(RATES, 16, 1)
    metrics = json.loads((grpo / "eval-results/aime24/metrics.json").read_text())["aime24"]
    assert system.label == "GRPO"
    assert found.accuracy.mean == pytest.approx(verdicts.mean())
    assert 100 * found.accuracy.mean == pytest.approx(
        metrics["pass@1[avg-of-16]"]["symbolic_correct"]
    )
    assert 100 * found.passes[8].mean == pytest.approx(metrics["pass@8"]["symbolic_correct"])
    assert 100 * found.majority.mean == pytest.approx(metrics["majority@16"]["symbolic_correct"])
    assert 100 * found.no_answer.mean == pytest.approx(metrics["pass@1[avg-of-16]"]["no_answer"])
    assert found.truncated.mean == pytest.approx(found.no_answer.mean)
    assert found.tokens.mean == pytest.approx(107.5)
    assert found.tokens.problems == 0.0  # every problem took the same lengths
    rows = read_samples(finished_files(grpo / "eval-results" / "aime24"))
    assert found.majority.mean == pytest.approx(np.mean([majority_score(row) for row in rows]))


def test_comparison_pairs_problems_and_averages_benchmarks(grpo, igrpo):
    comparison = compared(load_systems([grpo, igrpo]))
    by_name = comparison.differences["igrpo"]
    assert comparison.reference.label == "grpo"
    assert list(by_name) == ["aime24", "amc23", AVERAGE]
    for name in ("aime24", "amc23"):
        ours, theirs = (s.benchmarks[name].accuracy.mean for s in comparison.systems[::-1])
        assert by_name[name].mean == pytest.approx(ours - theirs)
    mean = (by_name["aime24"].mean + by_name["amc23"].mean) / 2
    assert by_name[AVERAGE].mean == pytest.approx(mean)
    assert by_name[AVERAGE].excludes_zero and by_name[AVERAGE].problems == 60
    assert compared(load_systems([grpo, igrpo])).differences == comparison.differences
    assert findings(comparison)[0].startswith("igrpo is ahead of grpo by")
    backwards = compared(load_systems([igrpo, grpo]))
    assert backwards.differences["grpo"][AVERAGE].mean == pytest.approx(-mean)
    assert findings(backwards)[0].startswith("igrpo is ahead of grpo by")


def test_problems_are_paired_by_identity_not_by_position(tmp_path, grpo):
    backwards = write_evaluation(tmp_path / "backwards", {"aime24": draw(RATES, 16, 1)})
    for path in (backwards / "eval-results" / "aime24").glob("*.jsonl"):
        path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))
    forwards = write_evaluation(tmp_path / "forwards", {"aime24": draw(RATES, 16, 1)})
    difference = compared(load_systems([forwards, backwards])).differences["backwards"]["aime24"]
    assert (difference.mean, difference.low, difference.high) == (0, 0, 0)


def test_equal_systems_are_not_told_apart(tmp_path):
    first = write_evaluation(tmp_path / "a", {"aime24": draw(RATES, 8, 5)})
    second = write_evaluation(tmp_path / "b", {"aime24": draw(RATES, 8, 6)})
    comparison = compared(load_systems([first, second]))
    assert not comparison.differences["b"]["aime24"].excludes_zero
    assert "b and a: no difference on aime24" in findings(comparison)[0]


@pytest.mark.parametrize(("changed", "words"), CASES["settings"])
def test_different_settings_are_refused_and_shown(tmp_path, changed, words):
    first = write_evaluation(tmp_path / "a", {"aime24": draw(RATES, 4, 1)})
    second = write_evaluation(tmp_path / "b", {"aime24": draw(RATES, 4, 2)}, **changed)
    with pytest.raises(UserError, match=re.escape(words)) as refused:
        compared(load_systems([first, second]))
    assert "\n" not in str(refused.value) and "--anyway" in str(refused.value)
    text = as_markdown(compared(load_systems([first, second]), anyway=True))
    assert "The evaluations differ in these settings" in text
    assert not re.search(rf"All: .*{next(iter(changed))} ", text)
    assert words.partition(" (")[0] in text or "more" in words


def test_different_problems_are_refused_and_the_common_ones_compared(tmp_path):
    first = write_evaluation(tmp_path / "a", {"aime24": draw(RATES, 4, 1)})
    second = write_evaluation(tmp_path / "b", {"aime24": draw(RATES[:20], 4, 2)})
    with pytest.raises(UserError, match="problems of aime24"):
        compared(load_systems([first, second]))
    comparison = compared(load_systems([first, second]), anyway=True)
    assert comparison.differences["b"]["aime24"].problems == 20
    other = write_evaluation(tmp_path / "c", {"gsm8k": draw(RATES, 4, 2)})
    with pytest.raises(UserError, match="share no benchmark"):
        compared(load_systems([first, other]), anyway=True)


def test_folders_and_labels(tmp_path, grpo, igrpo):
    assert evaluation_folder(tmp_path / "grpo") == grpo
    assert [s.label for s in load_systems([tmp_path / "grpo", igrpo])] == ["grpo", "igrpo"]
    write_evaluation(tmp_path / "grpo" / "evaluation" / "hot", {"aime24": draw(RATES, 2, 1)})
    with pytest.raises(UserError, match="holds 2 evaluations"):
        load_systems([tmp_path / "grpo"])
    with pytest.raises(UserError, match="holds no evaluation"):
        load_systems([tmp_path])
    with pytest.raises(UserError, match="is given twice"):
        load_systems([f"a={grpo}", f"a={grpo}"])
    with pytest.raises(UserError, match="is not a folder"):
        load_systems([tmp_path / "nowhere"])


def test_an_incomplete_evaluation_is_named(grpo):
    (grpo / "eval-results" / "aime24" / "output-rs3.jsonl.done").unlink()
    with pytest.raises(UserError, match=r"aime24: 1 of 16 samples are unfinished \(rs3\)"):
        load_systems([grpo])


def test_published_figures_stand_beside_measured_ones(tmp_path, grpo, igrpo):
    file = tmp_path / "paper.yaml"
    file.write_text(
        "t1_igrpo: {aime24: 62.5, amc23: 90.0, published_average: 70.0, "
        "recomputed_average: 76.25, source: Table 1}\n"
    )
    published = published_results("t1_igrpo", file)
    assert published == Published(
        "t1_igrpo", {"aime24": 0.625, "amc23": 0.9}, 0.7, 0.7625, "Table 1"
    )
    comparison = compared(load_systems([grpo, igrpo]), published={"igrpo": published})
    table = accuracy_table(comparison)
    rows = {row[0]: row[1:] for row in table.rows}
    assert list(rows) == ["grpo", "igrpo", "igrpo, published", "igrpo, measured - published"]
    assert rows["igrpo, published"] == ("62.50", "90.00", "70.00 (columns: 76.25)")
    measured = comparison.systems[1].benchmarks["aime24"].accuracy.mean
    assert rows["igrpo, measured - published"][0] == f"{100 * (measured - 0.625):+.1f}"
    assert re.fullmatch(r"\d+\.\d ± \d+\.\d", rows["igrpo"][0])
    assert "- t1_igrpo: Table 1" in as_markdown(comparison)
    with pytest.raises(UserError, match="no published figures of t2: it has t1_igrpo"):
        published_results("t2", file)


def test_training_seeds_of_an_arm_show_their_spread(tmp_path, grpo, igrpo):
    folders = {"GRPO": [], "iGRPO": []}
    for seed in range(6):
        arm = list(folders)[seed % 2]
        rates = RATES + 0.3 * (seed % 2) * (1 - RATES)
        verdicts = {name: draw(rates, 8, 10 + seed) for name in ("aime24", "aime25")}
        folders[arm].append(write_evaluation(tmp_path / f"s{seed}", verdicts))
    names = [f"{arm}={folder}" for arm, found in folders.items() for folder in found]
    comparison = compared(load_systems(names))
    assert [s.label for s in comparison.systems][:4] == [
        "GRPO (1)",
        "GRPO (2)",
        "GRPO (3)",
        "iGRPO (1)",
    ]
    means = {
        arm: [s.benchmarks["aime24"].accuracy.mean for s in seeds]
        for arm, seeds in comparison.arms.items()
    }
    table = next(t for t in tables(comparison) if t.header[0] == "arm")
    rows = {row[:2]: row[2:] for row in table.rows}
    assert len(rows) == 6 and rows["GRPO", "aime24"][0] == "3"
    assert rows["iGRPO", "aime24"][1].startswith(f"{100 * np.mean(means['iGRPO']):.1f} [")
    assert rows["iGRPO", "aime24"][2] == f"{100 * np.std(means['iGRPO'], ddof=1):.1f}"
    gain = 100 * (np.mean(means["iGRPO"]) - np.mean(means["GRPO"]))
    assert rows["iGRPO", "aime24"][3].startswith(f"{gain:+.1f} [")
    found = list(csv.DictReader(io.StringIO(as_csv(comparison))))
    (spread,) = [
        r
        for r in found
        if (r["system"], r["benchmark"], r["quantity"]) == ("GRPO", "aime24", "seeds_spread")
    ]
    assert float(spread["value"]) == pytest.approx(np.std(means["GRPO"], ddof=1))
    assert not compared(load_systems([grpo, igrpo])).arms


def test_aime_is_pooled_over_its_years(tmp_path):
    def written(label, seed):
        verdicts = {"aime24": draw(RATES, 8, seed), "aime25": draw(RATES, 4, seed + 1)}
        return write_evaluation(tmp_path / label, verdicts), verdicts

    (first, ours), (second, theirs) = written("a", 1), written("b", 5)
    comparison = compared(load_systems([first, second]))
    (pool,) = comparison.systems[0].pools.values()
    both = np.concatenate([ours["aime24"][:, :4], ours["aime25"]])
    assert (pool.benchmark, len(pool.problems), pool.num_samples) == ("aime24+aime25", 60, 4)
    assert pool.accuracy.mean == pytest.approx(both.mean())
    difference = comparison.differences["b"]["aime24+aime25"]
    other = np.concatenate([theirs["aime24"][:, :4], theirs["aime25"]])
    assert difference.problems == 60
    assert difference.mean == pytest.approx(other.mean() - both.mean())
    average = comparison.differences["b"][AVERAGE]
    assert average.problems == 60 and average.mean != pytest.approx(difference.mean)
    assert "aime24+aime25" in as_csv(comparison) and "aime24+aime25" in as_markdown(comparison)


def test_refined_answers_are_another_evaluation(tmp_path, grpo, igrpo):
    refined = {"aime24": draw(RATES, 16, 9), "amc23": draw(RATES, 4, 8)}
    write_evaluation(grpo / "refined", refined, refine=4, choose="reward")
    assert evaluation_folder(tmp_path / "grpo") == grpo
    words = "answers (igrpo: bare, grpo refined: refined from the best of 4 by reward)"
    with pytest.raises(UserError, match=re.escape(words)):
        compared(load_systems([igrpo, grpo / "refined"]))
    compared(load_systems([igrpo, grpo / "refined"]), anyway=True)
    # Beside the bare ones that they are made from, the difference is what is asked for.
    (differing,) = compared(load_systems([grpo, grpo / "refined"])).differing
    assert differing.name == "answers" and differing.values["grpo"] == "bare"


def test_csv_holds_every_number_of_the_page(grpo, igrpo):
    comparison = compared(load_systems([grpo, igrpo]))
    rows = list(csv.DictReader(io.StringIO(as_csv(comparison))))
    assert tuple(rows[0]) == CSV_HEADER
    found = {(r["system"], r["benchmark"], r["quantity"], r["k"]): r for r in rows}
    assert len(found) == len(rows)
    summary = comparison.systems[1].benchmarks["aime24"]
    row = found["igrpo", "aime24", "accuracy", ""]
    assert float(row["value"]) == summary.accuracy.mean
    assert float(row["stderr_problems"]) == summary.accuracy.problems
    assert float(row["stderr_sampling"]) == summary.accuracy.sampling
    assert float(found["igrpo", "aime24", "pass", "16"]["value"]) == summary.passes[16].mean
    difference = found["igrpo", AVERAGE, "difference", ""]
    sampling = [system.average(comparison.benchmarks).sampling for system in comparison.systems]
    assert float(difference["stderr_sampling"]) == pytest.approx(np.hypot(*sampling))
    assert float(difference["low"]) == comparison.differences["igrpo"][AVERAGE].low


def test_markdown_tables_are_whole(grpo, igrpo):
    text = as_markdown(compared(load_systems([f"a|b={grpo}", igrpo])))
    blocks = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert len(blocks) == 3
    setting = "answers bare, profile answer_tags, temperature 0.6, top_p 0.95, max_tokens 65000"
    assert f"All: evaluator NeMo-Skills, {setting}." in text
    for block in blocks:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block}) == 1


def test_pass_at_k_curves_reach_256(tmp_path):
    folder = write_evaluation(tmp_path / "a", {"aime24": draw(RATES[:5], 256, 1)})
    figure = pass_figure(compared(load_systems([folder])))
    ((_, svg),) = figure.panels
    chart = json.loads(re.search(r'data-chart="([^"]*)"', svg)[1].replace("&#34;", '"'))
    assert chart["log"] is True and chart["x"] == [1, 256]
    assert chart["lines"][0]["x"] == [1, 2, 4, 8, 16, 32, 64, 128, 256]
    assert chart["lines"][0]["y"] == sorted(chart["lines"][0]["y"])
    ticks = re.findall(r'class="tick mid" x="([\d.]+)" y="[\d.]+">([\d.k]+)<', svg)
    assert [label for _, label in ticks] == [str(2**i) for i in range(9)]
    gaps = np.diff([float(x) for x, _ in ticks])
    assert gaps == pytest.approx(gaps[0], abs=0.2)


def test_one_sample_has_no_curve_and_says_so(tmp_path):
    folder = write_evaluation(tmp_path / "a", {"aime24": draw(RATES, 1, 1)})
    comparison = compared(load_systems([folder]))
    assert "one sample a problem" in pass_figure(comparison).missing
    assert comparison.systems[0].benchmarks["aime24"].majority is None
    assert len(tables(comparison)) == 2


def test_report_takes_evaluations(tmp_path, grpo, igrpo, capsys):
    page = tmp_path / "page.html"
    assert main(["report", str(grpo), str(igrpo), "--out", str(page)]) == 0
    html = page.read_text()
    assert "Evaluation of grpo, igrpo" in html and "igrpo is ahead of grpo" in html
    assert 'id="pass-at-k"' in html and 'id="budget"' not in html
    assert "http://" not in html.replace("http://www.w3.org", "")
    write_evaluation(tmp_path / "hot", {"aime24": draw(RATES, 4, 1)}, temperature=1.0)
    assert main(["report", str(grpo), str(tmp_path / "hot"), "--out", str(page)]) == 2
    assert "temperature" in capsys.readouterr().err
    assert main(["report", str(grpo), str(tmp_path / "hot"), "--out", str(page), "--anyway"]) == 0
    assert "The evaluations differ in these settings" in page.read_text()


def test_labels_are_data(tmp_path, grpo):
    folder = grpo.rename(tmp_path / "<script>alert(1)<")
    html = build_report([folder], tmp_path / "page.html").read_text()
    assert "<script>alert" not in html and "&lt;script&gt;alert" in html
