"""Figures of a report as one SVG file for a README: its own styles, light and dark, no script.

python docs/picture.py OUT.svg KEY,KEY RUN_DIR [RUN_DIR ...]        such as docs/demo.svg
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from markupsafe import escape

from igrpo_nemo.errors import UserError
from igrpo_nemo.files.atomic import write_or_refuse
from igrpo_nemo.report.charts import HEIGHT, WIDTH
from igrpo_nemo.report.figures import FIGURES, Figure, draw_figures
from igrpo_nemo.report.page import HERE
from igrpo_nemo.report.runs import load_runs

HEAD, GAP, CHARACTER = 52.0, 24.0, 7.2
"""Height of title and legend, space between figures, width of a legend's character (pixels)."""


def write_picture(
    run_dirs: Sequence[Path | str],
    keys: Sequence[str],
    out: Path | str,
    labels: Sequence[str] | None = None,
) -> Path:
    """Write the named figures side by side; a figure of several panels shows its first.

    `keys` are those of `figures.FIGURES`. Raises `UserError` for one that is unknown, or that these
    runs have nothing for.
    """
    drawn = {figure.key: figure for figure in draw_figures(load_runs(run_dirs, labels))}
    if unknown := [key for key in keys if key not in drawn]:
        known = ", ".join(spec.key for spec in FIGURES)
        raise UserError(f"there is no figure {unknown[0]}: use {known}")
    if absent := [key for key in keys if drawn[key].missing]:
        raise UserError(f"figure {absent[0]}: {drawn[absent[0]].missing}")
    width = len(keys) * (WIDTH + GAP) + GAP
    parts = [_placed(drawn[key], GAP + i * (WIDTH + GAP)) for i, key in enumerate(keys)]
    style = (HERE / "page.css").read_text(encoding="utf-8")
    path = Path(out)
    write_or_refuse(
        path,
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} '
        f'{HEAD + HEIGHT + 8:.0f}" width="{width:.0f}"><style>{_svg_rules(style)}</style>'
        f'<rect class="page" width="100%" height="100%" rx="10"/>{"".join(parts)}</svg>\n',
    )
    return path


def _placed(figure: Figure, left: float) -> str:
    """Title, legend and first chart of a figure at a horizontal offset."""
    parts = [f'<text class="heading" x="0" y="22">{escape(figure.title)}</text>']
    at = 0.0
    for label, color, dashed in figure.legend:
        kind = "line dashed" if dashed else "line"
        parts.append(
            f'<path class="{kind}" style="--c:var(--{color})" d="M{at:.0f} 38h18"/>'
            f'<text x="{at + 24:.0f}" y="42">{escape(label)}</text>'
        )
        at += 24 + CHARACTER * len(label) + 14
    body = re.sub(r"^<svg[^>]*>|</svg>$", "", str(figure.panels[0][1]))
    return (
        f'<g transform="translate({left:.0f} 0)">{"".join(parts)}'
        f'<g transform="translate(0 {HEAD:.0f})">{body}</g></g>'
    )


def _svg_rules(style: str) -> str:
    """The page's colours and SVG rules, without what concerns the rest of the page."""
    colors = style[: style.index("* {")]
    rules = [rule for rule in re.findall(r"^svg .*$", style, re.M) if "display" not in rule]
    own = (
        "svg { font: 12.5px system-ui, sans-serif; } svg .page { fill: var(--card); } "
        "svg text.heading { fill: var(--ink); font-size: 16px; font-weight: 600; }"
    )
    return "\n".join([colors, *rules, own])


if __name__ == "__main__":
    out_path, figure_keys, *folders = sys.argv[1:]
    print(write_picture(folders, figure_keys.split(","), out_path))
