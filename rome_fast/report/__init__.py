"""What a person reads: tables on the terminal, and figures."""

from .tables import edit_table, metrics_table, summary_table, tasks_table

__all__ = ["edit_table", "metrics_table", "summary_table", "tasks_table"]
