"""Everything that is made from a run: tables, figures, report.html."""
