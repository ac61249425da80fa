"""Projections of the records: tables, figures, pages, MLflow."""
