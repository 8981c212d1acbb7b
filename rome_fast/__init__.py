"""Edit facts in language models at kernel speed, without collapsing them."""

from .delta import Delta
from .editor import EditResult, apply_edits
from .edits import Edit, load_edits
from .errors import RomeFastError
from .planning import Plan, plan
from .records import Record
from .statistics import Statistics, collect_statistics
from .values import ValueSettings

__all__ = [
    "Delta",
    "Edit",
    "EditResult",
    "Plan",
    "Record",
    "RomeFastError",
    "Statistics",
    "ValueSettings",
    "apply_edits",
    "collect_statistics",
    "load_edits",
    "plan",
]
