"""GRPO against iGRPO and its controls at one budget, paired by seed: `make compare`.

    python benchmarks/compare.py [--seeds N] [--steps N] [--arms A,B] [--json] [key=value ...]

Every arm is `igrpo train experiment=demo` with another feedback or draft choice, one process after
the other, from the same warmed-up model (it is cached) and on the same problems per seed. Finished
runs are kept: a comparison that was stopped goes on with the next one. It prints what it finds.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from arms import ArmResult, arm_results, findings, result_table

from igrpo_nemo.config import load_config
from igrpo_nemo.errors import UserError
from igrpo_nemo.report import build_report
from igrpo_nemo.report.runs import Run, load_run

ARMS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "grpo": ("GRPO", ("feedback=none",)),
    "igrpo": ("iGRPO", ("feedback=best_draft", "igrpo.draft_choice=best")),
    "random": ("random draft", ("feedback=best_draft", "igrpo.draft_choice=random")),
    "worst": ("worst draft", ("feedback=best_draft", "igrpo.draft_choice=worst")),
    "no_draft": ("no draft", ("feedback=best_draft", "igrpo.draft_choice=none")),
    "self_verification": ("Self-Verification", ("feedback=self_verification_short",)),
    "critique": ("Critique-GRPO", ("feedback=critique_short",)),
}
"""Short name: (label, overrides). `no_draft` pays for drafts but shows none. The last two start
from models of their own, whose warm-up shows verdicts and critiques: look at their start too."""

DEFAULT_ARMS = ("grpo", "igrpo", "random", "worst", "no_draft")

REFERENCE = "grpo"
TRAIN = (sys.executable, "-c", "from igrpo_nemo.cli import main; raise SystemExit(main())", "train")
NOTE = (
    "Held-out problems, one answer each to the bare prompt. Mean ± standard deviation over seeds; "
    "in brackets the 95 % t-interval of the difference paired by seed, not corrected for the "
    "number of arms. Completions sampled and trained are per seed. Entropy, verbatim copies of the "
    "draft and teaching groups (rewards not all equal) are means of the last tenth of training."
)


def main(arguments: Sequence[str] | None = None) -> int:
    flags, overrides = _parse(arguments)
    try:
        runs = {
            arm: {seed: _run_arm(arm, seed, flags, overrides) for seed in range(flags.seeds)}
            for arm in flags.arms
        }
        return _tell(runs, flags)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parse(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3, help="runs per arm (3)")
    parser.add_argument("--steps", type=int, help="training steps (the experiment's)")
    parser.add_argument("--arms", default=",".join(DEFAULT_ARMS), help=f"of {','.join(ARMS)}")
    parser.add_argument("--experiment", default="demo", help="config to compare on (demo)")
    parser.add_argument("--out", type=Path, default=Path("runs/compare"), help="(runs/compare)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("overrides", nargs="*", help="config overrides for every arm")
    flags = parser.parse_args(arguments)
    flags.arms = flags.arms.split(",")
    if unknown := [arm for arm in flags.arms if arm not in ARMS]:
        parser.error(f"unknown arm {unknown[0]}: use {', '.join(ARMS)}")
    if flags.seeds < 1:
        parser.error("--seeds needs 1 or more")
    overrides = list(flags.overrides)
    if flags.steps is not None:
        overrides.append(f"grpo.max_num_steps={flags.steps}")
    return flags, overrides


def _run_arm(arm: str, seed: int, flags: argparse.Namespace, overrides: Sequence[str]) -> Run:
    """Trains one arm with one seed, unless its finished run is there already."""
    folder = flags.out / arm / f"seed_{seed}"
    settings = [
        f"experiment={flags.experiment}",
        *ARMS[arm][1],
        *overrides,
        f"grpo.seed={seed}",
        f"logger.log_dir={folder}",
    ]
    digest = hashlib.sha256(load_config(settings).to_yaml().encode()).hexdigest()
    mark = folder / "compare.json"
    if mark.is_file() and json.loads(mark.read_text())["config_sha256"] != digest:
        raise UserError(f"{folder} holds a run with other settings: remove it or use another --out")
    folder.mkdir(parents=True, exist_ok=True)
    mark.write_text(json.dumps({"config_sha256": digest, "overrides": settings}))
    label = ARMS[arm][0]
    if not (folder / "summary.json").is_file():
        _say(f"{label}, seed {seed}: training")
        _train(settings, folder / "train.log")
    run = load_run(folder, name=f"{arm}/seed_{seed}", label=label)
    start, end = (run.summary.get(f"val_accuracy_{when}") for when in ("start", "end"))
    if start is None or end is None:
        raise UserError(f"{folder} has no held-out accuracy: leave validation on")
    _say(f"{label}, seed {seed}: {start:.1%} -> {end:.1%}")
    return run


def _train(settings: Sequence[str], log: Path) -> None:
    with log.open("ab") as file:
        code = subprocess.run([*TRAIN, *settings], stdout=file, stderr=subprocess.STDOUT).returncode
    if code:
        last = log.read_text(errors="replace").strip().splitlines()[-1:]
        raise UserError(f"training ended with exit code {code} ({log}): {' '.join(last)}")


def _tell(runs: Mapping[str, Mapping[int, Run]], flags: argparse.Namespace) -> int:
    """Table, findings and report; with --json, one object."""
    labelled = {ARMS[arm][0]: by_seed for arm, by_seed in runs.items()}
    reference = ARMS[REFERENCE][0]
    results = arm_results(labelled, reference)
    header, rows = result_table(results, reference)
    sentences = findings(results, reference)
    page = build_report(
        [run.path for by_seed in runs.values() for run in by_seed.values()],
        flags.out / "report.html",
        labels=[label for label, by_seed in labelled.items() for _ in by_seed],
        title="GRPO and iGRPO at an equal budget",
        introduction=NOTE,
        tables=[("Held-out accuracy by arm", header, rows)],
    )
    if flags.json:
        print(json.dumps(_as_json(results, sentences, page, flags)))
        return 0
    print(text_table(header, rows))
    note = textwrap.fill(NOTE, 100)
    print("", note, "", *(f"- {sentence}" for sentence in sentences), "", page, sep="\n")
    return 0


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell; the first one left, the others right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        first, *others = (cell.rjust(w) for cell, w in zip(cells, widths, strict=True))
        return "  ".join([first.strip().ljust(widths[0]), *others])

    return "\n".join([line(header), "  ".join("-" * w for w in widths), *map(line, rows)])


def _as_json(
    results: Sequence[ArmResult], sentences: Sequence[str], page: Path, flags: argparse.Namespace
) -> dict[str, object]:
    return {
        "reference": ARMS[REFERENCE][0],
        "experiment": flags.experiment,
        "arms": [asdict(result) for result in results],
        "findings": list(sentences),
        "report": str(page),
    }


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
