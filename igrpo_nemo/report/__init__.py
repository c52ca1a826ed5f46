"""One self-contained HTML page for a run folder or several."""

from igrpo_nemo.report.page import build_report

__all__ = ["build_report"]
