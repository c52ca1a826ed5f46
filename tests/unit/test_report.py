"""The report: what stands on the page, what must not, and the comparison's statistics."""

import importlib.util
import json
import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from igrpo_nemo.alarms import HEADLINES
from igrpo_nemo.errors import UserError
from igrpo_nemo.report import build_report
from igrpo_nemo.report.charts import (
    BOTTOM,
    LEFT,
    MAX_POINTS,
    RIGHT,
    TOP,
    Axis,
    Line,
    format_value,
    line_chart,
    running_mean,
    thin_out,
)
from igrpo_nemo.report.figures import FIGURES, draw_figures, mean_curve
from igrpo_nemo.report.runs import Curve, load_run, load_runs
from igrpo_nemo.report.tables import budget_rows, headline_facts, rollout_totals, shorten

CONFIG = """\
igrpo: {feedback: best_draft, num_drafts: 4, num_refinements: 4, budget: 8}
grpo: {num_prompts_per_step: 32, num_generations_per_prompt: 4}
"""

REFINE = ("refinement", "refine", "lift", "copy", "overlap", "selected", "clipped")


def write_run(folder, *, steps=50, seed=0, feedback="best_draft", gain=0.4, samples=(), extra=()):
    """A run folder with every metric that the figures know, as smooth synthetic curves."""
    folder.mkdir(parents=True)
    rng = random.Random(seed)
    rows = []
    names = {t.metric for spec in FIGURES if spec.kind == "train" for t in spec.traces}
    names = names - {"reward/reason/*"} | {headline.metric for headline in HEADLINES}
    for step in range(steps + 1):
        done = 1 - math.exp(-3 * step / steps)
        if step % 10 == 0:
            value = 0.25 + gain * done + rng.gauss(0, 0.01)
            val = {"val/accuracy": value, "val/accuracy_stderr": 0.01}
            rows.append({"kind": "val", "step": step, "time": 0.0, "metrics": val})
        if step:
            metrics = {name: 0.2 + 0.5 * done for name in names}
            metrics |= {"timing/draft": 0.2, "timing/refine": 0.3, "timing/step": 0.6}
            metrics |= {"reward/reason/match": done, "reward/reason/mismatch": 1 - done}
            if feedback == "none":
                metrics = {k: v for k, v in metrics.items() if not any(w in k for w in REFINE)}
            rows.append({"kind": "train", "step": step, "time": 1.0, "metrics": metrics})
    lines = [json.dumps(row) for row in [*rows, *extra]]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "config.yaml").write_text(CONFIG.replace("best_draft", feedback))
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    summary = {"val_accuracy_start": 0.25, "val_accuracy_end": value, "seconds": 250.0}
    (folder / "summary.json").write_text(json.dumps({**summary, "steps": steps}))
    return folder


class Page(HTMLParser):
    """Tags, attributes and visible text of a page; notices tags that are left open."""

    VOID = {"meta", "br"}

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes <{self.open[-1:]}>"
        self.open.pop()

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture
def run_dir(tmp_path):
    return write_run(tmp_path / "demo")


def test_page_is_whole_and_asks_the_network_for_nothing(run_dir):
    path = build_report([run_dir])
    assert path == run_dir / "report.html"
    html = path.read_text()
    page = Page(html)
    assert page.open == []
    urls = [v for k, v in page.attributes if k in ("src", "href", "srcset", "action", "data")]
    assert all(url.startswith("#") for url in urls)
    assert not re.search(r"@import|url\(|https?://(?!www\.w3\.org/2000/svg)", html)
    assert {"link", "img", "iframe", "object"}.isdisjoint(page.tags)
    assert page.tags.count("script") == 1
    policy = dict(page.attributes)["content"]
    assert "default-src 'none'" in html and "script-src 'sha256-" in html, policy


def test_every_figure_is_drawn_when_every_metric_is_there(run_dir):
    figures = draw_figures(load_runs([run_dir]))
    assert [f.key for f in figures if f.missing] == []
    assert all(f.caption and f.panels and f.legend for f in figures)


def test_absent_metrics_leave_a_sentence(tmp_path):
    folder = write_run(tmp_path / "grpo", feedback="none")
    figures = {f.key: f for f in draw_figures(load_runs([folder]))}
    assert figures["lift"].missing and figures["copying"].missing
    assert not figures["reward"].missing
    assert "without feedback there is no second stage" in build_report([folder]).read_text()


