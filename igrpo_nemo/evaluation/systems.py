"""Evaluated systems side by side: their numbers, and whether they were measured the same way.

    [LABEL=]FOLDER --load_systems--> System per folder --compared--> Comparison
                                     refused while settings or problems differ, unless told to go on

A folder is an evaluation's output, or a run folder with one evaluation in it. Dimensions: P
problems, K samples a problem, S training seeds. All rates are fractions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from igrpo_nemo.config.compose import builtin_config_dir
from igrpo_nemo.errors import UserError
from igrpo_nemo.evaluation.results import (
    EMBEDDED_FILE,
    REFINED,
    RESULTS_FOLDER,
    BenchmarkResults,
    Results,
    pooled,
    read_results,
    read_setting,
)
from igrpo_nemo.evaluation.statistics import Difference, Estimate, macro_average, paired_bootstrap
from igrpo_nemo.files.display_text import shorten

AVERAGE = "average"
"""Name of the macro average, beside the benchmarks'."""

POOLED = ("aime24", "aime25", "aime26")
"""Benchmarks of 30 problems of one kind, which are also measured as one."""

SETTINGS = (
    "evaluator", "answers", "profile", "system_prompt", "temperature", "top_p", "max_tokens",
)  # fmt: skip
"""What two evaluations must share, beside their data."""


@dataclass(frozen=True, slots=True)
class Published:
    """A row of the paper, as printed: accuracies (fractions) by benchmark, and where they stand.

    `average` is the printed one, `recomputed` the mean of the printed columns: they need not agree.
    """

    experiment: str
    benchmarks: Mapping[str, float]
    average: float | None
    recomputed: float | None
    source: str


@dataclass(frozen=True, slots=True)
class System:
    """An evaluated model under a name. `setting` holds those of `SETTINGS` that are known, `data`
    a digest of each benchmark's problems and answers where there is one, `pools` benchmarks of
    `POOLED` as one. Systems of one `arm` are its training seeds."""

    label: str
    folder: Path
    setting: Mapping[str, Any]
    benchmarks: Mapping[str, BenchmarkResults]
    data: Mapping[str, str] = field(default_factory=dict)
    pools: Mapping[str, BenchmarkResults] = field(default_factory=dict)
    arm: str = ""

    @property
    def measured(self) -> Mapping[str, BenchmarkResults]:
        """Benchmarks, then pools."""
        return {**self.benchmarks, **self.pools}

    def average(self, names: Sequence[str]) -> Estimate:
        """Macro average of the accuracies over these benchmarks."""
        return macro_average([self.measured[name].accuracy for name in names])


@dataclass(frozen=True, slots=True)
class Differing:
    """Something that was not the same in all evaluations: its value by label, as text."""

    name: str
    values: Mapping[str, str]

    def __str__(self) -> str:
        return f"{self.name} ({', '.join(f'{k}: {v}' for k, v in self.values.items())})"


@dataclass(frozen=True, slots=True)
class Comparison:
    """Systems over the benchmarks that all of them have, the first one being the reference.

    `differences`: label -> benchmark or `AVERAGE` -> that system minus the reference.
    """

    systems: Sequence[System]
    benchmarks: tuple[str, ...]
    differing: Sequence[Differing] = ()
    differences: Mapping[str, Mapping[str, Difference]] = field(default_factory=dict)
    published: Mapping[str, Published] = field(default_factory=dict)

    @property
    def reference(self) -> System:
        return self.systems[0]

    @property
    def arms(self) -> Mapping[str, Sequence[System]]:
        """Arm -> its seeds, in order; empty where no arm has several."""
        arms = dict.fromkeys(system.arm or system.label for system in self.systems)
        found = {arm: [s for s in self.systems if arm in (s.arm, s.label)] for arm in arms}
        return found if any(len(seeds) > 1 for seeds in found.values()) else {}


PAPER = builtin_config_dir() / "paper_results.yaml"
"""Experiment -> {benchmark: percent, ..., published_average, recomputed_average, source}."""


