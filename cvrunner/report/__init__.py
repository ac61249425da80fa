"""The report of a run: tables, figures, comparison.md, report.html; and the comparison of two runs."""