def test_model_text_and_names_cannot_become_markup(tmp_path):
    evil = "</pre></script><script>alert(1)</script><img src=x onerror=alert(2)>{{ 7*7 }}"
    sample = {
        "step": 10,
        "problem_id": evil,
        "question": evil,
        "answer": '"><b>',
        "draft": evil + "\ud800 lone surrogate",
        "draft_reward": 1.0,
        "draft_correct": False,
        "refinement": evil,
        "refinement_reward": 2.0,
        "refinement_correct": True,
    }
    reason = {f'reward/reason/"><script>{i}': 0.5 for i in range(12)}
    extra = [{"kind": "train", "step": 51, "time": 0.0, "metrics": reason}]
    folder = write_run(tmp_path / "<svg onload=x>", samples=[sample], extra=extra)
    page = Page(build_report([folder]).read_text())
    assert page.open == []
    assert page.tags.count("script") == 1 and "img" not in page.tags and "b" in page.tags
    assert not any(name.startswith("on") for name, _ in page.attributes)
    shown = "".join(page.text)
    assert shown.count("<script>alert(1)</script>") >= 4 and "{{ 7*7 }}" in shown


def test_several_runs_share_a_page_and_seeds_share_a_line(tmp_path):
    folders = [
        write_run(tmp_path / arm / f"seed_{i}", seed=i, feedback=feedback)
        for arm, feedback in (("grpo", "none"), ("igrpo", "best_draft"))
        for i in range(3)
    ]
    out = build_report(folders, tmp_path / "all.html", labels=["GRPO"] * 3 + ["iGRPO"] * 3)
    shown = "".join(Page(out.read_text()).text)
    assert "GRPO (mean of 3)" in shown and "iGRPO (mean of 3)" in shown
    assert "grpo/seed_0" in shown and "igrpo/seed_2" in shown
    validation = draw_figures(load_runs(folders, ["GRPO"] * 3 + ["iGRPO"] * 3))[0]
    assert [label for label, _, _ in validation.legend] == ["GRPO (mean of 3)", "iGRPO (mean of 3)"]


