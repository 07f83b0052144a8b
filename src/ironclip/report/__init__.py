"""Tables, charts and pages; reads results only, needs no model."""

from __future__ import annotations

from ironclip.report.flags import FLAGS
from ironclip.report.html import write_html
from ironclip.report.tables import csv, latex, markdown, terminal
from ironclip.report.write import write_all

__all__ = ["FLAGS", "csv", "latex", "markdown", "terminal", "write_all", "write_html"]
