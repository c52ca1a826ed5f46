"""docs/paper: commands, links and decisions exist; the tables are what their sources give."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
from composed import plan_of

from igrpo_nemo.config.compose import builtin_config_dir, config_groups

CONFIGS = builtin_config_dir()
SCRIPT = CONFIGS.parent / "docs" / "paper" / "write_tables.py"
_SPEC = importlib.util.spec_from_file_location("write_tables", SCRIPT)
assert _SPEC is not None and _SPEC.loader is not None
tables = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(tables)
GROUPS = config_groups([CONFIGS])
DEMOS = {"demo", "demo_grpo", "laptop"}
PAGES = tables.PAGES
TABLES = [page for page in PAGES if page.stem != "README"]


def _blocks(page: Path, kind: str) -> list[str]:
    found = tables.BLOCK.finditer(page.read_text(encoding="utf-8"))
    return [name for match in found if match["kind"] == kind for name in match["names"].split()]


def test_there_is_a_page_for_each_table():
    names = {"table1", "figure2", "table2", "table3", "tableS1", "tableS3", "tableS4"}
    assert {page.stem for page in TABLES} == names


def test_every_experiment_has_its_cost_on_one_page():
    shown = [name for page in TABLES for name in _blocks(page, "preflight")]
    assert sorted(shown) == sorted(set(GROUPS["experiment"]) - DEMOS)
    for page in TABLES:
        own = {name for name in _blocks(page, "preflight") if not name.startswith("literal_")}
        assert all(name.startswith(f"{page.stem}_") for name in own)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_published_tables_are_current(page):
    text = page.read_text(encoding="utf-8")
    assert tables.rewritten(text, kinds=["published"]) == text


@pytest.mark.parametrize("page", TABLES, ids=lambda page: page.stem)
def test_preflight_tables_are_current(page):
    """`python docs/paper/write_tables.py` writes them again."""
    text = page.read_text(encoding="utf-8")
    assert tables.rewritten(text, ["preflight"], plan_of) == text


@pytest.mark.parametrize("page", TABLES, ids=lambda page: page.stem)
def test_commands_name_experiments_that_exist(page):
    text = page.read_text(encoding="utf-8")
    for name, values, command in re.findall(r"for (\w+) in (.+?); do (.+?); done", text):
        text += "".join(f"\n{command.replace(f'${name}', value)}" for value in values.split())
    named = re.findall(r"experiment[= ](?:iGRPO=)?([\w-]+)(?![\w$-])", text)
    named = [name for name in named if not name.endswith("_")]
    assert named
    assert set(named) <= set(GROUPS["experiment"])
    for group in ("eval", "data", "model"):
        for option in re.findall(rf"(?<![\w.]){group}=(\w+)", text):
            assert option in GROUPS[group]


@pytest.mark.parametrize("page", TABLES, ids=lambda page: page.stem)
def test_decisions_exist(page):
    method = (CONFIGS.parent / "docs" / "method.md").read_text(encoding="utf-8")
    known = set(re.findall(r"^\| (\d+) \|", method, flags=re.MULTILINE))
    text = page.read_text(encoding="utf-8")
    open_table = text[text.index("| the paper | here | decision |") :]
    cells = [line.rstrip(" |").rpartition("|")[2].strip() for line in open_table.splitlines()[2:]]
    cited = {n for cell in cells if re.fullmatch(r"[\d, ]+", cell) for n in cell.split(", ")}
    assert cited and cited <= known


def test_a_table_is_made_anew_and_the_rest_is_left_alone():
    text = "a\n<!-- published: table2_dapo -->\nold\n<!-- end -->\nb\n"
    new = tables.rewritten(text)
    assert new == (
        "a\n<!-- published: table2_dapo -->\n"
        "| experiment | average |\n| --- | --- |\n| `table2_dapo` | 69.74 |\n"
        "<!-- end -->\nb\n"
    )
    assert tables.rewritten(text, kinds=["preflight"]) == text
