"""The docs as a site, which `make docs` builds without a network, and the lock file."""

from __future__ import annotations

import re
import runpy
import tomllib
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

CHECKOUT = Path(__file__).parents[2]


class Links(HTMLParser):
    """What a page links to, and what it loads as it is shown."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        if tag == "a":
            self.links.append(values.get("href", ""))
        elif tag == "link" and values.get("rel") == "stylesheet":
            self.loaded.append(values["href"])
        elif "src" in values:
            self.loaded.append(values["src"])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("material")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    out = tmp_path_factory.mktemp("site")
    config = load_config(str(CHECKOUT / "mkdocs.yml"), strict=True, site_dir=str(out))
    build(config)  # raises where a link or a heading is missing, or a page is in no menu
    return out


def targets(page: Path) -> Iterator[Path]:
    for link in Links(page).links:
        parts = urlsplit(link)
        if not parts.scheme and parts.path:
            path = (page.parent / parts.path).resolve()
            yield path / "index.html" if path.is_dir() else path


def test_every_page_is_reached_in_two_clicks(site: Path) -> None:
    pages = {path for path in site.rglob("*.html") if path.name != "404.html"}
    assert len(pages) > 20
    one = set(targets(site / "index.html"))
    two = one.union(*(targets(page) for page in one if page.suffix == ".html"))
    assert pages - two - {site / "index.html"} == set()
    assert (site / "examples" / "own_data.py") in one


def test_a_page_loads_nothing_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        assert [url for url in Links(page).loaded if urlsplit(url).netloc] == [], page


@pytest.mark.parametrize("page", (CHECKOUT / "docs").glob("*.md"), ids=lambda page: page.stem)
def test_a_page_says_what_it_is_for_and_its_command_at_the_top(page: Path) -> None:
    title, _, purpose, *head = page.read_text(encoding="utf-8").splitlines()[:16]
    assert title.startswith("# ") and purpose[:1].isalpha()
    commands = r"^(igrpo|make|python|pip|bash|export) |`make "
    assert re.search(commands, "\n".join([purpose, *head]), flags=re.MULTILINE)


def test_the_lock_file_meets_what_the_package_asks_for() -> None:
    lines = (CHECKOUT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert all(re.fullmatch(r"[a-z0-9-]+==[\w.]+", x) for x in lines if not x.startswith("#"))
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    for line in project["dependencies"]:
        requirement = Requirement(line)
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), line


def test_the_lock_file_has_the_package_alone() -> None:
    needed = runpy.run_path(str(CHECKOUT / "docs" / "lock.py"))["needed"]
    lines = (CHECKOUT / "constraints.txt").read_text().splitlines()
    pinned = {line.split("==")[0] for line in lines if not line.startswith("#")}
    assert {"torch", "transformers", "hydra-core"} <= needed("igrpo-nemo").keys()
    assert not {"igrpo-nemo", "pytest"} & pinned
