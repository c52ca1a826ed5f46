"""Problems: named data sets, files and hub data sets; what was dropped; the order of an epoch."""

from igrpo_nemo.data.problems import DataReport, DataSpec, load_problems, load_with_report

__all__ = ["DataReport", "DataSpec", "load_problems", "load_with_report"]
