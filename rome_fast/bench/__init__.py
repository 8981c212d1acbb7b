"""Edit throughput: what an edit costs, by stage, against an editor written the usual way."""

from .released import ReleasedEdit, edit_as_released

__all__ = ["ReleasedEdit", "edit_as_released"]
