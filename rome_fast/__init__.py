"""Edit facts in language models at kernel speed, without collapsing them.

Public names load what they need when they are first asked for: transformers alone takes seconds, which neither
`rome-fast --help` nor a program that uses only `rome_fast.kernels` has to wait for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import kernels
    from .closing.history import History
    from .editor import apply_edits, verify
    from .edits import Edit, Probe, load_edits
    from .errors import RomeFastError
    from .evaluation import evaluate
    from .ledger import Ledger
    from .planning import Plan, plan
    from .records import Record
    from .result import EditResult
    from .search.values import ValueSettings
    from .statistics import Statistics, collect_statistics
    from .updates.delta import Delta

__all__ = [
    "Delta",
    "Edit",
    "EditResult",
    "History",
    "Ledger",
    "Plan",
    "Probe",
    "Record",
    "RomeFastError",
    "Statistics",
    "ValueSettings",
    "apply_edits",
    "collect_statistics",
    "evaluate",
    "kernels",
    "load_edits",
    "plan",
    "verify",
]

_HOMES = {
    "Delta": "updates.delta",
    "Edit": "edits",
    "EditResult": "result",
    "History": "closing.history",
    "Ledger": "ledger",
    "Plan": "planning",
    "Probe": "edits",
    "Record": "records",
    "RomeFastError": "errors",
    "Statistics": "statistics",
    "ValueSettings": "search.values",
    "apply_edits": "editor",
    "collect_statistics": "statistics",
    "evaluate": "evaluation",
    "load_edits": "edits",
    "plan": "planning",
    "verify": "editor",
}


def __getattr__(name: str) -> Any:
    if name == "kernels":
        return import_module(".kernels", __name__)
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
