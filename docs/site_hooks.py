"""Hooks of mkdocs.yml: the pages at the checkout's root belong to the site, README as its front.

Links are written for the files as they lie in the checkout; here they become the site's.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from igrpo_nemo import __version__

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    "README.md": "index.md",
    "ARCHITECTURE.md": "architecture.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
_LINK = re.compile(r"\]\((?:\.\./|docs/)?([\w./-]+)")


def on_config(config: Any) -> Any:
    config.site_name = f"igrpo-nemo {__version__}"
    return config


def on_files(files: Any, config: Any) -> Any:
    """The root's pages, and the files of the checkout that pages link to, as they are."""
    from mkdocs.structure.files import File

    for name, uri in PAGES.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        files.append(File.generated(config, uri, content=text))
    pages = [*(ROOT / name for name in PAGES), *(ROOT / "docs").glob("*.md")]
    links = {link for page in pages for link in _LINK.findall(page.read_text(encoding="utf-8"))}
    for link in sorted(links - PAGES.keys()):
        if (path := ROOT / link).is_file():
            files.append(File.generated(config, link, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    if "/" in page.file.src_uri:  # deeper pages link to docs/ alone
        return markdown
    return _LINK.sub(lambda match: f"]({PAGES.get(match[1], match[1])}", markdown)