def test_folders_that_cannot_be_used_are_named(tmp_path, run_dir):
    with pytest.raises(UserError, match="absent is not a folder"):
        build_report([tmp_path / "absent"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty has no metrics\.jsonl"):
        build_report([tmp_path / "empty"])
    with pytest.raises(UserError, match="given twice"):
        build_report([run_dir, run_dir])
    with pytest.raises(UserError, match="no run folder given"):
        build_report([])
    (tmp_path / "empty" / "metrics.jsonl").touch()
    with pytest.raises(UserError, match="holds no metrics yet"):
        build_report([tmp_path / "empty"])
    (run_dir / "metrics.jsonl").write_text('{"kind": "train"}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:1"):
        build_report([run_dir])
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(UserError, match="cannot write"):
        build_report([write_run(tmp_path / "good")], file / "report.html")


def test_a_running_or_resumed_run_is_readable(run_dir):
    path = run_dir / "metrics.jsonl"
    row = {"kind": "train", "step": 50, "time": 0, "metrics": {"loss": 9.0}}
    odd = {
        "kind": "train",
        "step": 51,
        "metrics": {"loss": 1.0},
        "non_finite": {"grad_norm": "nan"},
    }
    path.write_text(path.read_text() + f'{json.dumps(row)}\n{json.dumps(odd)}\n{{"kind": "tr')
    run = load_run(run_dir)
    assert run.train["loss"].steps[-2:] == (50, 51)
    assert run.train["loss"].values[-2] == 9.0  # the later record of a step counts
    assert run.non_finite == ((51, "grad_norm"),)
    assert "grad_norm at step 51" in build_report([run_dir]).read_text()
    path.write_text('{"kind": "tr\n' + path.read_text())
    with pytest.raises(UserError, match=r"metrics\.jsonl:1 is not JSON"):
        load_run(run_dir)


def test_headline_shares_are_told_with_what_to_change_where_they_are_high(run_dir):
    facts = {fact.label: fact for fact in headline_facts(load_run(run_dir))}
    met, without = facts["Drafts that met the token limit"], facts["Groups without advantage"]
    assert met.value == "67.2 %" and met.note.startswith("high: raise policy.generation.max_new")
    assert (without.value, without.note) == ("67.2 %", "mean of the last tenth")
    assert "Drafts that met the token limit" in build_report([run_dir]).read_text()


def test_budget_counts_samples_and_trained_rows(tmp_path, run_dir):
    rows = {name: values for name, *values in budget_rows(load_run(run_dir))}
    assert rows["completions sampled"] == ["256", "12,800"]
    assert rows["rows trained (4 a problem)"] == ["128", "6,400"]
    summary = json.loads((run_dir / "summary.json").read_text())
    (run_dir / "summary.json").write_text(json.dumps({**summary, "trained_rows": 123}))
    assert rollout_totals(load_run(run_dir))["rows trained"] == 123
    plain = write_run(tmp_path / "grpo", feedback="none")
    config = (plain / "config.yaml").read_text().replace("per_prompt: 4", "per_prompt: 8")
    (plain / "config.yaml").write_text(config)
    totals = rollout_totals(load_run(plain))
    assert totals["completions sampled"] == totals["rows trained"] == 32 * 8 * 50


def test_line_geometry():
    svg = line_chart(
        [Line("a", "g0", (0, 5, 10), (0.0, 0.25, 1.0))], Axis("share", percent=True), title="t"
    )
    path = re.search(r'class="line"[^>]* d="([^"]+)"', svg).group(1)
    xs, ys = zip(*([float(v) for v in p.split()] for p in path[1:].split("L")), strict=True)
    assert xs == pytest.approx((LEFT, (LEFT + RIGHT) / 2, RIGHT))
    # 0 % at the bottom, 100 % at the top, and a quarter of the height for a quarter.
    assert ys == pytest.approx((BOTTOM, BOTTOM - (BOTTOM - TOP) / 4, TOP))
    assert "100 %" in svg


def test_charts_survive_constant_single_and_tiny_data():
    for values in [(0.0,), (5.0,), (0.0, 0.0), (-1e-9, 1e-9), (1e12, 3e12), (-3.0, -3.0)]:
        x = tuple(range(len(values)))
        for axis in (Axis("a"), Axis("a", percent=True), Axis("a", zero=True)):
            svg = line_chart([Line("a", "g0", x, values)], axis, title="t")
            assert "nan" not in svg and "inf" not in svg
    with pytest.raises(ValueError, match="nothing to draw"):
        line_chart([Line("a", "g0", (), ())], Axis("a"), title="t")


def test_reasons_and_seconds_have_a_line_each(run_dir):
    figures = {figure.key: figure for figure in draw_figures(load_runs([run_dir]))}
    assert [label for label, *_ in figures["reasons"].legend] == ["match", "mismatch"]
    shown = [label for label, *_ in figures["time"].legend]
    assert {"whole step", "sample drafts", "sample refinements"} <= set(shown)


def test_long_curves_keep_their_mean():
    y = tuple(math.sin(i) for i in range(9_600))
    thin = thin_out(Line("a", "g0", tuple(range(9_600)), y))
    assert len(thin.x) <= MAX_POINTS
    assert sum(thin.y) / len(thin.y) == pytest.approx(sum(y) / len(y), abs=1e-9)
    assert running_mean([1.0, 2.0, 3.0, 4.0], 2) == (1.0, 1.5, 2.5, 3.5)


def test_mean_over_seeds_uses_common_steps_alone():
    mean, low, high = mean_curve([Curve((1, 2, 3), (1.0, 2.0, 3.0)), Curve((2, 3), (4.0, 5.0))])
    assert (mean.steps, mean.values, low, high) == ((2, 3), (3.0, 4.0), (2.0, 3.0), (4.0, 5.0))


@pytest.mark.parametrize(
    "value, percent, text",
    [
        (0.0, False, "0"), (0.5, True, "50 %"), (1.0, True, "100 %"), (12345.0, False, "12.3k"),
        (1234.0, False, "1234"), (2.5e6, False, "2.5M"), (5e-4, False, "5e-4"),
        (-0.02, False, "-0.02"), (0.1 + 0.2, False, "0.3"),
    ],
)  # fmt: skip
def test_numbers_are_written_for_people(value, percent, text):
    assert format_value(value, percent) == text


def test_texts_are_cut_at_their_beginning():
    assert shorten("abc", 3) == "abc"
    cut = shorten("x" * 5 + "answer", 6)
    assert cut.endswith("\nanswer") and "5 characters left out" in cut


def script(name):
    """A script of the checkout as a module."""
    spec = importlib.util.spec_from_file_location("script", Path(__file__).parents[2] / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_picture_is_one_svg_without_the_page(run_dir, tmp_path):
    write_picture = script("docs/picture.py").write_picture
    out = write_picture([run_dir], ["validation", "reward"], tmp_path / "demo.svg")
    root = ElementTree.parse(out).getroot()
    texts = ["".join(node.itertext()) for node in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"Held-out accuracy", "Reward by stage", "bare prompt", "refinements"} <= set(texts)
    assert "--draft" in out.read_text() and ".facts" not in out.read_text()
    with pytest.raises(UserError, match="there is no figure reword: use validation, "):
        write_picture([run_dir], ["reword"], tmp_path / "x.svg")
