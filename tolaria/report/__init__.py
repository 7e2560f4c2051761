"""Pages that people look at: a run, or several beside each other, in one HTML file; a run that goes on."""

from tolaria.report.reading import RunReading
from tolaria.report.server import watch_run
from tolaria.report.write import write_report

__all__ = ["RunReading", "watch_run", "write_report"]
