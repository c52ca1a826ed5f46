"""The tables of a report: headline numbers, rollout budget, and samples; its templates.

Everything is plain data (strings and numbers); escaping is the template's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from igrpo_nemo.alarms import HEADLINES, Headline
from igrpo_nemo.files.display_text import clock
from igrpo_nemo.report.charts import format_value
from igrpo_nemo.report.runs import Curve, Run

if TYPE_CHECKING:
    from jinja2 import Template

SAMPLE_LIMIT = 60
"""Samples shown on the page, over all runs."""
TEXT_LIMIT = 6000
"""Characters of one model text; the tail is kept, since that is where the answer is."""


def template(name: str, *, autoescape: bool = True) -> Template:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    return Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=autoescape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    ).get_template(name)


class Fact(NamedTuple):
    """A headline number: what it is, its value, "" where it is not known, and a note."""

    label: str
    value: str
    note: str = ""


def headline_facts(run: Run) -> list[Fact]:
    """The numbers a reader wants first, the same for each run."""
    start, end = run.accuracy("start"), run.accuracy("end")
    accuracy = change = ""
    if start is not None and end is not None:
        accuracy = f"{100 * start:.1f} → {100 * end:.1f} %"
        change = f"{100 * (end - start):+.1f} points"
    seconds, rate = run.summary.get("seconds"), run.summary.get("completions_per_second")
    sampled = rollout_totals(run)["completions sampled"]
    entropy, memory = run.tail("entropy/exact"), run.train.get("perf/peak_memory_gb")
    last = "mean of the last tenth"
    return [
        Fact("Held-out accuracy", accuracy, change),
        Fact("Training steps", str(run.summary.get("steps", run.steps))),
        Fact("Wall clock", "" if seconds is None else clock(float(seconds))),
        Fact("Completions", "" if sampled is None else f"{sampled:,}"),
        Fact("Completions / s", "" if rate is None else format_value(float(rate))),
        *(_share(run, headline) for headline in HEADLINES),
        Fact("Copies of the draft", _percent(run.tail("igrpo/copy_rate")), last),
        Fact("Entropy", "" if entropy is None else f"{format_value(entropy)} nats", last),
        Fact("Peak memory", f"{format_value(max(memory.values))} GB" if memory else ""),
    ]


def _share(run: Run, headline: Headline) -> Fact:
    """A share that says why a run learns little, with what to change where it is high."""
    share = run.tail(headline.metric)
    high = share is not None and share > headline.threshold
    note = f"high: {headline.remedy}" if high else "mean of the last tenth"
    return Fact(headline.name.capitalize(), _percent(share), note)


def run_rows(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """Header and one row a run: its headline facts, the shares over the last tenth of the steps."""
    facts = [headline_facts(run) for run in runs]
    header = ["run", *(fact.label for fact in facts[0])]
    return header, [
        [run.name, *(fact.value or "–" for fact in own)]
        for run, own in zip(runs, facts, strict=True)
    ]


def budget_rows(run: Run) -> list[tuple[str, str, str]]:
    """(quantity, per step, over the run) of what was sampled and trained."""
    settings = _budget(run)
    if settings is None:
        return []
    P, drafts, refinements, trained = settings
    totals = rollout_totals(run)
    steps = totals["steps"] or 0
    quantities = {"problems": P}
    if refinements:
        quantities[f"drafts (N = {drafts})"] = P * drafts
        quantities[f"refinements (G = {refinements})"] = P * refinements
    quantities["completions sampled"] = P * (drafts + refinements)
    quantities[f"rows trained ({trained} a problem)"] = P * trained
    rows = [(name, f"{count:,}", f"{count * steps:,}") for name, count in quantities.items()]
    if (tokens := totals["tokens sampled"]) is not None and steps:
        rows.append(("tokens sampled", f"{tokens // steps:,}", f"{tokens:,}"))
    return rows


def rollout_totals(run: Run) -> dict[str, int | None]:
    """Steps, completions and tokens sampled, and rows trained, as far as config and metrics say."""
    settings, steps = _budget(run), int(run.summary.get("steps", run.steps))
    if settings is None:
        unknown = ("completions sampled", "rows trained", "tokens sampled")
        return {"steps": steps, **dict.fromkeys(unknown)}
    P, drafts, refinements, trained = settings
    sizes = {"igrpo/draft_tokens": P * drafts, "igrpo/refinement_tokens": P * refinements}
    tokens: int | None = 0
    for name, count in sizes.items():
        mean = run.train.get(name, Curve()).tail_mean(1.0) if count else 0.0
        tokens = None if tokens is None or mean is None else tokens + round(mean * count * steps)
    # Dynamic sampling draws more than the plan, a feedback may skip problems; the run counts.
    counted, rows = (run.summary.get(name) for name in ("completions", "trained_rows"))
    planned = P * (drafts + refinements) * steps
    return {
        "steps": steps,
        "completions sampled": counted if isinstance(counted, int) and counted else planned,
        "rows trained": rows if isinstance(rows, int) else P * trained * steps,
        "tokens sampled": tokens,
    }


def _budget(run: Run) -> tuple[int, int, int, int] | None:
    """(problems, drafts, refinements, trained rows a problem) per step; None without a config."""
    P = run.setting("grpo.num_prompts_per_step")
    trained = run.setting("grpo.num_generations_per_prompt")
    N, G = run.setting("igrpo.num_drafts"), run.setting("igrpo.num_refinements")
    if not isinstance(P, int):
        return None
    # Without a trained Stage 2 there are no refinements, whatever N and G say.
    if run.setting("igrpo.train_stages") != ["draft"] and isinstance(N, int) and isinstance(G, int):
        return P, N, G, trained if isinstance(trained, int) else G
    single = trained if isinstance(trained, int) else run.setting("igrpo.budget")
    return (P, single, 0, single) if isinstance(single, int) else None


def sample_rows(runs: Sequence[Run]) -> tuple[list[dict[str, Any]], int]:
    """Samples to show, evenly spread over training, and how many were logged."""
    shown: list[dict[str, Any]] = []
    for run in runs:
        rows, last = run.samples, len(run.samples) - 1
        limit = min(len(rows), max(4, SAMPLE_LIMIT // len(runs)))
        places = [round(i * last / max(limit - 1, 1)) for i in range(limit)]
        shown += [_sample(run, rows[place]) for place in places]
    return shown[:SAMPLE_LIMIT], sum(len(run.samples) for run in runs)


def _sample(run: Run, row: Mapping[str, Any]) -> dict[str, Any]:
    """A logged problem with its draft and a refinement, cut for display."""
    texts = ("problem_id", "question", "answer", "draft", "refinement")
    values = {name: "" if row.get(name) is None else str(row[name]) for name in texts}
    sample: dict[str, Any] = {name: shorten(text) for name, text in values.items()}
    for stage in ("draft", "refinement"):
        reward, right = row.get(f"{stage}_reward"), row.get(f"{stage}_correct")
        known = isinstance(reward, int | float)
        sample[f"{stage}_reward"] = format_value(float(reward)) if known else "–"
        sample[f"{stage}_verdict"] = "none" if right is None else "right" if right else "wrong"
    shown = row.get("draft_shown") is not False
    return {**sample, "run": run.name, "step": int(row.get("step") or 0), "draft_shown": shown}


def shorten(text: str, limit: int = TEXT_LIMIT) -> str:
    """At most `limit` characters of a text: its tail, with a line that says what was left out."""
    if len(text) <= limit:
        return text
    return f"[{len(text) - limit:,} characters left out]\n{text[-limit:]}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"
