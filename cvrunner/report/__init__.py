"""What is made from a finished run: tables, figures, comparison.md, report.html."""