def published_results(experiment: str, file: Path = PAPER) -> Published:
    """The row of an experiment. Raises `UserError` for one that has none."""
    rows = _published_rows(file)
    if experiment not in rows:
        known = ", ".join(rows) or "none"
        raise UserError(f"{file.name} has no published figures of {experiment}: it has {known}")
    # Beside percentages a row may hold a note, a gain by benchmark, a cost.
    numbers = {k: v / 100 for k, v in rows[experiment].items() if isinstance(v, int | float)}
    average, recomputed = (numbers.pop(f"{n}_average", None) for n in ("published", "recomputed"))
    source = rows[experiment].get("source", "")
    return Published(experiment, numbers, average, recomputed, source)


def is_published(experiment: str | None) -> bool:
    return experiment in _published_rows(PAPER)


@lru_cache
def _published_rows(path: Path) -> dict[str, dict[str, Any]]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def is_evaluation(folder: Path) -> bool:
    return (folder / RESULTS_FOLDER).is_dir()


def load_systems(names: Sequence[str | Path]) -> list[System]:
    """Systems from `FOLDER` or `LABEL=FOLDER`; without a label it is the run's name. Folders under
    one label are training seeds of an arm.

    Raises `UserError` for a folder without a complete evaluation, and for one that is given twice.
    """
    if not names:
        raise UserError("nothing to compare: give folders of evaluations, such as runs/demo")
    given: list[tuple[str, Path]] = []
    for name in map(str, names):
        label, equals, path = name.partition("=")
        if not equals or Path(name).exists():
            label, path = "", name
        given.append((label, evaluation_folder(Path(path))))
    labels = [label or _run_name(folder) for label, folder in given]
    if len(set(labels)) < len(labels):
        labels = [label or str(folder) for label, folder in given]
    folders = [folder.resolve() for _, folder in given]
    if twice := [folder for folder in folders if folders.count(folder) > 1]:
        raise UserError(f"{twice[0]} is given twice: a system, or a training seed, has its own")
    systems = []
    for i, (label, (_, folder)) in enumerate(zip(labels, given, strict=True)):
        arm = label if labels.count(label) > 1 else ""
        label = f"{label} ({labels[:i].count(label) + 1})" if arm else label
        systems.append(replace(system_of(label, read_results(folder)), arm=arm))
    return systems


def evaluation_folder(folder: Path) -> Path:
    """The evaluation meant by a folder: itself, or the only one inside a run folder."""
    if is_evaluation(folder):
        return folder
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: give an evaluation's output or a run folder")
    found = sorted(path.parent for path in (folder / "evaluation").rglob(f"{RESULTS_FOLDER}/"))
    found = [path for path in found if path.name != REFINED]  # of the evaluation around it
    if not found:
        raise UserError(f"{folder} holds no evaluation ({RESULTS_FOLDER}/): evaluate it first")
    if len(found) > 1:
        names = ", ".join(str(path) for path in found)
        raise UserError(f"{folder} holds {len(found)} evaluations, name one of them: {names}")
    return found[0]


def _run_name(folder: Path) -> str:
    """The run that an evaluation belongs to: RUN/evaluation/..., else the folder's own name."""
    if folder.name == REFINED:
        return f"{_run_name(folder.parent)} {REFINED}"
    parts = folder.resolve().parts
    return parts[parts.index("evaluation") - 1] if "evaluation" in parts[1:] else parts[-1]


def system_of(label: str, results: Results) -> System:
    """What is compared of one evaluation: of its setting.json, or of what `igrpo evaluate` left
    beside each benchmark's samples."""
    setting = {"evaluator": "NeMo-Skills", **results.setting} if results.setting else {}
    for name in results.benchmarks if not results.setting else ():
        if values := read_setting(results.folder / RESULTS_FOLDER / name, EMBEDDED_FILE):
            own = {"evaluator": "igrpo evaluate", "profile": "its run's", "system_prompt": None}
            setting |= {**values, "max_tokens": values.get("max_new_tokens"), **own}
    drafts, choose = setting.get("refine"), setting.get("choose")
    setting["answers"] = f"refined from the best of {drafts} by {choose}" if drafts else "bare"
    problems = results.setting.get("problems", {})
    data = {name: about["sha256"] for name, about in problems.items() if "sha256" in about}
    known = {name: setting[name] for name in SETTINGS if name in setting}
    parts = [results.benchmarks[name] for name in POOLED if name in results.benchmarks]
    pools = {pool.benchmark: pool for pool in ([pooled(parts)] if parts[1:] else [])}
    return System(label, results.folder, known, results.benchmarks, data, pools)


