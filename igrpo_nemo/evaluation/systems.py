"""Evaluated systems side by side: their numbers, and whether they were measured the same way.

    [LABEL=]FOLDER --load_systems--> System per folder --compared--> Comparison
                                     refused while settings or problems differ, unless told to go on

A folder is an evaluation's output, or a run folder with one evaluation in it. Dimensions: P
problems, K samples a problem. All rates are fractions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from igrpo_nemo.errors import UserError
from igrpo_nemo.evaluation.published import Published
from igrpo_nemo.evaluation.results import (
    RESULTS_FOLDER,
    BenchmarkResults,
    Results,
    read_embedded_setting,
    read_results,
)
from igrpo_nemo.evaluation.statistics import Difference, Estimate, macro_average, paired_bootstrap
from igrpo_nemo.files.display_text import shorten

AVERAGE = "average"
"""Name of the macro average, beside the benchmarks'."""

SETTINGS = ("evaluator", "profile", "system_prompt", "temperature", "top_p", "max_tokens")
"""What two evaluations must share, beside their data."""

SHOWN = 40
"""Characters of a setting that a message or a table shows."""


@dataclass(frozen=True, slots=True)
class System:
    """An evaluated model under a name. `setting` holds those of `SETTINGS` that are known, `data`
    a digest of each benchmark's problems and answers where there is one."""

    label: str
    folder: Path
    setting: Mapping[str, Any]
    benchmarks: Mapping[str, BenchmarkResults]
    data: Mapping[str, str] = field(default_factory=dict)

    def average(self, names: Sequence[str]) -> Estimate:
        """Macro average of the accuracies over these benchmarks."""
        return macro_average([self.benchmarks[name].accuracy for name in names])


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
    confidence: float = 0.95

    @property
    def reference(self) -> System:
        return self.systems[0]


def is_evaluation(folder: Path) -> bool:
    """Whether a folder is an evaluation's output."""
    return (folder / RESULTS_FOLDER).is_dir()


def load_systems(names: Sequence[str | Path]) -> list[System]:
    """Systems from `FOLDER` or `LABEL=FOLDER`; without a label it is the run's name.

    Raises `UserError` for a folder without a complete evaluation, and for equal labels.
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
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise UserError(f"{twice[0]} stands for two evaluations: name them apart with LABEL=FOLDER")
    return [
        system_of(label, read_results(folder))
        for label, (_, folder) in zip(labels, given, strict=True)
    ]


def evaluation_folder(folder: Path) -> Path:
    """The evaluation meant by a folder: itself, or the only one inside a run folder."""
    if is_evaluation(folder):
        return folder
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: give an evaluation's output or a run folder")
    inside = folder / "evaluation"
    found = sorted(path.parent for path in inside.rglob(RESULTS_FOLDER) if path.is_dir())
    if not found:
        raise UserError(f"{folder} holds no evaluation ({RESULTS_FOLDER}/): evaluate it first")
    if len(found) > 1:
        names = ", ".join(str(path) for path in found)
        raise UserError(f"{folder} holds {len(found)} evaluations, name one of them: {names}")
    return found[0]


def _run_name(folder: Path) -> str:
    """The run that an evaluation belongs to: RUN/evaluation/..., else the folder's own name."""
    parts = folder.resolve().parts
    return parts[parts.index("evaluation") - 1] if "evaluation" in parts[1:] else parts[-1]


def system_of(label: str, results: Results) -> System:
    """What is compared of one evaluation: of its setting.json, or of what `igrpo evaluate` left
    beside each benchmark's samples."""
    setting: dict[str, Any] = {}
    if results.setting:
        setting = {"evaluator": "NeMo-Skills", **results.setting}
    for name in results.benchmarks if not results.setting else ():
        if values := read_embedded_setting(results.folder / RESULTS_FOLDER / name):
            own = {"evaluator": "igrpo evaluate", "profile": "its run's", "system_prompt": None}
            setting |= {**values, "max_tokens": values.get("max_new_tokens"), **own}
    problems = results.setting.get("problems", {})
    data = {name: about["sha256"] for name, about in problems.items() if "sha256" in about}
    known = {name: setting[name] for name in SETTINGS if name in setting}
    return System(label, results.folder, known, results.benchmarks, data)


def compared(
    systems: Sequence[System],
    *,
    anyway: bool = False,
    published: Mapping[str, Published] | None = None,
    confidence: float = 0.95,
    seed: int = 0,
) -> Comparison:
    """Systems against the first of them, on the benchmarks that all have.

    Raises `UserError` naming what differs between the evaluations unless `anyway`, and where they
    share no benchmark or no problem.
    """
    reference, *others = systems
    shared = [name for name in reference.benchmarks if all(name in s.benchmarks for s in others)]
    if not shared:
        raise UserError(
            f"{' and '.join(system.label for system in systems)} share no benchmark: evaluate them "
            "on the same ones"
        )
    differing = [*_differing_settings(systems), *_differing_problems(systems, shared)]
    if differing and not anyway:
        more = f" and {len(differing) - 1} more" if len(differing) > 1 else ""
        raise UserError(
            f"the evaluations differ in {differing[0]}{more}: evaluate alike, or compare --anyway"
        )
    differences = {
        system.label: _differences(system, reference, shared, confidence, seed) for system in others
    }
    return Comparison(systems, tuple(shared), differing, differences, published or {}, confidence)


def _differences(
    ours: System, theirs: System, benchmarks: Sequence[str], confidence: float, seed: int
) -> dict[str, Difference]:
    pairs = {name: _paired(ours.benchmarks[name], theirs.benchmarks[name]) for name in benchmarks}
    chosen = {name: [name] for name in benchmarks}
    if len(benchmarks) > 1:
        chosen[AVERAGE] = list(benchmarks)
    return {
        name: paired_bootstrap(
            {each: pairs[each][0] for each in among},
            {each: pairs[each][1] for each in among},
            confidence=confidence,
            seed=seed,
        )
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
        known = [name in system.setting for system in systems]
        values = {str(system.setting.get(name)) for system in systems}
        if len(values) > 1 or (len(systems) > 1 and not all(known)):
            shown = {s.label: shorten(str(s.setting.get(name, "unknown")), SHOWN) for s in systems}
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
