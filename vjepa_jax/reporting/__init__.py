"""The page that shows what a run has done and learned; see docs/report.md."""