def compared(
    systems: Sequence[System],
    *,
    anyway: bool = False,
    published: Mapping[str, Published] | None = None,
) -> Comparison:
    """Systems against the first of them, on the benchmarks that all have.

    Raises `UserError` naming what differs between the evaluations unless `anyway` (bare and refined
    answers of one evaluation may), and where they share no benchmark or no problem.
    """
    reference, *others = systems
    shared = [name for name in reference.benchmarks if all(name in s.benchmarks for s in others)]
    if not shared:
        raise UserError(
            f"{' and '.join(system.label for system in systems)} share no benchmark: evaluate them "
            "on the same ones"
        )
    differing = [*_differing_settings(systems), *_differing_problems(systems, shared)]
    # Who gives an evaluation and its own refined answers wants to see what refining does.
    folders = {system.folder.resolve() for system in systems}
    pairs = {each.parent for each in folders if each.name == REFINED} & folders
    apart = "answers" if pairs else None
    if (refused := [each for each in differing if each.name != apart]) and not anyway:
        more = f" and {len(refused) - 1} more" if len(refused) > 1 else ""
        raise UserError(
            f"the evaluations differ in {refused[0]}{more}: evaluate alike, or compare --anyway"
        )
    differences = {system.label: _differences(system, reference, shared) for system in others}
    return Comparison(systems, tuple(shared), differing, differences, published or {})


def _differences(ours: System, theirs: System, names: Sequence[str]) -> dict[str, Difference]:
    both = [*names, *(pool for pool in ours.pools if pool in theirs.pools)]
    pairs = {name: _paired(ours.measured[name], theirs.measured[name]) for name in both}
    chosen = {name: [name] for name in both} | ({AVERAGE: list(names)} if names[1:] else {})
    return {
        name: paired_bootstrap(*({each: pairs[each][i] for each in among} for i in (0, 1)))
        for name, among in chosen.items()
    }


def _paired(ours: BenchmarkResults, theirs: BenchmarkResults) -> tuple[np.ndarray, np.ndarray]:
    """Accuracies of the problems that both have, in one order."""
    first, second = (
        dict(zip(one.problems, one.correct_P_K.mean(axis=1), strict=True)) for one in (ours, theirs)
    )
    common = [problem for problem in ours.problems if problem in second]
    if not common:
        raise UserError(f"{ours.benchmark}: the evaluations share no problem, nothing to compare")
    return np.array([first[p] for p in common]), np.array([second[p] for p in common])


def _differing_settings(systems: Sequence[System]) -> Iterator[Differing]:
    """A setting that one evaluation did not record differs from every recorded one."""
    for name in SETTINGS:
        values = {str(system.setting.get(name, "unknown")) for system in systems}
        if len(values) > 1 or (len(systems) > 1 and "unknown" in values):
            shown = {s.label: shorten(str(s.setting.get(name, "unknown")), 40) for s in systems}
            yield Differing(name, shown)


def _differing_problems(systems: Sequence[System], shared: Sequence[str]) -> Iterator[Differing]:
    names = {system.label: " ".join(sorted(system.benchmarks)) for system in systems}
    if len(set(names.values())) > 1:
        yield Differing("benchmarks", names)
    for name in shared:
        sets = {system.label: frozenset(system.benchmarks[name].problems) for system in systems}
        digests = {system.label: system.data.get(name, "")[:8] for system in systems}
        if len(set(sets.values())) > 1:
            common = frozenset.intersection(*sets.values())
            counts = {k: f"{len(v)}, {len(v - common)} of its own" for k, v in sets.items()}
            yield Differing(f"problems of {name}", counts)
        elif all(digests.values()) and len(set(digests.values())) > 1:
            yield Differing(f"data of {name}", digests)
