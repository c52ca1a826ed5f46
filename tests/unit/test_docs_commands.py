"""The commands in README and docs: their flags, and the groups' options that they choose, exist."""

from __future__ import annotations

import argparse
import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from igrpo_nemo.cli.entry import COMMANDS
from igrpo_nemo.config.compose import builtin_config_dir, config_groups
from igrpo_nemo.errors import UserError

CHECKOUT = builtin_config_dir().parent
ROOT_PAGES = [CHECKOUT / f"{name}.md" for name in ("README", "ARCHITECTURE", "CONTRIBUTING")]
PAGES = [*ROOT_PAGES, *sorted((CHECKOUT / "docs").rglob("*.md"))]
GROUPS = config_groups([CHECKOUT / "configs"])
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)
NAMED = re.compile(
    r"(?<![\w./~$<{-])(?!https?:)([a-z_.][\w./-]*(?:/|\.(?:py|md|sh|toml|yaml)))(?![\w*{])"
)
PATH = re.compile(
    r"(?<![\w./~$<{-])((?:igrpo_nemo|configs|pipelines|slurm|tests|benchmarks|examples|docs)"
    r"/[\w./-]*\w)(?![\w*{/-])"
)
MADE_BY_RUNS = (
    "runs/",
    "cluster.local.yaml",
    "configs/cluster_configs/mine.yaml",
    "configs/cluster_configs/NAME.yaml",
    "pipelines/X.py",
)
STARTS = re.compile(r"\b(?:igrpo|python -m igrpo_nemo) ([a-z]+)|\bpython (pipelines/\w+\.py)")


class Parsed(Exception):
    """Carries the words that no flag took, in the place of running the command."""


def commands(text: str) -> Iterator[tuple[str, list[str]]]:
    """(`train` or `pipelines/X.py`, its words) for each command in a page's blocks of code."""
    for language, block in BLOCK.findall(text):
        lines = block.replace("\\\n", " ").splitlines() if language in ("", "bash") else []
        for line in lines:
            for part in re.split(r"&&|[;|>()]", re.sub(r"(^|\s)#.*", "", line)):
                if "--help" not in part and (match := STARTS.search(part)):
                    yield match[1] or match[2], shlex.split(part[match.end() :])


def parsed(name: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The words beside the flags. Raises `UserError` for a flag's value that is not allowed."""
    if not name.endswith(".py"):
        parser = argparse.ArgumentParser(allow_abbrev=False, exit_on_error=False)
        next(c for c in COMMANDS if c.name == name).add_flags(parser)
        return parser.parse_known_args(words)[1]
    spec = importlib.util.spec_from_file_location("script", CHECKOUT / name)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    parse = argparse.ArgumentParser.parse_known_args

    def parse_alone(self: argparse.ArgumentParser, words: list[str]) -> None:
        raise Parsed(parse(self, words)[1])

    with monkeypatch.context() as patch:
        for method in ("parse_args", "parse_known_args"):
            patch.setattr(argparse.ArgumentParser, method, parse_alone)
        with pytest.raises(Parsed) as stop:
            script.main(words)
    return stop.value.args[0]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_of_a_page_parse(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, words in commands(page.read_text(encoding="utf-8")):
        rest = parsed(name, words, monkeypatch)
        assert [word for word in rest if word.startswith("-")] == [], name
        for word in rest:
            group, _, option = word.partition("=")
            place_holder = option == "E" or not option.isidentifier()
            assert group not in GROUPS or place_holder or option in GROUPS[group], word


def test_a_wrong_flag_and_a_wrong_value_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    page = "```bash\nx=$(igrpo launch --envy a) && python pipelines/train_and_evaluate.py \\\n"
    page += "    experiment=demo --cluster slurm_a100   # --no\n```\n"
    (launch, train) = commands(page)
    assert parsed(*launch, monkeypatch) == ["--envy", "a"]
    assert train[1] == ["experiment=demo", "--cluster", "slurm_a100"]
    with pytest.raises(UserError, match="slurm_a100"):
        parsed(*train, monkeypatch)


@pytest.mark.parametrize("page", [*PAGES, CHECKOUT / "CHANGELOG.md"], ids=lambda page: page.stem)
def test_paths_of_the_checkout_and_targets_of_make_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    if page.stem == "CHANGELOG":  # the first column of its tables names what is gone
        text = re.sub(r"^\|[^|]*\|", "", text, flags=re.MULTILINE)
    paths = set(PATH.findall(text)) - set(MADE_BY_RUNS)
    assert [path for path in paths if not (CHECKOUT / path).exists()] == []
    targets = re.findall(r"(?:`|^|&& )make ([a-z][\w-]*)", text, flags=re.MULTILINE)
    makefile = (CHECKOUT / "Makefile").read_text(encoding="utf-8")
    assert [name for name in targets if f"\n{name}:" not in makefile] == []


@pytest.mark.parametrize("page", ROOT_PAGES, ids=lambda page: page.stem)
def test_files_that_a_page_names_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    names = {name for name in NAMED.findall(text) if not name.startswith(MADE_BY_RUNS)}
    roots = (CHECKOUT, CHECKOUT / "igrpo_nemo")
    files = {path.name for path in (CHECKOUT / "igrpo_nemo").rglob("*.py")}
    absent = [name for name in names if not any((root / name).exists() for root in roots)]
    assert [name for name in absent if name not in files] == []
    assert len(names) > 5
