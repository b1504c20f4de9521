"""One page of a run, or of several that are compared."""

from fedzge_flwr.report.page import write_report

__all__ = ["write_report"]
