"""What a person reads: tables on the terminal, and figures."""

from .tables import ages_table, edit_table, metrics_table, summary_table, tasks_table

__all__ = ["ages_table", "edit_table", "metrics_table", "summary_table", "tasks_table"]
